"""What a record costs: the command runs, and the rates are a difference."""

import importlib
import sys
from pathlib import Path

import pytest

from grsd_jax.experiments.common import records

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("record_cost")
    for name in [x for x in sys.modules if x.split(".")[0] == "comparison"]:
        del sys.modules[name]


def test_the_rates_alone_are_the_difference_of_two_probes(script):
    numbers = {"balance, dense": 1, "balance, Lanczos": 9}
    numbers["balance and rates, dense"] = 4
    rows = [
        {"probe": name, "seconds": 0.5 * k, "cost": 10.0 * k, "cost_in_steps": 2.0 * k}
        for name, k in numbers.items()
    ]
    (last,) = [x for x in script.table(rows).splitlines() if "by difference" in x]
    assert [cell.strip() for cell in last.split("|")[2:5]] == ["1.5", "30", "6"]


@pytest.mark.scheduled
def test_a_rehearsal_measures_all_probes(script, tmp_path):
    script.main(["--rehearse", "--out", str(tmp_path / "cost.json")])
    found = records.read_json(tmp_path / "cost.json")
    assert [row["probe"] for row in found["rows"]] == list(script.PROBES)
    assert found["settings"]["n"] == 40
    for row in found["rows"]:
        assert (
            0
            < row["seconds"]
            == pytest.approx(
                row["cost_in_steps"] * found["settings"]["step_seconds"], rel=1e-3
            )
        )
