import jax
import jax.numpy as jnp
import numpy as np
import pytest

import block_problems
from grsd_jax import (
    gradient_flow_direction,
    kernel_with_derivative_dense,
    layer_kernels_with_derivative,
    measure_coupling,
    measure_layers,
    partition_by_prefix,
    toeplitz_residual,
)
from oracles import problem, relative_error

KEY = jax.random.key(0)
OPTIONS = {"num_shells": 4, "window": 3, "num_bootstrap": 0}


@pytest.fixture(scope="module")
def mlp():
    error_fn, params, batches, loss_fn = problem("mlp", jnp.float32)
    direction = gradient_flow_direction(loss_fn, params, batches)
    return error_fn, params, batches, direction


@pytest.mark.parametrize(
    ("name", "jacobian"),
    [
        ("mlp", "factored"),
        ("mlp", "plain"),
        pytest.param("resnet18", "factored", marks=pytest.mark.slow),
    ],
)
def test_layers_add_up_to_the_whole(name, jacobian):
    error_fn, params, batches, loss_fn = problem(name, jnp.float32)
    direction = gradient_flow_direction(loss_fn, params, batches)
    layers = layer_kernels_with_derivative(
        error_fn, params, batches, direction, jacobian=jacobian
    )
    assert len(layers) > 1
    whole = kernel_with_derivative_dense(error_fn, params, batches, direction)
    for part, expected in zip(zip(*layers.values(), strict=True), whole, strict=True):
        assert relative_error(sum(part[1:], part[0]), expected) < 1e-6


def test_each_layer_is_the_gram_matrix_of_its_own_columns(mlp):
    error_fn, params, batches, direction = mlp
    blocks = partition_by_prefix(params, {"in": ["Dense_0"], "out": ["Dense_1"]})
    layers = layer_kernels_with_derivative(*mlp, layer_of=blocks.block_of)

    def grams(p):
        parts = []
        for k in range(2):
            batch = jax.tree.map(lambda leaf, k=k: leaf[k], batches)
            rows = jax.jacrev(lambda q, b=batch: error_fn(q, b).reshape(-1))(p)
            parts.append([leaf.reshape(15, -1) for leaf in jax.tree.leaves(rows)])
        halves = [
            [sum(r[i] @ r[i].T for i in blocks.leaves_of(b)) for b in range(2)]
            for r in parts
        ]
        return [(x + y) / 2 for x, y in zip(*halves, strict=True)]

    kernels, moved = jax.jvp(grams, (params,), (direction,))
    for name, kernel, derivative in zip(blocks.names, kernels, moved, strict=True):
        assert relative_error(layers[name][0], kernel) < 1e-5
        assert relative_error(layers[name][1], derivative) < 1e-5


def test_total_is_the_measurement_of_the_whole(mlp):
    got = measure_layers(*mlp, key=KEY, **OPTIONS)
    expected = measure_coupling(*mlp, key=KEY, solver="dense", **OPTIONS)
    np.testing.assert_allclose(got.total.values[:8], expected.values[:8], rtol=1e-4)
    np.testing.assert_allclose(
        got.total.renormalized.residual, expected.renormalized.residual, atol=1e-3
    )
    np.testing.assert_allclose(
        got.total.diagonal_fit.exponent, expected.diagonal_fit.exponent, atol=1e-2
    )
    assert set(got.layers) == {"Dense_0", "Dense_1"}
    for measured in got.layers.values():
        assert bool(measured.finite)
        assert np.isnan(measured.operator_disagreement)
    assert got.total.operator_disagreement < 1e-5


def test_layers_have_their_own_spectra(mlp):
    got = measure_layers(*mlp, key=KEY, **OPTIONS)
    layers = layer_kernels_with_derivative(*mlp)
    for name, measured in got.layers.items():
        values, vectors = np.linalg.eigh(np.asarray(layers[name][0], np.float64))
        np.testing.assert_allclose(measured.values[:5], values[::-1][:5], rtol=1e-4)
        rates = np.diag(vectors.T @ np.asarray(layers[name][1]) @ vectors)[::-1]
        diagonal = np.diag(measured.coupling)[:3]
        np.testing.assert_allclose(diagonal, rates[:3], rtol=1e-2, atol=1e-4)


def test_average_over_depth(mlp):
    got = measure_layers(*mlp, key=KEY, **OPTIONS)
    layers = layer_kernels_with_derivative(*mlp)
    vectors = np.asarray(got.total.vectors, np.float64)
    values = np.asarray(got.total.values, np.float64)
    index = np.asarray(got.total.shells.index)
    expected = np.zeros((4, 4))
    for _, moved in layers.values():
        squares = (vectors.T @ np.asarray(moved, np.float64) @ vectors) ** 2
        squares /= values[:, None] * values[None, :]
        for a in range(4):
            for b in range(4):
                inside = squares[np.ix_(index == a, index == b)]
                expected[a, b] += inside.mean() / len(layers) if inside.size else 0
    matrix, mask = got.average.coupling
    np.testing.assert_allclose(matrix, expected, rtol=1e-3, atol=1e-4 * expected.max())
    residual = toeplitz_residual(jnp.asarray(expected, jnp.float32), mask)
    np.testing.assert_allclose(got.average.residual, residual, atol=1e-3)


def test_one_layer_is_the_whole(mlp):
    got = measure_layers(*mlp, key=KEY, layer_of=lambda _: "all", **OPTIONS)
    np.testing.assert_array_equal(got.layers["all"].values, got.total.values)
    np.testing.assert_allclose(
        got.average.coupling.matrix, got.total.renormalized.coupling.matrix, rtol=1e-4
    )


def test_orthogonal_layers_are_all_alike():
    error_fn, params, batches, blocks = block_problems.orthogonal_layers()
    got = measure_layers(
        error_fn, params, batches, params, key=KEY, layer_of=blocks.block_of, **OPTIONS
    )
    for measured in got.layers.values():
        np.testing.assert_allclose(measured.values, 1, rtol=1e-5)
    np.testing.assert_allclose(got.total.values, 4, rtol=1e-5)
