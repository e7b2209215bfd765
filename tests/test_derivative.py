import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax import (
    Derivative,
    Problem,
    gradient_flow_direction,
    kernel_dense,
    kernel_derivative,
    measure_coupling,
)
from grsd_jax.kernel import (
    central_difference,
    default_step,
    kernel_derivative_matmat,
    linearize_derivative,
    linearize_kernel,
)
from oracles import cast, dense_jacobians, dense_kernel, network_problem, relative_error

reductions = pytest.mark.parametrize("reduction", ["mean", "stack"])


def with_direction(name, dtype, **options):
    problem, params = network_problem(name, dtype, **options)
    return problem, params, gradient_flow_direction(problem, params)


def columns(size, count, dtype):
    return jax.random.normal(jax.random.key(5), (size, count), dtype)


@reductions
@pytest.mark.usefixtures("x64")
def test_direction_is_minus_the_gradient_of_the_mean_loss(reduction):
    problem, params = network_problem("mlp", jnp.float64, reduction=reduction)
    outputs_fn, batches = problem.objective.outputs_fn, problem.batches

    def mean_loss(p):
        images = batches["image"].reshape(10, 4)
        log_p = jax.nn.log_softmax(outputs_fn(p, {"image": images}))
        return -jnp.mean(log_p[jnp.arange(10), batches["label"].reshape(10)])

    got = gradient_flow_direction(problem, params)
    expected = jax.grad(mean_loss)(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, -b, rtol=1e-12), got, expected
    )


@pytest.mark.usefixtures("x64")
@reductions
def test_products_with_the_derivative_are_those_of_the_dense_one(reduction):
    arguments = with_direction("mlp", jnp.float64, reduction=reduction)
    _, moved = kernel_dense(*arguments)
    block = columns(len(moved), 3, jnp.float64)
    got = kernel_derivative_matmat(*arguments, block)
    assert relative_error(got, moved @ block) < 1e-12
    split = arguments[0].split(block)
    got = kernel_derivative_matmat(*arguments, split)
    assert got.shape == split.shape


@pytest.mark.usefixtures("x64")
@reductions
def test_gram_of_the_derivative_is_that_of_the_dense_one(reduction):
    problem, params, direction = with_direction("mlp", jnp.float64, reduction=reduction)
    _, moved = jax.jvp(lambda p: dense_jacobians(problem, p), (params,), (direction,))
    whole = np.concatenate(moved, axis=0 if reduction == "stack" else 1)
    gram = whole @ whole.T / (1 if reduction == "stack" else len(moved))
    block = columns(len(gram), 3, jnp.float64)
    got = linearize_derivative(problem, params, direction).matmat(block)
    assert relative_error(got, gram @ np.asarray(block)) < 1e-12


def test_a_complex_direction_is_refused():
    """Its imaginary part would be dropped."""
    problem, params, direction = with_direction("mlp", jnp.float32)
    block = columns(problem.dimension(params), 2, jnp.float32)
    turned = jax.tree.map(lambda leaf: leaf.astype(jnp.complex64), direction)
    with pytest.raises(ValueError, match=r"direction.*: expected real numbers, got c"):
        kernel_derivative(problem, params, turned, block)


def test_operators_are_those_of_the_arrays_as_they_were():
    """Training in place, or a buffer that is filled again, moves no operator."""
    problem, params, direction = with_direction("mlp", jnp.float32)
    block = columns(problem.dimension(params), 2, jnp.float32)
    batches, params, direction = (
        jax.tree.map(np.array, tree) for tree in (problem.batches, params, direction)
    )
    problem = problem.replace(batches=batches)
    operators = (
        linearize_derivative(problem, params, direction),
        linearize_kernel(problem, params),
    )
    before = [np.array(operator.matmat(block)) for operator in operators]
    for leaf in jax.tree.leaves((batches, params, direction)):
        leaf[...] = 0
    for operator, wanted in zip(operators, before, strict=True):
        assert np.any(wanted)
        np.testing.assert_array_equal(operator.matmat(block), wanted)


def test_a_central_difference_takes_the_default_step():
    problem, params, direction = with_direction("mlp", jnp.float32)
    block = columns(problem.dimension(params), 2, jnp.float32)
    steps = (None, default_step(jnp.float32), 2 * default_step(jnp.float32))
    found = [
        kernel_derivative(
            problem, params, direction, block, method="finite_difference", step=step
        )
        for step in steps
    ]
    np.testing.assert_array_equal(found[0], found[1])
    assert np.any(found[0] != found[2])


networks = [
    pytest.param("resnet18", marks=pytest.mark.slow),
    pytest.param("plainnet18", marks=pytest.mark.scheduled),
]


@pytest.mark.usefixtures("x64")
@reductions
@pytest.mark.parametrize("name", ["mlp", *networks])
def test_exact_equals_central_differences_for_a_smooth_activation(name, reduction):
    arguments = with_direction(name, jnp.float64, reduction=reduction)
    size = arguments[0].dimension(arguments[1])
    vectors, _ = jnp.linalg.qr(columns(size, 4, jnp.float64))
    exact, difference = (
        kernel_derivative(*arguments, vectors, method=method, step=1e-6)
        for method in ("exact", "finite_difference")
    )
    assert relative_error(difference, exact) < 1e-8


@pytest.mark.usefixtures("x64")
def test_difference_falls_as_the_square_of_the_step():
    arguments = with_direction("mlp", jnp.float64, reduction="mean")
    vectors = columns(15, 4, jnp.float64)
    exact = kernel_derivative(*arguments, vectors)
    errors = [
        relative_error(
            kernel_derivative(
                *arguments, vectors, method="finite_difference", step=step
            ),
            exact,
        )
        for step in (4e-3, 2e-3, 1e-3)
    ]
    rates = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(rates, 2, atol=0.1)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_piecewise_linear_networks_differ_by_their_flips():
    arguments = with_direction(
        "resnet18", jnp.float64, activation="relu", reduction="mean"
    )
    vectors = columns(9, 4, jnp.float64)
    exact, far, near = (
        kernel_derivative(*arguments, vectors, **options)
        for options in (
            {},
            {"method": "finite_difference", "step": 1e-1},
            {"method": "finite_difference", "step": 1e-9},
        )
    )
    assert relative_error(near, exact) < 1e-4 < 1e-2 < relative_error(far, exact)


@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        pytest.param("resnet18", marks=pytest.mark.scheduled),
        pytest.param("plainnet18", marks=pytest.mark.scheduled),
    ],
)
def test_exact_dense_and_projected_agree_in_float32(name):
    for reduction in ("mean", "stack") if name == "mlp" else ("mean",):
        problem, params, direction = with_direction(
            name, jnp.float32, reduction=reduction
        )
        _, dense = kernel_dense(problem, params, direction)
        oracle = jax.jvp(
            lambda p, problem=problem: dense_kernel(problem, p),
            (params,),
            (direction,),
        )[1]
        identity = jnp.eye(dense.shape[0], dtype=dense.dtype)
        projected = kernel_derivative(problem, params, direction, identity)
        assert relative_error(dense, oracle) < 1e-4
        assert relative_error(projected, oracle) < 1e-4
        assert relative_error(projected.T, projected) == 0


@reductions
def test_column_chunks_change_nothing_eagerly_or_traced(reduction):
    problem, params, direction = with_direction("mlp", jnp.float32, reduction=reduction)
    vectors = columns(problem.dimension(params), 7, jnp.float32)

    def chunked(p, chunk):
        return kernel_derivative(problem, p, direction, vectors, column_chunk=chunk)

    whole = chunked(params, None)
    assert relative_error(chunked(params, 3), whole) < 1e-5
    assert relative_error(jax.jit(lambda p: chunked(p, 3))(params), whole) < 1e-5


@reductions
def test_custom_vjp_functions_work(reduction):
    @jax.custom_vjp
    def cube(x):
        return x**3

    cube.defvjp(lambda x: (x**3, x), lambda x, g: (3 * x**2 * g,))
    params = {"w": jax.random.normal(jax.random.key(0), (4, 3))}
    batches = {"x": jax.random.normal(jax.random.key(1), (2, 5, 4))}

    def custom(params, batch):
        return cube(batch["x"] @ params["w"])

    def same(params, batch):
        return (batch["x"] @ params["w"]) ** 3

    got, expected = (
        kernel_derivative(problem, params, params, jnp.eye(problem.dimension(params)))
        for problem in (
            Problem.from_error(error_fn, batches, reduction=reduction)
            for error_fn in (custom, same)
        )
    )
    assert relative_error(got, expected) < 1e-5


def test_central_difference_is_exact_for_a_quadratic_and_safe_at_zero():
    params = {"w": jnp.array([1.0, 2.0])}
    direction = {"w": jnp.array([3.0, -1.0])}
    got = central_difference(lambda p: p["w"] ** 2, params, direction, step=2.0**-10)
    np.testing.assert_allclose(got, 2 * params["w"] * direction["w"], rtol=1e-3)
    still = jax.tree.map(jnp.zeros_like, direction)
    np.testing.assert_array_equal(
        central_difference(lambda p: p["w"] ** 2, params, still), 0
    )


def test_steps_that_rounding_swallows_are_refused():
    cubes = lambda p: sum(jnp.sum(leaf) ** 3 for leaf in jax.tree.leaves(p))  # noqa: E731
    params = {"v": np.ones(3), "w": np.asarray([1.0, 2.0])}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    take = functools.partial(central_difference, cubes)
    # The exact derivative: 3 (sum v)^2 3 + 3 (sum w)^2 2.
    np.testing.assert_allclose(take(params, params), 81 + 81, rtol=2e-2)
    for dtype in (jnp.bfloat16, jnp.float16):
        mixed = params | {"w": params["w"].astype(dtype)}
        with pytest.raises(ValueError, match=r"^params\['w'\]: expected dtype float"):
            take(mixed, mixed)
    for step in (1e-8, 1e-12):
        with pytest.raises(ValueError, match=r"^step: expected at least 1.2e-07, the"):
            take(params, params, step=step)


def test_a_difference_needs_a_parameter():
    with pytest.raises(ValueError, match=r"^params: expected at least one floating"):
        central_difference(lambda p: jnp.ones(2), {}, {})


@pytest.mark.usefixtures("x64")
def test_the_default_step_is_that_of_the_coarsest_parameters():
    params = {"v": jnp.ones(3, jnp.float32), "w": jnp.ones(2, jnp.float64)}
    sine = lambda p: jnp.sin(jnp.sum(p["v"].astype(jnp.float64)))  # noqa: E731
    got = central_difference(sine, params, params)
    np.testing.assert_allclose(got, 3 * np.cos(3), rtol=5e-3)


@pytest.mark.parametrize("solver", ["dense", "lanczos"])
@pytest.mark.parametrize(
    "derivative", [Derivative("finite_difference"), Derivative(cross_checked=True)]
)
def test_measurements_of_half_parameters_take_no_difference(solver, derivative):
    problem, params, _ = with_direction("mlp", jnp.float32)
    in_single = lambda p, b: problem.objective.outputs_fn(cast(p, jnp.float32), b)  # noqa: E731
    with pytest.raises(ValueError, match=r"^params.*: expected dtype float32 or"):
        measure_coupling(
            problem.replace(outputs_fn=in_single),
            cast(params, jnp.bfloat16),
            key=jax.random.key(0),
            solver=solver,
            derivative=derivative,
        )


def test_bad_input_is_named():
    problem, params, direction = with_direction("mlp", jnp.float32, reduction="mean")
    vectors = jnp.ones((15, 2))
    with pytest.raises(ValueError, match="direction: expected the tree of params"):
        kernel_derivative(problem, params, {}, vectors)
    short = jax.tree.map(lambda leaf: leaf[..., :-1], direction)
    with pytest.raises(ValueError, match=r"direction.*: expected shape"):
        kernel_derivative(problem, params, short, vectors)
    with pytest.raises(ValueError, match=r"vectors: expected shape \[15, any\]"):
        kernel_derivative(problem, params, direction, vectors[1:])
    with pytest.raises(ValueError, match="method: expected one of 'exact'"):
        kernel_derivative(problem, params, direction, vectors, method="fd")
    with pytest.raises(ValueError, match="step: expected a finite number > 0"):
        kernel_derivative(
            problem, params, direction, vectors, method="finite_difference", step=-1.0
        )
    own = Problem.from_error(
        problem.error, problem.batches, loss_fn=lambda p, b: problem.error(p, b)
    )
    with pytest.raises(ValueError, match="loss_fn: expected a scalar"):
        gradient_flow_direction(own, params)
