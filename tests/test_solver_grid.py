"""The grid of the two solvers, on the smallest of its points."""

import json
from pathlib import Path

import jax
import pytest

from grsd_jax.experiments.benchmark import solver_grid
from grsd_jax.experiments.benchmark.solver_grid import Point

RECORDED = Path(__file__).parents[1] / "docs/results/solver_grid/solver_grid.json"

ROW = {
    "network": "mlp",
    "width": 4,
    "num_examples": 8,
    "num_columns": 16,
    "jacobian": "plain",
    "n": 80,
    "num_params": 100,
    "chosen": "dense",
    "dense_seconds": 3.0,
    "lanczos_seconds": 2.0,
    "dense_operations": 10.0,
    "lanczos_operations": 20.0,
}


def test_the_loss_is_that_of_the_chosen_solver():
    assert solver_grid.loss_of_choice(ROW) == 1.5
    assert solver_grid.loss_of_choice(ROW | {"chosen": "lanczos"}) == 1.0
    assert "1.50" in solver_grid.format_grid([ROW]).splitlines()[-1]


def test_the_grid_has_both_forms_and_no_point_twice():
    points = solver_grid.grid()
    assert len(set(points)) == len(points)
    assert {point.jacobian for point in points} == {"plain", "factored"}
    assert {point.network for point in points} == {"mlp", "resnet18"}


def test_the_recorded_run_is_of_this_model_and_within_its_bound():
    rows = json.loads(RECORDED.read_text())["rows"]
    points = [Point(*(row[name] for name in Point._fields)) for row in rows]
    assert points == solver_grid.grid()
    assert max(solver_grid.loss_of_choice(row) for row in rows) <= 1.15
    for point, row in zip(points, rows, strict=True):
        if point.network == "mlp":  # those that are traced in no time
            with jax.numpy_dtype_promotion("standard"):
                predicted = solver_grid.predict_point(point)
            assert predicted.pop("chosen") == row["chosen"]
            for name, value in predicted.items():
                assert value == pytest.approx(row[name], rel=0.02)


def test_the_figure_is_drawn(tmp_path):
    paths = solver_grid.draw_grid([ROW, ROW | {"jacobian": "factored"}], tmp_path)
    assert {path.name for path in paths} == {"solver_grid.png", "solver_grid.pdf"}


@pytest.mark.slow
def test_a_point_is_measured_by_both_solvers():
    with jax.numpy_dtype_promotion("standard"):
        row = solver_grid.measure_point(Point("mlp", 4, 4, 16, "plain"))
    assert set(ROW) == set(row)
    assert row["n"] == 40
    assert row["dense_seconds"] > 0
    assert row["lanczos_seconds"] > 0
    json.dumps(row)
