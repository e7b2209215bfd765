"""The comparison with peers: targets, table, plot and page."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytest.importorskip("flax")
sys.path.append(str(ROOT / "benchmarks"))
grid = importlib.import_module("comparison.grid")
report = importlib.import_module("report")
table = importlib.import_module("comparison.table")
targets = importlib.import_module("comparison.targets")


def make_row(peer, task, seconds, problem="resnet18_w16_n32", **changes):
    return {
        "problem": problem,
        "task": task,
        "peer": peer,
        "variant": "variant",
        "device": "cpu",
        "status": "ok",
        "seconds": {"minimum": seconds, "median": seconds, "repeats": [seconds]},
        "prepare_seconds": None,
        "compile_seconds": 3.0,
        "peak_mib": 512.0,
        "error": 1e-7,
        "versions": {"numpy": "1.2.3"},
        **changes,
    }


def outcome_of(rows, task, word=""):
    (outcome,) = (
        outcome
        for outcome in targets.outcomes(rows)
        if (outcome.problem, outcome.task) == ("resnet18_w16_n32", task)
        and word in outcome.goal
    )
    return outcome


def test_targets_without_rows_are_not_measured():
    assert all(outcome.met is None for outcome in targets.outcomes([]))


@pytest.mark.parametrize(("seconds", "met"), [(2.0, True), (1.9, False)])
def test_the_fastest_variant_that_agrees_counts(seconds, met):
    rows = [
        make_row("grsd_jax", "dense", 1.0),
        make_row("torch_func", "dense", 3.0),
        make_row("torch_func", "dense", seconds),
        make_row("torch_func", "dense", 0.1, status="disagrees"),
        make_row("torch_func", "dense", 0.1, device="gpu"),
    ]
    outcome = outcome_of(rows, "dense", "torch.func")
    assert outcome.met is met
    assert outcome.measured == f"{seconds:.2f} times"


def test_preparation_counts_for_the_dense_matrix_alone():
    rows = [
        make_row("grsd_jax", task, 0.5, prepare_seconds=0.5)
        for task in ("dense", "block_8")
    ]
    assert [targets.cost(row) for row in rows] == [1.0, 0.5]


@pytest.mark.parametrize(("beside", "met"), [(1.0, True), (0.9, False)])
def test_derivative_is_measured_in_block_products_beside_it(beside, met):
    beside = {"minimum": beside, "median": beside, "repeats": [beside]}
    row = make_row("grsd_jax_plain", "derivative_8", 1.0, beside_seconds=beside)
    assert outcome_of([row], "derivative_8", "by the plain path").met is met
    row = make_row("grsd_jax", "derivative_32", 1.0, beside_seconds=beside)
    (outcome, plain) = (o for o in targets.outcomes([row]) if o.task == "derivative_32")
    assert (outcome.met, plain.met) == (met, None)


@pytest.mark.parametrize(("seconds", "met"), [(1.0, True), (1.01, False)])
def test_plain_path_is_measured_in_the_rate_of_the_forward_pass(seconds, met):
    beside = {"minimum": 0.1, "median": 0.1, "repeats": [0.1]}
    row = make_row(
        "grsd_jax_plain",
        "block_8",
        seconds,
        beside_seconds=beside,
        details={"flops": 80.0, "beside_flops": 10.0},
    )
    assert outcome_of([row], "block_8", "FLOP rate").met is met


def test_eigenpairs_are_compared_in_columns_and_in_time():
    narrow, wide = {"columns": 64}, {"columns": 96}
    rows = [
        make_row("grsd_jax", "eigenpairs", 2.0, variant="b = 1", details=narrow),
        make_row("grsd_jax", "eigenpairs", 0.5, variant="b = 8", details=wide),
        make_row("grsd_jax", "eigenpairs", 0.1, details=wide, status="disagrees"),
        make_row("scipy_eigsh", "eigenpairs", 1.0, details={"columns": 80}),
    ]
    columns = outcome_of(rows, "eigenpairs", "fewer operator")
    assert (columns.met, columns.measured) == (True, "64 against 80 (b = 1)")
    assert outcome_of(rows, "eigenpairs", "of fewest columns").met is False
    best = outcome_of(rows, "eigenpairs", "the fastest width")
    assert (best.met, best.measured) == (True, "0.500 s against 1.000 s (b = 8)")


@pytest.fixture
def results():
    rows = [
        make_row("grsd_jax", "dense", 1.0),
        make_row("torch_func", "dense", 2.5, error=None, status="disagrees"),
        make_row("torch_func", "block_8", 0.0125),
    ]
    reason = {"status": "cannot", "reason": "it has none", "variant": None}
    missing = {
        **{key: rows[0][key] for key in ("problem", "device")},
        "task": "eigenpairs",
        "peer": "torch_func",
        **reason,
    }
    machine = {"cpu": "a CPU", "cores": 2, "memory_gib": 24.0, "threads": 2}
    return {
        "environment": {"cpu": machine},
        "problems": {"resnet18_w16_n32": {"dimension": 320, "parameters": 701466}},
        "rows": [*rows, missing],
    }


def test_table_tells_times_reasons_and_what_is_not_measured(results):
    text = table.render(results)
    assert "a CPU, 2 cores" in text
    assert "n = 320, P = 701,466" in text
    assert "1.00 (1.00) | 1.00 | 3.00 | 512 | 1e-07 |  |\n" in text
    assert "not counted: disagrees" in text
    assert "cannot: it has none" in text
    header = next(line for line in text.splitlines() if "call s (median)" in line)
    rows = [line for line in text.splitlines() if "| torch.func" in line]
    widths = {line.count("|") for line in rows}
    assert len(rows) == 3
    assert widths == {header.count("|")}


def test_table_shows_a_gpu_time_beside_that_of_the_cpu(results):
    results["rows"].append(make_row("grsd_jax", "dense", 0.25, device="gpu"))
    text = table.render(results)
    assert "| 1e-07 |  | 0.250 |" in text
    assert "columns | GPU call s |" in text
    assert f"not finite |  | {table.NOT_MEASURED} |" in text


def test_table_leaves_out_columns_that_no_row_of_the_problem_has(results):
    assert not re.search("first result|GPU", table.render(results))
    first = {"first_result_seconds": 9.0, "first_result_seconds_cached": 4.0}
    results["rows"][0].update(first)
    text = table.render(results)
    assert "compile s | first result s (cached) | peak MiB" in text
    assert "| 3.00 | 9.0 (4.0) | 512 |" in text
    assert "GPU" not in text


def test_page_takes_the_table_between_its_markers():
    page = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    new = report.replaced(page, "table")
    assert new == f"before\n{report.BEGIN}\n\ntable\n{report.END}\nafter\n"
    assert report.replaced(new, "table") == new
    with pytest.raises(ValueError, match="page: expected one"):
        report.replaced("no markers", "table")


def test_plot_draws_the_best_of_each_peer(results, tmp_path):
    plot = importlib.import_module("comparison.plot")
    results["rows"].append(make_row("torch_func", "dense", 4.0))
    results["rows"].append(make_row("torch_func", "dense", 3.0))
    assert plot.relative_times(results["rows"]) == {
        ("resnet18_w16_n32", "dense"): {"torch_func": 3.0}
    }
    plot.draw(results["rows"], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_committed_page_shows_the_committed_results():
    results = json.loads((ROOT / "docs/results/benchmarks/results.json").read_text())
    page = (ROOT / "docs/benchmarks.md").read_text()
    assert report.replaced(page, table.render(results)) == page
    met = [outcome.met for outcome in targets.outcomes(results["rows"])]
    assert f"Of the {len(met)} [targets](#targets) {met.count(True)} are met." in page


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({}, "not measured"),
        (
            {"first_result_seconds": None, "first_result_seconds_cached": 1.0},
            "not measured",
        ),
        (
            {"first_result_seconds": 9.04, "first_result_seconds_cached": 4.0},
            "9.0 (4.0)",
        ),
    ],
)
def test_the_time_to_the_first_result_stands_beside_that_with_a_cache(row, expected):
    assert table._first_result(row) == expected
