"""The depth mechanism, on chains whose increments and memory are known."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from grsd_jax.conditions import (
    correlation_time,
    direction_memory,
    increment_statistics,
    state_increments,
)
from grsd_jax.models import MLP, linen_chain
from grsd_jax.shells import fit_power_law
from oracles import cast


def columns(matrix, state):
    """Applies a matrix to the features of a state ``[N, width]``."""
    return jnp.matmul(state, matrix.T, precision="highest")


def test_orthogonal_blocks_change_no_norm_and_turn_by_their_angle():
    angle, depth = 0.3, 5
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    maps = [partial(columns, jnp.asarray(turn, jnp.float32))] * depth
    found = state_increments(
        maps, jnp.ones((3, 2)), key=jax.random.key(0), num_directions=4
    )
    assert found.increments.shape == (depth, 4, 3)
    np.testing.assert_allclose(found.increments, 0, atol=1e-6)
    expected = np.cos(angle * np.arange(depth + 1))
    np.testing.assert_allclose(direction_memory(found.overlap), expected, atol=1e-6)
    assert correlation_time(found.overlap) == pytest.approx(
        -1 / np.log(np.cos(angle)), rel=1e-4
    )


def test_increments_add_up_to_the_jacobian_of_the_whole_chain(x64):
    keys = jax.random.split(jax.random.key(0), 3)
    model = MLP(2, 4, 5, "gelu", residual=True, branch_scale=0.4)
    x = jax.random.normal(keys[0], (2, 3))
    params = model.init(keys[1], x.astype(jnp.float32))["params"]
    params = cast(params, x.dtype)
    state, maps = linen_chain(model, params, x)
    found = state_increments(maps, state, key=keys[2], num_directions=6)

    def whole(state):
        for advance in maps:
            state = advance(state)
        return state

    start = jax.random.normal(keys[2], (6, *state.shape), state.dtype)
    jacobian = jax.jacobian(whole)(state)
    carried = np.einsum("npmq,rmq->rnp", jacobian, start)
    growth = np.linalg.norm(carried, axis=-1) / np.linalg.norm(start, axis=-1)
    np.testing.assert_allclose(
        np.sum(found.increments, axis=0), np.log(growth), atol=1e-10
    )


def random_residual(scale, depth, width=256):
    keys = jax.random.split(jax.random.key(1), depth)
    eye = jnp.eye(width)
    return [
        partial(columns, eye + scale * jax.random.normal(k, eye.shape) / width**0.5)
        for k in keys
    ]


@pytest.mark.parametrize("scale", [0.2, 0.5])
def test_isotropic_residual_branches_have_the_known_increment_and_memory(scale):
    found = state_increments(
        random_residual(scale, 8),
        jnp.ones((1, 256)),
        key=jax.random.key(2),
        num_directions=32,
    )
    statistics = increment_statistics(found.increments)
    expected = 0.5 * np.log(1 + scale**2)
    assert float(statistics.mean) == pytest.approx(expected, rel=0.05)
    time = float(correlation_time(found.overlap))
    assert time == pytest.approx(2 / np.log(1 + scale**2), rel=0.05)
    memory = direction_memory(found.overlap)
    np.testing.assert_allclose(memory, np.exp(-np.arange(9) / time), atol=0.05)


def test_plain_random_blocks_forget_at_once():
    keys = jax.random.split(jax.random.key(3), 6)
    maps = [
        partial(columns, jax.random.normal(k, (256, 256)) / jnp.float32(16))
        for k in keys
    ]
    found = state_increments(maps, jnp.ones((1, 256)), key=jax.random.key(4))
    assert correlation_time(found.overlap) < 0.5


def test_self_averaging_falls_as_one_over_depth():
    rng = np.random.default_rng(0)
    draws = rng.normal(0.1, 0.5, size=(64, 4000)).astype(np.float32)
    depths = np.array([2, 8, 64], np.float32)
    spreads = [
        float(increment_statistics(draws[: int(d)]).variance_of_mean) for d in depths
    ]
    fit = fit_power_law(jnp.asarray(depths), jnp.asarray(spreads))
    assert float(fit.exponent) == pytest.approx(-1, abs=0.03)
    whole = increment_statistics(draws)
    assert float(whole.mean) == pytest.approx(0.1, abs=0.01)
    assert float(whole.variance) == pytest.approx(0.25, rel=0.02)
    assert float(whole.variance_ratio) == pytest.approx(1, abs=0.1)
    repeated = increment_statistics(np.repeat(draws[:1], 8, axis=0))
    assert float(repeated.variance_ratio) == pytest.approx(8, rel=1e-4)


@pytest.mark.parametrize("factor", [0.3, 1.0, -1.7])
def test_blocks_that_only_scale_are_remembered_for_ever_and_do_not_vary(factor):
    maps = [lambda h: factor * h] * 4
    found = state_increments(maps, jnp.ones((8, 50)), key=jax.random.key(1))
    time = correlation_time(jnp.abs(found.overlap))
    assert np.isposinf(time)
    statistics = increment_statistics(found.increments)
    assert float(statistics.mean) == pytest.approx(np.log(abs(factor)), abs=1e-6)
    for name in ("variance_ratio", "normal_distance", "wasserstein"):
        assert np.isnan(getattr(statistics, name)), name
    compiled = jax.jit(lambda x: increment_statistics(x).normal_distance)
    assert np.isposinf(compiled(found.increments))


def test_sums_that_agree_to_rounding_do_not_vary():
    rng = np.random.default_rng(0)
    steps = rng.normal(size=7).astype(np.float32)
    paths = np.stack([rng.permutation(steps) for _ in range(6)], axis=1)
    for increments, ratio in ((paths, 0.0), (np.full((3, 5), 0.1, np.float32), None)):
        found = increment_statistics(increments)
        assert np.isnan(found.normal_distance)
        assert np.isnan(found.wasserstein)
        got = float(found.variance_ratio)
        assert np.isnan(got) if ratio is None else got == pytest.approx(0, abs=1e-10)


def test_distances_to_the_normal_law():
    rng = np.random.default_rng(1)
    for draw, far in ((rng.normal, False), (rng.standard_exponential, True)):
        sums = draw(size=(1, 2000))
        got = increment_statistics(jnp.asarray(sums, jnp.float32))
        z = (sums[0] - sums.mean()) / sums.std()
        expected = scipy.stats.kstest(z, "norm").statistic
        assert float(got.normal_distance) == pytest.approx(expected, abs=1e-5)
        normal = scipy.stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000)
        distance = scipy.stats.wasserstein_distance(z, normal)
        assert float(got.wasserstein) == pytest.approx(distance, abs=0.01)
        assert (float(got.normal_distance) > 0.1) == far
    assert got.num_paths == 2000


def test_it_works_under_jit_and_keeps_dead_directions_finite_elsewhere():
    maps = [lambda h: h * jnp.asarray([[0.0, 2.0]], h.dtype)] * 2

    @jax.jit
    def measure(state, key):
        return state_increments(maps, state, key=key, num_directions=3)

    found = measure(jnp.ones((1, 2)), jax.random.key(0))
    np.testing.assert_allclose(found.increments[1], np.log(2.0), rtol=1e-6)
    dead = state_increments([jnp.zeros_like], jnp.ones((1, 2)), key=jax.random.key(0))
    assert np.all(np.isneginf(dead.increments))
    assert correlation_time(dead.overlap) == 0
    assert np.isnan(correlation_time(dead.overlap * jnp.nan))


def test_bad_arguments_are_named():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="maps: expected at least one map"):
        state_increments([], jnp.ones((1, 2)), key=key)
    with pytest.raises(ValueError, match=r"maps: expected states of shape \[1, 2\]"):
        state_increments([lambda h: h[:, :1]], jnp.ones((1, 2)), key=key)
    with pytest.raises(ValueError, match="increments: paths: expected an integer >= 2"):
        increment_statistics(jnp.ones((3, 1)))
    with pytest.raises(ValueError, match="overlap: expected a square matrix"):
        correlation_time(jnp.ones((2, 3)))
