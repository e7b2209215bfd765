import chex
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grsd_jax
from grsd_jax import kernel_dense, kernel_matmat, linearize_kernel
from grsd_jax._memory import tree_bytes
from grsd_jax.jacobian import autodiff as _jacobian
from oracles import dense_kernel, problem, relative_error

TOLERANCE = {jnp.float32: 1e-5, jnp.float64: 1e-11}


def check_all_forms(name, dtype, error):
    error_fn, params, batches, _ = problem(name, dtype, error=error)
    for reduction in ("mean", "stack"):
        expected = dense_kernel(error_fn, params, batches, reduction)
        identity = jnp.eye(expected.shape[0], dtype=dtype)
        kernel = linearize_kernel(error_fn, params, batches, reduction=reduction)
        forms = {
            "matmat": kernel_matmat(
                error_fn, params, batches, identity, reduction=reduction
            ),
            "linearized": kernel.matmat(identity),
            "dense": kernel_dense(error_fn, params, batches, reduction=reduction),
        }
        tolerance = TOLERANCE[dtype]
        for form, got in forms.items():
            assert got.dtype == dtype
            assert relative_error(got, expected) < tolerance, (form, reduction)
            assert relative_error(got.T, got) < tolerance, (form, reduction)
            values = np.linalg.eigvalsh(np.asarray(got, np.float64))
            assert values[0] > -tolerance * values[-1], (form, reduction)
        assert kernel.dimension == expected.shape[0]


errors = pytest.mark.parametrize(
    "error", [grsd_jax.softmax_error, grsd_jax.squared_error]
)


@errors
@pytest.mark.parametrize(
    "name", ["mlp", pytest.param("resnet18", marks=pytest.mark.slow), "plainnet18"]
)
def test_all_forms_equal_the_jacobian_product(name, error):
    check_all_forms(name, jnp.float32, error)


@errors
@pytest.mark.usefixtures("x64")
def test_all_forms_equal_the_jacobian_product_in_float64(error):
    check_all_forms("mlp", jnp.float64, error)


@errors
@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["resnet18", "plainnet18"])
def test_networks_in_float64(name, error):
    check_all_forms(name, jnp.float64, error)


def test_linearized_kernel_crosses_jit_without_retracing():
    error_fn, params, batches, _ = problem("mlp", jnp.float32)
    block = jax.random.normal(jax.random.key(1), (15, 2))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def apply(kernel, block):
        return kernel.matmat(block)

    for scale in (1.0, 0.5, 2.0):
        moved = jax.tree.map(lambda leaf, s=scale: leaf * s, params)
        kernel = linearize_kernel(error_fn, moved, batches)
        expected = dense_kernel(error_fn, moved, batches, "mean") @ block
        assert relative_error(apply(kernel, block), expected) < 1e-5


@pytest.mark.parametrize(("limit", "products"), [("none", 6), ("three", 2), ("all", 1)])
def test_eager_products_take_the_columns_that_stay_in_the_caches(
    monkeypatch, limit, products
):
    error_fn, params, batches, _ = problem("mlp", jnp.float32)
    kernel = linearize_kernel(error_fn, params, batches, jacobian="plain")
    block = jnp.asarray(
        np.random.default_rng(0).normal(size=(kernel.dimension, 6)), jnp.float32
    )
    expected = jax.jit(lambda k, v: k.matmat(v))(kernel, block)
    taken, multiply = [], _jacobian._multiply

    def spy(pullback, columns):
        taken.append(columns.shape[-1])
        return multiply(pullback, columns)

    column = tree_bytes(kernel.jacobians[0].pullback) + tree_bytes(params)
    room = {"none": 1, "three": 3 * column, "all": 6 * column}[limit]
    monkeypatch.setattr(_jacobian, "_CACHED_BYTES", room)
    monkeypatch.setattr(_jacobian, "_multiply", spy)
    assert relative_error(kernel.matmat(block), expected) < 1e-5
    assert taken == [6 // products] * products * len(kernel.jacobians)


def test_new_parameters_and_state_do_not_trace_the_error_again():
    traces = 0

    def error_fn(params, batch):
        nonlocal traces
        traces += 1
        return jnp.tanh(batch["x"] @ params["w"])

    params = {"w": jnp.ones((4, 3))}
    batches = {"x": jnp.ones((2, 5, 4))}
    block = jnp.ones((15, 2))
    kernel_matmat(error_fn, params, batches, block)
    before = traces
    for scale in (0.5, 2.0):
        kernel_matmat(error_fn, {"w": params["w"] * scale}, batches, block)
    assert traces == before


def test_user_transformations():
    error_fn, params, batches, _ = problem("mlp", jnp.float32)
    block = jax.random.normal(jax.random.key(1), (15, 2))

    def quadratic(p):
        return jnp.sum(block * kernel_matmat(error_fn, p, batches, block))

    def oracle(p):
        kernel = dense_kernel(error_fn, p, batches, "mean")
        return jnp.sum(block * jnp.matmul(kernel, block, precision="highest"))

    got, expected = jax.jit(jax.grad(quadratic))(params), jax.grad(oracle)(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        got,
        expected,
    )
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    both = jax.vmap(quadratic)(stacked)
    np.testing.assert_allclose(both[0], quadratic(params), rtol=1e-5)


def test_custom_vjp_functions_work():
    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))

    def custom(params, batch):
        return square(batch["x"] @ params["w"])

    def plain(params, batch):
        return (batch["x"] @ params["w"]) ** 2

    params = {"w": jax.random.normal(jax.random.key(0), (4, 3))}
    batches = {"x": jax.random.normal(jax.random.key(1), (2, 5, 4))}
    block = jnp.eye(15)
    got = kernel_matmat(custom, params, batches, block)
    assert relative_error(got, dense_kernel(plain, params, batches, "mean")) < 1e-5


def test_nnx_model_and_plain_function():
    model = nnx.Sequential(
        nnx.Linear(4, 6, rngs=nnx.Rngs(0)),
        nnx.gelu,
        nnx.BatchNorm(6, use_running_average=True, rngs=nnx.Rngs(1)),
        nnx.Linear(6, 3, rngs=nnx.Rngs(2)),
    )
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def error_fn(params, batch):
        logits = nnx.merge(graph, params, rest)(batch["image"])
        return grsd_jax.softmax_error(logits, batch["label"])

    batches = {
        "image": jax.random.normal(jax.random.key(0), (2, 5, 4)),
        "label": jnp.zeros((2, 5), jnp.int32),
    }
    got = kernel_matmat(error_fn, params, batches, jnp.eye(15))
    assert relative_error(got, dense_kernel(error_fn, params, batches, "mean")) < 1e-5


@pytest.mark.parametrize("reduction", ["mean", "stack"])
def test_chunks_of_columns_change_nothing(reduction):
    error_fn, params, batches, _ = problem("mlp", jnp.float32)
    expected = dense_kernel(error_fn, params, batches, reduction)
    block = jax.random.normal(jax.random.key(1), (len(expected), 5))

    def product(block, chunk):
        return kernel_matmat(
            error_fn, params, batches, block, reduction=reduction, column_chunk=chunk
        )

    for chunk in (2, 9):
        assert relative_error(product(block, chunk), expected @ block) < 1e-5
    traced = jax.jit(product, static_argnums=1)(block, 2)
    assert relative_error(traced, expected @ block) < 1e-5
    kernel = linearize_kernel(error_fn, params, batches, reduction=reduction)
    held = kernel.matmat(block, column_chunk=2)
    assert relative_error(held, expected @ block) < 1e-5
    with pytest.raises(ValueError, match="column_chunk: expected an integer >= 1"):
        product(block, 0)


def test_bad_input_is_named():
    error_fn, params, batches, _ = problem("mlp", jnp.float32)
    block = jnp.ones((15, 2))
    with pytest.raises(ValueError, match=r"block: expected shape \[15, any\], got"):
        kernel_matmat(error_fn, params, batches, block[:-1])
    with pytest.raises(ValueError, match=r"block: expected shape \[30, any\]"):
        kernel_matmat(error_fn, params, batches, block, reduction="stack")
    with pytest.raises(ValueError, match="block: expected dtype float32"):
        kernel_matmat(error_fn, params, batches, block.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="reduction: expected one of 'mean', 'stack'"):
        kernel_matmat(error_fn, params, batches, block, reduction="sum")
    uneven = {**batches, "label": batches["label"][:, :-1]}
    with pytest.raises(ValueError, match=r"batches\['label'\]: expected leading axes"):
        linearize_kernel(error_fn, params, uneven)
    empty = jax.tree.map(lambda leaf: leaf[:0], batches)
    with pytest.raises(ValueError, match="expected K >= 1 batches of N >= 1"):
        linearize_kernel(error_fn, params, empty)
    with pytest.raises(ValueError, match="batches: expected arrays"):
        linearize_kernel(error_fn, params, {})
    with pytest.raises(ValueError, match=r"params\['w'\]: expected a real floating"):
        linearize_kernel(error_fn, {"w": jnp.arange(3)}, batches)
    with pytest.raises(ValueError, match=r"error_fn: expected an array \[N, C\]"):
        linearize_kernel(lambda p, b: error_fn(p, b)[0], params, batches)
