"""Bounds for sharp edges: they hold for every measure, and close with the steps."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grsd_jax import Problem
from grsd_jax._arrays import matmul
from grsd_jax.dynamics import sharp_flux_bounds
from grsd_jax.dynamics.between_ends import KrylovSpaces
from grsd_jax.dynamics.sharp_bounds import _bounds, energy_above
from grsd_jax.linalg import block_lanczos
from grsd_jax.results import with_undefined
from grsd_jax.shells import SoftShells, measure_stochastic_coupling
from oracles import symmetric_with_spectrum
from test_between_ends import in_double, make_problem, train
from test_exact_balance import by_definition

KEY = jax.random.key(0)
EDGES = np.geomspace(1e-3, 3, 6)
SIZE, STEPS = 14, 5


@st.composite
def measures(draw):
    """Draws places, some of them equal or on an edge, and masses, some of them zero."""
    places = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(1e-3, 2))
    masses = st.one_of(st.just(0.0), st.floats(0.1, 1))
    values = draw(st.lists(places, min_size=SIZE, max_size=SIZE))
    weights = draw(st.lists(masses, min_size=SIZE, max_size=SIZE))
    weights[0] += 0.1
    return np.array(values), np.array(weights)


@jax.jit
def bounds(values, weights, edges):
    matmat = lambda block: values[:, None] * block  # noqa: E731
    start = jnp.sqrt(weights)[:, None]
    run = block_lanczos(matmat, start, STEPS, key=KEY)
    return energy_above(run.tridiagonal, jnp.sum(weights), edges)


@pytest.mark.usefixtures("x64")
@given(measures())
@settings(deadline=None, max_examples=60, derandomize=True)
def test_the_mass_above_an_edge_lies_between_its_bounds(measure):
    values, weights = measure
    # Beside the places that are drawn exactly, where rounding decides.
    edges = np.array([0.05, 0.5 - 1e-6, 0.5 + 1e-6, 0.8, 1.5])
    low, high = bounds(values, weights, edges)
    exact = np.sum(weights * (values[None, :] >= edges[:, None]), axis=1)
    slack = np.sum(weights * (np.abs(values[None, :] - edges[:, None]) < 1e-9), axis=1)
    assert np.all(low <= exact + slack + 1e-7)
    assert np.all(exact <= high + slack + 1e-7)
    assert np.all(low <= high)


@pytest.mark.usefixtures("x64")
def test_bounds_of_few_values_are_exact():
    values = np.array([0.1, 0.4, 0.4, 2.0] + [0.0] * 10)
    weights = np.array([1.0, 2.0, 3.0, 4.0] + [0.0] * 10)
    low, high = bounds(values, weights, np.array([0.05, 0.3, 1.0, 3.0]))
    np.testing.assert_allclose(low, [10, 9, 4, 0], atol=1e-9)
    np.testing.assert_allclose(high, [10, 9, 4, 0], atol=1e-9)


@pytest.mark.usefixtures("x64")
def test_the_gap_is_the_mass_that_a_node_at_the_edge_may_have():
    """The Christoffel function, by the moments of the measure."""
    values, weights = np.linspace(0.1, 2, SIZE), np.full(SIZE, 0.3)
    edges = np.array([0.45, 1.13])
    low, high = bounds(values, weights, edges)
    powers = np.vander(values, STEPS, increasing=True)
    moments = powers.T @ (weights[:, None] * powers)
    at_edge = np.vander(edges, STEPS, increasing=True)
    largest = 1 / np.einsum("ki,ij,kj->k", at_edge, np.linalg.inv(moments), at_edge)
    np.testing.assert_allclose(high - low, largest, rtol=1e-6)


@pytest.mark.parametrize(
    "activation", ["relu", pytest.param("gelu", marks=pytest.mark.scheduled)]
)
def test_the_flux_of_a_training_lies_between_its_bounds(activation):
    problem, params = make_problem(activation)
    before, after = train(problem, params, optax.sgd(0.3, momentum=0.9), [20])
    oracle = in_double(problem, before), in_double(problem, after)
    exact = by_definition(*oracle, EDGES, 0)["flux"]
    widths = []
    for steps in (6, 24):
        found = sharp_flux_bounds(
            (problem, before),
            (problem, after),
            jnp.asarray(EDGES, jnp.float32),
            num_steps=steps,
            key=KEY,
        )
        assert np.all(found.lower <= exact)
        assert np.all(exact <= found.upper)
        assert found.finite
        assert found.comparable
        widths.append(np.asarray(found.upper - found.lower))
    assert np.sum(widths[1]) < 0.5 * np.sum(widths[0])
    energy = float(np.sum(np.square(oracle[0].error)))
    assert np.median(widths[1]) < 0.02 * energy


def test_bounds_that_the_dtype_cannot_hold_are_undefined():
    rng = np.random.default_rng(0)
    vectors = jnp.asarray(rng.normal(size=(SIZE, 2)), jnp.float32)
    runs = []
    for seed in (0, 1):
        kernel, _ = symmetric_with_spectrum(np.geomspace(1e-4, 5, SIZE), seed)
        matmat = partial(matmul, jnp.asarray(kernel, jnp.float32))
        runs.append(block_lanczos(matmat, vectors, STEPS, key=KEY))
    eps = jnp.finfo(jnp.float32).eps
    spaces = KrylovSpaces(*runs, vectors, jnp.asarray(eps), ())
    sharp = SoftShells(jnp.asarray(EDGES, jnp.float32), width=0)

    def found(size):
        far = spaces._replace(vectors=size * spaces.vectors)
        return _bounds(far, sharp, jnp.bool_(True), KEY, num_steps=STEPS)

    once, small = found(1.0), found(1e-12)
    assert np.all(once.in_range & small.in_range)
    np.testing.assert_allclose(small.upper / 1e-24, once.upper, rtol=1e-3, atol=1e-4)
    for size in (1e-21, 1e21):
        lost = with_undefined(found(size))
        assert not np.any(lost.in_range)
        assert np.all(np.isnan([lost.lower, lost.upper]))


def test_what_does_not_fit_is_one_sentence():
    problem, params = make_problem()
    end, edges = (problem, params), jnp.ones(1)
    with pytest.raises(ValueError, match=r"^num_steps: expected"):
        sharp_flux_bounds(end, end, edges, num_steps=3, key=KEY)
    with pytest.raises(ValueError, match=r"^shells\.edges: expected"):
        sharp_flux_bounds(end, end, jnp.float32(1), key=KEY)
    other, _ = make_problem(num_examples=12)
    with pytest.raises(ValueError, match=r"^after: expected n = 48 as before"):
        sharp_flux_bounds(end, (other, params), edges, key=KEY)
    data = problem.batches
    moved = problem.replace(batches=data | {"image": data["image"] + 1})
    with pytest.raises(ValueError, match=r"^after: expected the examples"):
        sharp_flux_bounds(end, (moved, params), edges, key=KEY)


def test_one_error_is_too_few_for_the_steps_and_said():
    def outputs_fn(params, batch):
        return batch["x"] @ params

    batches = {"x": jnp.ones((1, 1, 2)), "label": jnp.ones((1, 1, 1))}
    problem = Problem(outputs_fn, batches, loss="squared")
    ends = (problem, jnp.ones((2, 1))), (problem, 2 * jnp.ones((2, 1)))
    with pytest.raises(ValueError, match="solver: expected no more start vectors or"):
        sharp_flux_bounds(*ends, jnp.ones(1), key=jax.random.key(0))
    with pytest.raises(ValueError, match="num_signs: expected at most n / 2 = "):
        measure_stochastic_coupling(
            problem, ends[0][1], num_pairs=1, key=jax.random.key(0)
        )
