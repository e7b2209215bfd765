"""Products over a mesh of simulated devices against those of one device."""

import dataclasses
import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from grsd_jax import (
    Binning,
    Derivative,
    Lanczos,
    Problem,
    Window,
    gradient_flow_direction,
    kernel_dense,
    kernel_derivative,
    kernel_matmat,
    layer_kernels,
    linearize_kernel,
    make_probe,
    measure_coupling,
    models,
)
from grsd_jax.dynamics import KrylovSteps
from grsd_jax.kernel import ShardedKernel, products, shard_batches
from grsd_jax.linalg import block_lanczos, lanczos_init, lanczos_step, ritz_pairs
from oracles import dense_kernel, network_problem, plain, random_batches, relative_error

COLUMNS = 4
KEY = jax.random.key(0)


def make_mesh(num_devices, names=("examples",)):
    devices = jax.devices()[:num_devices]
    shape = (num_devices,) + (1,) * (len(names) - 1)
    return jax.make_mesh(
        shape, names, axis_types=(AxisType.Auto,) * len(names), devices=devices
    )


def sharded(problem, mesh, *, layers_known=True):
    """Returns the same problem with its batches on the mesh."""
    problem = problem if layers_known else plain(problem)
    return problem.replace(batches=shard_batches(problem.batches, mesh))


@pytest.fixture(scope="module")
def mlp():
    problem, params = network_problem("mlp", jnp.float32)
    problem = problem.replace(batches=random_batches(2, 16, (4,), 3))
    return problem, params, gradient_flow_direction(problem, params)


forms = pytest.mark.parametrize("layers_known", [False, True])
reductions = pytest.mark.parametrize("reduction", ["mean", "stack"])


@forms
@reductions
def test_products_and_derivative_equal_one_device(mlp, reduction, layers_known):
    problem, params, direction = mlp
    problem = problem.replace(reduction=reduction)
    placed = sharded(problem, make_mesh(8), layers_known=layers_known)
    kernel = linearize_kernel(placed, params)
    assert isinstance(kernel, ShardedKernel)
    expected = dense_kernel(problem, params)
    assert kernel.dimension == len(expected)
    columns = jax.random.normal(jax.random.key(1), (len(expected), COLUMNS))
    for got in (kernel.matmat(columns), kernel_matmat(placed, params, columns)):
        assert got.sharding.is_equivalent_to(kernel.row_sharding, 2)
        assert relative_error(got, expected @ columns) < 1e-5
    split = kernel.matmat(problem.split(columns))
    assert relative_error(problem.join(split), expected @ columns) < 1e-5

    # More columns than would be differentiated plainly.
    columns = jax.random.normal(jax.random.key(1), (len(expected), 6))
    one = kernel_derivative(problem, params, direction, columns)
    many = kernel_derivative(placed, params, direction, columns, column_chunk=3)
    assert relative_error(many, one) < 1e-5


@reductions
def test_finite_difference_equals_one_device(mlp, reduction):
    problem, params, direction = mlp
    problem = problem.replace(reduction=reduction)
    columns = jax.random.normal(jax.random.key(1), (problem.dimension(params), 2))
    one, many = (
        kernel_derivative(
            either, params, direction, columns, method="finite_difference", step=0.05
        )
        for either in (problem, sharded(problem, make_mesh(8)))
    )
    assert relative_error(many, one) < 1e-4


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(nn.Conv(3, (3, 3))(x))
        return nn.Dense(3)(nn.gelu(x).reshape(x.shape[0], -1))


@forms
def test_convolutions_statistics_and_a_second_mesh_axis(layers_known):
    batches = random_batches(1, 4, (4, 4, 2), 3)
    model = Convolutions()
    variables = jax.jit(model.init)(jax.random.key(0), batches["image"][0])
    params = variables["params"]
    stats = jax.tree.map(lambda leaf: leaf + 0.5, variables["batch_stats"])
    outputs_fn = models.linen_outputs(model, {"batch_stats": stats})
    problem = Problem(outputs_fn, batches)
    mesh = make_mesh(2, ("examples", "other"))
    columns = jax.random.normal(jax.random.key(1), (12, 2))
    placed = sharded(problem, mesh, layers_known=layers_known)
    kernel = linearize_kernel(placed, params)
    expected = dense_kernel(problem, params) @ columns
    assert relative_error(kernel.matmat(columns), expected) < 1e-5


@pytest.mark.parametrize(("reduction", "driver"), [("mean", "host"), ("stack", "scan")])
def test_lanczos_and_ritz_pairs_lie_by_rows(mlp, reduction, driver):
    problem, params, _ = mlp
    problem = problem.replace(reduction=reduction)
    kernel = linearize_kernel(sharded(problem, make_mesh(8)), params)
    start = jax.random.normal(jax.random.key(1), (kernel.dimension, COLUMNS))
    key = jax.random.key(2)

    def product(block):
        return kernel_matmat(problem, params, block)

    one = block_lanczos(product, start, 4, key=key, driver="host")
    expected = ritz_pairs(one)
    placed = jax.device_put(start, kernel.row_sharding)
    run = block_lanczos(kernel.matmat, placed, 4, key=key, driver=driver)
    pairs = ritz_pairs(run)
    for array in (run.basis, pairs.vectors):
        assert array.sharding.is_equivalent_to(kernel.row_sharding, 2)
    assert run.orthogonality < 1e-5
    assert relative_error(pairs.values, expected.values) < 1e-5
    np.testing.assert_array_equal(pairs.resolved, expected.resolved)
    left_over = product(pairs.vectors) - pairs.vectors * pairs.values[None]
    measured = np.linalg.norm(left_over, axis=0)
    assert np.all(measured <= pairs.residuals + 1e-5 * float(pairs.values[0]))


def analysis(fn, *args):
    compiled = jax.jit(fn).lower(*args).compile()
    return compiled, compiled.cost_analysis(), compiled.memory_analysis()


def reduced_numbers(compiled):
    """Counts the numbers that the program's all-reduces add up, by its own text."""
    total = 0
    for line in compiled.as_text().splitlines():
        found = re.search(r"= (.*?) all-reduce(?:-start)?\(", line)
        if found:
            shapes = re.findall(r"\w+\[([\d,]*)\]", found.group(1))
            total += sum(
                int(np.prod([int(size) for size in shape.split(",") if size] or [1]))
                for shape in shapes
            )
    return total


@forms
@reductions
def test_work_falls_with_devices_and_one_sum_is_sent(mlp, reduction, layers_known):
    problem, params, _ = mlp
    batches = random_batches(2, 512, (4,), 3)
    problem = problem.replace(batches=batches, reduction=reduction)
    flops, accessed, held = {}, {}, {}
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    for count in (1, 2, 4, 8):
        placed = sharded(problem, make_mesh(count), layers_known=layers_known)
        kernel = linearize_kernel(placed, params)
        columns = jax.device_put(
            jnp.ones((kernel.dimension, COLUMNS)), kernel.row_sharding
        )
        compiled, cost, memory = analysis(lambda k, v: k.matmat(v), kernel, columns)
        flops[count], accessed[count] = cost["flops"], cost["bytes accessed"]
        held[count] = memory.argument_size_in_bytes
        sums = 2 if reduction == "mean" else 1
        sent = reduced_numbers(compiled)
        assert sent == (sums * num_params * COLUMNS if count > 1 else sent), count
        others = r"all-gather|all-to-all|collective-permute|reduce-scatter"
        assert not re.search(others, compiled.as_text())
    for name, per_device in {"f": flops, "b": accessed, "h": held}.items():
        # Alone, XLA may choose layouts that cost bytes, but no work.
        least = 2 if name == "b" else 1
        for count, value in per_device.items():
            assert value * count / per_device[1] < 1.1, (name, per_device)
            assert value * count / (least * per_device[least]) > 1 / 1.1, per_device


def test_a_lanczos_step_keeps_the_basis_where_it_lies():
    size, width, steps = 4096, 4, 8
    flops, held = {}, {}
    for count in (1, 2, 4, 8):
        sharding = jax.NamedSharding(make_mesh(count), jax.P("examples"))
        start = jax.random.normal(jax.random.key(0), (size, width))
        placed = jax.device_put(start, sharding)
        state = lanczos_init(placed, steps, key=jax.random.key(1))
        assert state.basis.sharding.is_equivalent_to(sharding, 2)
        compiled, cost, memory = analysis(lanczos_step, state, placed)
        flops[count] = cost["flops"]
        held[count] = memory.argument_size_in_bytes
        gathered = re.findall(r"f32\[([\d,]+)\][^=]*all-gather\(", compiled.as_text())
        sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in gathered]
        # Of the new block the triangles of its pieces, of the basis nothing.
        assert all(found <= size // 256 * width**2 for found in sizes), gathered
    for count in (2, 4, 8):
        assert held[count] * count < 1.1 * held[1], held
        assert flops[count] * count < 1.3 * flops[1], flops


@pytest.mark.parametrize(
    ("reduction", "room"),
    [("mean", None), pytest.param("stack", 1, marks=pytest.mark.slow)],
)
def test_the_whole_measurement_equals_one_device(mlp, monkeypatch, reduction, room):
    if room is not None:  # nothing fits, so that each product linearizes again
        monkeypatch.setattr(products, "default_bytes", lambda: room)
    problem, params, direction = mlp
    problem = problem.replace(reduction=reduction)
    mesh = make_mesh(8)
    one, many = (
        measure_coupling(
            either,
            params,
            direction,
            key=jax.random.key(0),
            solver=Lanczos(block_size=4, num_steps=5),
            shells=Binning(num_shells=4, window=2, num_bootstrap=0),
            # So that the secant differs by more than its rounding.
            derivative=Derivative(step=0.05, cross_checked=True),
        )
        for either in (problem, sharded(problem, mesh))
    )
    assert (many.solver, many.jacobian) == (one.solver, one.jacobian)
    assert many.finite
    assert relative_error(many.values, one.values) < 1e-5
    leading = (slice(None, 4), slice(None, 4))
    difference = np.abs(many.coupling[leading]) - np.abs(one.coupling[leading])
    assert np.max(np.abs(difference)) < 1e-4 * np.max(np.abs(one.coupling))
    assert max(many.operator_disagreement, one.operator_disagreement) < 1e-5
    assert relative_error(many.secant_disagreement, one.secant_disagreement) < 1e-2
    rows = jax.NamedSharding(mesh, jax.P("examples"))
    assert many.vectors.sharding.is_equivalent_to(rows, 2)
    rest = dataclasses.replace(many, vectors=many.values)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(rest))


def deep(params, batch):
    hidden = batch["image"]
    for weight in params[:-1]:
        hidden = jnp.tanh(hidden @ weight)
    return hidden @ params[-1]


@pytest.fixture(scope="module")
def spread():
    """A problem, its parameters on one device and spread over four, and columns."""
    keys = jax.random.split(jax.random.key(0), 5)
    sizes = [(4, 64), (64, 64), (64, 64), (64, 4)]
    one = [
        jax.random.normal(key, size) / size[0] ** 0.5
        for key, size in zip(keys, sizes, strict=False)
    ]
    mesh = make_mesh(4, ("parameters",))
    widths = [PartitionSpec(None, "parameters")] * 3 + [PartitionSpec("parameters")]
    many = [
        jax.device_put(leaf, NamedSharding(mesh, spec))
        for leaf, spec in zip(one, widths, strict=True)
    ]
    problem = Problem(deep, random_batches(2, 4, (4,), 4))
    columns = jax.random.normal(keys[-1], (problem.dimension(one), COLUMNS))
    return problem, one, many, columns


SPREAD = {
    "product": kernel_matmat,
    "linearized": lambda q, p, v: linearize_kernel(q, p).matmat(v),
    "derivative": lambda q, p, v: kernel_derivative(
        q, p, gradient_flow_direction(q, p), v
    ),
    "dense": lambda q, p, v: kernel_dense(q, p),
}


@pytest.mark.parametrize("name", SPREAD)
def test_devices_may_share_the_parameters(spread, name):
    problem, one, many, columns = spread
    call = partial(SPREAD[name], problem)
    assert relative_error(call(many, columns), call(one, columns)) < 1e-5
    (_, alone, held_alone), (compiled, shared, held) = (
        analysis(call, params, columns) for params in (one, many)
    )
    assert relative_error(compiled(many, columns), call(one, columns)) < 1e-5
    # A softmax and what joins the batches are on every device.
    assert shared["flops"] < 1.15 * alone["flops"] / 4
    assert held.argument_size_in_bytes < 0.3 * held_alone.argument_size_in_bytes
    if name != "dense":  # whose n^2 are on every device
        assert held.temp_size_in_bytes < 0.5 * held_alone.temp_size_in_bytes


@pytest.fixture
def explicit(mlp):
    """Returns an explicit mesh, `jax.make_mesh`'s default, with problem and params."""
    problem, params, _ = mlp
    mesh = jax.make_mesh((8,), ("examples",))
    assert mesh.axis_types == (AxisType.Explicit,)
    placed = problem.replace(batches=shard_batches(problem.batches, mesh))
    return mesh, placed, jax.device_put(params, jax.NamedSharding(mesh, jax.P()))


@pytest.mark.parametrize(
    "reduction", ["stack", pytest.param("mean", marks=pytest.mark.slow)]
)
def test_an_explicit_mesh_equals_one_device(mlp, explicit, reduction):
    problem, params, direction = mlp
    _, placed, spread = explicit
    problem, placed = (p.replace(reduction=reduction) for p in (problem, placed))
    moved = gradient_flow_direction(placed, spread)
    for got, leaf, one in zip(
        *map(jax.tree.leaves, (moved, spread, direction)), strict=True
    ):
        assert got.sharding == leaf.sharding  # so that the two can be added
        assert relative_error(leaf + got, leaf + jax.device_put(one, leaf.sharding)) < (
            1e-5
        )
    batch = jax.tree.map(lambda leaf: leaf[0], placed.batches)
    one = jax.tree.map(lambda leaf: leaf[0], problem.batches)
    assert relative_error(placed.error(spread, batch), problem.error(params, one)) < (
        1e-5
    )
    assert relative_error(placed.loss(spread), problem.loss(params)) < 1e-5
    expected = kernel_dense(problem, params, direction)
    for got, matrix in zip(kernel_dense(placed, spread, moved), expected, strict=True):
        assert relative_error(got, matrix) < 1e-5
    layers = layer_kernels(placed, spread)
    assert relative_error(sum(layers.values()), expected[0]) < 1e-5
    columns = jax.random.normal(jax.random.key(1), (len(expected[0]), 6))
    rows = jax.NamedSharding(explicit[0], jax.P("examples"))
    for block in (columns, jax.device_put(columns, rows)):
        kernel = linearize_kernel(placed, spread)
        assert isinstance(kernel, ShardedKernel)
        for product in (kernel.matmat(block), kernel_matmat(placed, spread, block)):
            assert relative_error(product, expected[0] @ columns) < 1e-5
        projected = kernel_derivative(placed, spread, moved, block)
        assert relative_error(projected, columns.T @ expected[1] @ columns) < 1e-4
    assert product.sharding == rows  # where the block lay
    assert placed.explain(spread).num_factored == 4


@pytest.mark.scheduled
def test_measurement_and_probe_on_an_explicit_mesh_equal_one_device(mlp, explicit):
    problem, params, _ = mlp
    options = {
        "key": jax.random.key(0),
        "solver": "lanczos",
        "window": Window(num_pairs=12),
        "shells": Binning(num_shells=4, window=2, num_bootstrap=0),
    }
    one = measure_coupling(problem, params, **options)
    many = measure_coupling(*explicit[1:], **options)
    assert many.finite
    assert relative_error(many.values, one.values) < 1e-5
    found = []
    for where in ((problem, params), explicit[1:]):
        probe = make_probe(where[0], every=1, shells=4, solver=KrylovSteps(8))
        state = probe.init(KEY, where[1])
        for step, scale in enumerate((1.0, 1.1)):
            there = jax.tree.map(lambda leaf, by=scale: by * leaf, where[1])
            state, record = probe.update(state, there, step)
        found.append(record)
    assert all(record.finite for record in found)
    flux = [record.balance.flux[-2:] for record in found]
    assert relative_error(*flux) < 1e-3
    assert relative_error(found[1].values, found[0].values) < 1e-5


def test_a_context_that_makes_a_mesh_explicit_is_refused(mlp, explicit):
    problem, params, _ = mlp
    mesh, placed, spread = explicit
    columns = jax.random.normal(KEY, (problem.dimension(params), 2))
    uses = {
        "dense": kernel_dense,
        "layers": layer_kernels,
        "matmat": lambda problem, params: kernel_matmat(problem, params, columns),
        "linearize": linearize_kernel,
        "derivative": lambda problem, params: kernel_derivative(
            problem, params, params, columns
        ),
    }
    message = r"^batches: expected no explicit mesh inside jit or under jax\.set_mesh"
    for use in uses.values():
        with pytest.raises(ValueError, match=message):
            jax.jit(use)(placed, spread)
        with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
            use(placed, spread)
    # Arrays that are not spread pass under it as anywhere else.
    with jax.set_mesh(mesh):
        kernel = kernel_dense(problem, params)
        product = linearize_kernel(problem, params).matmat(columns)
    expected = dense_kernel(problem, params)
    assert relative_error(kernel, expected) < 1e-5
    assert relative_error(product, expected @ columns) < 1e-5
    # What training needs works everywhere.
    expected = problem.loss(params)
    gradient = jax.jit(jax.grad(lambda p, q: q.loss(p)))
    with jax.set_mesh(mesh):
        assert relative_error(placed.loss(spread), expected) < 1e-5
        inside = gradient(spread, placed)
    outside = gradient(spread, placed)
    jax.tree.map(np.testing.assert_array_equal, inside, outside)


def test_new_parameters_do_not_compile_again(mlp):
    problem, params, _ = mlp
    problem = sharded(problem, make_mesh(8))
    traces = 0

    @jax.jit
    def apply(kernel, columns):
        nonlocal traces
        traces += 1
        return kernel.matmat(columns)

    for scale in (1.0, 0.5):
        moved = jax.tree.map(lambda leaf, s=scale: leaf * np.float32(s), params)
        kernel = linearize_kernel(problem, moved)
        apply(kernel, jnp.ones((kernel.dimension, 2)))
    assert traces == 1


def test_bad_input_is_named(mlp):
    problem, params, direction = mlp
    problem = problem.replace(reduction="mean")
    batches, mesh = problem.batches, make_mesh(8)
    with pytest.raises(ValueError, match="axis: expected one of 'examples', got 'x'"):
        shard_batches(batches, mesh, axis="x")
    few = jax.tree.map(lambda leaf: leaf[:, :12], batches)
    with pytest.raises(ValueError, match="N to be a multiple of the 8 devices"):
        shard_batches(few, mesh)
    manual = jax.make_mesh((8,), ("examples",), axis_types=(AxisType.Manual,))
    with pytest.raises(ValueError, match="mesh: expected the axis 'examples' to be of"):
        shard_batches(batches, manual)
    placed = sharded(problem, mesh)
    kernel = linearize_kernel(placed, params)
    with pytest.raises(ValueError, match=r"block: expected shape \[48, any\]"):
        kernel.matmat(jnp.ones((47, 2)))
    with pytest.raises(ValueError, match="block: expected dtype float32"):
        kernel.matmat(jnp.ones((48, 2), jnp.bfloat16))
    columns = jnp.ones((48, 2))
    with pytest.raises(ValueError, match="column_chunk: expected an integer >= 1"):
        kernel_derivative(placed, params, direction, columns, column_chunk=0)
    with pytest.raises(ValueError, match="method: expected one of 'exact'"):
        kernel_derivative(placed, params, direction, columns, method="secant")
    with pytest.raises(ValueError, match="solver, with batches on a mesh,: expected"):
        measure_coupling(
            placed, params, direction, solver="dense", key=jax.random.key(0)
        )
