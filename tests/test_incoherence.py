"""The overlap of blocks' Jacobians, against explicit products and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import block_problems
from grsd_jax import Problem
from grsd_jax.conditions import block_coherence, partition_by_prefix
from oracles import network_problem, plain

KEY = jax.random.key(0)
METHODS = ["dense", "power_iteration"]
methods = pytest.mark.parametrize("method", METHODS)


def explicit(jacobians):
    """Returns G from the products ``J_l^T J_m`` themselves."""
    return np.array(
        [
            [np.linalg.norm(left.T @ right, 2) for right in jacobians]
            for left in jacobians
        ]
    )


@pytest.mark.parametrize("reduction", ["mean", "stack"])
def test_all_ways_agree_with_the_products_themselves(reduction):
    problem, params = network_problem("mlp", jnp.float32, reduction=reduction)
    names = ["Dense_0/kernel", "Dense_0/bias", "Dense_1"]
    blocks = partition_by_prefix(params, {name: [name] for name in names})
    jacobians = block_problems.block_jacobians(problem, params, blocks)
    expected = explicit(jacobians)
    for method, given in [
        ("dense", problem),
        ("power_iteration", problem),
        ("power_iteration", plain(problem)),
    ]:
        got = block_coherence(given, params, blocks, key=KEY, method=method)
        assert bool(jnp.all(got.converged))
        # The quotient errs by less than its residual, and only downward.
        slack = np.asarray(got.residuals) * expected + 1e-4 * expected.max()
        assert np.all(np.abs(np.asarray(got.products) - expected) <= slack)
        assert np.all(np.asarray(got.products) <= expected * (1 + 1e-5))
        norms = [np.linalg.norm(block, 2) for block in jacobians]
        np.testing.assert_allclose(got.norms, norms, rtol=1e-2)
        np.testing.assert_array_equal(got.products, got.products.T)
        assert (got.num_iterations == 0) == (method == "dense")


@methods
def test_separate_branches_do_not_overlap(method):
    for reduction in ("mean", "stack"):
        problem, params, blocks = block_problems.branches(reduction=reduction)
        got = block_coherence(problem, params, blocks, key=KEY, method=method)
        np.testing.assert_allclose(got.coherence, np.eye(4), atol=1e-3)
        assert bool(jnp.all(got.converged))
        np.testing.assert_allclose(got.profile, [1, 0, 0, 0], atol=1e-3)
        assert got.tail_sum < 2e-3


@methods
def test_orthogonal_layers_have_norm_one(method):
    problem, params, blocks = block_problems.orthogonal_layers()
    got = block_coherence(problem, params, blocks, key=KEY, method=method)
    np.testing.assert_allclose(got.norms, np.ones(4), rtol=1e-5)
    np.testing.assert_allclose(got.products, np.ones((4, 4)), rtol=1e-5)


@methods
def test_chain_of_scalars(method):
    problem, params, blocks = block_problems.chain()
    got = block_coherence(problem, params, blocks, key=KEY, method=method)
    (batch,) = block_problems.batches_of(problem)
    weights = np.abs(np.array([0.5, 2.0, 1.5, 0.8]))
    size = float(jnp.sum(problem.error(params, batch) ** 2))
    np.testing.assert_allclose(
        got.products, size / np.outer(weights, weights), rtol=1e-4
    )
    np.testing.assert_allclose(got.coherence, np.ones((4, 4)), rtol=1e-4)
    np.testing.assert_allclose(got.tail_sum, 3, rtol=1e-4)


@methods
def test_planted_pair_stands_out(method):
    problem, params, blocks = block_problems.planted_pair(reduction="mean")
    got = block_coherence(problem, params, blocks, key=KEY, method=method)
    expected = np.eye(5)
    expected[0, 4] = expected[4, 0] = 1
    np.testing.assert_allclose(got.coherence, expected, atol=2e-3)


@methods
def test_two_blocks_and_a_block_without_effect(method):
    def error_fn(params, batch):
        return batch["x"] * params["b0"] + 0 * params["b1"]

    params = {"b0": jnp.ones((1, 2)), "b1": jnp.ones((1, 1))}
    problem = Problem.from_error(error_fn, {"x": jnp.ones((1, 3, 2))})
    blocks = block_problems.in_order(2)(params)
    got = block_coherence(problem, params, blocks, key=KEY, method=method)
    np.testing.assert_allclose(got.norms, [3**0.5, 0], rtol=1e-5)
    np.testing.assert_allclose(got.coherence, [[1, 0], [0, 0]], rtol=1e-5)


@methods
def test_a_block_of_integers_alone_has_no_effect(method):
    def error_fn(params, batch):
        return batch["x"] * params["b0"] * params["b1"].astype(jnp.float32)

    params = {"b0": jnp.ones((1, 2)), "b1": jnp.int32(1)}
    problem = Problem.from_error(error_fn, {"x": jnp.ones((1, 3, 2))})
    blocks = block_problems.in_order(2)(params)
    got = block_coherence(problem, params, blocks, key=KEY, method=method)
    np.testing.assert_allclose(got.norms, [3**0.5, 0], rtol=1e-5)
    np.testing.assert_allclose(got.coherence, [[1, 0], [0, 0]], rtol=1e-5)


def test_what_has_not_converged_is_marked():
    problem, params = network_problem("mlp", jnp.float32, reduction="mean")
    blocks = partition_by_prefix(params, {"in": ["Dense_0"], "out": ["Dense_1"]})
    got = block_coherence(
        problem,
        params,
        blocks,
        key=KEY,
        method="power_iteration",
        tolerance=1e-3,
        max_iterations=1,
    )
    assert not bool(jnp.any(got.converged))
    assert got.num_iterations == 1


def test_auto_is_dense_when_small():
    problem, params, blocks = block_problems.branches(reduction="mean")
    assert block_coherence(problem, params, blocks, key=KEY).num_iterations == 0


def test_bad_input_is_named():
    problem, params, blocks = block_problems.branches()
    with pytest.raises(ValueError, match="method: expected one of 'auto', 'dense'"):
        block_coherence(problem, params, blocks, key=KEY, method="svd")
    with pytest.raises(ValueError, match="tolerance: expected a finite number > 0"):
        block_coherence(problem, params, blocks, key=KEY, tolerance=0)
    with pytest.raises(ValueError, match="blocks: expected a partition of the leaves"):
        block_coherence(problem, {"b0": params["b0"]}, blocks, key=KEY)
