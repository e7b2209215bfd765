"""Ritz pairs of a block Lanczos run, and which of them count as resolved."""

import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax.linalg import resolved_pairs, ritz_pairs
from lanczos_runs import run_spectrum
from oracles import symmetric_with_spectrum


def test_ritz_pairs_of_a_whole_space_are_the_eigenpairs():
    spectrum = np.geomspace(1, 1e-3, 40)
    _, basis = symmetric_with_spectrum(spectrum)
    pairs = ritz_pairs(run_spectrum(spectrum, 4, 10))
    np.testing.assert_allclose(pairs.values, spectrum, atol=1e-6)
    overlap = np.abs(basis.T @ np.asarray(pairs.vectors, np.float64))
    np.testing.assert_allclose(np.diag(overlap), 1, atol=1e-3)
    assert np.all(np.diff(pairs.values) <= 0)
    assert bool(jnp.all(pairs.resolved))


def test_resolved_follows_its_definition():
    values = jnp.array([1.0, 0.5, 1e-3, 1e-8, -1e-9])
    residuals = jnp.array([0.0, 0.1, 1e-6, 0.0, 0.0])
    got = resolved_pairs(values, residuals, tolerance=0.1, floor=1e-6)
    np.testing.assert_array_equal(got, [True, False, True, False, False])
    unfinished = ritz_pairs(run_spectrum(np.geomspace(1, 1e-4, 60), 2, 12))
    assert 0 < int(jnp.sum(unfinished.resolved)) < 24


def test_bad_input_is_named():
    result = run_spectrum(np.geomspace(1, 1e-4, 60), 2, 12)
    with pytest.raises(ValueError, match="tolerance: expected a finite number > 0"):
        ritz_pairs(result, tolerance=0.0)
    with pytest.raises(ValueError, match="floor: expected a finite number > 0"):
        ritz_pairs(result, floor=-1.0)
