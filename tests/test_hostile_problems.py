"""Every function that takes a problem, against problems that nobody would state.

Each answers rightly, says in a field (or by NaN) that the answer is undefined, or
raises one sentence that names the argument. What is public and has no row here fails.
"""

import inspect
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grsd_jax as grsd
from called_names import TESTS, used_names
from grsd_jax import kernel
from oracles import dense_jacobians, dense_kernel

KEY = jax.random.key(0)
SHELLS = grsd.Binning(num_shells=2, window=2, num_bootstrap=2)


def outputs_fn(params, batch):
    return jnp.tanh(batch["x"] @ params["w"]) @ params["v"]


def make(num_batches=1, num_examples=3, classes=3, dim=4):
    keys = jax.random.split(KEY, 3)
    params = {
        "v": jax.random.normal(keys[1], (dim, classes)),
        "w": jax.random.normal(keys[0], (5, dim)),
    }
    leading = (num_batches, num_examples)
    batches = {
        "x": jax.random.normal(keys[2], (*leading, 5)),
        "label": (jnp.arange(num_batches * num_examples) % classes).reshape(leading),
    }
    return grsd.Problem(outputs_fn, batches), params


def with_batches(**leaves):
    problem, params = make()
    return problem.replace(batches={**problem.batches, **leaves}), params


def squared(num_batches=1, num_examples=1, size=1):
    """Returns a problem of the squared loss, of one number where not told otherwise."""
    problem, params = make(num_batches, num_examples, size)
    target = jnp.cos(jnp.arange(float(num_batches * num_examples * size)))
    batches = {
        "x": problem.batches["x"],
        "label": target.reshape(num_batches, num_examples, size),
    }
    return problem.replace(batches=batches, loss="squared"), params


def with_outputs(change):
    problem, params = make()
    return problem.replace(outputs_fn=lambda p, b: change(outputs_fn(p, b))), params


def with_params(change):
    problem, params = make()
    return problem, change(params)


# The problems, and what is to come of them: "right", "undefined", or a sentence.


def shift_by_large(params):
    return {**params, "v": params["v"].at[:, 0].add(1e4)}


PROBLEMS = {
    "plain": (make, "right"),
    "one example": (lambda: make(1, 1), "right"),
    "many batches of one": (lambda: make(4, 1), "right"),
    "one class": (lambda: make(classes=1), "right"),
    "one number": (squared, "right"),
    "squared loss": (lambda: squared(2, 3, 2), "right"),
    "one feature": (lambda: make(dim=1), "right"),
    "zero parameters": (
        lambda: with_params(lambda p: jax.tree.map(jnp.zeros_like, p)),
        "right",
    ),
    "zero inputs": (lambda: with_batches(x=jnp.zeros((1, 3, 5))), "right"),
    "equal examples": (lambda: with_batches(x=jnp.ones((1, 3, 5))), "right"),
    "integer inputs": (
        lambda: with_batches(x=np.arange(15, dtype=np.float32).reshape(1, 3, 5) / 9),
        "right",
    ),
    "an empty leaf": (
        lambda: with_params(lambda p: {**p, "empty": jnp.zeros((0, 2))}),
        "right",
    ),
    "a count among parameters": (lambda: with_params(lambda p: {**p, "n": 3}), "right"),
    "NumPy parameters": (
        lambda: with_params(lambda p: jax.tree.map(np.asarray, p)),
        "right",
    ),
    "half outputs": (lambda: with_outputs(lambda z: z.astype(jnp.bfloat16)), "near"),
    "confident outputs": (lambda: with_params(shift_by_large), "right"),
    "a NaN parameter": (
        lambda: with_params(lambda p: {**p, "v": p["v"].at[0, 0].set(jnp.nan)}),
        "undefined",
    ),
    "an infinite parameter": (
        lambda: with_params(lambda p: {**p, "v": p["v"].at[0, 0].set(jnp.inf)}),
        "undefined",
    ),
    "a NaN input": (
        lambda: with_batches(x=jnp.ones((1, 3, 5)).at[0, 1, 0].set(jnp.nan)),
        "undefined",
    ),
    "an infinite input": (
        lambda: with_batches(x=jnp.ones((1, 3, 5)).at[0, 1, 0].set(jnp.inf)),
        "undefined",
    ),
    "infinite outputs": (lambda: with_outputs(lambda z: z / 0.0), "undefined"),
    "no examples": (
        lambda: make(1, 0),
        "batches['label']: expected K >= 1 batches of N >= 1 examples, got",
    ),
    "no batches": (
        lambda: make(0, 3),
        "batches['label']: expected K >= 1 batches of N >= 1 examples, got",
    ),
    "no classes": (
        lambda: with_outputs(lambda z: z[:, :0]),
        "outputs_fn: expected an array [N, ...] with the batch's N = 3",
    ),
    "integer outputs": (
        lambda: with_outputs(lambda z: z.astype(jnp.int32)),
        "outputs_fn(params, batch): expected a real floating dtype, got int32",
    ),
    "complex outputs": (
        lambda: with_outputs(lambda z: z.astype(jnp.complex64)),
        "outputs_fn(params, batch): expected a real floating dtype, got complex64",
    ),
    "outputs summed over examples": (
        lambda: with_outputs(lambda z: z.sum(0)[None]),
        "outputs_fn: expected an array [N, ...] with the batch's N = 3",
    ),
    "no outputs": (lambda: with_outputs(lambda z: None), "outputs_fn: expected an arr"),
    "a label too large": (
        lambda: with_batches(label=jnp.array([[0, 3, 1]])),
        "batches['label']: expected classes in [0, 3), got values from 0 to 3, the "
        "first at [0, 1]",
    ),
    "a negative label": (
        lambda: with_batches(label=np.array([[0, 1, -1]], np.int8)),
        "batches['label']: expected classes in [0, 3), got values from -1 to 1, the "
        "first at [0, 2]",
    ),
    "floating labels": (
        lambda: with_batches(label=jnp.zeros((1, 3))),
        "labels: expected shape [3, 3], got [3] of float32; classes have to be int",
    ),
    "labels of other examples": (
        lambda: with_batches(label=jnp.zeros((1, 4), jnp.int32)),
        "batches['x']: expected leading axes [1, 4] as in the first leaf, got [1, 3]",
    ),
    "no labels": (
        lambda: with_batches(label=None),
        "labels: expected an array of numbers, got NoneType",
    ),
    "names in a batch": (
        lambda: with_batches(id=np.array([["a", "b", "c"]])),
        "batches['id']: expected an array of numbers, got an array of dtype <U1",
    ),
    "no axis of batches": (
        lambda: with_batches(label=jnp.zeros(3, jnp.int32)),
        "batches['label']: expected leading axes [K, N], got shape [3]",
    ),
    "integer parameters": (
        lambda: with_params(lambda p: {"w": jnp.ones((5, 4), jnp.int32)}),
        "params: expected at least one floating array, got none",
    ),
    "complex parameters": (
        lambda: with_params(lambda p: {**p, "c": jnp.ones(4, jnp.complex64)}),
        "params['c']: expected real numbers, got complex64; pass its real and its",
    ),
    "no parameters": (
        lambda: with_params(lambda p: {}),
        "params: expected at least one floating array, got none",
    ),
    "parameters that cannot be held": (
        lambda: with_params(lambda p: {**p, "cfg": {1, 2}}),
        "params['cfg']: expected an array of numbers or a hashable value, got set",
    ),
}


# The functions. Each returns its answer and whether it says that this is undefined; and
# what is right, from the dense oracles M, Mdot and the gradient of the loss.


def direction_of(params):
    """Returns a direction like the parameters, the same for every problem."""

    def one(leaf):
        if not hasattr(leaf, "dtype"):
            return leaf
        return jnp.cos(jnp.arange(np.size(leaf), dtype=jnp.float32)).reshape(leaf.shape)

    return jax.tree.map(one, params)


def columns_of(problem, params):
    size = problem.dimension(params)
    return jnp.sin(1.0 + jnp.arange(2.0 * size)).reshape(size, 2)


def nan(answer):
    return answer, bool(np.any(~np.isfinite(np.asarray(answer))))


def matrices(problem, params):
    kernel, moved = grsd.kernel_dense(problem, params, direction_of(params))
    return nan(jnp.concatenate([kernel, moved]))


def flow(problem, params):
    found = grsd.gradient_flow_direction(problem, params)
    leaves = [leaf for leaf in jax.tree.leaves(found) if isinstance(leaf, jax.Array)]
    return nan(jnp.concatenate([jnp.ravel(leaf) for leaf in leaves]))


def measured(solver):
    def run(problem, params):
        direction, options = direction_of(params), {"key": KEY, "shells": SHELLS}
        chosen = solver
        if solver == "lanczos":  # until the Krylov space is the whole
            chosen = grsd.Lanczos(1, problem.dimension(params))
        found = grsd.measure_coupling(
            problem, params, direction, solver=chosen, **options
        )
        if not found.finite:
            assert not found.resolved.any()
        return found.values[:2], not bool(found.finite)

    return run


def probed(problem, params):
    probe = grsd.make_probe(problem, every=1, shells=4, solver="dense")
    state, record = probe.update(probe.init(KEY, params), params, 0)
    if record is None:
        _, record = probe.update(state, params, 1)
    return record.values[:2], not bool(record.finite)


def by_blocks(problem, params):
    blocks = grsd.partition(params, lambda path: path[0], list(params))
    kernels = kernel.linearize_block_kernels(problem, params, blocks)
    columns = columns_of(problem, params)
    return nan(sum(block.matmat(columns) for block in kernels))


def sharded(problem, params):
    mesh = jax.make_mesh((1,), ("examples",), devices=jax.devices()[:1])
    placed = problem.replace(batches=kernel.shard_batches(problem.batches, mesh))
    return nan(grsd.kernel_matmat(placed, params, columns_of(problem, params)))


def explained(problem, params):
    found = problem.explain(params)
    assert found.coupled is not True
    return np.float32(found.num_leaves), None


def solved(problem, params):
    solver = kernel.choose_solver(problem, params, num_columns=1)
    return np.float32(solver in ("dense", "lanczos")), None


def first_batch(problem):
    return jax.tree.map(lambda leaf: leaf[0], problem.batches)


FUNCTIONS = {
    "kernel_dense": (matrices, lambda m, d, v: np.concatenate([m, d])),
    "layer_kernels": (
        lambda p, x: nan(sum(grsd.layer_kernels(p, x).values())),
        lambda m, d, v: m,
    ),
    "kernel_matmat": (
        lambda p, x: nan(grsd.kernel_matmat(p, x, columns_of(p, x))),
        lambda m, d, v: m @ v,
    ),
    "linearize_kernel": (
        lambda p, x: nan(grsd.linearize_kernel(p, x).matmat(columns_of(p, x))),
        lambda m, d, v: m @ v,
    ),
    "linearize_block_kernels": (by_blocks, lambda m, d, v: m @ v),
    "shard_batches": (sharded, lambda m, d, v: m @ v),
    "kernel_derivative": (
        lambda p, x: nan(
            grsd.kernel_derivative(p, x, direction_of(x), columns_of(p, x))
        ),
        lambda m, d, v: v.T @ d @ v,
    ),
    "kernel_derivative_matmat": (
        lambda p, x: nan(
            kernel.kernel_derivative_matmat(p, x, direction_of(x), columns_of(p, x))
        ),
        lambda m, d, v: d @ v,
    ),
    "linearize_derivative": (
        lambda p, x: nan(
            kernel.linearize_derivative(p, x, direction_of(x)).matmat(columns_of(p, x))
        ),
        "moved",
    ),
    "gradient_flow_direction": (flow, "flow"),
    "measure_coupling": (measured("dense"), "values"),
    "measure_coupling by Lanczos": (measured("lanczos"), "leading"),
    "make_probe": (probed, "values"),
    "choose_solver": (solved, lambda m, d, v: np.float32(1)),
    "Problem.explain": (explained, None),
    "Problem.loss": (lambda p, x: nan(p.loss(x)), "loss"),
    "Problem.error": (lambda p, x: nan(p.error(x, first_batch(p))), "error"),
}

#: Public names that take no problem, and the file whose tests hold them to their word.
WITHOUT_A_PROBLEM = {
    "Binning": "test_options",
    "Derivative": "test_options",
    "Lanczos": "test_options",
    "Window": "test_options",
    "PathPoint": "test_condition_report",
    "condition_report": "test_hostile_values",
    "load": "test_result_files",
    "central_difference": "test_derivative",
    "default_step": "test_derivative",
    "partition": "test_parameter_blocks",
    "softmax_error": "test_targets",
    "squared_error": "test_targets",
}

#: Classes that a row makes, or what it calls returns.
IN_A_ROW = {"Explanation", "LeafForm", "LinearizedKernel", "Problem", "ShardedKernel"}


@pytest.mark.parametrize(("name", "file"), WITHOUT_A_PROBLEM.items())
def test_what_has_no_row_is_used_where_it_is_said(name, file):
    assert (TESTS / f"{file}.py").exists()
    assert name in used_names(file)


def test_every_public_name_has_a_row():
    public = {*grsd.__all__, *kernel.__all__}
    modules = {name for name in public if inspect.ismodule(getattr(grsd, name, None))}
    rows = {name.split(" ")[0] for name in FUNCTIONS if "." not in name}
    assert public - modules == rows | set(WITHOUT_A_PROBLEM) | IN_A_ROW
    methods = {
        name
        for name, member in inspect.getmembers(grsd.Problem, inspect.isfunction)
        if not name.startswith("_") and "params" in inspect.signature(member).parameters
    }
    tested = {name.split(".")[1] for name in FUNCTIONS if "." in name}
    assert methods - {"at", "dimension"} == tested


def right_answer(kind, problem, params, columns):
    """Returns what is right, from plain `jax.jacrev` and `jax.grad`."""
    rest = {k: v for k, v in params.items() if not hasattr(v, "shape")}
    params = jax.tree.map(
        jnp.asarray, {k: v for k, v in params.items() if k not in rest}
    )
    direction = direction_of(params)
    raised = lambda p, b: outputs(p, b).astype(jnp.float32)  # noqa: E731
    outputs = problem.objective.outputs_fn

    def losses(params):
        each = [
            jnp.mean(
                loss_of(raised(params, jax.tree.map(lambda x, k=k: x[k], b)), b, k)
            )
            for k in range(len(b["label"]))
        ]
        return jnp.mean(jnp.stack(each))

    b = problem.batches

    def loss_of(z, batches, k):
        if problem.objective.loss == "squared":
            return jnp.sum(jnp.square(z - batches["label"][k]), 1) / 2
        chosen = jnp.take_along_axis(z, batches["label"][k][:, None], 1)[:, 0]
        return jax.nn.logsumexp(z, 1) - chosen

    if kind == "loss":
        return losses(params)
    if kind == "flow":
        leaves = jax.tree.leaves(jax.grad(losses)(params))
        flat = [-np.ravel(leaf) for leaf in leaves]
        return np.concatenate([*flat])
    if kind == "error":
        z = np.asarray(raised(params, first_batch(problem)), np.float64)
        if problem.objective.loss == "squared":
            return z - np.asarray(b["label"][0])
        p = np.exp(z - z.max(1, keepdims=True))
        one_hot = np.eye(z.shape[1])[np.asarray(b["label"][0])]
        return p / p.sum(1, keepdims=True) - one_hot
    if kind == "moved":
        rows = lambda p: jnp.concatenate(dense_jacobians(problem, p))  # noqa: E731
        _, moved = jax.jvp(rows, (params,), (direction,))
        moved = np.asarray(moved, np.float64)
        return moved @ (moved.T @ np.asarray(columns))
    plain = lambda p: dense_kernel(problem, p)  # noqa: E731
    m, d = map(np.asarray, jax.jvp(plain, (params,), (direction,)))
    if kind in ("values", "leading"):
        values = np.linalg.eigvalsh(np.asarray(m, np.float64))[::-1]
        return values[: 2 if kind == "values" else 1]
    return kind(m, d, np.asarray(columns))


TOLERANCE = {"right": 1e-4, "near": 0.05}


#: There is no first batch, and there are no blocks.
SENSELESS = {
    ("no batches", "Problem.error"),
    ("no parameters", "linearize_block_kernels"),
}

#: An activation that saturates there leaves outputs that are as finite as any.
FINITE_THERE = {"Problem.error", "Problem.loss", "gradient_flow_direction"}


#: What is always run of the pairs that compute: these problems, or these functions.
PROBLEMS_FIRST = {
    "one example",
    "one class",
    "one number",
    "half outputs",
    "an infinite input",
}
FUNCTIONS_FIRST = {"kernel_dense", "Problem.error"}


def pairs():
    """Returns every pair that makes sense, with what belongs to a later run marked."""
    found = []
    for name, function in itertools.product(PROBLEMS, FUNCTIONS):
        computes = PROBLEMS[name][1] in ("right", "near", "undefined")
        first = name in PROBLEMS_FIRST or function in FUNCTIONS_FIRST
        marks = [pytest.mark.scheduled] if computes and not first else []
        if (name, function) not in SENSELESS:
            found.append(pytest.param(name, function, marks=marks))
    return found


@pytest.mark.filterwarnings("ignore:grsd_jax. the factors of:RuntimeWarning")
@pytest.mark.parametrize(("name", "function"), pairs())
def test_a_hostile_problem_is_answered_or_named(name, function):
    state, expected = PROBLEMS[name]
    call, right = FUNCTIONS[function]
    problem, params = state()
    if expected not in ("right", "near", "undefined"):
        if function == "Problem.error" and "classes" not in expected:  # of one batch
            expected = expected.split(":")[0].replace("batches", "batch")
        with pytest.raises(ValueError, match="^" + re.escape(expected)):
            call(problem, params)
        return
    answer, undefined = call(problem, params)
    if expected == "undefined":
        finite = name == "an infinite input" and function in FINITE_THERE
        assert finite or undefined is not False
        return
    assert not undefined
    if right is None:
        return
    wanted = np.asarray(
        right_answer(right, problem, params, columns_of(problem, params))
    )
    answer = np.asarray(answer, np.float64)[: len(wanted)] if wanted.ndim else answer
    scale = max(np.max(np.abs(wanted), initial=0), 1e-3)
    np.testing.assert_allclose(answer, wanted, rtol=0, atol=TOLERANCE[expected] * scale)
