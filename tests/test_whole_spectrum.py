"""The benchmark of the whole spectrum, rehearsed on small networks."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
script = importlib.import_module("whole_spectrum")


@pytest.mark.scheduled
def test_both_networks_are_measured_and_drawn(tmp_path, capsys):
    script.main(["--rehearse", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "whole_spectrum.json").read_text())
    for entry in report["networks"].values():
        matrix, mask = np.array(entry["matrix"]), np.array(entry["mask"])
        assert matrix.shape == (8, 8)
        assert np.all(matrix[mask] > 0)
        assert entry["dimension"] == 2 * 8 * 10
        assert entry["seconds"] > 0
        assert entry["peak_memory_gib"] > 0
        assert len(entry["toeplitz"]["windows"]) == 4
    assert sorted(report["networks"]) == ["mlp", "resmlp"]
    assert "| resmlp" in capsys.readouterr().out
    assert (tmp_path / "whole_spectrum.png").stat().st_size > 10_000


def test_a_folder_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        script.main([])
    assert "expected the folder with both networks" in capsys.readouterr().err
