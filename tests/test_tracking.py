"""Training with the probe on: its records, their figures, and what a kill leaves."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from matplotlib.figure import Figure

from grsd_jax.dynamics import KrylovSteps
from grsd_jax.experiments.common import data, networks, records, training
from grsd_jax.experiments.common.config import Config, UserError
from grsd_jax.experiments.track import analyse, quantities
from grsd_jax.experiments.track import figures as tracking_figures
from grsd_jax.experiments.track import run as tracking


class TinyNet(nn.Module):
    """One convolution with BatchNorm."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), strides=4, use_bias=False)(x)
        x = jax.nn.gelu(nn.BatchNorm(not train, momentum=0.6)(x))
        return nn.Dense(10)(jnp.mean(x, axis=(1, 2)))


CONFIG = Config(
    train_batch_size=16,
    epochs=2,
    checkpoint_every=5,
    log_every=4,
    record_every=3,
    over=(1,),
    batch_size=6,
    num_batches=1,
    num_shells=4,
    window=4,
    solver="dense",
)  # 100 // 16 = 6 steps an epoch
STEPS = [1, 3, 4, 6, 7, 9, 10, 12]
TINY_RANGE = (1e-5, 1.0)
#: What a line says of the clock, and so the only things in it that no run repeats.
CLOCK = ("seconds", "gradient_seconds", "cost", "train_step_seconds", "cost_in_steps")


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's schedules divide an integer count by a float."""
    with jax.numpy_dtype_promotion("standard"):
        yield


cached_optimizer = functools.cache(training.make_optimizer)


@pytest.fixture(autouse=True)
def one_optimizer(monkeypatch):
    """Gives equal settings one optimizer, so that a test compiles nothing again."""
    monkeypatch.setattr(training, "make_optimizer", cached_optimizer)
    monkeypatch.setattr(tracking, "LAMBDA_RANGE", TINY_RANGE)  # where TinyNet's lie


@pytest.fixture(scope="module")
def dataset():
    return data.synthetic_textures(num_train=100, num_test=30)


def track(dataset, workdir, *, config=CONFIG, kill_at=None):
    model = TinyNet()
    path = workdir / "tiny" / "records.jsonl"
    tracker = tracking.Tracker(model, dataset, config, path)
    if kill_at is not None:
        update = tracker.update

        def killed(own, state, step):
            own = update(own, state, step)
            if step == kill_at:
                raise KeyboardInterrupt
            return own

        tracker.update = killed
    training.train(model, dataset, config, workdir, name="tiny", callback=tracker)
    return path


def lines_of(path):
    lines = records.read_jsonl(path)
    return [{k: v for k, v in x.items() if k not in CLOCK} for x in lines]


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """The records of a run without interruption."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_optimizer", cached_optimizer)
        patch.setattr(tracking, "LAMBDA_RANGE", TINY_RANGE)
        with jax.numpy_dtype_promotion("standard"):
            return track(dataset, tmp_path_factory.mktemp("whole"))


def test_a_line_a_record_with_what_it_promises(whole):
    lines = records.read_jsonl(whole)
    assert [line["step"] for line in lines] == STEPS
    expected = {"effective_time", "energies", "lost", "moved", "flux", "velocity"}
    expected |= {"counting_velocity", "elapsed", "num_resolved", "floor", "converged"}
    expected |= {"flux_error", "energy_error", "velocity_mask", "cost", "finite"}
    for line in lines:
        assert set(line) >= expected
        assert np.shape(line["energies"]) == (2, 4)
        assert len(line["flux"]) == len(line["counting_velocity"]) == 3
        assert line["finite"]
        assert line["num_resolved"] >= 1
        start, step = line["start_step"], line["step"]
        assert (start % 3, step - start) in {(0, 1), (0, 3)}
        # Momentum 0.9 goes ten times as far as the rate of 0.05 says.
        assert line["elapsed"] == pytest.approx((step - start) * 0.05 / 0.1)
        assert line["effective_time"] == pytest.approx(step * 0.05 / 0.1)
        lost = np.sum(line["energies"][0]) - np.sum(line["energies"][1])
        assert np.sum(line["lost"]) == pytest.approx(lost, abs=1e-3)
        assert line["cost_in_steps"] > 0


@pytest.mark.parametrize("kill_at", [2, 6, 9])
def test_a_killed_run_leaves_the_records_of_a_whole_one(
    dataset, whole, tmp_path, kill_at
):
    with pytest.raises(KeyboardInterrupt):
        track(dataset, tmp_path, kill_at=kill_at)
    path = tmp_path / "tiny" / "records.jsonl"
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"step": 9, "energ')  # killed in mid-write
    track(dataset, tmp_path)
    assert lines_of(path) == lines_of(whole)
    before = path.read_bytes()
    track(dataset, tmp_path)  # complete already
    assert path.read_bytes() == before


def test_a_broken_training_goes_on_and_one_record_says_so(dataset, tmp_path):
    wild = Config(**{**CONFIG.__dict__, "learning_rate": 1e20})
    lines = records.read_jsonl(track(dataset, tmp_path, config=wild))
    assert [line["finite"] for line in lines] == [False]
    assert (lines[0]["start_step"], lines[0]["step"]) == (0, 1)
    metrics = records.read_jsonl(tmp_path / "tiny" / "metrics.jsonl")
    assert metrics[-1]["step"] == STEPS[-1]
    assert metrics[-1]["loss"] is None
    assert metrics[-1]["accuracy"] is metrics[-1]["test_accuracy"] is None


def test_a_run_resumes_under_its_own_settings_only(dataset, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        track(dataset, tmp_path, kill_at=1)
    other = Config(**{**CONFIG.__dict__, "record_every": 4})
    with pytest.raises(UserError, match=r"^--record_every: expected 3 .*got 4"):
        track(dataset, tmp_path, config=other)
    other = Config(**{**CONFIG.__dict__, "over": (1, 2)})
    with pytest.raises(UserError, match=r"^--over: expected \[1\] .*got \[1, 2\]"):
        track(dataset, tmp_path, config=other)


@pytest.mark.parametrize("over", [(3,), (0,), (1, 4)])
def test_steps_of_over_beyond_an_interval_are_named(over):
    with pytest.raises(UserError, match=r"^--over: expected numbers of steps from 1"):
        Config(record_every=3, over=over)


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_records_lost_before_a_checkpoint_are_noticed(dataset, tmp_path, kept):
    with pytest.raises(KeyboardInterrupt):
        track(dataset, tmp_path, kill_at=11)  # the newest checkpoint is of step 10
    path = tmp_path / "tiny" / "records.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:kept]))
    with pytest.raises(
        UserError, match=r"records.jsonl': expected the record of step 10"
    ):
        track(dataset, tmp_path)


def test_training_without_a_callback_reads_the_same_checkpoints(dataset, tmp_path):
    track(dataset, tmp_path)
    result = training.train(TinyNet(), dataset, CONFIG, tmp_path, name="tiny")
    assert result.resumed_from == STEPS[-1]


def test_sharp_shells_give_the_share_between_non_neighbors(dataset, tmp_path):
    config = dataclasses.replace(CONFIG, shells="sharp", solver="auto", epochs=1)
    lines = records.read_jsonl(track(dataset, tmp_path, config=config))
    shares = [line["non_adjacent_share"] for line in lines]
    assert len(shares) == 4
    assert all(0 <= share <= 1 for share in shares)
    assert all(x is not None for line in lines for x in line["rotation"])
    with pytest.raises(UserError, match="--shells: expected 'soft' with --solver"):
        dataclasses.replace(CONFIG, shells="sharp", solver="lanczos")


@pytest.mark.parametrize("solver", ["auto", "lanczos"])
def test_krylov_steps_are_those_of_the_settings(dataset, tmp_path, monkeypatch, solver):
    monkeypatch.setattr(tracking, "cheaper_solver", lambda point, width, steps: steps)
    config = dataclasses.replace(CONFIG, solver=solver, num_steps=7)
    model = TinyNet()
    tracker = tracking.Tracker(model, dataset, config, tmp_path / "records.jsonl")
    weights = networks.init_weights(model, dataset.train_images.shape[1:], 0)
    optimizer = training.make_optimizer(config, total_steps=12)
    tracker.init(training.init_state(weights, optimizer))
    assert tracker._probe.solver == KrylovSteps(7, num_probes=4)


def test_summary_counts_and_takes_medians(whole):
    summary = analyse.summary(records.read_jsonl(whole))
    assert summary["num_records"] == 8
    assert summary["num_whole"] == 4  # the others are of --over
    assert summary["finite"]
    assert summary["cost_in_steps_median"] > 0
    assert summary["moved_share_median"] > 0
    assert summary["non_adjacent_share_median"] is None  # soft shells are too narrow
    table = analyse.format_tracks({"mlp": summary, "my network": summary})
    assert "moved, share of the energy" in table
    assert re.search(r"MLP +\| +my network", table)
    assert re.search(r"of them whole intervals, finite +\| 4 +\| +4", table)
    assert table.endswith("|\n\n" + "\n".join(analyse.LEGEND))  # short ones


def test_a_late_first_look_and_a_long_interval_leave_the_others_whole():
    first = line_of(-1, 500, [0.0]) | {"flux": None}  # without a balance
    ends = [500, 510, 520, 540, 550]  # 530 was left out
    whole = [line_of(a, b, [1.0]) for a, b in itertools.pairwise(ends)]
    over = [line_of(a, a + 1, [1.0]) for a in ends[:-1]]
    lines = [first, *(x for pair in zip(over, whole, strict=True) for x in pair)]
    assert quantities.whole_intervals(lines) == whole[:3]
    assert quantities.whole_intervals(lines[:5]) == whole[:2]


def test_small_shares_are_not_written_as_0():
    small = {"moved_share_median": 2.34e-4, "lost_share_median": -4e-5}
    told = dict(analyse.track_rows({"mlp": small})[1:])
    assert told["moved, share of the energy"] == "0.000234"
    assert told["lost, share of the energy"] == "-4e-05"


def line_of(start, step, flux, **more):
    flux = np.array(flux, np.float64)
    return {
        "start_step": start,
        "step": step,
        "finite": True,
        "flux": flux,
        "flux_error": np.full_like(flux, 0.1),
        **more,
    }


def test_quantities_of_a_line_are_what_they_say():
    moved = [[0.0, 2.0, 0.0], [-2.0, 0.0, -1.0], [0.0, 1.0, 0.0]]
    line = line_of(
        0,
        4,
        [1.0, 2.0],
        energies=[[3.0, 2.0, 5.0], [1.0, 1.0, 1.0]],
        lost=[2.0, 1.0, 4.0],
        moved=moved,
        velocity=[None, 3.0],
        counting_velocity=[1.0, 2.0],
        velocity_mask=[False, True],
    )
    assert quantities.total_energy(line) == 10
    assert quantities.lost_share(line) == pytest.approx(0.7)
    assert quantities.moved_share(line) == pytest.approx(0.3)
    velocity, counted = quantities.usable_velocities(line)
    assert (velocity, counted) == ([3.0], [2.0])
    _, counted = quantities.usable_velocities(line | {"counting_velocity": None})
    assert np.isnan(counted)
    lines = [line_of(0, 1, [1.0, 0.05]), line, line_of(4, 5, [0.5, 0.5])]
    # At the first edge 1 and 1 / 4 a step; at the second one flux is below its error.
    assert quantities.spreads_over_steps(lines) == pytest.approx([0.75])
    assert list(quantities.by_steps(lines)) == [1, 4]
    assert quantities.whole_intervals(lines) == [line]


def test_networks_share_one_clock_and_no_record_is_left_out():
    """One time that is not known puts all panels over steps, of which none is lost."""
    shares = {"energies": [[1.0, 1.0]] * 2, "lost": [0.1, 0.2], "moved": [[0, 0.5]] * 2}
    lines = [
        line_of(k, k + 1, [1.0], effective_time=0.5 * k, **shares) for k in range(3)
    ]
    unknown = [*lines[:2], lines[2] | {"effective_time": None}]
    for tracks, wanted in (
        ({"mlp": lines, "cnn": lines}, [0, 0.5, 1]),
        ({"mlp": lines, "cnn": unknown}, [1, 2, 3]),
    ):
        figure = tracking_figures._amounts(tracking_figures._on_one_clock(tracks))
        drawn = [x for x in figure.axes[0].lines if len(x.get_xdata()) == 3]
        assert len(drawn) == 4  # moved and lost of both
        for line in drawn:
            np.testing.assert_array_equal(line.get_xdata(), wanted)
        assert ("step" in figure.axes[0].get_xlabel()) == (wanted[0] == 1)


def test_the_legend_says_whose_velocity_is_undefined():
    shares = {"velocity": [0.5], "velocity_mask": [True], "counting_velocity": None}
    known = [line_of(k, k + 1, [1.0], effective_time=k, **shares) for k in range(3)]
    unknown = [line | {"velocity": [None]} for line in known]
    figure = tracking_figures._velocity({"mlp": known, "cnn": unknown})
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["MLP", "CNN: undefined"]  # and no null, which none has


def test_shares_of_no_energy_are_undefined():
    line = line_of(0, 1, [0.0], energies=[[0.0, 0.0]] * 2, lost=[0.0, 0.0])
    line |= {"moved": [[0.0, 0.0]] * 2}
    assert np.isnan([quantities.lost_share(line), quantities.moved_share(line)]).all()


def test_figures_are_drawn_from_the_lines_alone(whole, tmp_path, monkeypatch):
    lines = records.read_jsonl(whole)
    broken = {name: None for name in lines[-1]} | {"finite": False, "step": 15}
    nothing = {"step": 15, "start_step": 12}
    broken |= nothing
    zeros = {name: [0.0] * 3 for name in ("velocity", "flux")}
    still = lines[1] | zeros | {"moved": np.zeros((4, 4)).tolist()}
    wide = [line | {"non_adjacent_share": 0.5} for line in lines]
    tracks = {"plainnet18": [still], "resnet18": [*wide, broken]}
    paths = tracking_figures.write_tracking_figures(tracks, tmp_path)
    names = {"energies", "profiles", "amounts", "velocity", "eigenvalues"}
    more = {"steps", "non_adjacent"}
    assert {path.stem for path in paths} == {f"track_{n}" for n in names | more}
    assert len(list(tmp_path.glob("*.pdf"))) == len(list(tmp_path.glob("*.png"))) == 7
    monkeypatch.setattr(Figure, "savefig", lambda _, path, **_o: path.write_bytes(b"x"))
    paths = tracking_figures.write_tracking_figures({"resnet18": [still]}, tmp_path)
    assert {path.stem for path in paths} == {f"track_{n}" for n in names}
    drawn = []
    energies = lambda _, ax: drawn.append(ax.get_title())  # noqa: E731
    monkeypatch.setattr(tracking_figures.plotting, "energies", energies)
    names = ("my network", "plainnet18", "resnet18")
    tracking_figures.write_tracking_figures({key: [still] for key in names}, tmp_path)
    assert drawn == ["ResNet-18", "PlainNet-18", "my network"]
    with pytest.raises(UserError, match="resnet18: expected records"):
        tracking_figures.write_tracking_figures({"resnet18": [broken]}, tmp_path)
