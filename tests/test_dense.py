import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax import gradient_flow_direction, kernel_dense
from grsd_jax.kernel import dense
from oracles import dense_kernel, network_problem, relative_error


@pytest.fixture(scope="module")
def mlp():
    return network_problem("mlp", jnp.float32)


@pytest.mark.parametrize("reduction", ["mean", "stack"])
@pytest.mark.parametrize(("chunk", "limit"), [(2, 1), (3, 400), (100, 2**30)])
def test_chunks_and_groups_change_nothing(mlp, reduction, chunk, limit):
    problem, params = mlp
    problem = problem.replace(reduction=reduction)
    direction = gradient_flow_direction(problem, params)
    got = kernel_dense(problem, params, direction, example_chunk=chunk, max_bytes=limit)
    expected = jax.jvp(lambda p: dense_kernel(problem, p), (params,), (direction,))
    for matrix, oracle in zip(got, expected, strict=True):
        assert relative_error(matrix, oracle) < 1e-5
        assert relative_error(matrix.T, matrix) == 0


def test_labels_of_numpy_in_64_bits_warn_of_nothing(mlp):  # new JAX warns of int64
    problem, params = mlp
    batches = {**problem.batches, "label": np.asarray(problem.batches["label"], int)}
    got = kernel_dense(problem.replace(batches=batches), params)
    assert relative_error(got, kernel_dense(problem, params)) == 0


def test_the_bound_is_a_share_of_the_free_memory_by_default(mlp, monkeypatch):
    whole = kernel_dense(*mlp)
    bounds, groups = [], dense._leaf_groups

    def spy(sizes, max_bytes):
        bounds.append(max_bytes)
        return groups(sizes, max_bytes)

    monkeypatch.setattr(dense, "_leaf_groups", spy)
    monkeypatch.setattr(dense, "default_bytes", lambda: 10)
    assert relative_error(kernel_dense(*mlp), whole) < 1e-5
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
    problem, params = mlp
    monkeypatch.setattr(dense, "_SMALL", small)
    sizes = []

    def chunked(batches, num_spaces, num_examples, size):
        sizes.append(size)
        return iter(())

    monkeypatch.setattr(dense, "_chunked", chunked)
    one = jax.tree.map(
        lambda leaf: jnp.stack([leaf[0, 0]] * examples)[None], problem.batches
    )
    with pytest.raises(KeyError):  # nothing was accumulated
        kernel_dense(problem.replace(batches=one), params)
    assert min(sizes[0], examples) == chunk


@pytest.mark.parametrize("reduction", ["mean", "stack"])
def test_inside_jit(mlp, reduction):
    problem, params = mlp
    problem = problem.replace(reduction=reduction)
    jitted = jax.jit(lambda p: kernel_dense(problem, p, example_chunk=2))
    assert relative_error(jitted(params), dense_kernel(problem, params)) < 1e-5


def test_bad_input_is_named(mlp):
    problem, params = mlp
    with pytest.raises(ValueError, match="example_chunk: expected an integer >= 1"):
        kernel_dense(problem, params, example_chunk=0)
    with pytest.raises(ValueError, match="max_bytes: expected an integer >= 1"):
        kernel_dense(problem, params, max_bytes=0)
    with pytest.raises(ValueError, match="direction: expected the tree of params"):
        kernel_dense(problem, params, {})
