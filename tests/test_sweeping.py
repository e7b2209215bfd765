"""Sweeps: the grid, what a cell measures, resuming, and the figures."""

import csv
import json
import math
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from absl import flags as absl_flags

from grsd_jax import Binning, Problem, measure_coupling
from grsd_jax.experiments.common import flags
from grsd_jax.experiments.common.config import CHAINS, UserError
from grsd_jax.experiments.common.data import evaluation_batches, synthetic_textures
from grsd_jax.experiments.sweep import analyse, figures
from grsd_jax.experiments.sweep import run as sweeping
from grsd_jax.experiments.sweep.config import SweepConfig, cell_network, list_cells
from grsd_jax.models import linen_outputs
from running import run_script

DATA = synthetic_textures(num_train=32, num_test=16, num_classes=3)


def small(workdir, **changes):
    settings = {
        "models": ("mlp", "ssm"),
        "depths": (2,),
        "widths": (3,),
        "branch_scales": (0.5,),
        "seeds": (0, 1),
        "steps": 2,
        "train_batch_size": 8,
        "batch_size": 4,
        "num_shells": 4,
        "window": 2,
        "num_directions": 4,
        "workdir": str(workdir),
    }
    return SweepConfig(**{**settings, **changes})


def test_the_grid_holds_each_network_once():
    config = SweepConfig(
        models=("mlp", "resmlp", "ssm"),
        depths=(2, 4),
        activations=("relu", "gelu"),
        branch_scales=(0.1, 0.3),
        seeds=(0, 1, 2),
    )
    cells = list_cells(config)
    counts = {m: sum(cell.model == m for cell in cells) for m in config.models}
    assert counts == {"mlp": 2 * 2 * 3, "resmlp": 2 * 2 * 2 * 3, "ssm": 2 * 3}
    assert len({cell.name for cell in cells}) == len(cells)
    near = SweepConfig(models=("resmlp",), branch_scales=(0.1234567, 0.1234568))
    cells_near = list_cells(near)
    assert len({cell.name for cell in cells_near}) == len(cells_near)
    assert [cell.seed for cell in cells[:3]] == [0, 1, 2]  # one compilation serves all


@pytest.mark.parametrize("name", CHAINS)
def test_every_network_of_a_sweep_can_be_made(name):
    config = SweepConfig(models=(name,), depths=(4,), widths=(6,))
    model = cell_network(list_cells(config)[0], 5, 0.5)
    assert (model.num_classes, model.depth, model.width) == (5, 4, 6)
    assert getattr(model, "residual", None) in (None, name.startswith("res"))


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sweep")
    return workdir, sweeping.run_sweep(DATA, small(workdir))


def test_a_sweep_writes_one_row_per_cell(swept):
    workdir, rows = swept
    about = json.loads((workdir / "sweep.json").read_text())
    assert about["data_fingerprint"] == DATA.fingerprint
    assert about["config"]["steps"] == 2
    with open(workdir / "sweep.csv", newline="") as file:
        assert tuple(next(csv.reader(file))) == analyse.COLUMNS
    assert analyse.read_rows(workdir / "sweep.csv") == rows
    cells = [(row["model"], row["seed"]) for row in rows]
    assert cells == [("mlp", 0), ("mlp", 1), ("ssm", 0), ("ssm", 1)]
    for row in rows:
        assert row["status"] == "done"
        assert row["branch_scale"] is None
        assert 0 < row["num_resolved"] <= 4 * 3
        assert 0 <= row["toeplitz_residual"] <= 1
        assert row["num_paths"] == 16
    # The state-space model's Jacobian is rho times an orthogonal matrix.
    assert rows[2]["initial_increment_mean"] == pytest.approx(math.log(0.9), rel=1e-5)
    assert rows[2]["trained_increment_variance"] < 1e-10


def test_rows_that_are_not_a_sweep_are_named(tmp_path):
    with pytest.raises(UserError, match="expected the rows of a sweep"):
        analyse.read_rows(tmp_path / "missing.csv")
    (tmp_path / "empty.csv").write_text(",".join(analyse.COLUMNS) + "\n")
    with pytest.raises(UserError, match="expected at least one row of 33 columns"):
        analyse.read_rows(tmp_path / "empty.csv")
    (tmp_path / "other.csv").write_text("depth,seed\ntwo,0\n")
    with pytest.raises(UserError, match="expected the rows of a sweep"):
        analyse.read_rows(tmp_path / "other.csv")


def test_a_row_is_what_the_library_measures(swept):
    workdir, _ = swept
    config = small(workdir, steps=0)
    cell = list_cells(config)[0]
    row = sweeping.measure_cell(cell, DATA, config, optax.sgd(0.1))
    model = cell_network(cell, 3, config.rho)
    batches = evaluation_batches(
        DATA.test_images, DATA.test_labels, num_batches=1, batch_size=4, seed=0
    )
    params = jax.jit(model.init)(jax.random.key(0), batches["image"][0])["params"]
    measured = measure_coupling(
        Problem(linen_outputs(model, {}), batches),
        params,
        key=jax.random.key(0),
        shells=Binning(4, 2, num_bootstrap=0),
    )
    assert row["slope"] == pytest.approx(float(measured.diagonal_fit.exponent), 1e-3)
    assert row["r_squared"] == pytest.approx(
        float(measured.diagonal_fit.r_squared), 1e-3
    )
    residual = float(measured.renormalized.residual)
    assert row["toeplitz_residual"] == pytest.approx(residual, 1e-3)
    assert row["initial_increment_mean"] == row["trained_increment_mean"]


def test_a_sweep_goes_on_after_a_kill_and_does_nothing_twice(swept, monkeypatch):
    workdir, rows = swept
    done = []

    def count(cell, *args):
        done.append(cell.name)
        assert len(analyse.read_rows(workdir / "sweep.csv")) == 3  # all but this one
        return rows[3]

    monkeypatch.setattr(sweeping, "measure_cell", count)
    assert sweeping.run_sweep(DATA, small(workdir)) == rows
    assert done == []
    last = workdir / "cells" / "ssm-L2-w3-seed1.json"
    last.unlink()  # killed in the last cell
    assert sweeping.run_sweep(DATA, small(workdir)) == rows
    assert done == ["ssm-L2-w3-seed1"]
    note = json.loads(last.read_text())
    note["made_by"]["settings"]["steps"] = 3
    last.write_text(json.dumps(note))
    sweeping.run_sweep(DATA, small(workdir))
    assert done == ["ssm-L2-w3-seed1"] * 2


def test_cells_follow_what_they_compute_and_nothing_else(swept, monkeypatch):
    workdir, rows = swept
    monkeypatch.setattr(sweeping, "measure_cell", lambda *_: {"status": "again"})
    larger = small(workdir, seeds=(0, 1, 2), depths=(2, 3))
    again = sweeping.run_sweep(DATA, larger)
    kept = [row for row in again if row["status"] == "done"]
    assert (kept, len(again)) == (rows, 2 * 2 * 3)
    for cell in (workdir / "cells").iterdir():
        if cell.stem not in {c.name for c in list_cells(small(workdir))}:
            cell.unlink()


def test_a_network_that_diverges_keeps_its_row(tmp_path):
    config = small(tmp_path, models=("mlp",), seeds=(0,), learning_rate=1e30)
    optimizer = optax.sgd(config.learning_rate)
    row = sweeping.measure_cell(list_cells(config)[0], DATA, config, optimizer)
    assert row["status"] == "diverged"
    assert math.isnan(row["slope"])
    assert np.isfinite(row["initial_increment_mean"])


def fake_rows():
    rows = []
    for model, scale in (("mlp", None), ("resmlp", 0.1), ("resmlp", 0.3)):
        for depth in (2, 4):
            for seed in (0, 1, 2):
                row = dict.fromkeys(analyse.COLUMNS, 0.5 + 0.1 * seed)
                row |= {"model": model, "depth": depth, "branch_scale": scale}
                row |= {"width": 16, "activation": "gelu"}
                rows.append(row | {"seed": seed, "slope": depth + seed})
    rows[0]["slope"] = None  # what is undefined is left out
    return rows


def test_the_range_over_seeds_is_seen_at_a_single_depth():
    """A band of no width needs a line around it."""
    from matplotlib.figure import Figure

    axis, point = Figure().subplots(), np.ones(1)
    band = figures.Band(4 * point, point, 2 * point, 3 * point, point, point)
    figures._draw_range(axis, band, "red", bars=False)
    (drawn,) = axis.collections
    (path,) = drawn.get_paths()
    assert (path.vertices[:, 1].min(), path.vertices[:, 1].max()) == (1, 3)
    assert drawn.get_linewidth() > 0


def test_figures_show_means_in_bands_over_seeds(tmp_path, monkeypatch):
    drawn = {}

    def keep(drawings, folder):
        drawn.update({name: draw() for name, draw in drawings.items()})
        return []

    monkeypatch.setattr(figures, "save_figures", keep)
    figures.write_sweep_figures(fake_rows(), tmp_path)
    names = ("coupling", "increments", "mixing", "scale")
    assert set(drawn) == {f"sweep_{name}" for name in names}
    axis = drawn["sweep_coupling"].axes[1]
    lines = {line.get_label(): line for line in axis.lines}
    np.testing.assert_allclose(lines["Residual MLP, s = 0.1"].get_ydata(), [3, 5])
    np.testing.assert_allclose(lines["MLP"].get_ydata(), [3.5, 5])
    bars = axis.collections[1].get_segments()
    assert [bar[:, 1].tolist() for bar in bars] == [[2, 4], [4, 6]]
    places = [bar[0, 0] for x in axis.collections for bar in x.get_segments()]
    assert len(set(places)) == len(places)  # no bar covers another
    memory = drawn["sweep_mixing"].axes[0]
    band = memory.collections[1].get_paths()[0].vertices
    assert {0.5, 0.7} <= set(band[:, 1])
    memory = drawn["sweep_scale"].axes[5]
    law = next(line for line in memory.lines if "log" in line.get_label())
    assert law.get_ydata()[0] == pytest.approx(2 / math.log(1.01))
    (line,) = (line for line in memory.lines if line.get_label() == "Residual MLP")
    assert list(line.get_xdata()) == [0.1, 0.3]
    # Of the deepest networks alone: a row of depth 2 moves nothing.
    rows = fake_rows()
    rows[7]["initial_correlation_time"] = 100.0
    assert rows[7]["depth"] == 2
    figures.write_sweep_figures(rows, tmp_path)
    (again,) = (
        line
        for line in drawn["sweep_scale"].axes[5].lines
        if line.get_label() == "Residual MLP"
    )
    np.testing.assert_array_equal(again.get_ydata(), line.get_ydata())
    assert "resmlp, s = 0.3" in analyse.format_sweep(fake_rows())


def test_means_of_some_seeds_say_how_many_and_of_none_leave_a_gap():
    """A diverged seed, or an undefined number, is not passed over."""
    rows = trend("cnn", None, (True, True, True))
    for row in rows:
        if row["depth"] == 4 and row["seed"] == 1:
            row |= {"toeplitz_residual": math.nan, "r_squared": math.inf}
        if row["depth"] == 8:
            row["toeplitz_residual"] = None
    table = {row[1]: row for row in analyse.mean_rows(rows)[1:]}
    assert [table[depth][5] for depth in "248"] == ["0.5", "0.5 (2 of 3)", "n/a"]
    assert table["4"][7] == "0.904 (2 of 3)"
    assert analyse.depth_rows(rows)[1][4] == "n/a"  # two depths make no trend
    figure = figures._coupling(figures.lines_of(rows))
    axis = figure.axes[0]
    np.testing.assert_array_equal(axis.lines[0].get_ydata(), [0.5, 0.5, np.nan, 0.5])
    assert [x.get_text() for x in axis.texts] == ["2 of 3"]
    assert axis.texts[0].xy == (axis.lines[0].get_xdata()[1], 0.5)


def test_widths_and_activations_are_lines_of_their_own():
    rows = [
        row | {"width": width, "activation": activation}
        for row in fake_rows()
        for width in (8, 16)
        for activation in ("relu", "gelu")
    ]
    table = analyse.format_sweep(rows)
    assert "resmlp, s = 0.3, w = 16, gelu" in table
    assert "mlp, w = 8, relu" in table
    assert "w = " not in analyse.format_sweep(fake_rows())


def test_flags_give_the_settings_and_name_what_is_wrong():
    def parse(*arguments):
        values = absl_flags.FlagValues()
        flags.define_flags(settings=SweepConfig, flag_values=values)
        values(["script", *arguments])
        return flags.config_from_flags(values, settings=SweepConfig)

    assert parse() == SweepConfig()
    changed = parse("--depths=2,64", "--branch_scales=0.5", "--models=ssm")
    assert (changed.depths, changed.branch_scales) == ((2, 64), (0.5,))
    assert changed.models == ("ssm",)
    with pytest.raises(absl_flags.IllegalFlagValueError, match="list of int numbers"):
        parse("--depths=two")
    with pytest.raises(absl_flags.IllegalFlagValueError, match="different numbers > 0"):
        parse("--depths=0")
    with pytest.raises(UserError, match="--window: expected at most --num_shells"):
        SweepConfig(window=30)
    with pytest.raises(UserError, match="network transformer: --width: expected a mul"):
        cell_network(
            list_cells(SweepConfig(models=("transformer",), widths=(3,)))[0], 3, 0.5
        )


def trend(model, scale, falls):
    """A network whose residual falls with depth in the seeds that are given True."""
    return [
        dict.fromkeys(analyse.COLUMNS, 0.5)
        | {
            "model": model,
            "branch_scale": scale,
            "width": 16,
            "activation": "gelu",
            "depth": depth,
            "seed": seed,
            "toeplitz_middle_third": 1 / depth if down else depth / 100,
            "slope": 1 + 1 / depth,
            "r_squared": None if depth == 2 else 0.9 + depth / 1000,
        }
        for depth in (2, 4, 8, 16)
        for seed, down in enumerate(falls)
    ]


def test_the_trend_with_depth_is_told_by_ranks():
    _, first, second, third = analyse.depth_rows(
        trend("rescnn", 0.1, (True, True, True))
        + trend("rescnn", 0.3, (True, False, True))
        + trend("cnn", None, (False, False))
    )
    up, down = "1.00 [1.00, 1.00]", "-1.00 [-1.00, -1.00]"
    known = f"{up} (9 of 12)"  # R^2 is undefined at one of four depths
    assert first == ["rescnn, s = 0.1", "2, 4, 8, 16", down, down, known]
    assert second[2] == "-0.33 [-1.00, 1.00]"
    assert third[2] == up
    unfinished = [
        row
        for row in trend("rescnn", 0.1, (True, True, True))
        if row["seed"] < 2 or row["depth"] == 2
    ]
    assert analyse.depth_rows(unfinished)[1][2] == "n/a"
    assert analyse.format_sweep(trend("cnn", None, (True,))).count("| network") == 2
    table, legend = analyse.format_sweep(fake_rows()).split("\n\n")
    assert table.count("| network") == 1
    assert " ".join(legend.split()) == " ".join(analyse.LEGEND)


def test_rank_correlation_leaves_out_what_is_undefined():
    assert analyse.rank_correlation([1, 2, 3, 4], [4.0, None, 3.0, 2.0]) == -1
    assert np.isnan(analyse.rank_correlation([1, 2, 3], [None, 1.0, 2.0]))
    assert np.isnan(analyse.rank_correlation([1, 2, 3], [0.5, 0.5, 0.5]))
    assert analyse.rank_correlation([2, 2, 4, 4], [1.0, 2.0, 1.0, 2.0]) == 0


def test_a_size_of_0_is_named_where_a_logarithmic_axis_cannot_show_it():
    path = Path(__file__).parents[1] / "docs" / "results" / "sweep" / "sweep.csv"
    rows = analyse.read_rows(path)
    for row in rows:
        if (row["model"], row["depth"]) == ("mlp", 4):
            row["initial_increment_variance"] = 0.0
    figure = figures._increments(figures._titled(analyse.lines_of(rows)))
    texts = {
        axis.get_ylabel(): [text.get_text() for text in axis.texts]
        for axis in figure.axes
    }
    assert texts.pop("variance of the\nincrements") == ["0 somewhere: MLP"]
    assert not any(texts.values())


def test_script_draws_again_from_the_rows_alone(swept, tmp_path):
    rows = swept[1]
    analyse.write_rows(tmp_path / "sweep.csv", rows)
    done = run_script("sweep.py", f"--workdir={tmp_path}", "--figures_only")
    assert done.code == 0, done.err
    places = f"{tmp_path / 'sweep.csv'}\n{tmp_path / 'figures'}"
    ending = f"{places}\nnext: grsd report {tmp_path}\n"
    assert done.out == f"{analyse.format_sweep(rows)}\n{ending}"
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"sweep_coupling.png", "sweep_scale.pdf"} <= drawn
    assert len(drawn) == 8
    wrong = run_script("sweep.py", f"--workdir={tmp_path}", "--depths=none")
    assert wrong.code != 0
    assert "Traceback" not in wrong.err
