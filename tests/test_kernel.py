import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax import (
    Problem,
    kernel_dense,
    kernel_matmat,
    linearize_kernel,
    models,
    softmax_error,
)
from grsd_jax.jacobian import autodiff
from oracles import (
    dense_kernel,
    network_problem,
    plain,
    random_batches,
    relative_error,
)

TOLERANCE = {jnp.float32: 1e-5, jnp.float64: 1e-11}


def columns(size, number):
    return jax.random.normal(jax.random.key(1), (size, number), jnp.float32)


def small_plain_network(dtype, loss):
    """Returns the layers of a PlainNet-18, strides and shortcuts too, in two blocks."""
    model = models.ResNet(3, 2, "gelu", stage_sizes=(1, 1), residual=False)
    batches = random_batches(2, 3, (8, 8, 3), 3, dtype)
    variables = dict(jax.jit(model.init)(jax.random.key(0), batches["image"][0]))
    params = variables.pop("params")
    return Problem(models.linen_outputs(model, variables), batches, loss=loss), params


def check_all_forms(name, dtype, loss):
    if name == "plain":
        both, params = small_plain_network(dtype, loss)
    else:
        both, params = network_problem(name, dtype, loss=loss)
    for reduction in ("mean", "stack"):
        problem = both.replace(reduction=reduction)
        expected = dense_kernel(problem, params)
        identity = jnp.eye(expected.shape[0], dtype=dtype)
        kernel = linearize_kernel(problem, params)
        forms = {
            "matmat": kernel_matmat(problem, params, identity),
            "linearized": kernel.matmat(identity),
            "dense": kernel_dense(problem, params),
        }
        tolerance = TOLERANCE[dtype]
        for form, got in forms.items():
            assert got.dtype == dtype
            assert relative_error(got, expected) < tolerance, (form, reduction)
            assert relative_error(got.T, got) < tolerance, (form, reduction)
            values = np.linalg.eigvalsh(np.asarray(got, np.float64))
            assert values[0] > -tolerance * values[-1], (form, reduction)
        assert kernel.dimension == expected.shape[0] == problem.dimension(params)
        assert kernel.dtype == dtype


losses = pytest.mark.parametrize("loss", ["softmax_cross_entropy", "squared"])
reductions = pytest.mark.parametrize("reduction", ["mean", "stack"])


whole = [
    pytest.param(name, marks=pytest.mark.scheduled)
    for name in ("resnet18", "plainnet18")
]


@losses
@pytest.mark.parametrize("name", ["mlp", "plain", *whole])
def test_all_forms_equal_the_jacobian_product(name, loss):
    check_all_forms(name, jnp.float32, loss)


@losses
@pytest.mark.usefixtures("x64")
def test_all_forms_equal_the_jacobian_product_in_float64(loss):
    check_all_forms("mlp", jnp.float64, loss)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "loss"),
    [
        pytest.param("resnet18", "softmax_cross_entropy", marks=pytest.mark.scheduled),
        pytest.param("resnet18", "squared", marks=pytest.mark.scheduled),
        pytest.param(
            "plainnet18", "softmax_cross_entropy", marks=pytest.mark.scheduled
        ),
        pytest.param("plainnet18", "squared", marks=pytest.mark.scheduled),
    ],
)
def test_networks_in_float64(name, loss):
    check_all_forms(name, jnp.float64, loss)


@reductions
def test_linearized_kernel_crosses_jit_without_retracing(reduction):
    problem, params = network_problem("mlp", jnp.float32, reduction=reduction)
    block = columns(problem.dimension(params), 2)

    traces = 0

    @jax.jit
    def apply(kernel, block):
        nonlocal traces
        traces += 1
        return kernel.matmat(block)

    for scale in (1.0, 0.5, 2.0):
        moved = jax.tree.map(lambda leaf, s=scale: leaf * s, params)
        kernel = linearize_kernel(problem, moved)
        expected = dense_kernel(problem, moved) @ block
        assert relative_error(apply(kernel, block), expected) < 1e-5
    assert traces == 1


@pytest.mark.parametrize(("limit", "taken"), [(1, 1), (4, 3), (8, 6)])
def test_eager_products_take_the_columns_that_stay_in_the_caches(
    monkeypatch, limit, taken
):
    problem, params = network_problem("mlp", jnp.float32, reduction="mean")
    kernel = linearize_kernel(plain(problem), params)
    block = jnp.asarray(
        np.random.default_rng(0).normal(size=(kernel.dimension, 6)), jnp.float32
    )
    expected = jax.jit(lambda k, v: k.matmat(v))(kernel, block)
    widths, multiply = [], autodiff._multiply

    def spy(jacobian, columns):
        widths.append(columns.shape[-1])
        return multiply(jacobian, columns)

    monkeypatch.setattr(autodiff, "_CPU_COLUMNS", limit)
    monkeypatch.setattr(autodiff, "_multiply", spy)
    assert relative_error(kernel.matmat(block), expected) < 1e-5
    assert widths == [taken] * (6 // taken) * len(kernel.jacobians)


@reductions
def test_new_parameters_and_batches_do_not_trace_the_error_again(reduction):
    traces = 0

    def error_fn(params, batch):
        nonlocal traces
        traces += 1
        return jnp.tanh(batch["x"] @ params["w"])

    params = {"w": jnp.ones((4, 3))}
    batches = {"x": jnp.ones((2, 5, 4))}
    problem = Problem.from_error(error_fn, batches, reduction=reduction)
    block = jnp.ones((problem.dimension(params), 2))
    kernel_matmat(problem, params, block)
    before = traces
    for scale in (0.5, 2.0):
        kernel_matmat(problem, {"w": params["w"] * scale}, block)
        scaled = {"x": batches["x"] * scale}
        kernel_matmat(problem.replace(batches=scaled), params, block)
    assert traces == before > 0


@reductions
def test_user_transformations(reduction):
    problem, params = network_problem("mlp", jnp.float32, reduction=reduction)
    block = columns(problem.dimension(params), 2)

    def quadratic(p):
        return jnp.sum(block * kernel_matmat(problem, p, block))

    def oracle(p):
        kernel = dense_kernel(problem, p)
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


@reductions
def test_custom_vjp_functions_work(reduction):
    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))

    def custom(params, batch):
        return square(batch["x"] @ params["w"])

    def same(params, batch):
        return (batch["x"] @ params["w"]) ** 2

    params = {"w": jax.random.normal(jax.random.key(0), (4, 3))}
    batches = {"x": jax.random.normal(jax.random.key(1), (2, 5, 4))}
    problem, oracle = (
        Problem.from_error(error_fn, batches, reduction=reduction)
        for error_fn in (custom, same)
    )
    identity = jnp.eye(problem.dimension(params))
    got = kernel_matmat(problem, params, identity)
    assert relative_error(got, dense_kernel(oracle, params)) < 1e-5


@reductions
def test_nnx_model_as_outputs_and_as_an_error_of_the_users_own(reduction):
    model = nnx.Sequential(
        nnx.Linear(4, 6, rngs=nnx.Rngs(0)),
        nnx.gelu,
        nnx.BatchNorm(6, use_running_average=True, rngs=nnx.Rngs(1)),
        nnx.Linear(6, 3, rngs=nnx.Rngs(2)),
    )
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def outputs_fn(params, batch):
        return nnx.merge(graph, params, rest)(batch["image"])

    def error_fn(params, batch):
        return softmax_error(outputs_fn(params, batch), batch["label"])

    batches = {
        "image": jax.random.normal(jax.random.key(1), (2, 5, 4), jnp.float32),
        "label": jnp.zeros((2, 5), jnp.int32),
    }
    named = Problem(outputs_fn, batches, reduction=reduction)
    own = Problem.from_error(error_fn, batches, reduction=reduction)
    expected = dense_kernel(own, params)
    for problem in (named, own):
        got = kernel_matmat(problem, params, jnp.eye(len(expected), dtype=jnp.float32))
        assert relative_error(got, expected) < 1e-5


@reductions
def test_chunks_of_columns_change_nothing(reduction):
    problem, params = network_problem("mlp", jnp.float32, reduction=reduction)
    expected = dense_kernel(problem, params)
    block = columns(len(expected), 5)

    def product(block, chunk):
        return kernel_matmat(problem, params, block, column_chunk=chunk)

    for chunk in (2, 9):
        assert relative_error(product(block, chunk), expected @ block) < 1e-5
    traced = jax.jit(product, static_argnums=1)(block, 2)
    assert relative_error(traced, expected @ block) < 1e-5
    held = linearize_kernel(problem, params).matmat(block, column_chunk=2)
    assert relative_error(held, expected @ block) < 1e-5
    with pytest.raises(ValueError, match="column_chunk: expected an integer >= 1"):
        product(block, 0)


def test_bad_input_is_named():
    problem, params = network_problem("mlp", jnp.float32, reduction="mean")
    batches, block = problem.batches, jnp.ones((15, 2))
    with pytest.raises(ValueError, match=r"block: expected shape \[15, any\], got"):
        kernel_matmat(problem, params, block[:-1])
    with pytest.raises(ValueError, match=r"block: expected shape \[30, any\]"):
        kernel_matmat(problem.replace(reduction="stack"), params, block)
    with pytest.raises(ValueError, match="block: expected dtype float32"):
        kernel_matmat(problem, params, block.astype(jnp.bfloat16))
    uneven = {**batches, "label": batches["label"][:, :-1]}
    with pytest.raises(ValueError, match=r"batches\['label'\]: expected leading axes"):
        linearize_kernel(problem.replace(batches=uneven), params)
    empty = jax.tree.map(lambda leaf: leaf[:0], batches)
    with pytest.raises(ValueError, match="expected K >= 1 batches of N >= 1"):
        linearize_kernel(problem.replace(batches=empty), params)
    with pytest.raises(ValueError, match="batches: expected arrays"):
        linearize_kernel(problem.replace(batches={}), params)
    with pytest.raises(ValueError, match="params: expected at least one floating"):
        linearize_kernel(problem, {"w": jnp.arange(3)})
    own = Problem.from_error(lambda p, b: problem.error(p, b)[0], batches)
    with pytest.raises(ValueError, match=r"error_fn: expected an array \[N, C\]"):
        linearize_kernel(own, params)
