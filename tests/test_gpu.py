"""On an accelerator in float32, against float64 on the host; also passes on a CPU.

A float32 number is rounded to 6e-8 of itself, and sums of thousands of terms through
ten layers come to some 1e-6 of the largest entry. TF32 rounds the inputs of a product
to 5e-4 of themselves, so that one product left at it shows as 1e-4 to 1e-3. The bounds
lie between the two.
"""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax import (
    Derivative,
    Lanczos,
    Problem,
    gradient_flow_direction,
    kernel_dense,
    kernel_derivative,
    kernel_matmat,
    linearize_kernel,
    measure_coupling,
    models,
)
from grsd_jax.jacobian import factored
from grsd_jax.jacobian.plan import plan_of
from grsd_jax.kernel.dense import _Blocks, _gram_tile
from grsd_jax.kernel.derivative import _tree_products, project
from grsd_jax.linalg import block_lanczos, leading_eigenpairs, ritz_pairs
from grsd_jax.linalg.lanczos import lanczos_init, lanczos_step
from grsd_jax.shells import log_shells, shell_coupling, toeplitz_residual
from grsd_jax.shells.measurement import diagonalize
from grsd_jax.shells.power_law import fit_power_law
from oracles import plain, relative_error

pytestmark = pytest.mark.gpu

#: Of products and kernels; of what a derivative or a residual takes from them.
BOUND, DERIVED_BOUND = 2e-5, 5e-5

K, N, C = 2, 8, 10


class GroupNormNet(nn.Module):
    """Convolutions with GroupNorm and a skip."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (3, 3), name="stem")(x)
        y = nn.gelu(nn.GroupNorm(4, name="norm1")(x))
        y = nn.Conv(16, (3, 3), name="conv1")(y)
        y = nn.gelu(nn.GroupNorm(4, name="norm2")(y))
        x = x + nn.Conv(16, (3, 3), name="conv2")(y)
        return nn.Dense(C, name="head")(jnp.mean(nn.gelu(x), axis=(1, 2)))


NETWORKS = {
    "mlp": models.MLP(C, 3, 128, "gelu"),
    "batch_norm": models.ResNet(C, 8, "gelu", stage_sizes=(1, 1)),
    "group_norm": GroupNormNet(),
    "transformer": models.Transformer(C, 2, 32, branch_scale=0.5, patch_size=4),
}
networks = pytest.mark.parametrize("name", NETWORKS)


@pytest.fixture(autouse=True)
def _precision():
    # Some of flax's own layers promote ranks and dtypes.
    promotion = jax.numpy_dtype_promotion("standard")
    ranks = jax.numpy_rank_promotion("allow")
    with jax.default_matmul_precision("highest"), promotion, ranks:
        yield


@functools.cache
def host_arrays(name):
    """Returns batches, parameters, state, direction and a block, in NumPy."""
    model, noise = NETWORKS[name], np.random.default_rng(0)
    images = noise.normal(size=(K, N, 8, 8, 3)).astype(np.float32)
    batches = {"image": images, "label": noise.integers(0, C, (K, N)).astype(np.int32)}
    variables = jax.eval_shape(model.init, jax.random.key(0), images[0])

    def draw(path, leaf):
        scale = np.prod(leaf.shape[:-1]) ** -0.5 if len(leaf.shape) > 1 else 0.1
        around = float(path[-1].key in ("scale", "var"))
        values = scale * noise.normal(size=leaf.shape)
        return (around + np.clip(values, -0.5, None)).astype(np.float32)

    drawn = jax.tree_util.tree_map_with_path(draw, dict(variables))
    params = drawn.pop("params")
    direction = jax.tree.map(
        lambda leaf: noise.normal(size=leaf.shape).astype(np.float32), params
    )
    block = noise.normal(size=(K * N * C, 16)).astype(np.float32)
    return batches, params, drawn, direction, block


def make(name, dtype=jnp.float32):
    """Returns ``(problem, params, direction, block)`` on the default device."""

    def place(leaf):
        floating = np.issubdtype(leaf.dtype, np.floating)
        return jnp.asarray(leaf, dtype if floating else leaf.dtype)

    batches, params, state, direction, block = jax.tree.map(place, host_arrays(name))
    outputs_fn = models.linen_outputs(NETWORKS[name], state)
    problem = Problem(outputs_fn, batches, reduction="stack")
    return problem, params, direction, block


def on_host(call):
    """Evaluates a call in float64 on the host's processor."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        return jax.tree.map(np.asarray, call())


@functools.cache
def reference(name):
    """Returns M, Mdot and Mdot along the gradient flow, by plain differentiation."""

    def kernels():
        problem, params, direction, _ = make(name, jnp.float64)
        problem = plain(problem)
        flow = gradient_flow_direction(problem, params)
        kernel, moved = kernel_dense(problem, params, direction)
        return kernel, moved, kernel_dense(problem, params, flow)[1]

    return on_host(kernels)


def check(record, what, got, expected, bound):
    assert got.dtype == np.float32
    error = float(relative_error(got, expected))
    record(what, error)
    assert error < bound, (what, error)


def imprecise(text):
    """Returns the products of a lowered program, and those not at the highest."""
    products = re.findall(r".*stablehlo\.(?:dot_general|convolution).*", text)
    return products, [line for line in products if line.count("HIGHEST") < 2]


def imprecise_compiled(text):
    """The same of a compiled program: products, and calls of cuBLAS and cuDNN."""
    products = re.findall(
        r".* (?:dot|convolution)\(.*|.*custom_call_target=\"__cu(?:blas|dnn).*", text
    )
    return [line for line in products if len(re.findall("highest", line, re.I)) < 2]


def own_programs():
    """Yields the programs of the library's own linear algebra, and their arguments."""
    problem, params, _, block = make("mlp")
    batch = jax.tree.map(lambda leaf: leaf[0], problem.batches)
    point = problem.at(params)
    plan = plan_of(point)
    jacobian = factored.held_jacobian(point.error_fn, params, batch, plan=plan)
    columns = block[: N * C].reshape(N, C, -1)
    yield "pull", factored._pull, (jacobian, columns)
    tangents = jacobian.pull(columns)
    yield "push", factored._push, (jacobian, tangents)
    yield "multiply", factored._multiply, (jacobian, columns)
    blocks = _Blocks(jacobian.blocks, ())
    labels = ("",) * len(jacobian.blocks)
    gram = functools.partial(_gram_tile, labels=labels, diagonal=True)
    yield "gram", jax.jit(gram), (blocks, blocks)
    tree = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    yield "tree_products", _tree_products, (tree, tree)
    yield "project", jax.jit(project), (block, block)
    square = block @ block.T
    solve = functools.partial(diagonalize, tolerance=0.05, floor=None)
    yield "diagonalize", jax.jit(solve), (square, square)
    state = lanczos_init(block, 2, key=jax.random.key(0))
    yield "lanczos_step", jax.jit(lanczos_step), (state, block)


def test_own_linear_algebra_is_at_the_highest_precision(record_property):
    for name, program, arguments in own_programs():
        # The user's default is the lowest; the library's own products ignore it.
        with jax.default_matmul_precision("bfloat16"):
            lowered = program.lower(*arguments)
            products, low = imprecise(lowered.as_text())
            assert products, name
            assert not low, (name, low[0])
            low = imprecise_compiled(lowered.compile().as_text())
            assert not low, (name, low[0])
        record_property(name, len(products))


@networks
def test_networks_follow_the_users_precision(record_property, name):
    problem, params, direction, block = make(name)

    def everything(p, d, v):
        product = kernel_matmat(problem, p, v)
        return product, kernel_derivative(problem, p, d, v), kernel_dense(problem, p)

    lowered = jax.jit(everything).lower(params, direction, block[:, :2])
    products, low = imprecise(lowered.as_text())
    record_property("products", len(products))
    assert products
    assert not low, low[0]


def test_shell_statistics(record_property):
    noise = np.random.default_rng(0)
    values = np.geomspace(1, 1e-4, 96).astype(np.float32)
    scale = np.sqrt(values[:, None] * values).astype(np.float32)
    symmetric = noise.normal(size=(96, 96)).astype(np.float32)
    coupling = scale * (symmetric + symmetric.T)

    def statistics(dtype):
        lam, matrix = jnp.asarray(values, dtype), jnp.asarray(coupling, dtype)
        shells = log_shells(lam, 8, mask=jnp.ones(96, bool))
        binned = shell_coupling(matrix, lam, shells, renormalize=True)
        strength = jnp.abs(jnp.diag(matrix))
        fit = fit_power_law(
            lam, strength, jnp.ones(96, bool), key=jax.random.key(0), num_bootstrap=0
        )
        return {
            "shells": binned.matrix,
            "residual": toeplitz_residual(binned.matrix, binned.mask),
            "exponent": fit.exponent,
        }

    expected = on_host(lambda: statistics(jnp.float64))
    for what, got in statistics(jnp.float32).items():
        check(record_property, what, got, expected[what], BOUND)


def check_twice(record, what, call, expected, bound):
    """Checks a product, and that a second one is the same.

    Bit by bit, if the card adds up in one order; the record says whether.
    """
    first, second = call(), call()
    record(f"{what} bitwise", bool(jnp.all(first == second)))
    assert relative_error(second, first) < 1e-6, what
    check(record, what, first, expected, bound)


@networks
@pytest.mark.parametrize("layers", ["known", "hidden"])
def test_products(record_property, name, layers):
    problem, params, _, block = make(name)
    problem = problem if layers == "known" else plain(problem)
    matrix, columns = reference(name)[0], np.asarray(block, np.float64)
    kernel = linearize_kernel(problem, params)
    forms = {
        "linearized": lambda: kernel.matmat(block),
        "column_chunk": lambda: kernel.matmat(block, column_chunk=5),
    }
    if layers == "hidden":  # it takes no notice of layers
        forms["kernel_matmat"] = lambda: kernel_matmat(problem, params, block)
    for form, call in forms.items():
        check_twice(record_property, form, call, matrix @ columns, BOUND)

    mean = linearize_kernel(problem.replace(reduction="mean"), params)
    size = N * C
    diagonal = [matrix[i : i + size, i : i + size] for i in range(0, K * size, size)]
    check_twice(
        record_property,
        "mean",
        lambda: mean.matmat(block[:size]),
        np.mean(diagonal, axis=0) @ columns[:size],
        BOUND,
    )


@pytest.mark.parametrize(
    ("name", "layers"),
    [*((name, "known") for name in NETWORKS), ("batch_norm", "hidden")],
)
def test_dense(record_property, name, layers):
    problem, params, direction, _ = make(name)
    problem = problem if layers == "known" else plain(problem)
    for index, what in enumerate(("kernel", "derivative")):
        check_twice(
            record_property,
            what,
            lambda i=index: kernel_dense(problem, params, direction)[i],
            reference(name)[index],
            (BOUND, DERIVED_BOUND)[index],
        )


@networks
@pytest.mark.parametrize("layers", ["known", "hidden"])
def test_derivative(record_property, name, layers):
    problem, params, direction, block = make(name)
    problem = problem if layers == "known" else plain(problem)
    columns = np.asarray(block, np.float64)
    check_twice(
        record_property,
        "derivative",
        lambda: kernel_derivative(problem, params, direction, block),
        columns.T @ reference(name)[1] @ columns,
        DERIVED_BOUND,
    )


@networks
def test_leading_eigenpairs(record_property, name):
    problem, params, _, block = make(name)
    kernel = reference(name)[0]
    linearized = linearize_kernel(problem, params)
    matmat = jax.jit(lambda k, v: k.matmat(v))
    found = leading_eigenpairs(
        functools.partial(matmat, linearized),
        block[:, :4],
        8,
        key=jax.random.key(1),
        relative_to="largest",
    )
    assert np.asarray(found.converged).all()
    values = np.linalg.eigvalsh(kernel)[::-1][:8]
    check(record_property, "values", found.values, values, BOUND)
    vectors = np.asarray(found.vectors, np.float64)
    left_over = kernel @ vectors - vectors * np.asarray(found.values)
    residual = np.linalg.norm(left_over, axis=0).max() / values[0]
    record_property("residual", float(residual))
    assert residual < 1e-4 + BOUND  # the tolerance, and rounding
    record_property("orthogonality", float(found.orthogonality))
    assert found.orthogonality < BOUND


@pytest.mark.parametrize("driver", ["scan", "host"])
def test_block_lanczos(record_property, driver):
    problem, params, _, block = make("batch_norm")
    linearized = linearize_kernel(problem, params)
    run = block_lanczos(
        linearized.matmat, block[:, :8], 10, key=jax.random.key(1), driver=driver
    )
    record_property("orthogonality", float(run.orthogonality))
    assert run.orthogonality < BOUND
    assert run.asymmetry < BOUND
    pairs = ritz_pairs(run)
    values = np.linalg.eigvalsh(reference("batch_norm")[0])[::-1][:8]
    check(record_property, "values", pairs.values[:8], values, BOUND)


@pytest.mark.parametrize(
    ("name", "solver"),
    [
        *((name, "dense") for name in NETWORKS),
        ("batch_norm", Lanczos(block_size=8, num_steps=6)),
        ("transformer", Lanczos(block_size=8, num_steps=6)),
    ],
)
def test_measurement(record_property, name, solver):
    problem, params, _, _ = make(name)
    result = measure_coupling(
        problem,
        params,
        key=jax.random.key(0),
        solver=solver,
        derivative=Derivative(cross_checked=True),
    )
    kernel, _, moved = reference(name)
    assert result.finite
    if solver == "dense":
        assert result.operator_disagreement < BOUND
    vectors = np.asarray(result.vectors, np.float64)
    values = np.linalg.eigvalsh(kernel)[::-1][:4]
    check(record_property, "values", result.values[:4], values, BOUND)
    expected = vectors.T @ moved @ vectors
    check(record_property, "coupling", result.coupling, expected, DERIVED_BOUND)
