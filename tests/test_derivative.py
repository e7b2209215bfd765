import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grsd_jax
from grsd_jax import (
    central_difference,
    gradient_flow_direction,
    kernel_derivative,
    kernel_derivative_dense,
)
from oracles import dense_kernel, problem, relative_error


def with_direction(name, dtype, **options):
    error_fn, params, batches, loss_fn = problem(name, dtype, **options)
    direction = gradient_flow_direction(loss_fn, params, batches)
    return error_fn, params, batches, direction


def columns(size, count, dtype):
    return jax.random.normal(jax.random.key(5), (size, count), dtype)


@pytest.mark.usefixtures("x64")
def test_direction_is_minus_the_gradient_of_the_mean_loss():
    _, params, batches, loss_fn = problem("mlp", jnp.float64)

    def mean_loss(p):
        losses = [
            loss_fn(p, jax.tree.map(lambda leaf, k=k: leaf[k], batches))
            for k in range(2)
        ]
        return sum(losses) / 2

    got = gradient_flow_direction(loss_fn, params, batches)
    expected = jax.grad(mean_loss)(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, -b, rtol=1e-12), got, expected
    )


networks = [
    pytest.param("resnet18", marks=pytest.mark.slow),
    pytest.param("plainnet18", marks=pytest.mark.slow),
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("reduction", ["mean", "stack"])
@pytest.mark.parametrize("name", ["mlp", *networks])
def test_exact_equals_central_differences_for_a_smooth_activation(name, reduction):
    error_fn, params, batches, direction = with_direction(name, jnp.float64)
    size = error_size(error_fn, params, batches, reduction)
    vectors, _ = jnp.linalg.qr(columns(size, 4, jnp.float64))
    exact, difference = (
        kernel_derivative(
            error_fn,
            params,
            batches,
            direction,
            vectors,
            method=method,
            step=1e-6,
            reduction=reduction,
        )
        for method in ("exact", "finite_difference")
    )
    assert relative_error(difference, exact) < 1e-8


def error_size(error_fn, params, batches, reduction):
    return grsd_jax.error_dimension(error_fn, params, batches, reduction=reduction)


@pytest.mark.usefixtures("x64")
def test_difference_falls_as_the_square_of_the_step():
    error_fn, params, batches, direction = with_direction("mlp", jnp.float64)
    vectors = columns(15, 4, jnp.float64)
    arguments = (error_fn, params, batches, direction, vectors)
    exact = kernel_derivative(*arguments)
    errors = [
        relative_error(
            kernel_derivative(*arguments, method="finite_difference", step=step), exact
        )
        for step in (4e-3, 2e-3, 1e-3)
    ]
    rates = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(rates, 2, atol=0.1)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_piecewise_linear_networks_differ_by_their_flips():
    error_fn, params, batches, direction = with_direction(
        "resnet18", jnp.float64, activation="relu"
    )
    vectors = columns(9, 4, jnp.float64)
    arguments = (error_fn, params, batches, direction, vectors)
    exact = kernel_derivative(*arguments)
    far = kernel_derivative(*arguments, method="finite_difference", step=1e-1)
    near = kernel_derivative(*arguments, method="finite_difference", step=1e-9)
    assert relative_error(near, exact) < 1e-4 < 1e-2 < relative_error(far, exact)


@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        pytest.param("resnet18", marks=pytest.mark.slow),
        pytest.param("plainnet18", marks=pytest.mark.slow),
    ],
)
def test_exact_dense_and_projected_agree_in_float32(name):
    error_fn, params, batches, direction = with_direction(name, jnp.float32)
    for reduction in ("mean", "stack") if name == "mlp" else ("mean",):
        dense = kernel_derivative_dense(
            error_fn, params, batches, direction, reduction=reduction
        )
        oracle = jax.jvp(
            lambda p, reduction=reduction: dense_kernel(
                error_fn, p, batches, reduction
            ),
            (params,),
            (direction,),
        )[1]
        identity = jnp.eye(dense.shape[0])
        projected = kernel_derivative(
            error_fn, params, batches, direction, identity, reduction=reduction
        )
        assert relative_error(dense, oracle) < 1e-4
        assert relative_error(projected, oracle) < 1e-4
        assert relative_error(projected.T, projected) == 0


@pytest.mark.parametrize("reduction", ["mean", "stack"])
def test_column_chunks_change_nothing_eagerly_or_traced(reduction):
    error_fn, params, batches, direction = with_direction("mlp", jnp.float32)
    size = error_size(error_fn, params, batches, reduction)
    vectors = columns(size, 7, jnp.float32)

    def chunked(p, chunk):
        return kernel_derivative(
            error_fn,
            p,
            batches,
            direction,
            vectors,
            reduction=reduction,
            column_chunk=chunk,
        )

    whole = chunked(params, None)
    assert relative_error(chunked(params, 3), whole) < 1e-5
    assert relative_error(jax.jit(lambda p: chunked(p, 3))(params), whole) < 1e-5


def test_custom_vjp_functions_work():
    @jax.custom_vjp
    def cube(x):
        return x**3

    cube.defvjp(lambda x: (x**3, x), lambda x, g: (3 * x**2 * g,))
    params = {"w": jax.random.normal(jax.random.key(0), (4, 3))}
    batches = {"x": jax.random.normal(jax.random.key(1), (2, 5, 4))}

    def custom(params, batch):
        return cube(batch["x"] @ params["w"])

    def plain(params, batch):
        return (batch["x"] @ params["w"]) ** 3

    arguments = (params, batches, params, jnp.eye(15))
    expected = kernel_derivative(plain, *arguments)
    assert relative_error(kernel_derivative(custom, *arguments), expected) < 1e-5


def test_central_difference_is_exact_for_a_quadratic_and_safe_at_zero():
    params = {"w": jnp.array([1.0, 2.0])}
    direction = {"w": jnp.array([3.0, -1.0])}
    got = central_difference(lambda p: p["w"] ** 2, params, direction, step=2.0**-10)
    np.testing.assert_allclose(got, 2 * params["w"] * direction["w"], rtol=1e-3)
    still = jax.tree.map(jnp.zeros_like, direction)
    np.testing.assert_array_equal(
        central_difference(lambda p: p["w"] ** 2, params, still), 0
    )


def test_bad_input_is_named():
    error_fn, params, batches, direction = with_direction("mlp", jnp.float32)
    vectors = jnp.ones((15, 2))
    with pytest.raises(ValueError, match="direction: expected the tree of params"):
        kernel_derivative(error_fn, params, batches, {}, vectors)
    short = jax.tree.map(lambda leaf: leaf[..., :-1], direction)
    with pytest.raises(ValueError, match=r"direction.*: expected shape"):
        kernel_derivative(error_fn, params, batches, short, vectors)
    with pytest.raises(ValueError, match=r"vectors: expected shape \[15, any\]"):
        kernel_derivative(error_fn, params, batches, direction, vectors[1:])
    with pytest.raises(ValueError, match="method: expected one of 'exact'"):
        kernel_derivative(error_fn, params, batches, direction, vectors, method="fd")
    with pytest.raises(ValueError, match="step: expected a finite number > 0"):
        kernel_derivative(
            error_fn,
            params,
            batches,
            direction,
            vectors,
            method="finite_difference",
            step=-1.0,
        )
    with pytest.raises(ValueError, match="loss_fn: expected a scalar"):
        gradient_flow_direction(error_fn, params, batches)
