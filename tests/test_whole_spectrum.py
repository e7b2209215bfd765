"""The benchmark of the whole spectrum, rehearsed on small networks."""

import importlib
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax.shells import StochasticCoupling

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


def test_scatter_alone_leaves_a_residual_that_falls_with_the_pairs_of_a_cell():
    """In one window of alike cells the mean squared residual follows from chi^2."""
    size = 5
    shape = (size, size)
    found = {}
    for count in (30.0, 300.0):
        coupling = StochasticCoupling(
            matrix=jnp.ones(shape),
            mask=jnp.ones(shape, bool),
            replicates=jnp.ones((2, *shape)),
            log_error=jnp.zeros(shape),
            lanczos_error=jnp.zeros(shape),
            counts=jnp.full(size, count),
            relative_drift=jnp.zeros(size),
            finite=jnp.bool_(True),
        )
        (found[count],) = script.residuals_of_scatter(coupling)["windows"]
    # A diagonal of k cells keeps (k - 1) of k parts of its scatter about its mean.
    variance = {count: 2 / count**2 for count in found}
    kept = sum(2 * (k - 1) for k in (2, 3, 4)) + 2 * (size - 1)
    for count, residual in found.items():
        np.testing.assert_allclose(
            residual, np.sqrt(kept * variance[count] / size**2), rtol=0.05
        )


def test_a_folder_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        script.main([])
    assert "expected the folder with both networks" in capsys.readouterr().err
