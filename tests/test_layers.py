"""Every layer's own measurement, against grams of its own columns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import block_problems
from grsd_jax import (
    Binning,
    gradient_flow_direction,
    kernel_dense,
    layer_kernels,
    measure_coupling,
)
from grsd_jax.conditions import partition_by_prefix
from grsd_jax.shells import measure_layers, toeplitz_residual
from modes import no_nan
from oracles import network_problem, plain, relative_error

KEY = jax.random.key(0)
SHELLS = Binning(num_shells=4, window=3, num_bootstrap=0)


@pytest.fixture(scope="module", params=["mean", "stack"])
def mlp(request):
    """Returns ``(problem, params, direction)``."""
    problem, params = network_problem("mlp", jnp.float32, reduction=request.param)
    return problem, params, gradient_flow_direction(problem, params)


@pytest.fixture(scope="module")
def kernels(mlp):
    """Returns ``{name: (M_l, Mdot_l)}``, which the tests hold to their oracle."""
    return layer_kernels(*mlp)


@pytest.fixture(scope="module")
def measured(mlp):
    return measure_layers(*mlp, key=KEY, shells=SHELLS)


def check_sum(problem, params):
    direction = gradient_flow_direction(problem, params)
    layers = layer_kernels(problem, params, direction)
    assert len(layers) > 1
    whole = kernel_dense(problem, params, direction)
    for part, expected in zip(zip(*layers.values(), strict=True), whole, strict=True):
        assert relative_error(sum(part[1:], part[0]), expected) < 1e-6


@pytest.mark.parametrize("hide", [lambda problem: problem, plain])
def test_layers_add_up_to_the_whole(mlp, hide):
    problem, params, _ = mlp
    check_sum(hide(problem), params)


@pytest.mark.slow
def test_layers_of_a_residual_network_add_up_to_the_whole():
    check_sum(*network_problem("resnet18", jnp.float32))


def test_each_layer_is_the_gram_matrix_of_its_own_columns(mlp, kernels):
    problem, params, direction = mlp
    batches = block_problems.batches_of(problem)

    def columns(p, batch, name):
        rows = jax.jacrev(lambda q: problem.error(q, batch).reshape(-1))(p)[name]
        leaves = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(rows)]
        return jnp.concatenate(leaves, axis=1)

    def grams(p):
        found = {}
        for name in ("Dense_0", "Dense_1"):
            parts = [columns(p, batch, name) for batch in batches]
            if problem.reduction == "stack":
                parts = [jnp.concatenate(parts)]
            found[name] = sum(part @ part.T for part in parts) / len(parts)
        return found

    expected, moved = jax.jit(lambda p, d: jax.jvp(grams, (p,), (d,)))(
        params, direction
    )
    assert list(kernels) == ["Dense_0", "Dense_1"]
    for name, (kernel, derivative) in kernels.items():
        assert relative_error(kernel, expected[name]) < 1e-5
        assert relative_error(derivative, moved[name]) < 1e-5


def test_blocks_of_a_partition_are_layers(mlp, kernels):
    problem, params, direction = mlp
    blocks = partition_by_prefix(params, {"head": ["Dense_1"], "in": ["Dense_0"]})
    found = layer_kernels(problem, params, direction, layer_of=blocks.block_of)
    assert list(found) == ["in", "head"]  # in the order of the tree, not of the names
    for name, layer in (("in", "Dense_0"), ("head", "Dense_1")):
        for got, expected in zip(found[name], kernels[layer], strict=True):
            np.testing.assert_array_equal(got, expected)


def test_total_is_the_measurement_of_the_whole(mlp, measured):
    expected = measure_coupling(*mlp, key=KEY, solver="dense", shells=SHELLS)
    total = measured.total
    np.testing.assert_allclose(total.values[:8], expected.values[:8], rtol=1e-4)
    np.testing.assert_allclose(
        total.renormalized.residual, expected.renormalized.residual, atol=1e-3
    )
    np.testing.assert_allclose(
        total.diagonal_fit.exponent, expected.diagonal_fit.exponent, atol=1e-2
    )
    assert set(measured.layers) == {"Dense_0", "Dense_1"}
    for layer in measured.layers.values():
        assert bool(layer.finite)
        assert np.isnan(layer.operator_disagreement)
    assert total.operator_disagreement < 1e-5
    assert total.reduction == mlp[0].reduction


@pytest.fixture(scope="module")
def with_few(mlp):
    """Returns a measurement with windows that hold no coupling, and how it is taken."""
    problem, params, _ = mlp
    shells = Binning(num_shells=7, window=3, num_bootstrap=0, min_count=3)

    def measure(params):
        return measure_layers(problem, params, key=KEY, shells=shells)

    with no_nan():
        return measure(params), measure


def test_windows_without_coupling_are_undefined(with_few):
    for part in (with_few[0].average, with_few[0].total.literal):
        undefined = np.isnan(part.windows)
        assert undefined.any()
        assert (part.degrees_of_freedom[undefined] == 0).all()


@pytest.mark.scheduled
def test_layers_measured_in_a_program_make_no_nan(mlp, with_few):
    outside, measure = with_few
    with no_nan():
        inside = jax.jit(measure)(mlp[1])
    assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves(inside))
    for part in (lambda found: found.average, lambda found: found.total.literal):
        infinite, undefined = part(inside).windows, part(outside).windows
        np.testing.assert_array_equal(np.isinf(infinite), np.isnan(undefined))


def test_layers_have_their_own_spectra(measured, kernels):
    for name, layer in measured.layers.items():
        kernel, moved = (np.asarray(matrix, np.float64) for matrix in kernels[name])
        values, vectors = np.linalg.eigh(kernel)
        np.testing.assert_allclose(layer.values[:5], values[::-1][:5], rtol=1e-4)
        rates = np.diag(vectors.T @ moved @ vectors)[::-1]
        diagonal = np.diag(layer.coupling)[:3]
        np.testing.assert_allclose(diagonal, rates[:3], rtol=1e-2, atol=1e-4)


def test_average_over_depth(measured, kernels):
    vectors = np.asarray(measured.total.vectors, np.float64)
    values = np.asarray(measured.total.values, np.float64)
    index = np.asarray(measured.total.shells.index)
    expected = np.zeros((4, 4))
    for _, moved in kernels.values():
        squares = (vectors.T @ np.asarray(moved, np.float64) @ vectors) ** 2
        squares /= values[:, None] * values[None, :]
        for a in range(4):
            for b in range(4):
                inside = squares[np.ix_(index == a, index == b)]
                expected[a, b] += inside.mean() / len(kernels) if inside.size else 0
    matrix, mask = measured.average.coupling
    np.testing.assert_allclose(matrix, expected, rtol=1e-3, atol=1e-4 * expected.max())
    residual = toeplitz_residual(jnp.asarray(expected, jnp.float32), mask)
    np.testing.assert_allclose(measured.average.residual, residual, atol=1e-3)


def test_one_layer_is_the_whole(mlp):
    got = measure_layers(*mlp, key=KEY, layer_of=lambda _: "all", shells=SHELLS)
    np.testing.assert_array_equal(got.layers["all"].values, got.total.values)
    np.testing.assert_allclose(
        got.average.coupling.matrix, got.total.renormalized.coupling.matrix, rtol=1e-4
    )


def test_layers_are_resampled_by_keys_of_their_own(mlp):
    shells = Binning(num_shells=4, window=2, num_bootstrap=16)
    got = measure_layers(*mlp, key=KEY, layer_of=lambda _: "all", shells=shells)
    one, whole = got.layers["all"].diagonal_fit, got.total.diagonal_fit
    np.testing.assert_array_equal(one.exponent, whole.exponent)
    assert np.any(one.interval != whole.interval)


def test_orthogonal_layers_are_all_alike():
    problem, params, blocks = block_problems.orthogonal_layers()
    got = measure_layers(
        problem, params, params, key=KEY, layer_of=blocks.block_of, shells=SHELLS
    )
    for layer in got.layers.values():
        np.testing.assert_allclose(layer.values, 1, rtol=1e-5)
    np.testing.assert_allclose(got.total.values, 4, rtol=1e-5)


def test_without_a_direction_layers_follow_the_gradient_flow(mlp, measured):
    problem, params, _ = mlp
    got = measure_layers(problem, params, key=KEY, shells=SHELLS)
    np.testing.assert_array_equal(got.total.coupling, measured.total.coupling)
