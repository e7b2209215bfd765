"""The numbers of a measurement against plain NumPy, on planted couplings."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax.experiments.common.quantities import (
    coupling_quantities,
    middle_third_residual,
)
from grsd_jax.shells import centre_toeplitz_residual
from grsd_jax.shells.binning import log_shells, shell_coupling
from grsd_jax.shells.diagnostics import toeplitz_diagnostics
from grsd_jax.shells.power_law import fit_power_law


@jax.jit
def diagnosed(coupling):
    """What a measurement holds of a coupling, over four decades of values."""
    values = jnp.geomspace(10, 1e-3, 60)
    resolved = jnp.arange(60) < 50
    shells = log_shells(values, 8, mask=resolved)
    fields = {
        "resolved": resolved,
        "diagonal_fit": fit_power_law(values, jnp.abs(jnp.diag(coupling)), resolved),
    }
    for name in ("literal", "renormalized"):
        renormalize = name == "renormalized"
        binned = shell_coupling(coupling, values, shells, renormalize=renormalize)
        root = jnp.sqrt(binned.matrix)
        fields[name] = toeplitz_diagnostics(root, binned.mask, 3)
    return fields


def quantities(coupling):
    return coupling_quantities(SimpleNamespace(**jax.device_get(diagnosed(coupling))))


def planted():
    """A coupling that obeys Condition 4, with random signs."""
    size, logs = 60, np.log(np.geomspace(10, 1e-3, 60))
    sizes = np.exp((logs[:, None] + logs - np.abs(logs[:, None] - logs)) / 2)
    signs = np.sign(np.random.default_rng(0).normal(size=(size, size)))
    signs = np.triu(signs) + np.triu(signs, 1).T
    return jnp.asarray(signs * sizes, jnp.float32)


def noise():
    """A symmetric coupling that knows nothing of the eigenvalues."""
    entries = np.random.default_rng(1).normal(size=(60, 60))
    return jnp.asarray(np.triu(entries) + np.triu(entries, 1).T, jnp.float32)


def test_quantities_are_those_of_the_coupling():
    coupling = noise()
    found, shells = quantities(coupling), 8
    values = np.geomspace(10, 1e-3, 60)[:50]
    entries = np.asarray(coupling, np.float64)[:50, :50]
    slope, _ = np.polyfit(np.log(values), np.log(np.abs(np.diag(entries))), 1)
    assert found["slope"] == pytest.approx(slope, rel=1e-3)
    assert found["num_resolved"] == 50
    edges = np.geomspace(values[-1], values[0], shells + 1)
    index = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, shells - 1)
    binned = np.zeros((shells, shells))
    weights = entries**2 / (values[:, None] * values)
    for a, b in np.ndindex(shells, shells):
        binned[a, b] = weights[np.ix_(index == a, index == b)].mean()
    assert found["toeplitz_residual"] == pytest.approx(toeplitz(binned), rel=2e-3)
    windows = [toeplitz(binned[k : k + 3, k : k + 3]) for k in range(6)]
    edge, centre = (windows[0] + windows[5]) / 2, (windows[2] + windows[3]) / 2
    assert found["toeplitz_edge"] == pytest.approx(edge, rel=2e-3)
    assert found["toeplitz_centre"] == pytest.approx(centre, rel=2e-3)


def toeplitz(matrix):
    """The relative distance of a matrix to its diagonals' means."""
    size = len(matrix)
    mean = sum(
        np.diag(np.full(size - abs(k), np.diagonal(matrix, k).mean()), k)
        for k in range(1 - size, size)
    )
    return np.linalg.norm(matrix - mean) / np.linalg.norm(matrix)


def test_a_planted_coupling_passes_and_its_literal_reading_does_not():
    found = quantities(planted())
    assert found["slope"] == pytest.approx(1, abs=1e-4)
    assert found["r_squared"] == pytest.approx(1, abs=1e-4)
    assert found["toeplitz_residual"] < 0.05
    assert found["toeplitz_literal"] > 0.5


def test_noise_has_no_exponent():
    found = quantities(noise())
    assert abs(found["slope"]) < 0.3
    assert found["r_squared"] < 0.1


def test_what_is_zero_by_construction_is_undefined():
    """Two pairs of shells on different diagonals have nothing to differ from."""
    fields = jax.device_get(diagnosed(noise()))
    mask = np.zeros((8, 8), bool)
    mask[0, 0] = mask[0, 1] = mask[1, 0] = True
    windows = fields["renormalized"]
    binned = windows.coupling._replace(mask=mask)
    none = np.zeros_like(windows.degrees_of_freedom)
    fields["renormalized"] = windows._replace(coupling=binned, degrees_of_freedom=none)
    found = coupling_quantities(SimpleNamespace(**fields))
    names = ("residual", "edge", "centre", "middle_third")
    assert all(math.isnan(found[f"toeplitz_{name}"]) for name in names)
    assert math.isfinite(found["toeplitz_literal"])


def test_the_middle_third_is_wider_than_the_centre():
    windows = [float(k) for k in range(7)]
    windows[3] = 9.0
    assert middle_third_residual(windows) == pytest.approx((2 + 9 + 4) / 3)
    assert centre_toeplitz_residual(windows) == 9.0
    windows[2:5] = [math.nan] * 3
    assert math.isnan(middle_third_residual(windows))
