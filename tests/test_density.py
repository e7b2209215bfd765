"""The density of eigenvalues: its mass, its place, and what is below its floor."""

import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax.linalg import spectral_density
from lanczos_runs import run_spectrum


def test_density_has_the_right_mass():
    spectrum = np.r_[np.geomspace(1, 1e-2, 80), np.zeros(20)]
    runs = [run_spectrum(spectrum, 4, 20, seed) for seed in range(4)]
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
    density = spectral_density(run_spectrum(np.full(30, 2.0), 2, 3), 30)
    peak = density.grid[jnp.argmax(density.density)]
    np.testing.assert_allclose(peak, 2, rtol=0.02)
    np.testing.assert_allclose(density.mass_below, 0, atol=1e-4)


def test_zero_operator_has_all_its_mass_below():
    density = spectral_density(run_spectrum(np.zeros(30), 2, 3), 30)
    np.testing.assert_allclose(density.mass_below, 30, rtol=1e-5)
    assert np.all(np.isfinite(density.density))


@pytest.mark.parametrize("values", [np.full(30, 2.0), np.geomspace(1e-4, 1, 30)])
@pytest.mark.parametrize("width", [1e-3, 1e-8, 1e-25, 1e-200])
def test_a_density_narrower_than_its_grid_keeps_its_mass(values, width):
    density = spectral_density(run_spectrum(values, 2, 3), 30, width=width)
    assert np.all(np.isfinite(density.density))
    low, high = (np.log(np.asarray(density.grid[end], np.float64)) for end in (0, -1))
    total = np.sum(np.asarray(density.density, np.float64)) * (high - low) / 255
    wide = high - low > 1e-2  # a narrower grid is known to few digits
    np.testing.assert_allclose(total + density.mass_below, 30, rtol=1e-3 if wide else 1)


def test_bad_input_is_named():
    result = run_spectrum(np.full(30, 2.0), 2, 3)
    with pytest.raises(ValueError, match=r"len\(results\): expected an integer >= 1"):
        spectral_density([], 10)
    with pytest.raises(ValueError, match="dimension: expected a finite number > 0"):
        spectral_density(result, 0)
    with pytest.raises(ValueError, match="floor: expected a finite number > 0"):
        spectral_density(result, 10, floor=0.0)
