import jax
import jax.numpy as jnp
import numpy as np
import pytest

import block_problems
from grsd_jax import (
    distance_maxima,
    distance_totals,
    gradient_flow_direction,
    influence_profile,
    partition_by_prefix,
    restrict_to_block,
    smallest_band,
)
from oracles import problem

KEY = jax.random.key(0)


def explicit(error_fn, params, batches, direction, blocks, reduction):
    """Returns R from the derivatives of the dense blocks of J themselves."""
    num_batches = jax.tree.leaves(batches)[0].shape[0]
    squares = np.zeros((len(blocks.names), len(blocks.names)))
    for k in range(num_batches):
        batch = jax.tree.map(lambda leaf, k=k: leaf[k], batches)
        jacobian = jax.jacrev(lambda p, batch=batch: error_fn(p, batch))
        for block in range(len(blocks.names)):
            moving = restrict_to_block(direction, blocks, block)
            _, moved = jax.jvp(jacobian, (params,), (moving,))
            for owner, leaf in zip(blocks.index, jax.tree.leaves(moved), strict=True):
                squares[owner, block] += float(jnp.sum(leaf**2))
    return np.sqrt(squares / (num_batches if reduction == "mean" else 1))


@pytest.fixture(scope="module")
def mlp():
    error_fn, params, batches, loss_fn = problem("mlp", jnp.float32)
    direction = gradient_flow_direction(loss_fn, params, batches)
    names = ["Dense_0/kernel", "Dense_0/bias", "Dense_1"]
    blocks = partition_by_prefix(params, {name: [name] for name in names})
    return error_fn, params, batches, direction, blocks


@pytest.mark.parametrize("reduction", ["mean", "stack"])
def test_exact_profile_is_that_of_the_dense_blocks(mlp, reduction):
    expected = explicit(*mlp, reduction)
    got = influence_profile(*mlp, num_probes=None, reduction=reduction, column_chunk=4)
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


def test_separate_branches_have_no_influence_on_each_other():
    error_fn, params, batches, blocks = block_problems.branches()
    for options in ({"num_probes": None}, {"key": KEY}):
        got = influence_profile(error_fn, params, batches, params, blocks, **options)
        influence = np.asarray(got.influence)
        assert np.all(np.diag(influence) > 0.1)
        np.testing.assert_array_equal(influence - np.diag(np.diag(influence)), 0)
        assert smallest_band(distance_totals(influence**2), 1.0) == 0


def test_chain_of_scalars():
    error_fn, params, batches, blocks = block_problems.chain()
    direction = jax.tree.map(lambda w: 0.3 * w**2, params)
    got = influence_profile(
        error_fn, params, batches, direction, blocks, num_probes=None
    )
    batch = jax.tree.map(lambda leaf: leaf[0], batches)
    weights = np.abs(np.array([0.5, 2.0, 1.5, 0.8]))
    size = float(jnp.linalg.norm(error_fn(params, batch)))
    expected = size * 0.3 * weights[None, :] / weights[:, None]
    np.fill_diagonal(expected, 0)  # e is linear in each weight
    np.testing.assert_allclose(got.influence, expected, rtol=1e-4, atol=1e-6)


def test_orthogonal_layers():
    error_fn, params, batches, blocks = block_problems.orthogonal_layers(width=5)
    spins = jax.tree.map(lambda w: jnp.roll(w, 1, axis=0), params)
    got = influence_profile(error_fn, params, batches, spins, blocks, num_probes=None)
    # J_l = A (x) b: a motion of size 1 in layer m moves a factor of norm 1 in J_l,
    # the output side's (sqrt(width) in Frobenius norm) or the input side's (1 row).
    np.testing.assert_allclose(
        got.influence, 5**0.5 * (1 - np.eye(4)), rtol=1e-4, atol=1e-5
    )


def test_distances_and_bands():
    matrix = np.arange(9, dtype=np.float32).reshape(3, 3)
    np.testing.assert_array_equal(distance_totals(matrix), [12, 16, 8])
    np.testing.assert_array_equal(distance_maxima(matrix), [8, 7, 6])
    profile = np.array([6.0, 3.0, 1.0, 0.0], np.float32)
    bands = [int(smallest_band(profile, share)) for share in (0.5, 0.6, 0.9, 0.95, 1)]
    assert bands == [0, 0, 1, 2, 2]
    assert smallest_band(np.zeros(3, np.float32), 0.9) == 0


def test_bad_input_is_named(mlp):
    with pytest.raises(ValueError, match="key: expected a key for random probes"):
        influence_profile(*mlp)
    with pytest.raises(ValueError, match="num_probes: expected an integer >= 2"):
        influence_profile(*mlp, key=KEY, num_probes=1)
    with pytest.raises(ValueError, match="direction: expected the tree of params"):
        influence_profile(*mlp[:3], {}, mlp[4], key=KEY)
    with pytest.raises(ValueError, match=r"share: expected a number in \(0, 1\]"):
        smallest_band(np.ones(3, np.float32), 0.0)
    with pytest.raises(ValueError, match=r"matrix: expected shape \[2, 2\]"):
        distance_totals(np.ones((2, 3), np.float32))
