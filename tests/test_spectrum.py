import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax import block_lanczos, resolved_pairs, ritz_pairs, spectral_density
from oracles import symmetric_with_spectrum


def run(spectrum, block_size, num_steps, seed=0):
    dense, _ = symmetric_with_spectrum(spectrum)
    matrix = jnp.asarray(dense, jnp.float32)
    start = jax.random.normal(jax.random.key(seed), (len(spectrum), block_size))
    return block_lanczos(
        lambda block: jnp.matmul(matrix, block, precision="highest"),
        start,
        num_steps,
        key=jax.random.key(1),
    )


def test_ritz_pairs_of_a_whole_space_are_the_eigenpairs():
    spectrum = np.geomspace(1, 1e-3, 40)
    _, basis = symmetric_with_spectrum(spectrum)
    pairs = ritz_pairs(run(spectrum, 4, 10))
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
    unfinished = ritz_pairs(run(np.geomspace(1, 1e-4, 60), 2, 12))
    assert 0 < int(jnp.sum(unfinished.resolved)) < 24


def test_density_has_the_right_mass():
    spectrum = np.r_[np.geomspace(1, 1e-2, 80), np.zeros(20)]
    runs = [run(spectrum, 4, 20, seed) for seed in range(4)]
    for results in (runs[0], runs):
        density = spectral_density(results, 100)
        spacing = np.diff(np.log(density.grid)).mean()
        total = np.sum(density.density) * spacing + density.mass_below
        np.testing.assert_allclose(total, 100, rtol=1e-3)
    below, above = density.mass_below, 100 - density.mass_below
    assert abs(below - 20) < 5
    left = np.sum(density.density[density.grid < 0.1]) * spacing
    assert abs(left - above / 2) < 6


def test_density_of_one_value_peaks_there():
    density = spectral_density(run(np.full(30, 2.0), 2, 3), 30)
    peak = density.grid[jnp.argmax(density.density)]
    np.testing.assert_allclose(peak, 2, rtol=0.02)
    np.testing.assert_allclose(density.mass_below, 0, atol=1e-4)


def test_zero_operator_has_all_its_mass_below():
    density = spectral_density(run(np.zeros(30), 2, 3), 30)
    np.testing.assert_allclose(density.mass_below, 30, rtol=1e-5)
    assert np.all(np.isfinite(density.density))


def test_bad_input_is_named():
    result = run(np.ones(10), 2, 2)
    with pytest.raises(ValueError, match="tolerance: expected a finite number > 0"):
        ritz_pairs(result, tolerance=0.0)
    with pytest.raises(ValueError, match="floor: expected a finite number > 0"):
        ritz_pairs(result, floor=-1.0)
    with pytest.raises(ValueError, match=r"len\(results\): expected an integer >= 1"):
        spectral_density([], 10)
    with pytest.raises(ValueError, match="dimension: expected a finite number > 0"):
        spectral_density(result, 0)
