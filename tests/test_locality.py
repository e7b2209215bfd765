"""The influence between blocks, against dense blocks of J and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import block_problems
from grsd_jax import Problem, gradient_flow_direction, partition
from grsd_jax.conditions import (
    distance_maxima,
    distance_totals,
    influence_profile,
    partition_by_prefix,
    restrict_to_block,
    smallest_band,
)
from oracles import network_problem

KEY = jax.random.key(0)


@jax.jit
def moved_jacobian(problem, params, moving, batch):
    """Returns the derivative of the dense J of one batch along ``moving``."""
    jacobian = jax.jacrev(lambda p: problem.error(p, batch))
    return jax.jvp(jacobian, (params,), (moving,))[1]


def explicit(problem, params, direction, blocks):
    """Returns R from the derivatives of the dense blocks of J themselves."""
    batches = block_problems.batches_of(problem)
    squares = np.zeros((len(blocks.names), len(blocks.names)))
    for batch in batches:
        for block in range(len(blocks.names)):
            moving = restrict_to_block(direction, blocks, block)
            moved = moved_jacobian(problem, params, moving, batch)
            for owner, leaf in zip(blocks.index, jax.tree.leaves(moved), strict=True):
                squares[owner, block] += float(jnp.sum(leaf**2))
    return np.sqrt(squares / (len(batches) if problem.reduction == "mean" else 1))


def mlp_at(reduction):
    problem, params = network_problem("mlp", jnp.float32, reduction=reduction)
    direction = gradient_flow_direction(problem, params)
    names = ["Dense_0/kernel", "Dense_0/bias", "Dense_1"]
    blocks = partition_by_prefix(params, {name: [name] for name in names})
    return problem, params, direction, blocks


@pytest.fixture(scope="module")
def mlp():
    return mlp_at("mean")


@pytest.mark.parametrize("reduction", ["mean", "stack"])
def test_exact_profile_is_that_of_the_dense_blocks(reduction):
    given = mlp_at(reduction)
    expected = explicit(*given)
    got = influence_profile(*given, num_probes=None, column_chunk=4)
    np.testing.assert_allclose(got.influence, expected, rtol=1e-4)
    assert got.num_probes == 0
    assert not np.any(got.stderr)
    assert expected[0, 2] != pytest.approx(expected[2, 0])  # rows and columns differ


def test_probes_agree_within_their_standard_error(mlp):
    expected = np.asarray(influence_profile(*mlp, num_probes=None).influence)
    got = influence_profile(*mlp, key=KEY, num_probes=64)
    assert np.all(np.abs(got.influence - expected) < 4 * got.stderr)
    assert np.all(got.stderr < 0.25 * expected)


def test_standard_error_is_the_spread_of_estimates(mlp):
    keys = jax.random.split(KEY, 24)
    estimates = [influence_profile(*mlp, key=k, num_probes=8) for k in keys]
    spread = np.std([e.influence for e in estimates], axis=0, ddof=1)
    stated = np.mean([e.stderr for e in estimates], axis=0)
    np.testing.assert_allclose(stated, spread, rtol=0.5)


@pytest.mark.parametrize("reduction", ["mean", "stack"])
def test_separate_branches_have_no_influence_on_each_other(reduction):
    problem, params, blocks = block_problems.branches(reduction=reduction)
    for options in ({"num_probes": None}, {"key": KEY}):
        got = influence_profile(problem, params, params, blocks, **options)
        influence = np.asarray(got.influence)
        assert np.all(np.diag(influence) > 0.1)
        np.testing.assert_array_equal(influence - np.diag(np.diag(influence)), 0)
        assert smallest_band(distance_totals(influence**2), 1.0) == 0


def test_chain_of_scalars():
    problem, params, blocks = block_problems.chain()
    direction = jax.tree.map(lambda w: 0.3 * w**2, params)
    got = influence_profile(problem, params, direction, blocks, num_probes=None)
    (batch,) = block_problems.batches_of(problem)
    weights = np.abs(np.array([0.5, 2.0, 1.5, 0.8]))
    size = float(jnp.linalg.norm(problem.error(params, batch)))
    expected = size * 0.3 * weights[None, :] / weights[:, None]
    np.fill_diagonal(expected, 0)  # e is linear in each weight
    np.testing.assert_allclose(got.influence, expected, rtol=1e-4, atol=1e-6)


def test_orthogonal_layers():
    problem, params, blocks = block_problems.orthogonal_layers(width=5)
    spins = jax.tree.map(lambda w: jnp.roll(w, 1, axis=0), params)
    got = influence_profile(problem, params, spins, blocks, num_probes=None)
    # J_l = A (x) b: a motion of size 1 in layer m moves a factor of norm 1 in J_l,
    # the output side's (sqrt(width) in Frobenius norm) or the input side's (1 row).
    np.testing.assert_allclose(
        got.influence, 5**0.5 * (1 - np.eye(4)), rtol=1e-4, atol=1e-5
    )


def test_integer_leaves_are_held_and_belong_to_a_block_all_the_same():
    problem, params, blocks = block_problems.branches(2)
    held = {"b0": params["b0"], "b1": {"steps": jnp.int32(3), "w": params["b1"]}}

    def error_fn(params, batch):
        steps = params["b1"]["steps"].astype(jnp.float32)
        first = jnp.tanh(batch["x"] @ params["b0"])
        return first * (batch["x"] @ params["b1"]["w"]) ** steps

    def closed_over(params, batch):
        inner = {"steps": held["b1"]["steps"], "w": params["b1"]}
        return error_fn(params | {"b1": inner}, batch)

    expected = influence_profile(
        problem.replace(error_fn=closed_over), params, params, blocks, num_probes=None
    )
    got = influence_profile(
        Problem.from_error(error_fn, problem.batches),
        held,
        held,
        partition(held, lambda path: path[0], ["b0", "b1"]),
        num_probes=None,
    )
    assert np.all(np.asarray(expected.influence) > 0)
    np.testing.assert_allclose(got.influence, expected.influence, rtol=1e-5)


def test_distances_and_bands():
    matrix = np.arange(9, dtype=np.float32).reshape(3, 3)
    np.testing.assert_array_equal(distance_totals(matrix), [12, 16, 8])
    np.testing.assert_array_equal(distance_maxima(matrix), [8, 7, 6])
    profile = np.array([6.0, 3.0, 1.0, 0.0], np.float32)
    bands = [int(smallest_band(profile, share)) for share in (0.5, 0.6, 0.9, 0.95, 1)]
    assert bands == [0, 0, 1, 2, 2]
    assert smallest_band(np.zeros(3, np.float32), 0.9) == 0
    assert smallest_band(np.float32([1, np.nan, 0]), 0.9) == -1
    assert smallest_band(np.float32([1, -1, 3]), 0.9) == -1


def test_bad_input_is_named(mlp):
    problem, params, _, blocks = mlp
    with pytest.raises(ValueError, match="key: expected a PRNG key for random probes"):
        influence_profile(*mlp)
    with pytest.raises(ValueError, match="num_probes: expected an integer >= 2"):
        influence_profile(*mlp, key=KEY, num_probes=1)
    with pytest.raises(ValueError, match="direction: expected the tree of params"):
        influence_profile(problem, params, {}, blocks, key=KEY)
    with pytest.raises(ValueError, match=r"share: expected a number in \(0, 1\]"):
        smallest_band(np.ones(3, np.float32), 0.0)
    with pytest.raises(ValueError, match=r"matrix: expected shape \[2, 2\]"):
        distance_totals(np.ones((2, 3), np.float32))
