"""The script that times products with and without factors, at its smallest."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.mark.scheduled
def test_both_forms_are_timed_and_agree(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("where_factors_help")
    out = tmp_path / "found.json"
    sizes = ["--positions", "2", "--widths", "8", "--num_examples", "3"]
    arguments = [*sizes, "--num_classes", "3", "--repeats", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["where_factors_help.py", *arguments])
    script.main()
    (row,) = json.loads(out.read_text())["rows"]
    assert row["forms"]["factors"]["num_factored"] == 3
    assert row["forms"]["plain"]["num_factored"] == 0
    assert row["forms"]["factors"]["error"] < 1e-5
    assert len(capsys.readouterr().out.splitlines()) == 2
