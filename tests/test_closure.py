"""Predicted against measured rates, and pairs that pass fixed edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax import dynamics, shells


def test_closure_error_by_hand():
    found = dynamics.closure_error(
        jnp.asarray([1.0, -2.0, 0.0, 3.0]),
        jnp.asarray([4.0, 5.0, 6.0, 7.0]),
        jnp.asarray([4.5, 4.5, 6.0, 5.5]),
        0.5,
    )
    np.testing.assert_allclose(found.measured_rate, [1, -1, 0, -3])
    np.testing.assert_allclose(found.shell_errors, [0, 0.5, 0, 2])
    np.testing.assert_allclose(found.total_error, np.sqrt((1 + 36) / 11), rtol=1e-6)
    assert found.defined


def test_a_number_that_is_not_real_is_refused():
    ones = jnp.ones(3)
    with pytest.raises(ValueError, match="elapsed: expected real numbers, got compl"):
        dynamics.closure_error(ones, ones, ones, 0.5 + 1j)


@pytest.mark.parametrize("elapsed", [0.0, np.nan, np.inf])
def test_no_step_or_none_that_is_finite_defines_nothing(elapsed):
    ones = jnp.ones(3)
    found = dynamics.closure_error(ones, ones, 2 * ones, elapsed)
    assert not found.defined
    for field in (found.measured_rate, found.shell_errors, found.total_error):
        assert np.max(np.abs(field)) == 0


@pytest.mark.not_in_mode("debug_nans")
@pytest.mark.parametrize("place", range(3))
def test_energies_and_rates_that_are_not_finite_define_nothing(place):
    given = [jnp.ones(3), jnp.ones(3), 2 * jnp.ones(3)]
    given[place] = given[place].at[1].set(jnp.nan)
    found = dynamics.closure_error(*given, 0.1)
    assert not found.defined
    assert all(np.all(np.isfinite(leaf)) for leaf in found)


def test_a_predicted_change_that_did_not_happen_is_infinitely_wrong():
    ones = jnp.ones(2)
    assert np.isinf(dynamics.closure_error(ones, ones, ones, 1.0).total_error)
    still = dynamics.closure_error(0 * ones, ones, ones, 1.0)
    assert still.total_error == 0
    assert still.defined


@pytest.mark.usefixtures("x64")
def test_crossings_complete_the_change_of_fixed_shells():
    rng = np.random.default_rng(0)
    edges = np.geomspace(0.1, 10, 6)
    before = np.exp(rng.uniform(np.log(0.1), np.log(10), 40))
    after = np.clip(before * np.exp(rng.normal(size=40)), 0.1, 10)
    g_before, g_after = rng.normal(size=(2, 40))
    passed = dynamics.edge_crossings(*map(jnp.asarray, (before, after, g_after, edges)))
    old = np.asarray(shells.assign_shells(jnp.asarray(before), edges).index)
    new = np.asarray(shells.assign_shells(jnp.asarray(after), edges).index)

    def energies(index, squares):
        return np.bincount(index, weights=squares, minlength=5)

    change = energies(new, g_after**2) - energies(old, g_before**2)
    carried = np.asarray(passed.energy_up - passed.energy_down)
    expected = energies(old, g_after**2 - g_before**2) + carried[:-1] - carried[1:]
    np.testing.assert_allclose(change, expected, atol=1e-12)
    assert np.max(np.abs(carried)) > 1
    counts = np.asarray(passed.up) - np.asarray(passed.down)
    moved = np.bincount(new, minlength=5) - np.bincount(old, minlength=5)
    np.testing.assert_array_equal(counts[:-1] - counts[1:], moved)
    assert np.sum(passed.up) + np.sum(passed.down) == np.sum(np.abs(new - old))


def test_a_mode_of_known_motion_crosses_at_its_time():
    # The eigenvalue 2 a(t) of a balanced two-layer linear network, a_dot = 2 a (s - a).
    target, start, edge = 2.0, 0.1, 1.5
    times = jnp.linspace(0, 3, 61)
    a = target / (1 + (target / start - 1) * jnp.exp(-2 * target * times))
    edges = jnp.asarray([0.1, edge, 9.0])
    ratio = (target / start - 1) / (target / (edge / 2) - 1)
    crossing = np.log(ratio) / (2 * target)
    passed = jax.vmap(dynamics.edge_crossings, (0, 0, 0, None))(
        2 * a[:-1, None], 2 * a[1:, None], (a - target)[1:, None], edges
    )
    (when,) = np.flatnonzero(passed.up[:, 1])
    assert times[when] < crossing <= times[when + 1]
    np.testing.assert_allclose(
        passed.energy_up[when, 1], (a[when + 1] - target) ** 2, rtol=1e-6
    )
    assert np.sum(passed.up) == 1
    assert np.sum(passed.down) == 0


@pytest.mark.not_in_mode("debug_nans")
def test_crossings_leave_out_masked_and_broken_pairs():
    before = jnp.asarray([0.5, 0.5, 0.5, 2.0, 1.0])
    after = jnp.asarray([5.0, 5.0, jnp.nan, 1.0, 0.5])
    mask = jnp.asarray([True, False, True, True, True])
    edges = jnp.asarray([1.0, 2.0, 5.0])
    passed = dynamics.edge_crossings(before, after, 2 * jnp.ones(5), edges, mask=mask)
    # A pair at an edge lies above it, at the last edge below it.
    np.testing.assert_array_equal(passed.up, [1, 1, 0])
    np.testing.assert_array_equal(passed.down, [1, 1, 0])
    np.testing.assert_allclose(passed.energy_up, [4, 4, 0])
    np.testing.assert_allclose(passed.energy_down, [4, 4, 0])
    with pytest.raises(ValueError, match="values_after: expected shape"):
        dynamics.edge_crossings(before, after[:3], before, edges)
