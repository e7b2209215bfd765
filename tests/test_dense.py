import jax
import jax.numpy as jnp
import pytest

from grsd_jax import (
    gradient_flow_direction,
    kernel_dense,
    kernel_derivative_dense,
    kernel_with_derivative_dense,
)
from grsd_jax.kernel import dense_blocks as _dense_blocks
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


def test_the_bound_is_a_share_of_the_free_memory_by_default(mlp, monkeypatch):
    error_fn, params, batches, _ = mlp
    whole = kernel_dense(error_fn, params, batches)
    bounds, groups = [], _dense_blocks._leaf_groups

    def spy(sizes, max_bytes):
        bounds.append(max_bytes)
        return groups(sizes, max_bytes)

    monkeypatch.setattr(_dense_blocks, "_leaf_groups", spy)
    monkeypatch.setattr(_dense_blocks, "default_bytes", lambda: 10)
    assert relative_error(kernel_dense(error_fn, params, batches), whole) < 1e-5
    assert set(bounds) == {5}


@pytest.mark.parametrize(
    ("examples", "small", "chunk"),
    [
        (5, 0, 5),
        (32, 0, 8),
        (160, 0, 20),
        (512, 0, 32),
        (32, 2**30, 32),
        (160, 2**30, 32),
    ],
)
def test_chunks_of_examples_by_default(mlp, monkeypatch, examples, small, chunk):
    error_fn, params, batches, _ = mlp
    monkeypatch.setattr(_dense_blocks, "_SMALL", small)
    sizes = []

    def chunked(batches, size):
        sizes.append(size)
        return iter(())

    monkeypatch.setattr(_dense_blocks, "_chunked", chunked)
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf[0, 0]] * examples)[None], batches)
    with pytest.raises(KeyError):  # nothing was accumulated
        kernel_dense(error_fn, params, batch)
    assert min(sizes[0], examples) == chunk


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
