"""Sweeps: the grid, what a cell measures, resuming, and the figures."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from absl import flags as absl_flags

import grsd_jax
from grsd_jax import models
from grsd_jax.experiments.common import flags, records
from grsd_jax.experiments.common.config import CHAINS, UserError
from grsd_jax.experiments.common.data import evaluation_batches, synthetic_textures
from grsd_jax.experiments.sweep import figures as sweep_figures
from grsd_jax.experiments.sweep import run as sweeping
from grsd_jax.experiments.sweep.config import (
    SweepConfig,
    cell_fingerprint,
    cell_network,
    list_cells,
)

SCRIPT = Path(__file__).parents[1] / "scripts" / "sweep.py"
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


def test_fingerprints_follow_what_a_cell_computes_and_nothing_else():
    config = SweepConfig()
    cell = list_cells(config)[0]
    mark = cell_fingerprint(cell, config, "data")
    changes = {"workdir": "elsewhere", "seeds": (5,), "depths": (3,)}
    assert mark == cell_fingerprint(cell, SweepConfig(**changes), "data")
    assert mark != cell_fingerprint(cell, SweepConfig(steps=3), "data")
    assert mark != cell_fingerprint(cell._replace(seed=9), config, "data")
    assert mark != cell_fingerprint(cell, config, "other data")


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sweep")
    return workdir, sweeping.run_sweep(DATA, small(workdir))


def test_a_sweep_writes_one_row_per_cell(swept):
    workdir, results = swept
    assert json.loads((workdir / "sweep.json").read_text())["data_fingerprint"]
    with open(workdir / "sweep.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == sweeping.COLUMNS
    assert [(r["model"], int(r["seed"])) for r in table] == [
        ("mlp", 0),
        ("mlp", 1),
        ("ssm", 0),
        ("ssm", 1),
    ]
    for line, row in zip(table, results["rows"], strict=True):
        assert line["status"] == "done"
        assert float(line["train_loss"]) == pytest.approx(row["train_loss"])
        assert 0 < row["num_resolved"] <= 4 * 3
        assert 0 <= row["toeplitz_residual"] <= 1
        assert row["num_paths"] == 16
    # The state-space model's Jacobian is rho times an orthogonal matrix.
    assert results["rows"][2]["initial_increment_mean"] == pytest.approx(
        math.log(0.9), rel=1e-5
    )
    assert results["rows"][2]["trained_increment_variance"] < 1e-10


def test_a_row_is_what_the_library_measures(swept):
    workdir, _ = swept
    config = small(workdir, steps=0)
    cell = list_cells(config)[0]
    row = sweeping.measure_cell(cell, DATA, config, optax.sgd(0.1))
    model = cell_network(cell, 3, config.rho)
    batches = evaluation_batches(
        DATA.test_images, DATA.test_labels, num_batches=1, batch_size=4, seed=0
    )
    params = model.init(jax.random.key(0), batches["image"][0])["params"]
    loss_fn = models.linen_loss_fn(model, {})
    measured = grsd_jax.measure_coupling(
        models.linen_error_fn(model, {}),
        params,
        batches,
        grsd_jax.gradient_flow_direction(loss_fn, params, batches),
        key=jax.random.key(0),
        num_shells=4,
        window=2,
        num_bootstrap=0,
    )
    assert row["slope"] == pytest.approx(float(measured.diagonal_fit.exponent), 1e-3)
    assert row["r_squared"] == pytest.approx(
        float(measured.diagonal_fit.r_squared), 1e-3
    )
    residual = float(measured.renormalized.residual)
    assert row["toeplitz_residual"] == pytest.approx(residual, 1e-3)
    assert row["initial_increment_mean"] == row["trained_increment_mean"]


def test_a_sweep_goes_on_after_a_kill_and_does_nothing_twice(swept, monkeypatch):
    workdir, results = swept
    done = []

    def count(cell, *args):
        done.append(cell.name)
        with open(workdir / "sweep.csv", newline="") as file:
            assert len(list(csv.DictReader(file))) == 3  # all but this one
        return results["rows"][3]

    monkeypatch.setattr(sweeping, "measure_cell", count)
    again = sweeping.run_sweep(DATA, small(workdir))
    assert done == []
    assert [r["slope"] for r in again["rows"]] == pytest.approx(
        [r["slope"] for r in results["rows"]]
    )
    (workdir / "cells" / "ssm-L2-w3-seed1.json").unlink()  # killed in the last cell
    sweeping.run_sweep(DATA, small(workdir))
    assert done == ["ssm-L2-w3-seed1"]
    damaged = workdir / "cells" / "ssm-L2-w3-seed1.json"
    note = json.loads(damaged.read_text())
    damaged.write_text(json.dumps(note | {"fingerprint": "of other settings"}))
    sweeping.run_sweep(DATA, small(workdir))
    assert done == ["ssm-L2-w3-seed1"] * 2


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
                row = dict.fromkeys(sweeping.COLUMNS, 0.5 + 0.1 * seed)
                row |= {"model": model, "depth": depth, "branch_scale": scale}
                row |= {"width": 16, "activation": "gelu"}
                rows.append(row | {"seed": seed, "slope": depth + seed})
    rows[0]["slope"] = None  # what is undefined is left out
    return rows


def test_figures_show_means_in_bands_over_seeds(tmp_path, monkeypatch):
    drawn = {}

    def keep(drawings, folder):
        drawn.update({name: draw() for name, draw in drawings.items()})
        return []

    monkeypatch.setattr(sweep_figures, "save_figures", keep)
    sweep_figures.write_sweep_figures({"rows": fake_rows()}, tmp_path)
    names = ("coupling", "increments", "mixing", "scale")
    assert set(drawn) == {f"sweep_{name}" for name in names}
    axis = drawn["sweep_coupling"].axes[1]
    lines = {line.get_label(): line for line in axis.lines}
    np.testing.assert_allclose(lines["resmlp, s = 0.1"].get_ydata(), [3, 5])
    np.testing.assert_allclose(lines["mlp"].get_ydata(), [3.5, 5])
    band = axis.collections[1].get_paths()[0].vertices
    assert {2.0, 4.0, 6.0} <= set(band[:, 1])
    memory = drawn["sweep_scale"].axes[5]
    law = next(line for line in memory.lines if "log" in line.get_label())
    assert law.get_ydata()[0] == pytest.approx(2 / math.log(1.01))
    (line,) = (line for line in memory.lines if line.get_label() == "resmlp")
    assert list(line.get_xdata()) == [0.1, 0.3]
    # Of the deepest networks alone: a row of depth 2 moves nothing.
    rows = fake_rows()
    rows[7]["initial_correlation_time"] = 100.0
    assert rows[7]["depth"] == 2
    sweep_figures.write_sweep_figures({"rows": rows}, tmp_path)
    (again,) = (
        line
        for line in drawn["sweep_scale"].axes[5].lines
        if line.get_label() == "resmlp"
    )
    np.testing.assert_array_equal(again.get_ydata(), line.get_ydata())
    table = sweep_figures.format_sweep({"rows": fake_rows()})
    assert "resmlp, s = 0.3" in table
    with pytest.raises(UserError, match="expected at least one row"):
        sweep_figures.format_sweep({})


def test_widths_and_activations_are_lines_of_their_own():
    rows = [
        row | {"width": width, "activation": activation}
        for row in fake_rows()
        for width in (8, 16)
        for activation in ("relu", "gelu")
    ]
    table = sweep_figures.format_sweep({"rows": rows})
    assert "resmlp, s = 0.3, w = 16, gelu" in table
    assert "mlp, w = 8, relu" in table
    one = sweep_figures.format_sweep({"rows": fake_rows()})
    assert "w = " not in one


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
    with pytest.raises(UserError, match="network transformer: width: expected a mul"):
        cell_network(
            list_cells(SweepConfig(models=("transformer",), widths=(3,)))[0], 3, 0.5
        )


@pytest.mark.slow
def test_script_sweeps_draws_and_draws_again(tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, str(SCRIPT), f"--workdir={tmp_path}", *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )

    sizes = ["--models=resmlp", "--depths=2", "--widths=4", "--branch_scales=0.3"]
    done = run(*sizes, "--seeds=0", "--steps=1", "--batch_size=4", "--num_shells=4")
    assert done.returncode == 0, done.stderr
    assert "resmlp, s = 0.3" in done.stdout
    first = sorted((tmp_path / "figures").iterdir())
    assert len(first) == 8
    first[0].unlink()
    assert run("--figures_only").returncode == 0
    assert first[0].exists()
    assert records.read_json(tmp_path / "sweep.json")["rows"][0]["status"] == "done"
    wrong = run("--depths=none")
    assert wrong.returncode != 0
    assert "Traceback" not in wrong.stderr
