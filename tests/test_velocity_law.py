"""The law over balances: planted exponents and planted rates are recovered."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax.dynamics import SpectralSnapshot, exact_balance, velocity_law
from grsd_jax.results import with_undefined
from grsd_jax.shells import SoftShells
from modes import no_nan

VALUES = np.geomspace(1e-6, 1e3, 250)
EDGES = np.geomspace(1e-3, 1, 8)
LOGS = np.log(VALUES)
ENERGIES = {
    "flat": np.ones_like(VALUES),
    "rising": np.exp(-((LOGS - np.log(1e2)) ** 2) / 50),
    "steep": np.exp(-((LOGS - np.log(3e-2)) ** 2) / 8),
    "falling": np.exp(-((LOGS - np.log(1e-4)) ** 2) / 50),
}


def snapshot(values, vectors, error):
    parts = values[::-1], vectors[:, ::-1], error
    parts = [jnp.asarray(part) for part in parts]
    eps = jnp.asarray(jnp.finfo(parts[0].dtype).eps, parts[0].dtype)
    rest = jnp.zeros(2, jnp.uint32), eps, jnp.bool_(True)
    return SpectralSnapshot(*parts, *rest)


def drifting(energy, shift):
    """Returns both ends: the eigenvalues move by ``shift`` in log lambda."""
    basis, error = np.eye(len(VALUES)), np.sqrt(energy)
    moved = snapshot(VALUES * np.exp(shift), basis, error)
    return snapshot(VALUES, basis, error), moved


def turning(energy, shift):
    """Returns both ends: eigenvalues stay, and the energy moves as in `drifting`."""
    below = np.cumsum(energy)
    moved = np.interp(LOGS, LOGS + shift, below)
    new = np.maximum(np.diff(np.append(0, moved)), 1e-14)
    new[-1] += below[-1] - moved[-1]
    error, turned = np.sqrt(energy), np.sqrt(new * below[-1] / np.sum(new))
    axis = (error - turned) / np.linalg.norm(error - turned)
    basis = np.eye(len(VALUES))
    mirror = basis - 2 * np.outer(axis, axis)
    return snapshot(VALUES, basis, error), snapshot(VALUES, mirror, error)


def between(ends, elapsed=1.0, width=0.5):
    shells = SoftShells(jnp.asarray(EDGES), width=width)
    return exact_balance(*ends, shells, elapsed=elapsed)


def laws(balances, starts, **options):
    return jax.device_get(velocity_law(balances, jnp.asarray(starts), **options))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("exponent", [0.0, 0.2, -0.3])
def test_planted_exponents_are_recovered_within_their_errors(exponent):
    step = 0.02
    shift = step * VALUES**exponent
    balances = [between(drifting(e, shift), step) for e in ENERGIES.values()]
    turns = [between(turning(e, shift), step) for e in ENERGIES.values()]
    for velocity in ("flux", "shift"):
        law = laws(balances, [1.0] * 4, velocity=velocity)
        off = np.abs(law.fits.fit.exponent - 1 - exponent)
        assert np.all(off <= law.exponent_error + 1e-8)
        assert np.all(law.exponent_error < 0.07)
        assert np.all(off < 0.01)
        assert np.all(law.num_edges >= 5)
        # The interpolation that plants a turning costs half a hundredth.
        law = laws(turns, [1.0] * 4, velocity=velocity)
        off = np.abs(law.fits.fit.exponent - 1 - exponent)
        assert np.all(off <= law.exponent_error + 0.012)
    excess = laws(turns, [1.0] * 4, velocity="excess")
    off = np.abs(excess.fits.fit.exponent - 1 - exponent)
    assert np.all(off <= excess.exponent_error + 0.012)


@pytest.mark.usefixtures("x64")
def test_a_kernel_that_only_grows_has_no_excess():
    step = 0.01
    grown = [between(drifting(e, step), step) for e in ENERGIES.values()]
    law = laws(grown, [1.0] * 4)
    np.testing.assert_allclose(law.rates, 1, rtol=1e-3)
    np.testing.assert_allclose(law.fits.fit.exponent, 1, atol=1e-4)
    excess = laws(grown, [1.0] * 4, velocity="excess")
    np.testing.assert_allclose(excess.rates, 0, atol=1e-3)


@pytest.mark.usefixtures("x64")
def test_rates_that_fall_as_one_over_time_have_a_constant_product():
    starts, elapsed = np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 8.0])
    rate = 0.6
    balances = []
    for start, time in zip(starts, elapsed, strict=True):
        # v = c / tau at all edges moves by c log of the ratio of times.
        shift = np.full_like(VALUES, rate * np.log1p(time / start))
        balances.append(between(turning(ENERGIES["flat"], shift), time))
    law = laws(balances, starts, velocity="shift")
    np.testing.assert_allclose(law.products, rate, rtol=2e-3)
    np.testing.assert_allclose(law.decay.exponent, -1, atol=3e-3)
    np.testing.assert_allclose(law.times, elapsed / np.log1p(elapsed / starts))
    assert np.all(law.rate_stderr < 0.01)
    constant = [
        between(turning(ENERGIES["flat"], 0.05 * t + 0 * VALUES), t) for t in elapsed
    ]
    law = laws(constant, starts, velocity="shift")
    np.testing.assert_allclose(law.decay.exponent, 0, atol=1e-2)


@pytest.mark.usefixtures("x64")
def test_scatter_over_edges_is_the_error_of_a_rate():
    shift = 0.01 * (1 + 0.3 * np.sin(3 * LOGS))
    balance = between(drifting(ENERGIES["flat"], shift), 0.01)
    law = laws([balance], [1.0])
    used = np.asarray(balance.velocity_mask)
    velocity = np.asarray(balance.velocity)[used]
    stderr = np.std(velocity, ddof=1) / np.sqrt(len(velocity))
    np.testing.assert_allclose(law.rates, np.mean(velocity), rtol=1e-12)
    np.testing.assert_allclose(law.rate_stderr, stderr, rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_balances_without_a_time_or_a_start_are_left_out():
    good = between(drifting(ENERGIES["flat"], 0.01), 0.01)
    unknown = between(drifting(ENERGIES["flat"], 0.01), np.nan)
    law = laws([good, unknown, good], [1.0, 2.0, 0.0])
    assert law.decay.num_points == 1
    np.testing.assert_array_equal(law.num_edges, [8, 0, 8])
    np.testing.assert_array_equal(np.isnan(law.rates), [False, True, False])
    np.testing.assert_array_equal(np.isnan(law.products), [False, True, True])
    np.testing.assert_array_equal(np.isnan(law.times), [False, True, True])


@pytest.mark.usefixtures("x64")
def test_a_law_in_a_program_makes_no_nan():
    ends = drifting(ENERGIES["flat"], 0.01)
    balances = [between(ends, elapsed) for elapsed in (0.01, np.nan)]
    starts = jnp.ones(2)
    with no_nan():
        outside = velocity_law(balances, starts)
        inside = jax.jit(velocity_law)(balances, starts)
    assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves(inside))
    assert np.isinf(inside.rates[1])
    assert np.isnan(outside.rates[1])
    read = with_undefined(inside)
    assert read.decay.num_points == 1
    for got, expected in zip(*map(jax.tree.leaves, (read, outside)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_each_velocity_has_its_own_error():
    balance = between(drifting(ENERGIES["flat"], 0.3), 0.3)
    still = dataclasses.replace(balance, growth_error=0 * balance.growth_error)
    loose = dataclasses.replace(balance, growth_error=0.1 + 0 * balance.growth_error)
    for velocity, wider in (("flux", False), ("excess", False), ("shift", True)):
        first, second = (laws([b], [1.0], velocity=velocity) for b in (still, loose))
        assert bool(second.rate_stderr[0] > first.rate_stderr[0]) == wider
    used = int(balance.velocity_mask.sum())
    np.testing.assert_allclose(
        second.rate_stderr[0],
        np.hypot(first.rate_stderr[0], 0.1 / 0.3 / np.sqrt(used)),
        rtol=1e-9,
    )


def test_bad_laws_are_told():
    with jax.enable_x64(True):
        balance = between(drifting(ENERGIES["flat"], 0.01))
        with pytest.raises(ValueError, match=r"len\(balances\): expected"):
            velocity_law([], jnp.zeros(0))
        with pytest.raises(ValueError, match="starts: expected shape"):
            velocity_law([balance], jnp.ones(2))
        with pytest.raises(ValueError, match="velocity: expected one of"):
            velocity_law([balance], jnp.ones(1), velocity="energy")
        uncounted = dataclasses.replace(balance, counting=None)
        with pytest.raises(ValueError, match="balances: expected counts"):
            velocity_law([uncounted], jnp.ones(1), velocity="excess")


@pytest.mark.usefixtures("x64")
def test_an_edge_that_has_not_converged_has_an_infinite_error():
    balance = between(drifting(ENERGIES["flat"], 0.01), 0.01)
    unknown = jnp.full_like(balance.flux, jnp.inf)
    still = dataclasses.replace(
        balance, flux=jnp.zeros_like(unknown), flux_error=unknown, density_error=unknown
    )
    with no_nan():
        assert np.isposinf(still.velocity_error).all()
