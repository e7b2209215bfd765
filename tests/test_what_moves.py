"""The benchmark of what moves, rehearsed on a small network."""

import importlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
script = importlib.import_module("what_moves")


@pytest.mark.scheduled
def test_every_setting_has_its_numbers_and_a_killed_run_goes_on(tmp_path, capsys):
    with jax.numpy_dtype_promotion("standard"):  # which AdamW relies on
        script.main(["--rehearse", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "what_moves.json").read_text())
    first, second = report["runs"]
    assert first["setting"] == "SGD 0.02, gelu"
    assert second["setting"] == "AdamW 0.001"
    np.testing.assert_allclose(first["times"], 0.02 * np.array([16, 32, 64, 128]))
    for entry in (first, second):
        assert entry["steps"] == [64, 128]
        assert np.sum(entry["energies"][0]) == pytest.approx(1, rel=1e-5)
        lost = 1 - np.sum(entry["energies"][1])
        assert entry["lost"] == pytest.approx(lost, abs=1e-4)
        assert [look["length"] for look in entry["resolution"]] == [
            1, 2, 4, 8, 16, 32, 64,
        ]  # fmt: skip
        assert entry["resolution"][-1]["lost"] == pytest.approx(lost, abs=1e-4)
        assert 0 < script.turned(entry) < 1
    assert (tmp_path / "what_moves.png").stat().st_size > 10_000
    before = [path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()]
    script.main(["--rehearse", "--out", str(tmp_path)])
    after = [path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()]
    assert before == after
    assert "AdamW 0.001" in capsys.readouterr().out


def test_only_known_settings_are_run(capsys):
    with pytest.raises(SystemExit):
        script.main(["--settings", "none", "--out", "nowhere"])
    assert "invalid choice: 'none'" in capsys.readouterr().err
