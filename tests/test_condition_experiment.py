"""The conditions of a training run: the file, the table and the figure page."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags as absl_flags

from grsd_jax.conditions import Check, ParameterBlocks, Thresholds, propagation_report
from grsd_jax.experiments.common import flags, records
from grsd_jax.experiments.common.config import TRAINING_FIELDS, Config, UserError
from grsd_jax.experiments.common.data import synthetic_textures
from grsd_jax.experiments.conditions import analyse, figures, run
from grsd_jax.experiments.report import page

RESULTS = Path(__file__).parents[1] / "docs" / "results"

OPTIONS = run.Options(
    thresholds=Thresholds(max_distant_coherence=0.0, distant=1),
    num_probes=2,
    num_points=4,
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A small run, trained and measured: its data, settings and conditions.json."""
    dataset = synthetic_textures(num_train=32, num_test=16, num_classes=3)
    config = Config(
        workdir=str(tmp_path_factory.mktemp("conditions")),
        model="resmlp",
        width=3,
        depth=1,
        epochs=2,
        train_batch_size=8,
        checkpoint_every=2,
        keep_checkpoints=10,
        batch_size=4,
        num_batches=1,
        num_shells=5,
        window=3,
        activation="gelu",
    )
    with jax.numpy_dtype_promotion("standard"):
        return dataset, config, run.run_conditions(dataset, config, OPTIONS)


@pytest.fixture
def found(measured):
    """The contents of a conditions.json that was written and read back."""
    return measured[2]


def test_the_measurement_is_that_of_the_run(measured):
    dataset, config, found = measured
    folder = Path(config.workdir) / config.model
    assert found == records.read_json(folder / "conditions.json")
    assert found["steps"] == [0, 2, 6, 8]
    assert found["blocks"] == ["stem", "block1", "head"]
    assert found["measured"]["n"] == 12
    assert found["config"]["width"] == 3
    assert found["data_fingerprint"] == dataset.fingerprint
    assert found["options"]["thresholds"]["max_drift"] == 0.5


def test_a_run_is_not_measured_twice_and_recognised(measured, monkeypatch):
    dataset, config, found = measured
    monkeypatch.setattr(run, "condition_report", None)
    with jax.numpy_dtype_promotion("standard"):
        assert run.run_conditions(dataset, config, OPTIONS) == found
        other = dataclasses.replace(config, width=4)
        message = re.escape("--width: expected 3 as in the run")
        with pytest.raises(UserError, match=message):
            run.run_conditions(dataset, other, OPTIONS)


class Bar:
    """What stands in for a bar of progress, and what it showed."""

    def __init__(self, **options):
        self.n, self.options, self.shown = 0, options, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.shown.append(("end", self.n))

    def set_description(self, text):
        self.shown.append((text, self.n))

    def update(self):
        self.n += 1


def test_progress_counts_a_piece_when_it_is_done(monkeypatch):
    config, bars = Config(model="resmlp"), []

    def progress_bar(**options):
        bars.append(Bar(**options))
        return bars[-1]

    how = dict.fromkeys(("window", "shells", "derivative"))
    monkeypatch.setattr(run, "progress_bar", progress_bar)
    monkeypatch.setattr(run, "measurement_options", lambda *_: how)

    def report(points, *_, progress, **_options):
        for piece in range(2 + len(points)):
            progress(f"piece {piece}")

    monkeypatch.setattr(run, "condition_report", report)
    monkeypatch.setattr(run, "measure_layers", lambda *_, **_options: None)
    points = [run.PathPoint(0.0, None, None, None)] * 2
    run._measured(points, ParameterBlocks(("a",), (0,), ()), config, OPTIONS)
    (bar,) = bars
    assert bar.options["total"] == 5
    assert [n for _, n in bar.shown] == [0, 1, 2, 3, 4, 5]
    assert bar.shown[0] == ("resmlp: piece 0", 0)


def test_file_holds_every_condition_with_its_verdict(found):
    for name in ("condition1", "condition2", "condition3", "condition4"):
        verdict = found[name]["verdict"]
        outcomes = {check["outcome"] for check in verdict["checks"]}
        assert (verdict["outcome"] == "holds") == (outcomes == {"holds"})
        assert (verdict["outcome"] == "fails") == ("fails" in outcomes)
        for check in verdict["checks"]:
            assert set(check) == {*Check._fields, "outcome"}
    flagged = {(a, b): c for a, b, c in found["condition2"]["flagged"]}
    assert ("stem", "head") in flagged
    coherence = found["condition2"]["coherence"][0][2]
    assert flagged["stem", "head"] == pytest.approx(coherence)
    names = [layer["name"] for layer in found["layers"]["blocks"]]
    assert names == found["blocks"]
    assert [point["step"] for point in found["condition1"]["points"]] == [0, 8]
    assert np.shape(found["condition1"]["points"][0]["influence"]) == (3, 3)
    first, *_, last = found["condition4"]["points"]
    assert first["slope"] != last["slope"]
    check = analyse.find_check(found, "condition4", "Toeplitz residual")
    assert last["toeplitz_centre"] == check["number"] > 0
    with pytest.raises(KeyError, match="condition4: expected a check 'R squared'"):
        analyse.find_check(found, "condition4", "R squared")


def test_table_has_a_row_for_every_check(found):
    table, legend = analyse.format_conditions(found).split("\n\n")
    assert legend == "\n".join(analyse.LEGEND)
    lines = table.split("\n")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    checks = [c for name in analyse.TITLES for c in found[name]["verdict"]["checks"]]
    assert [row[1] for row in rows[2:]] == [check["name"] for check in checks]
    verdicts = [row[4].partition(", of")[0] for row in rows[2:]]
    assert verdicts == [analyse.outcome(c) for c in checks]
    assert {text.split(":")[0] for text in verdicts} >= {"holds", "fails"}
    assert len({len(line) for line in lines}) == 1
    broken = json.loads(json.dumps(found))
    drift = analyse.find_check(broken, "condition3", "drift of the leading")
    drift |= {"number": None, "outcome": "undecided", "reason": "one point"}
    tail = analyse.find_check(broken, "condition2", "tail sum")
    tail |= {"number": 0.5, "error": 0.02, "converged": False, "outcome": "undecided"}
    table = analyse.format_conditions(broken)
    assert "n/a" in table
    assert "0.5 +- 0.02" in table
    assert "undecided: not converged" in table
    assert "undecided: one point" in table


def test_table_says_what_proposition_2_does_of_a_state_space_model(found):
    report = {
        "rho": 0.5,
        "in_condition": True,
        "below_bound": True,
        "predicted_range": 4,
        "measured_range": 3,
        "epsilon": 0.25,
    }
    told = analyse.format_conditions(found | {"propagation": report})
    assert "under the bound" in told
    assert "below 0.25 at 3 blocks, predicted 4" in told
    beyond = analyse.format_propagation(report | {"measured_range": None})
    assert "beyond the depth" in beyond
    above = analyse.format_propagation(report | {"below_bound": False})
    assert "NOT under the bound" in above
    outside = report | {"rho": 1.0, "in_condition": False, "predicted_range": None}
    assert "outside the condition" in analyse.format_propagation(outside)
    one = analyse.format_propagation(report | {"measured_range": 1})
    assert "at 1 block," in one


def test_an_influence_that_is_not_finite_is_not_said_to_exceed_its_bound():
    influence = np.array([[1.0, np.nan], [0.0, 1.0]])
    found = propagation_report(influence, constant=2.0, rho=0.5, epsilon=0.1)
    told = analyse.format_propagation(found._asdict() | {"rho": 0.5})
    assert told.endswith("nothing was compared.")
    assert "bound" not in told


def test_page_draws_every_check_over_its_threshold(found, tmp_path, monkeypatch):
    drawn = []

    def keep(drawings, folder):
        drawn.extend(draw() for draw in drawings.values())
        return []

    monkeypatch.setattr(figures, "save_figures", keep)
    figures.write_condition_page(found, tmp_path)
    (page,) = drawn
    axis = page.subfigs[0].axes[0]
    checks = [
        check for name in analyse.TITLES for check in found[name]["verdict"]["checks"]
    ]
    labels = [label.get_text().split("\n") for label in axis.get_yticklabels()]
    wanted = [figures._typeset(check["name"]) for check in checks]
    assert [name[3:] for name, _ in labels] == wanted
    told = [number for _, number in labels]
    assert all(
        text.endswith(analyse.outcome(check))
        for text, check in zip(told, checks, strict=True)
    )
    dots = {
        line.get_ydata()[0]: line.get_xdata()[0]
        for line in axis.lines
        if line.get_marker() == "o"
    }
    for row, check in enumerate(reversed(checks)):
        if row in dots:
            assert (dots[row] <= 1) == (check["outcome"] == "holds"), check


def test_the_table_shows_what_decides_and_on_how_much(found):
    cells = json.loads(json.dumps(found))
    first, second, third = (
        cells[name]["verdict"]["checks"][0]
        for name in ("condition1", "condition2", "condition3")
    )
    first |= {"number": 4.0001, "threshold": 4.0, "error": 0.0, "count": 6}
    first |= {"outcome": "fails", "reason": "", "converged": True}
    second |= {"number": None, "outcome": "fails", "reason": "", "count": None}
    second |= {"converged": True}
    third |= {"number": None, "outcome": "undecided", "reason": "one point"}
    rows = {(row[0][0], row[1]): row[2:] for row in analyse.condition_rows(cells)[1:]}
    assert rows["1", first["name"]] == ["4.0001", "<= 4", "fails, of 6"]
    assert rows["2", second["name"]][::2] == ["infinite", "fails"]
    assert rows["3", third["name"]][::2] == ["n/a", "undecided: one point"]


def test_checks_are_typeset():
    spelled = "R^2 of Jdot and J >= 2 +- 1 in log lambda"
    written = r"$R^2$ of $\dot J$ and $J$ ≥ 2 ± 1 in $\log\lambda$"
    assert figures._typeset(spelled) == written


def test_report_has_the_table(found, tmp_path):
    records.write_json(tmp_path / "conditions.json", found | {"config": {"seed": 1}})
    (section,) = page.find_sections(tmp_path)
    assert section.tables == [analyse.condition_rows(found)]


def test_page_is_drawn_from_the_file_alone(found, tmp_path):
    paths = figures.write_condition_page(found, tmp_path / "figures")
    assert [path.name for path in paths] == ["conditions.png", "conditions.pdf"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert paths[1].read_bytes().startswith(b"%PDF")


def test_page_survives_undefined_numbers(found, tmp_path):
    holes = json.loads(json.dumps(found))
    for point in holes["condition1"]["points"]:
        point["influence"] = np.zeros((3, 3)).tolist()
    holes["condition3"]["shell_drift"]["drift"] = [[None] * 5] * 3
    for point in holes["condition4"]["points"]:
        point["toeplitz_centre"] = None
    holes["layers"]["depth_average"]["toeplitz_residual"] = None
    assert figures.write_condition_page(holes, tmp_path)


def test_every_threshold_has_a_flag():
    values = absl_flags.FlagValues()
    flags.define_threshold_flags(values)
    values(["script"])
    assert flags.thresholds_from_flags(values) == Thresholds()
    values = absl_flags.FlagValues()
    flags.define_threshold_flags(values)
    values(["script", "--max_band=2", "--max_drift=0.25"])
    expected = Thresholds(max_band=2, max_drift=0.25)
    assert flags.thresholds_from_flags(values) == expected


def test_a_run_is_gone_on_with_under_its_own_settings_alone(tmp_path):
    config = Config(workdir=str(tmp_path))
    assert run.starts_here(tmp_path, config)
    settings = {name: getattr(config, name) for name in TRAINING_FIELDS}
    records.write_json(tmp_path / "config.json", settings)
    assert run.starts_here(tmp_path, config)
    longer = dataclasses.replace(config, epochs=config.epochs + 1)
    assert not run.starts_here(tmp_path, longer)


def test_page_shows_slopes_below_0_and_no_drift_where_none_is_defined(found):
    falling = json.loads(json.dumps(found))
    for point in [*falling["condition4"]["points"], *falling["layers"]["blocks"]]:
        point["slope"] = -0.5
    drift = falling["condition3"]["shell_drift"]["drift"]
    drift[0] = [None] * len(drift[0])
    drawn = figures._page(falling).subfigs[1].axes
    panels = {axis.get_title(): axis for axis in drawn}
    for title in ("4: log-shift invariance", "additive structure, last point"):
        low, high = panels[title].get_ylim()
        assert low < -0.5
        assert high > 1
    lines = panels["3: drift of spectral projectors"].lines
    (means,) = (line for line in lines if line.get_label() == "mean shell")
    assert np.isnan(means.get_ydata()[0])  # a 0 would be perfect stability
    assert np.isfinite(means.get_ydata()[1:]).all()


def test_page_names_what_is_undefined_and_tells_zeros_from_small_numbers():
    found = records.read_json(RESULTS / "conditions" / "conditions.json")
    for point in found["condition4"]["points"]:
        point["slope"] = None
    found["layers"]["depth_average"]["toeplitz_residual"] = None
    influence = found["condition1"]["points"][-1]["influence"]
    influence[0] = [0.0, None, *influence[0][2:]]
    found["condition2"]["coherence"] = [[None] * 10] * 10
    axes = {axis.get_title(): axis for axis in figures._page(found).subfigs[1].axes}
    (image,) = axes["1: influence, last point"].images
    shown = image.norm(image.get_array())
    assert shown[0, 0] < 0  # below the color bar, and nothing else is
    assert np.ma.getmaskarray(shown)[0, 1]
    assert np.ma.sum(shown < 0) == np.ma.count_masked(shown) == 1
    assert axes["2: coherence, first point"].texts[0].get_text() == "undefined"
    for title, told, drawn in (
        ("4: log-shift invariance", "slope: undefined", "residual"),
        ("additive structure, last point", "depth average: undefined", "slope"),
    ):
        assert [text.get_text() for text in axes[title].texts] == [told]
        labels = axes[title].get_legend_handles_labels()[1]
        assert drawn in labels
        assert told.partition(":")[0] not in labels
