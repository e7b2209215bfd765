"""The problem: what it computes, what it holds, and what it says of bad input."""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from grsd_jax import (
    Binning,
    Lanczos,
    Problem,
    gradient_flow_direction,
    kernel_dense,
    kernel_derivative,
    kernel_matmat,
    layer_kernels,
    linearize_kernel,
    measure_coupling,
    models,
    partition,
)
from grsd_jax import objective as module
from grsd_jax._arrays import Seen
from grsd_jax.kernel import linearize_block_kernels
from oracles import cast, dense_jacobians, dense_kernel, plain, relative_error

K, N, C, DIM = 2, 3, 4, 5

reductions = pytest.mark.parametrize("reduction", ["mean", "stack"])


def outputs_fn(params, batch):
    return jnp.tanh(batch["x"] @ params["w"]) @ params["v"] + params["b"][None]


def make_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = {"w": (DIM, 6), "v": (6, C), "b": (C,)}
    return {name: jnp.asarray(rng.normal(size=s), dtype) for name, s in shapes.items()}


def make_batches(dtype=jnp.float32):
    rng = np.random.default_rng(1)
    return {
        "x": jnp.asarray(rng.normal(size=(K, N, DIM)), dtype),
        "label": jnp.asarray(rng.integers(0, C, size=(K, N))),
        "target": jnp.asarray(rng.normal(size=(K, N, C)), dtype),
        "weight": jnp.asarray(rng.uniform(0.5, 2, size=(K, N)), dtype),
    }


def first(batches):
    return jax.tree.map(lambda leaf: leaf[0], batches)


def close(got, expected, tolerance=1e-12):
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def weighted_loss(outputs, target):
    """A loss of one example whose target is a label and a weight."""
    log_p = jax.nn.log_softmax(outputs)
    return -target["weight"] * log_p[target["label"]] + jnp.sum(outputs**4)


def label_and_weight(batch):
    return {"label": batch["label"], "weight": batch["weight"]}


# What is computed.


def by_hand(name, outputs, batch):
    """Returns errors ``[N, C]`` and the losses ``[N]`` of numbers, by NumPy."""
    z = np.asarray(outputs, np.float64)
    one_hot = np.eye(C)[np.asarray(batch["label"])]
    p = np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)
    cross_entropy = -np.sum(one_hot * np.log(p), axis=-1)
    if name == "softmax":
        return p - one_hot, cross_entropy
    if name == "squared":
        error = z - np.asarray(batch["target"])
        return error, np.sum(error**2, axis=-1) / 2
    weight = np.asarray(batch["weight"])[:, None]
    return (
        weight * (p - one_hot) + 4 * z**3,
        weight[:, 0] * cross_entropy + np.sum(z**4, axis=-1),
    )


LOSSES = {
    "softmax": {},
    "squared": {"loss": "squared", "target": "target"},
    "own": {"loss": weighted_loss, "target": label_and_weight},
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", LOSSES)
def test_error_and_loss_are_those_of_the_formulas_and_of_each_other(name):
    params, batches = make_params(jnp.float64), make_batches(jnp.float64)
    problem = Problem(outputs_fn, batches, **LOSSES[name])
    losses = []
    for k in range(K):
        batch = jax.tree.map(lambda leaf, k=k: leaf[k], batches)
        outputs = outputs_fn(params, batch)
        error, loss = by_hand(name, outputs, batch)
        close(problem.error(params, batch), error)
        losses.append(loss)
        # The error is N times the gradient of the batch's mean loss by the outputs.
        one = problem.replace(
            outputs_fn=lambda z, _: z, batches=jax.tree.map(lambda x: x[None], batch)
        )
        close(N * jax.grad(one.loss)(outputs), error)
    close(problem.loss(params), np.mean(losses))
    assert problem.loss(params).shape == ()
    got = gradient_flow_direction(problem, params)
    expected = jax.grad(problem.loss)(params)
    jax.tree.map(lambda a, b: close(a, -b), got, expected)
    assert problem.dimension(params) == K * N * C


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", LOSSES)
@reductions
def test_the_kernel_of_every_loss_is_that_of_its_error(name, reduction):
    params, batches = make_params(jnp.float64), make_batches(jnp.float64)
    problem = Problem(outputs_fn, batches, reduction=reduction, **LOSSES[name])

    def error_fn(params, batch):
        def loss(z, batch):
            one = problem.replace(
                outputs_fn=lambda z, _: z[None],
                batches=jax.tree.map(lambda x: x[None, None], batch),
            )
            return one.loss(z)

        return jax.vmap(jax.grad(loss))(outputs_fn(params, batch), batch)

    own = Problem.from_error(error_fn, batches, reduction=reduction)
    expected = dense_kernel(own, params)
    assert relative_error(kernel_dense(problem, params), expected) < 1e-12
    identity = jnp.eye(len(expected))
    assert relative_error(kernel_matmat(problem, params, identity), expected) < 1e-12


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["softmax_cross_entropy", "squared"])
def test_positions_of_a_sequence_are_errors_of_one_example(name):
    rng = np.random.default_rng(2)
    batches = {
        "x": jnp.asarray(rng.normal(size=(K, N, 2, DIM))),
        "label": jnp.asarray(rng.integers(0, C, size=(K, N, 2))),
    }
    params = make_params(jnp.float64)

    def sequence(params, batch):
        mixed = batch["x"] + jnp.mean(batch["x"], axis=1, keepdims=True) ** 2
        hidden = jnp.tanh(mixed @ params["w"])
        return hidden @ params["v"] + params["b"][None, None]

    problem = Problem(sequence, batches, loss=name)
    batch = first(batches)
    one_hot = jax.nn.one_hot(batch["label"], C)

    def error(params):
        z = sequence(params, batch)
        z = jax.nn.softmax(z) if name == "softmax_cross_entropy" else z
        return (z - one_hot).reshape(N, 2 * C)

    close(problem.error(params, batch), error(params))
    assert problem.dimension(params) == K * N * 2 * C
    rows = jax.jit(jax.jacrev(error))(params)
    rows = [rows[key].reshape(N * 2 * C, -1) for key in sorted(rows)]
    close(dense_jacobians(problem, params)[0], jnp.concatenate(rows, axis=1))
    expected = dense_kernel(problem, params)
    close(kernel_dense(problem, params), expected)
    # The loss is summed over positions and averaged over examples.
    z = sequence(params, batch)
    each = jnp.sum((z - one_hot) ** 2) / 2
    if name == "softmax_cross_entropy":
        each = -jnp.sum(one_hot * jax.nn.log_softmax(z))
    one = problem.replace(batches=jax.tree.map(lambda leaf: leaf[:1], batches))
    close(one.loss(params), each / N)
    moved = gradient_flow_direction(one, params)
    direct = jax.jit(
        jax.grad(lambda p: jnp.sum(problem.objective.mean_loss(p, batch)))
    )(params)
    jax.tree.map(lambda a, b: close(a, -b), moved, direct)


class Tokens(nn.Module):
    """A linen model with positions."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(C)(jnp.tanh(nn.Dense(3)(x)))


@pytest.mark.usefixtures("x64")
def test_factors_of_a_sequence_model_are_those_of_the_plain_path():
    rng = np.random.default_rng(2)
    model = Tokens()
    batches = {
        "image": jnp.asarray(rng.normal(size=(K, N, 2, DIM))),
        "label": jnp.asarray(rng.integers(0, C, size=(K, N, 2))),
    }
    image = batches["image"][0].astype(jnp.float32)
    params = cast(jax.jit(model.init)(jax.random.key(0), image)["params"], jnp.float64)
    problem = Problem(models.linen_outputs(model, {}), batches)
    close(kernel_dense(problem, params), kernel_dense(plain(problem), params))


@pytest.mark.usefixtures("x64")
@reductions
def test_one_number_an_example(reduction):
    batches = make_batches(jnp.float64)
    batches["target"] = batches["target"][..., 0]
    params = make_params(jnp.float64)

    def scalar(params, batch):
        return outputs_fn(params, batch)[:, 0]

    problem = Problem(
        scalar, batches, loss="squared", target="target", reduction=reduction
    )
    batch = first(batches)
    assert problem.error(params, batch).shape == (N, 1)
    close(problem.error(params, batch)[:, 0], scalar(params, batch) - batch["target"])
    copies = K if reduction == "stack" else 1
    assert problem.dimension(params) == copies * N
    close(kernel_dense(problem, params), dense_kernel(problem, params))

    def own_loss(output, target):
        return (output - target) ** 2 / 2

    same = problem.replace(loss=own_loss)
    close(same.error(params, batch), problem.error(params, batch))
    close(same.loss(params), problem.loss(params))


def test_target_is_a_key_or_a_function():
    params, batches = make_params(), make_batches()
    one_hot = Problem(
        outputs_fn, batches, target=lambda batch: jax.nn.one_hot(batch["label"], C)
    )
    by_key = Problem(outputs_fn, batches)
    batch = first(batches)
    close(one_hot.error(params, batch), by_key.error(params, batch), 1e-7)
    # Batches need be no dictionary.
    pairs = (batches["x"], batches["label"])
    of_pairs = Problem(
        lambda params, pair: outputs_fn(params, {"x": pair[0]}),
        pairs,
        target=operator.itemgetter(1),
    )
    close(of_pairs.error(params, first(pairs)), by_key.error(params, batch), 1e-7)
    with pytest.raises(ValueError, match="target: expected a key"):
        of_pairs.replace(target="label").loss(params)


# An error of the user's own.


def test_an_error_of_the_users_own_with_and_without_its_loss():
    params, batches = make_params(), make_batches()
    named = Problem(outputs_fn, batches)

    def error_fn(params, batch):
        return named.error(params, batch)

    def loss_fn(params, batch):
        return named.objective.mean_loss(params, batch)

    with_loss = Problem.from_error(error_fn, batches, loss_fn=loss_fn)
    close(with_loss.loss(params), named.loss(params), 1e-6)
    jax.tree.map(
        functools.partial(close, tolerance=1e-6),
        gradient_flow_direction(with_loss, params),
        gradient_flow_direction(named, params),
    )
    without = Problem.from_error(error_fn, batches)
    expected = kernel_dense(named, params)
    assert relative_error(kernel_dense(without, params), expected) < 1e-5
    direction = jax.tree.map(jnp.ones_like, params)
    options = {"key": jax.random.key(0), "solver": "dense"}
    assert measure_coupling(without, params, direction, **options).finite
    for needs_loss in (
        lambda: without.loss(params),
        lambda: gradient_flow_direction(without, params),
        lambda: measure_coupling(without, params, **options),
    ):
        with pytest.raises(ValueError, match=r"loss_fn: expected one .*, got None"):
            needs_loss()


# Blocks.


@reductions
def test_split_and_join_are_inverse_and_products_take_both_forms(reduction):
    params = make_params()
    problem = Problem(outputs_fn, make_batches(), reduction=reduction)
    n = problem.dimension(params)
    leading = (K, N, C) if reduction == "stack" else (N, C)
    columns = jax.random.normal(jax.random.key(0), (n, 3))
    blocks = problem.split(columns)
    assert blocks.shape == (*leading, 3)
    np.testing.assert_array_equal(problem.join(blocks), columns)
    np.testing.assert_array_equal(
        problem.join(problem.split(columns[:, 0])), columns[:, 0]
    )
    # Example-major, class-minor, the batch slowest.
    index = (1, 2, 3) if reduction == "stack" else (2, 3)
    row = np.ravel_multi_index(index, leading)
    np.testing.assert_array_equal(blocks[index], columns[row])

    kernel = linearize_kernel(problem, params)
    own = linearize_kernel(plain(problem), params)
    expected = kernel_dense(problem, params) @ columns
    products = {
        "matmat": functools.partial(kernel_matmat, problem, params),
        "chunks": functools.partial(kernel_matmat, problem, params, column_chunk=2),
        "held": kernel.matmat,
        "held chunks": functools.partial(kernel.matmat, column_chunk=2),
        "plain": own.matmat,
        "jit": jax.jit(lambda v: kernel_matmat(problem, params, v)),
    }
    for name, product in products.items():
        flat, split = product(columns), product(blocks)
        assert split.shape == blocks.shape, name
        np.testing.assert_array_equal(problem.join(split), flat, name)
        assert relative_error(flat, expected) < 1e-5, name
    if reduction == "mean":  # one batch's space, with the axis K as well
        assert kernel.matmat(blocks[None]).shape == (1, *blocks.shape)
    for wrong in (jnp.zeros((n + 1, 3)), jnp.zeros(())):
        with pytest.raises(ValueError, match=r"columns: expected \d+ C rows, .* got"):
            problem.split(wrong)
    for wrong in (columns, blocks[1:], jnp.zeros(leading[:-1])):
        with pytest.raises(ValueError, match=r"blocks: expected shape \[.*, got \["):
            problem.join(wrong)
    wrong = jnp.zeros((K + 1, N, C, 3))
    for product in products.values():
        with pytest.raises(ValueError, match=r"block: expected shape .* got \[3, 3, 4"):
            product(wrong)


@reductions
def test_the_reduction_says_how_the_batches_combine(reduction):
    params = make_params()
    problem = Problem(outputs_fn, make_batches())
    assert problem.reduction == "stack"
    jacobians = dense_jacobians(problem, params)
    if reduction == "stack":
        whole = jnp.concatenate(jacobians)
        expected = whole @ whole.T
    else:
        expected = sum(j @ j.T for j in jacobians) / K
    problem = problem.replace(reduction=reduction)
    assert problem.dimension(params) == len(expected)
    assert relative_error(kernel_dense(problem, params), expected) < 1e-5


# A problem is data.


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["shift"], meta_fields=["traced"]
)
@dataclasses.dataclass(frozen=True)
class Shifted:
    """Outputs with a state, that note every time they are traced."""

    shift: jax.Array
    traced: Callable[[], None]

    def __call__(self, params, batch):
        self.traced()
        return outputs_fn(params, batch) + self.shift


@pytest.fixture
def traces():
    return []


@pytest.fixture
def shifted(traces):
    shift = jnp.asarray(0.5)
    return Problem(Shifted(shift, functools.partial(traces.append, 1)), make_batches())


def test_a_problem_crosses_jit_with_its_data(shifted):
    params = make_params()
    # Not constant over classes: the product of such a block is zero.
    block = jax.random.normal(jax.random.key(0), (shifted.dimension(params), 2))
    compiled = 0

    @jax.jit
    def product(problem, params):
        nonlocal compiled
        compiled += 1
        return kernel_matmat(problem, params, block), problem

    got, back = product(shifted, params)
    assert relative_error(got, kernel_matmat(shifted, params, block)) < 1e-5
    assert isinstance(back, Problem)
    assert jax.tree.structure(back) == jax.tree.structure(shifted)
    assert relative_error(kernel_matmat(back, params, block), got) < 1e-5
    moved = dataclasses.replace(shifted.objective.outputs_fn, shift=jnp.asarray(2.0))
    for changes in (
        {"outputs_fn": moved},
        {"batches": jax.tree.map(lambda leaf: leaf[::-1], shifted.batches)},
    ):
        other = shifted.replace(**changes)
        got, _ = product(other, params)
        assert relative_error(got, kernel_matmat(other, params, block)) < 1e-5
    assert compiled == 1
    product(shifted.replace(loss="squared"), params)
    assert compiled == 2


def test_new_state_and_batches_retrace_nothing_outside_jit(shifted, traces):
    params = make_params()

    def use(problem):
        n = problem.dimension(params)
        direction = gradient_flow_direction(problem, params)
        kernel_matmat(problem, params, jnp.ones((n, 2)))
        linearize_kernel(problem, params).matmat(jnp.ones((n, 2)))
        kernel_dense(problem, params, direction)
        kernel_derivative(problem, params, direction, jnp.ones((n, 2)))
        layer_kernels(problem, params)
        problem.loss(params)
        problem.error(params, first(problem.batches))

    use(shifted)
    before = len(traces)
    assert before > 0
    outputs = shifted.objective.outputs_fn
    for scale in (2.0, 3.0):
        use(
            shifted.replace(
                outputs_fn=dataclasses.replace(outputs, shift=jnp.asarray(scale)),
                batches={**shifted.batches, "x": scale * shifted.batches["x"]},
            )
        )
        # The same from scratch: data is compared by shape, not by object.
        again = dataclasses.replace(outputs, shift=jnp.asarray(scale))
        use(Problem(again, shifted.batches))
    assert len(traces) == before


def test_statistics_of_batch_norm_are_data():
    model = models.ResNet(C, 2, stage_sizes=(1,))
    image = jax.random.normal(jax.random.key(0), (1, N, 4, 4, 3))
    batches = {"image": image, "label": jnp.zeros((1, N), jnp.int32)}
    variables = dict(jax.jit(model.init)(jax.random.key(1), image[0]))
    params = variables.pop("params")
    problem = Problem(models.linen_outputs(model, variables), batches)
    compiled = 0

    @jax.jit
    def error(problem, batch):
        nonlocal compiled
        compiled += 1
        return problem.error(params, batch)

    found = []
    for shift in (0.0, 0.5):
        state = jax.tree.map(lambda leaf, s=shift: leaf + s, variables)
        moved = problem.replace(outputs_fn=models.linen_outputs(model, state))
        found.append(error(moved, first(batches)))
        expected = model.apply({**state, "params": params}, image[0], train=False)
        expected = jax.nn.softmax(expected) - jax.nn.one_hot(jnp.zeros(N, int), C)
        close(found[-1], expected, 1e-5)
    assert compiled == 1
    assert not np.allclose(*found)


def test_a_function_made_anew_traces_again_and_the_same_one_does_not():
    params, batches = make_params(), make_batches()
    calls = []

    def made_anew():
        def fn(params, batch):
            calls.append(1)
            return outputs_fn(params, batch)

        return fn

    kept = made_anew()
    counts = []
    for fn in (kept, kept, made_anew(), made_anew()):
        before = len(calls)
        Problem(fn, batches).loss(params)
        counts.append(len(calls) - before)
    assert counts[0] > 0
    assert counts[1] == 0
    # Once less than the first, whose shapes served the check of the same targets.
    assert counts[2] == counts[3] == counts[0] - 1


def test_placeholders_pass_through_a_problem(shifted):
    params = make_params()
    own = Problem.from_error(shifted.error, shifted.batches, loss_fn=lambda p, b: 0.0)
    held = shifted.at({**params, "step": 3}).error_fn
    for problem in (shifted, own):
        tree = jax.tree.structure(problem)
        for placeholder in (None, object(), "leaf"):
            marked = jax.tree.map(lambda _, p=placeholder: p, problem)
            assert isinstance(marked, Problem)
        assert jax.tree.structure(jax.tree.map(lambda _: 0, problem)) == tree
        assert hash(tree) == hash(jax.tree.structure(problem))
        shapes = jax.eval_shape(lambda p: p, problem)
        assert jax.tree.structure(shapes) == tree
        assert jax.tree.map(jnp.shape, shapes.batches) == jax.tree.map(
            jnp.shape, problem.batches
        )
        stacked = jax.vmap(lambda _, p=problem: p)(jnp.arange(2))
        assert jax.tree.structure(stacked) == tree
        paths = jax.tree_util.tree_leaves_with_path(problem)
        names = [jax.tree_util.keystr(path) for path, _ in paths]
        assert ".batches['x']" in names
    assert callable(jax.tree.map(lambda _: object(), held))


# Parameters of other kinds.


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "count", "mask", "activation", "nothing", "name", "rate"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Module:
    """A module as Equinox has them: every field is a leaf of the tree."""

    weight: Any
    count: Any
    mask: Any
    activation: Any
    nothing: Any
    name: Any
    rate: Any


def module_outputs(module, batch):
    x = batch["x"] @ module.weight["w"]
    x = module.activation(x) * module.count.astype(x.dtype)
    x = jnp.where(module.mask[None], x, 2 * x) * module.rate
    assert module.nothing is None
    assert module.name == "head"
    return x @ module.weight["v"]


def make_module():
    params = make_params()
    del params["b"]
    mask = np.array([True, False] * 3)
    return Module(params, jnp.asarray(2), mask, jnp.tanh, None, "head", 3)


def floating_outputs(weight, batch):
    return module_outputs(dataclasses.replace(make_module(), weight=weight), batch)


@reductions
def test_leaves_that_are_not_floating_are_held(reduction):
    module = make_module()
    problem = Problem(module_outputs, make_batches(), reduction=reduction)
    alone = problem.replace(outputs_fn=floating_outputs)
    expected = dense_kernel(alone, module.weight)
    n = problem.dimension(module)
    assert n == alone.dimension(module.weight) == len(expected)
    block = jax.random.normal(jax.random.key(0), (n, 3))
    got = {
        "dense": kernel_dense(problem, module) @ block,
        "matmat": kernel_matmat(problem, module, block),
        "held": linearize_kernel(problem, module).matmat(block),
        "layers": sum(layer_kernels(problem, module).values()) @ block,
    }
    for name, product in got.items():
        assert relative_error(product, expected @ block) < 1e-5, name
    close(problem.loss(module), alone.loss(module.weight), 1e-6)
    close(
        problem.error(module, first(problem.batches)),
        alone.error(module.weight, first(problem.batches)),
        1e-6,
    )


def test_held_numbers_that_compare_equal_are_not_taken_for_each_other():
    def scaled(params, batch):
        held = params["held"]
        factor = {True: 2.0, False: 3.0}[held] if held is bool(held) else 1.0
        sign = np.copysign(1.0, held)
        return factor * sign * outputs_fn(params["net"], batch)

    problem, params = Problem(scaled, make_batches()), make_params()
    batch = first(problem.batches)
    for held in (1, True, 0.0, -0.0):
        given = {"net": params, "held": held}
        expected = module.softmax_error(scaled(given, batch), batch["label"])
        assert np.allclose(problem.error(given, batch), expected, atol=1e-6), held


def test_the_gradient_flow_leaves_them_where_they_are():
    module = make_module()
    problem = Problem(module_outputs, make_batches())
    alone = problem.replace(outputs_fn=floating_outputs)
    direction = gradient_flow_direction(problem, module)
    expected = gradient_flow_direction(alone, module.weight)
    jax.tree.map(functools.partial(close, tolerance=1e-6), direction.weight, expected)
    for leaf in (direction.count, direction.mask):
        np.testing.assert_array_equal(leaf, 0)
    assert direction.count.dtype == module.count.dtype
    assert direction.mask.shape == module.mask.shape
    # A direction of the flow is accepted wherever one is asked for.
    kernel, moved = kernel_dense(problem, module, direction)
    expected = jax.jvp(
        lambda weight: dense_kernel(alone, weight), (module.weight,), (expected,)
    )
    assert relative_error(kernel, expected[0]) < 1e-5
    assert relative_error(moved, expected[1]) < 1e-4
    full = dataclasses.replace(
        direction, activation=jnp.tanh, name="head", rate=0, count=jnp.asarray(7)
    )
    for other in (direction, full):
        vectors = jnp.eye(len(kernel))
        projected = kernel_derivative(problem, module, other, vectors)
        assert relative_error(projected, expected[1]) < 1e-4
    values = np.linalg.eigvalsh(np.asarray(expected[0], np.float64))[::-1]
    shells = Binning(num_shells=2, window=2, num_bootstrap=0)
    for solver in ("dense", Lanczos(4, 4)):
        measured = measure_coupling(
            problem, module, key=jax.random.key(0), solver=solver, shells=shells
        )
        assert measured.finite
        close(measured.values[:3], values[:3], 1e-4)


def test_blocks_of_such_parameters_hold_their_floating_leaves():
    module = make_module()
    problem = Problem(module_outputs, make_batches())
    whole = kernel_dense(problem, module)

    def block_of(path):
        return "second" if path[-1] == "v" else "first"

    blocks = partition(module, block_of, ["first", "second"])
    kernels = linearize_block_kernels(problem, module, blocks)
    identity = jnp.eye(len(whole))
    total = sum(kernel.matmat(identity) for kernel in kernels)
    assert relative_error(total, whole) < 1e-5


@reductions
def test_numpy_leaves_and_leaves_of_low_precision_move(reduction):
    low = jnp.asarray(make_params()["b"], jnp.bfloat16)
    params = {**make_params(), "b": low, "w": np.asarray(make_params()["w"])}

    def mixed(params, batch):
        return outputs_fn({**params, "b": params["b"].astype(jnp.float32)}, batch)

    problem = Problem(mixed, make_batches(), reduction=reduction)
    wide = {**params, "b": low.astype(jnp.float32)}
    alone = problem.replace(outputs_fn=outputs_fn)
    direction = gradient_flow_direction(problem, params)
    assert [leaf.dtype for leaf in jax.tree.leaves(direction)] == [
        leaf.dtype for leaf in jax.tree.leaves(params)
    ]
    wide_direction = gradient_flow_direction(alone, wide)
    expected = kernel_dense(alone, wide, wide_direction)
    identity = jnp.eye(problem.dimension(params))
    # As JAX is by default: the dtypes of two leaves promote each other.
    with jax.numpy_dtype_promotion("standard"):
        got = kernel_dense(problem, params, direction)
        moved = kernel_derivative(problem, params, direction, identity)
        product = kernel_matmat(problem, params, identity)
    for matrix, oracle in zip(
        (*got, moved, product), (*expected, expected[1], expected[0]), strict=True
    ):
        assert matrix.dtype == jnp.float32
        assert relative_error(matrix, oracle) < 1e-2


# What is said of bad input.


def raises(message):
    return pytest.raises(ValueError, match=message)


def test_bad_choices_are_named_at_once():
    batches = make_batches()
    named = Problem(outputs_fn, batches)
    own = Problem.from_error(outputs_fn, batches)
    names = "loss: expected one of 'softmax_cross_entropy', 'squared'"
    with raises(f"{names}, got 'hinge'"):
        Problem(outputs_fn, batches, loss="hinge")
    with raises(f"{names}, or a function of one example, got 3"):
        Problem(outputs_fn, batches, loss=3)
    with raises(f"{names}, got 'hinge'"):
        named.replace(loss="hinge")
    with raises(f"{names}, or a function of one example, got None"):
        named.replace(loss=None)
    known = "reduction: expected one of 'mean', 'stack'"
    with raises(f"{known}, got 'sum'"):
        Problem(outputs_fn, batches, reduction="sum")
    with raises(f"{known}, got 'sum'"):
        Problem.from_error(outputs_fn, batches, reduction="sum")
    with raises(f"{known}, got None"):
        named.replace(reduction=None)
    with raises("outputs_fn: expected a callable, got dict"):
        Problem({}, batches)
    with raises("outputs_fn: expected a callable, got int"):
        named.replace(outputs_fn=3)
    with raises("error_fn: expected a callable, got NoneType"):
        Problem.from_error(None, batches)
    with raises("loss_fn: expected a callable, got float"):
        Problem.from_error(outputs_fn, batches, loss_fn=1.0)
    with raises("loss_fn: expected a callable, got float"):
        own.replace(loss_fn=1.0)
    with raises("preconditioner: expected None"):
        Problem(outputs_fn, batches, preconditioner=jnp.ones(3))
    with raises("replace: expected one of 'batches', .*'target', got 'error_fn'"):
        named.replace(error_fn=outputs_fn)
    with raises("replace: expected one of .*'error_fn', 'loss_fn', got 'loss'"):
        own.replace(loss="squared")


BAD_DATA = [
    (
        r"outputs_fn: expected an array \[N, ...\] with the batch's N = 3 examples, "
        r"got \[4\]",
        {"outputs_fn": lambda p, b: outputs_fn(p, b)[0]},
    ),
    (
        r"outputs_fn: expected an array .* got PyTreeDef",
        {"outputs_fn": lambda p, b: {"logits": outputs_fn(p, b)}},
    ),
    (
        r"outputs_fn\(params, batch\): expected a real floating dtype, got int32",
        {"outputs_fn": lambda p, b: outputs_fn(p, b).astype(jnp.int32)},
    ),
    (
        r"outputs_fn: expected an array .* got \[3, 0\]",
        {"outputs_fn": lambda p, b: outputs_fn(p, b)[:, :0]},
    ),
    (
        r"target: expected a key of the batch, or a function of it, got 'y' and a "
        r"batch with \['label', 'target', 'weight', 'x'\]",
        {"target": "y"},
    ),
    (r"labels: expected shape \[3, 4\], got \[3\]", {"target": "weight"}),
    (
        r"labels: expected shape \[3\], got \[3, 1, 1\]",
        {"target": lambda batch: batch["label"][:, None, None]},
    ),
    (
        r"logits: expected at least 2 axes, examples first, got shape \[3\]",
        {"outputs_fn": lambda p, b: outputs_fn(p, b)[:, 0]},
    ),
    (
        r"loss: expected a scalar of every example, got shape \[4\] of one",
        {"loss": lambda outputs, label: outputs**2},
    ),
    (
        r"batches\['label'\]: expected leading axes \[K, N\], got shape \[2\]",
        {"batches": {**make_batches(), "label": jnp.zeros(K, jnp.int32)}},
    ),
    (
        r"batches\['target'\]: expected leading axes \[2, 2\] as in the first leaf, "
        r"got \[2, 3\]",
        {"batches": {**make_batches(), "label": jnp.zeros((K, 2), jnp.int32)}},
    ),
    (r"batches: expected arrays with leading axes .*, got none", {"batches": {}}),
]


@pytest.mark.parametrize(("message", "changes"), BAD_DATA)
def test_bad_data_are_named_at_first_use(message, changes):
    params = make_params()
    bad = Problem(outputs_fn, make_batches()).replace(**changes)
    with raises(message):
        bad.dimension(params)
    with raises(message):
        bad.loss(params)
    with raises(message):
        gradient_flow_direction(bad, params)


def test_bad_parameters_and_directions_are_named():
    params = make_params()
    problem = Problem(outputs_fn, make_batches())
    for empty in ({}, {"w": jnp.arange(3)}, {"w": None, "f": jnp.tanh, "lr": 0.1}):
        with raises("params: expected at least one floating array, got none"):
            problem.dimension(empty)
    with raises("direction: expected the tree of params"):
        kernel_dense(problem, params, {"w": params["w"]})
    with raises("direction: expected the tree of params"):
        kernel_dense(problem, params, {**params, "w": None})
    turned = {**params, "w": params["w"].T}
    with raises(r"direction\['w'\]: expected shape \[5, 6\] as in params, got \[6, 5"):
        kernel_dense(problem, params, turned)
    of_module = Problem(module_outputs, make_batches())
    with raises("direction: expected the tree of params"):
        kernel_dense(of_module, make_module(), {"w": params["w"]})


BAD_ERRORS = [
    (
        r"error_fn: expected an array \[N, C\] with the batch's N = 3 examples and "
        r"C >= 1, got \[3\]",
        lambda p, b: outputs_fn(p, b)[:, 0],
    ),
    (
        r"error_fn: expected an array \[N, C\] .* got PyTreeDef",
        lambda p, b: [outputs_fn(p, b)],
    ),
    (
        r"error_fn\(params, batch\): expected a real floating dtype, got complex64",
        lambda p, b: outputs_fn(p, b).astype(jnp.complex64),
    ),
]


@pytest.mark.parametrize(("message", "error_fn"), BAD_ERRORS)
def test_an_error_of_the_users_own_is_checked(message, error_fn):
    problem = Problem.from_error(error_fn, make_batches())
    with raises(message):
        problem.dimension(make_params())


def test_a_loss_of_the_users_own_is_checked():
    problem = Problem.from_error(outputs_fn, make_batches(), loss_fn=outputs_fn)
    with raises(r"loss_fn: expected a scalar, the mean loss .* got \(3, 4\)"):
        problem.loss(make_params())


def test_targets_are_searched_once_for_their_arrays(monkeypatch):
    searched = []

    def counted(name, labels, shape, **options):
        searched.append(name)
        return search(name, labels, shape, **options)

    search = module.check_targets
    monkeypatch.setattr(module, "check_targets", counted)
    params, batches = make_params(), make_batches()
    problem = Problem(outputs_fn, batches)
    block = jnp.ones((K * N * C, 1))
    for _ in range(3):
        kernel_matmat(problem, params, block)
        Problem(outputs_fn, batches, reduction="mean").at(params)
    assert len(searched) == 1
    problem.replace(batches=batches | {"x": 2 * batches["x"]}).at(params)
    assert len(searched) == 1  # the same targets
    problem.replace(target=lambda batch: batch["label"] % 2).at(params)
    assert len(searched) == 2
    wrong = batches | {"label": batches["label"] + C}
    for _ in range(2):  # what failed is not known
        with pytest.raises(ValueError, match=r"expected classes in \[0, 4\)"):
            kernel_matmat(problem.replace(batches=wrong), params, block)


def test_targets_of_numpy_that_change_in_place_are_searched_again():
    batches = make_batches()
    batches["label"] = np.array(batches["label"])
    problem = Problem(outputs_fn, batches)
    problem.at(make_params())
    batches["label"][1, 2] = C
    with pytest.raises(ValueError, match=r"the first at \[1, 2\]"):
        problem.at(make_params())


def test_arrays_are_known_while_they_live():
    seen = Seen(most=2)
    first, second, third = (jnp.ones(3) + k for k in range(3))
    seen.note("a", [first, second])
    assert seen.knows("a", [first, second])
    assert not seen.knows("a", [second, first])
    assert not seen.knows("b", [first, second])
    kept = jnp.array(first)
    del first
    assert not seen.knows("a", [kept, second])
    seen.note("a", [np.ones(3)])
    assert not seen.knows("a", [np.ones(3)])
    for array in (second, third, kept):  # two at most
        seen.note("a", [array])
    assert [seen.knows("a", [x]) for x in (second, third, kept)] == [False, True, True]
