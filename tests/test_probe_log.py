"""The records of a probe on disk, in a bare loop that is killed and goes on."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import grsd_jax as grsd
import oracles
from grsd_jax.dynamics import ProbeRecord
from grsd_jax.experiments.common import records
from grsd_jax.experiments.common.config import UserError
from grsd_jax.experiments.report.page import find_sections
from grsd_jax.experiments.track import analyse
from grsd_jax.experiments.track.log import ProbeLog, read_log
from running import run_script

CLOCK = ("seconds", "gradient_seconds", "cost")
AMOUNTS = {"energies", "lost", "moved", "flux", "rotation", "density"}


@pytest.fixture(scope="module")
def training():
    """Returns a function that trains from a checkpoint to a step, and the start."""
    problem, params = oracles.network_problem("mlp", jnp.float32)
    instantaneous = grsd.dynamics.Instantaneous(num_bootstrap=0)
    probe = grsd.make_probe(
        problem, every=2, shells=4, schedule=0.1, instantaneous=instantaneous
    )

    def train(log, checkpoint, last_step, save_every=3):
        step, params, state = checkpoint
        log.rewind(int(state.last_step))
        while step <= last_step:
            state, record = probe.update(state, params, step)
            if record is not None:
                log.append(record, width=7)
            direction = grsd.gradient_flow_direction(problem, params)
            move = lambda p, d: p + jnp.asarray(0.1, p.dtype) * d  # noqa: E731
            params = jax.tree.map(move, params, direction)
            step += 1
            if step % save_every == 0:
                checkpoint = step, params, state
        return checkpoint

    return train, (0, params, probe.init(jax.random.key(0), params))


def timeless(log):
    return [{k: v for k, v in x.items() if k not in CLOCK} for x in log.read()]


def test_a_killed_loop_leaves_the_lines_of_a_whole_one(training, tmp_path):
    train, start = training
    whole, broken = ProbeLog(tmp_path / "whole"), ProbeLog(tmp_path / "broken")
    train(whole, start, 10)
    assert [line["step"] for line in whole.read()] == [0, 2, 4, 6, 8, 10]
    assert whole.read()[0]["width"] == 7
    checkpoint = start
    for last_step in (0, 4, 5, 8):  # killed there, to go on from the last checkpoint
        checkpoint = train(broken, checkpoint, last_step)
        with open(tmp_path / "broken", "a", encoding="utf-8") as file:
            file.write('{"step": 9, "energ')
    train(broken, checkpoint, 10)
    assert timeless(broken) == timeless(whole)


def test_a_line_is_strict_json_with_every_part_of_the_record(training, tmp_path):
    train, start = training
    log = ProbeLog(tmp_path / "lines")
    train(log, start, 2)

    def refuse(name):
        raise AssertionError(name)

    text = (tmp_path / "lines").read_text()
    first, line = [json.loads(x, parse_constant=refuse) for x in text.splitlines()]
    assert (line.pop("line"), len(line.pop("crc32"))) == (2, 8)
    assert line == log.read()[1]
    assert set(line) == set(first) - {"line", "crc32"}
    assert set(line) >= AMOUNTS | {"velocity", "counting_velocity", "velocity_mask"}
    assert set(line) >= {"elapsed", "effective_time", "num_resolved", "converged"}
    assert set(line) >= {"step", "start_step", "edges", "floor", "cost", "values"}
    errors = {"flux_error", "energy_error", "lost_error", "moved_error"}
    assert set(line) >= errors | {"velocity_error", "density_error"}
    assert (line["start_step"], line["step"]) == (0, 2)
    assert np.shape(line["moved"]) == (4, 4)
    assert np.shape(line["flux"]) == (3,)
    # Before there are two ends there are rates alone.
    assert first["flux"] is first["edges"] is None
    dynamics = set(grsd.dynamics.ShellDynamics._fields)
    for rates in (first["instantaneous"], line["instantaneous"]):
        assert set(rates) >= dynamics | {"exponent", "closure_error"}
        assert np.shape(rates["transfers"]) == (4, 4)


def test_balance_of_a_line_adds_up(training, tmp_path):
    train, start = training
    log = ProbeLog(tmp_path / "lines")
    train(log, start, 4)
    for line in log.read()[1:]:
        before, after = np.array(line["energies"])
        gained = np.sum(line["moved"], axis=1) - np.array(line["lost"])
        np.testing.assert_allclose(after - before, gained, atol=1e-5 * before.sum())
        flux = [np.sum(np.array(line["moved"])[k + 1 :, : k + 1]) for k in range(3)]
        np.testing.assert_allclose(line["flux"], flux, atol=1e-5 * before.sum())


def test_a_log_that_is_not_one_is_named(tmp_path):
    path = tmp_path / "lines"
    path.write_text("something else\n")
    with pytest.raises(UserError, match="a JSON object on every line, got: line 1"):
        ProbeLog(path).rewind(3)
    assert path.read_text() == "something else\n"


def test_an_append_that_would_lie_is_refused(training, tmp_path):
    train, start = training
    path = tmp_path / "new" / "folder" / "lines"
    log = ProbeLog(path)
    with pytest.raises(ValueError, match="record: expected a ProbeRecord, got None"):
        log.append(None)
    assert not path.parent.exists()
    train(log, start, 4)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"more: expected other names .* got 'step'"):
        log.append(ProbeRecord(*[None] * len(ProbeRecord._fields)), step=99)
    assert path.read_bytes() == before


def test_two_runs_in_one_file_are_told(training, tmp_path):
    train, start = training
    log = ProbeLog(tmp_path / "lines")
    train(log, start, 4)
    lines = read_log(log.path)
    for line in lines:
        records.append_jsonl(log.path, line)
    number = len(lines) + 1
    with pytest.raises(UserError, match=f"line {number} at an earlier step"):
        read_log(log.path)


@pytest.fixture(scope="module")
def own_run(training, tmp_path_factory):
    """A folder with nothing but the records of a loop of one's own."""
    folder = tmp_path_factory.mktemp("runs") / "my run"
    folder.mkdir()
    train, start = training
    train(ProbeLog(folder / "records.jsonl"), start, 4)
    return folder


NAMES = ("energies", "flux", "velocity", "eigenvalues")


@pytest.mark.parametrize("place", [".", "records.jsonl"])
def test_plot_draws_the_records_of_any_loop(own_run, monkeypatch, place):
    drawn = []

    def savefig(figure, path, **_):
        drawn.append(figure)
        path.write_bytes(b"drawn")

    monkeypatch.setattr(Figure, "savefig", savefig)
    done = run_script("plot.py", own_run / place)
    assert done.code == 0, done.err
    *listed, following = done.out.splitlines()
    assert following == f"next: grsd report '{own_run / place}'"
    kinds = ("png", "pdf")
    names = [f"records_{name}.{kind}" for name in NAMES for kind in kinds]
    assert listed == [str(own_run / "figures" / name) for name in names]
    assert {figure.axes[0].get_title() for figure in drawn} == {"my run"}
    energies, flux, *_ = (figure.axes[0] for figure in drawn[::2])
    assert len(energies.lines) == 5  # four shells and their sum
    assert len(flux.lines) == 3  # two intervals and the zero


@pytest.mark.parametrize("place", [".", "records.jsonl"])
def test_report_shows_the_records_of_any_loop(own_run, place):
    done = run_script("report.py", own_run / place)
    assert done.code == 0, done.err
    page = own_run / "report.html"
    assert done.out == f"{page}\nnext: open {page} in a browser\n"
    text = page.read_text()
    assert "<h1>Report on my run</h1>" in text
    assert "What the probe saw: my run, 3 records." in text
    assert "<td>moved, share of the energy</td>" in text
    assert "A kernel that only grows moves energy at the counting velocity." in text
    assert text.count("data:image/png;base64") == 4
    assert "Flux over each edge with its error" in text
    assert "Settings other than the defaults" not in text  # which it cannot know
    page.unlink()


def test_records_that_a_results_file_speaks_of_have_no_section_of_their_own(own_run):
    lines = ProbeLog(own_run / "records.jsonl").read()
    results = {"config": {}, "tracks": {own_run.name: analyse.summary(lines)}}
    records.write_json(own_run.parent / "results.json", results)
    (section,) = find_sections(own_run.parent)
    (own_run.parent / "results.json").unlink()
    assert section.title == "results.json"
    assert section.summary == "What the probe saw: my run, 3 records."
    assert list(section.tables) == [analyse.track_rows(results["tracks"])]
    (section,) = find_sections(own_run.parent)
    assert section.title == f"{own_run.name}/records.jsonl"


def test_a_folder_may_have_any_name(own_run, tmp_path):
    folder = tmp_path / "a$x_{$b & <c> 100% é"
    folder.mkdir()
    log = folder / "records.jsonl"
    log.write_bytes((own_run / "records.jsonl").read_bytes())
    done = run_script("plot.py", folder)
    assert done.code == 0, done.err
    (section,) = find_sections(folder)
    assert len(section.figures) == len(NAMES)


def test_a_folder_without_results_is_told_with_the_one_inside(own_run, tmp_path):
    for place, told in [
        (own_run.parent, f"got '{own_run.parent}'; did you mean '{own_run}'?"),
        (tmp_path, f"got '{tmp_path}'."),
        (tmp_path / "none", "which does not exist."),
    ]:
        done = run_script("plot.py", place)
        assert (done.code, done.out) == (1, "")
        (sentence,) = done.err.splitlines()
        assert sentence.startswith("error: --workdir: expected a folder")
        assert sentence.endswith(told)


@pytest.mark.parametrize("script", ["plot.py", "report.py"])
def test_a_file_without_records_is_told_in_one_sentence(tmp_path, script):
    path = tmp_path / "records.jsonl"
    for text, told in [
        (b"", "no whole line"),
        (b"no JSON\n", "line 1"),
        (b'{"step": 1, "loss": 2.0}\n', "line 1 without 'start_step'"),
    ]:
        path.write_bytes(text)
        done = run_script(script, path)
        assert (done.code, done.out) == (1, "")
        (sentence,) = done.err.splitlines()
        assert sentence.startswith(f"error: '{path}': expected ")
        assert told in sentence
    assert list(tmp_path.iterdir()) == [path]


def test_a_summary_leaves_out_records_without_a_balance(own_run):
    lines = ProbeLog(own_run / "records.jsonl").read()
    assert lines[0]["energies"] is None
    found = analyse.summary(lines)
    assert found["num_records"] == 3
    assert found == analyse.summary(lines[1:]) | {
        name: found[name] for name in found if "cost" in name or "seconds" in name
    } | {"num_records": 3}
    assert analyse.summary(lines[:1])["moved_share_median"] is None
