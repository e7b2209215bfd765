"""The options of a measurement: what each refuses, and what a window leaves out."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax import Binning, Derivative, Lanczos, Problem, Window, measure_coupling
from grsd_jax.linalg import RitzPairs
from grsd_jax.shells.measurement import leading_pairs


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Window, {"num_pairs": 0}, "num_pairs: expected an integer >= 1, got 0"),
        (Window, {"num_pairs": 2.0}, "num_pairs: expected an integer >= 1, got 2.0"),
        (Window, {"floor": 0.0}, "floor: expected a finite number > 0, got 0.0"),
        (Window, {"tolerance": -1.0}, "tolerance: expected a finite number > 0"),
        (Window, {"tolerance": None}, "tolerance: expected a finite number > 0"),
        (Binning, {"num_shells": 0}, "num_shells: expected an integer >= 1, got 0"),
        (Binning, {"window": 0}, "window: expected an integer >= 1, got 0"),
        (Binning, {"num_shells": 4}, "window: expected at most num_shells = 4, got 5"),
        (Binning, {"min_count": 0}, "min_count: expected an integer >= 1, got 0"),
        (Binning, {"num_bootstrap": -1}, "num_bootstrap: expected an integer >= 0"),
        (Derivative, {"method": "secant"}, "method: expected one of 'exact', 'finite_"),
        (Derivative, {"step": 0.0}, "step: expected a finite number > 0, got 0.0"),
        (Lanczos, {"block_size": 0}, "block_size: expected an integer >= 1, got 0"),
        (Lanczos, {"num_steps": True}, "num_steps: expected an integer >= 1, got True"),
    ],
)
def test_a_value_out_of_range_is_named(make, options, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        make(**options)


def test_the_defaults_are_in_range_and_hashable():
    for option in (Window(), Binning(), Derivative(), Lanczos()):
        hash(option)
    assert Window(floor=1e-3, num_pairs=1, tolerance=1) != Window()


def test_a_window_keeps_the_leading_pairs_that_were_resolved_before():
    resolved = jnp.asarray([True, False, True, True])
    pairs = RitzPairs(jnp.arange(4.0)[::-1], jnp.eye(4), jnp.zeros(4), resolved)
    assert leading_pairs(pairs, Window()) is pairs
    for num_pairs, kept in [(1, [1, 0, 0, 0]), (3, [1, 0, 1, 0]), (9, resolved)]:
        got = leading_pairs(pairs, Window(num_pairs=num_pairs))
        np.testing.assert_array_equal(got.resolved, np.asarray(kept, bool))
        assert got.values is pairs.values


@pytest.mark.parametrize("solver", ["dense", Lanczos(block_size=2, num_steps=4)])
def test_a_measurement_uses_the_leading_pairs_of_its_window(solver):
    x = jax.random.normal(jax.random.key(0), (1, 4, 3))
    problem = Problem.from_error(lambda p, b: jnp.tanh(b["x"] @ p), {"x": x})
    params = jax.random.normal(jax.random.key(1), (3, 2))
    shells = Binning(num_shells=2, window=2, num_bootstrap=0)

    def measure(window):
        return measure_coupling(
            problem,
            params,
            params,
            key=jax.random.key(2),
            solver=solver,
            window=window,
            shells=shells,
        )

    whole, part = measure(Window()), measure(Window(num_pairs=3))
    assert whole.values.shape == part.values.shape == (8,)
    assert np.sum(whole.resolved) > 3
    np.testing.assert_array_equal(part.resolved, np.arange(8) < 3)
    np.testing.assert_array_equal(part.values, whole.values)
    np.testing.assert_allclose(part.shells.edges[0], whole.values[2], rtol=1e-6)
    assert np.sum(part.shells.counts) == part.diagonal_fit.num_points == 3
