import jax
import jax.numpy as jnp
import pytest

from grsd_jax import (
    gradient_flow_direction,
    kernel_dense,
    kernel_derivative_dense,
    kernel_with_derivative_dense,
)
from oracles import dense_kernel, problem, relative_error


@pytest.fixture
def mlp():
    return problem("mlp", jnp.float32)


@pytest.mark.parametrize("reduction", ["mean", "stack"])
@pytest.mark.parametrize(("chunk", "limit"), [(2, 1), (3, 400), (100, 2**30)])
def test_chunks_and_groups_change_nothing(mlp, reduction, chunk, limit):
    error_fn, params, batches, loss_fn = mlp
    direction = gradient_flow_direction(loss_fn, params, batches)
    options = {"example_chunk": chunk, "max_jacobian_bytes": limit}
    got = kernel_with_derivative_dense(
        error_fn, params, batches, direction, reduction=reduction, **options
    )
    expected = jax.jvp(
        lambda p: dense_kernel(error_fn, p, batches, reduction),
        (params,),
        (direction,),
    )
    for matrix, oracle in zip(got, expected, strict=True):
        assert relative_error(matrix, oracle) < 1e-5
        assert relative_error(matrix.T, matrix) == 0


def test_inside_jit(mlp):
    error_fn, params, batches, _ = mlp
    jitted = jax.jit(lambda p: kernel_dense(error_fn, p, batches, example_chunk=2))
    expected = dense_kernel(error_fn, params, batches, "mean")
    assert relative_error(jitted(params), expected) < 1e-5


def test_bad_input_is_named(mlp):
    error_fn, params, batches, _ = mlp
    with pytest.raises(ValueError, match="example_chunk: expected an integer >= 1"):
        kernel_dense(error_fn, params, batches, example_chunk=0)
    with pytest.raises(ValueError, match="max_jacobian_bytes: expected an integer"):
        kernel_dense(error_fn, params, batches, max_jacobian_bytes=0)
    with pytest.raises(ValueError, match="direction: expected the tree of params"):
        kernel_derivative_dense(error_fn, params, batches, {})
