"""Products over a mesh of simulated devices against those of one device."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import grsd_jax
from grsd_jax import (
    block_lanczos,
    gradient_flow_direction,
    kernel_derivative,
    kernel_matmat,
    lanczos_init,
    lanczos_step,
    measure_coupling,
    models,
    ritz_pairs,
    shard_batches,
    sharded_kernel,
    sharded_kernel_derivative,
)
from oracles import dense_kernel, problem, random_batches, relative_error

COLUMNS = 4


def make_mesh(num_devices, names=("examples",)):
    devices = jax.devices()[:num_devices]
    shape = (num_devices,) + (1,) * (len(names) - 1)
    return jax.make_mesh(
        shape, names, axis_types=(AxisType.Auto,) * len(names), devices=devices
    )


@pytest.fixture(scope="module")
def mlp():
    error_fn, params, _, loss_fn = problem("mlp", jnp.float32)
    batches = random_batches(2, 16, (4,), 3)
    return error_fn, params, batches, gradient_flow_direction(loss_fn, params, batches)


forms = pytest.mark.parametrize("jacobian", ["plain", "factored"])
reductions = pytest.mark.parametrize("reduction", ["mean", "stack"])


@forms
@reductions
def test_products_and_derivative_equal_one_device(mlp, reduction, jacobian):
    error_fn, params, batches, direction = mlp
    mesh = make_mesh(8)
    options = {"reduction": reduction, "jacobian": jacobian}
    placed = shard_batches(batches, mesh)
    kernel = sharded_kernel(error_fn, params, placed, mesh, **options)
    expected = dense_kernel(error_fn, params, batches, reduction)
    assert kernel.dimension == len(expected)
    columns = jax.random.normal(jax.random.key(1), (len(expected), COLUMNS))
    got = kernel.matmat(columns)
    assert got.sharding.is_equivalent_to(kernel.row_sharding, 2)
    assert relative_error(got, expected @ columns) < 1e-5

    args = (error_fn, params, batches, direction, columns)
    one = kernel_derivative(*args, **options)
    many = sharded_kernel_derivative(*args, mesh, column_chunk=3, **options)
    assert relative_error(many, one) < 1e-5


@reductions
def test_finite_difference_equals_one_device(mlp, reduction):
    error_fn, params, batches, direction = mlp
    size = 48 if reduction == "mean" else 96
    columns = jax.random.normal(jax.random.key(1), (size, 2))
    args = (error_fn, params, batches, direction, columns)
    options = {"method": "finite_difference", "reduction": reduction, "step": 0.05}
    one = kernel_derivative(*args, **options)
    many = sharded_kernel_derivative(*args, make_mesh(8), **options)
    assert relative_error(many, one) < 1e-4


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(nn.Conv(3, (3, 3))(x))
        return nn.Dense(3)(nn.gelu(x).reshape(x.shape[0], -1))


@forms
def test_convolutions_statistics_and_a_second_mesh_axis(jacobian):
    batches = random_batches(1, 4, (4, 4, 2), 3)
    model = Convolutions()
    variables = model.init(jax.random.key(0), batches["image"][0])
    params = variables["params"]
    stats = jax.tree.map(lambda leaf: leaf + 0.5, variables["batch_stats"])
    error_fn = models.linen_error_fn(model, {"batch_stats": stats})
    mesh = make_mesh(2, ("examples", "other"))
    columns = jax.random.normal(jax.random.key(1), (12, 2))
    kernel = sharded_kernel(error_fn, params, batches, mesh, jacobian=jacobian)
    expected = dense_kernel(error_fn, params, batches, "mean") @ columns
    assert relative_error(kernel.matmat(columns), expected) < 1e-5


@pytest.mark.parametrize(("reduction", "driver"), [("mean", "host"), ("stack", "scan")])
def test_lanczos_and_ritz_pairs_lie_by_rows(mlp, reduction, driver):
    error_fn, params, batches, _ = mlp
    mesh = make_mesh(8)
    kernel = sharded_kernel(error_fn, params, batches, mesh, reduction=reduction)
    start = jax.random.normal(jax.random.key(1), (kernel.dimension, COLUMNS))
    key = jax.random.key(2)

    def product(block):
        return kernel_matmat(error_fn, params, batches, block, reduction=reduction)

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
def test_work_falls_with_devices_and_one_sum_is_sent(reduction, jacobian):
    error_fn, params, _, _ = problem("mlp", jnp.float32)
    batches = random_batches(2, 512, (4,), 3)
    flops, accessed, held = {}, {}, {}
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    for count in (1, 2, 4, 8):
        mesh = make_mesh(count)
        kernel = sharded_kernel(
            error_fn, params, batches, mesh, reduction=reduction, jacobian=jacobian
        )
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
        for count, value in per_device.items():
            assert 1 / 1.1 < value * count / per_device[1] < 1.1, (name, per_device)


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
    ("reduction", "options"),
    [("mean", {}), pytest.param("stack", {"max_bytes": 1}, marks=pytest.mark.slow)],
)
def test_the_whole_measurement_equals_one_device(mlp, reduction, options):
    options |= {"key": jax.random.key(0), "reduction": reduction, "num_shells": 4}
    options |= {"block_size": 4, "num_steps": 5, "window": 2, "num_bootstrap": 0}
    options |= {"step": 0.05}  # so that the secant differs by more than its rounding
    one = measure_coupling(*mlp, solver="lanczos", **options)
    mesh = make_mesh(8)
    many = measure_coupling(*mlp, mesh=mesh, **options)
    assert (many.solver, many.jacobian) == (one.solver, one.jacobian)
    assert many.finite
    assert relative_error(many.values, one.values) < 1e-5
    leading = (slice(None, 4), slice(None, 4))
    difference = np.abs(many.coupling[leading]) - np.abs(one.coupling[leading])
    assert np.max(np.abs(difference)) < 1e-4 * np.max(np.abs(one.coupling))
    assert relative_error(many.operator_disagreement, one.operator_disagreement) < 1e-2
    assert relative_error(many.secant_disagreement, one.secant_disagreement) < 1e-2
    rows = jax.NamedSharding(mesh, jax.P("examples"))
    assert many.vectors.sharding.is_equivalent_to(rows, 2)
    rest = dataclasses.replace(many, vectors=many.values)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(rest))


def test_new_parameters_do_not_compile_again(mlp):
    error_fn, params, batches, _ = mlp
    mesh = make_mesh(8)
    traces = 0

    @jax.jit
    def apply(kernel, columns):
        nonlocal traces
        traces += 1
        return kernel.matmat(columns)

    for scale in (1.0, 0.5):
        moved = jax.tree.map(lambda leaf, s=scale: leaf * np.float32(s), params)
        kernel = sharded_kernel(error_fn, moved, batches, mesh)
        apply(kernel, jnp.ones((kernel.dimension, 2)))
    assert traces == 1


def test_bad_input_is_named(mlp):
    error_fn, params, batches, direction = mlp
    mesh = make_mesh(8)
    with pytest.raises(ValueError, match="axis: expected one of 'examples', got 'x'"):
        shard_batches(batches, mesh, axis="x")
    few = jax.tree.map(lambda leaf: leaf[:, :12], batches)
    with pytest.raises(ValueError, match="N to be a multiple of the 8 devices"):
        sharded_kernel(error_fn, params, few, mesh)
    explicit = jax.make_mesh((8,), ("examples",), axis_types=(AxisType.Explicit,))
    with pytest.raises(ValueError, match="mesh: expected the axis 'examples' to be of"):
        sharded_kernel(error_fn, params, batches, explicit)
    kernel = sharded_kernel(error_fn, params, batches, mesh)
    with pytest.raises(ValueError, match=r"block: expected shape \[48, any\]"):
        kernel.matmat(jnp.ones((47, 2)))
    with pytest.raises(ValueError, match="block: expected dtype float32"):
        kernel.matmat(jnp.ones((48, 2), jnp.bfloat16))
    args = (error_fn, params, batches, direction, jnp.ones((48, 2)), mesh)
    with pytest.raises(ValueError, match="column_chunk: expected an integer >= 1"):
        sharded_kernel_derivative(*args, column_chunk=0)
    with pytest.raises(ValueError, match="method: expected one of 'exact'"):
        sharded_kernel_derivative(*args, method="secant")
    assert grsd_jax.ShardedKernel is type(kernel)
    with pytest.raises(ValueError, match="solver, with a mesh,: expected one"):
        measure_coupling(
            *args[:4], mesh=mesh, solver="dense", block_size=2, key=jax.random.key(0)
        )
