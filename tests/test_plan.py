"""The check of the factors: what it finds, and that the numbers stay right."""

import contextlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grsd_jax as grsd
from grsd_jax import (
    Problem,
    kernel_dense,
    kernel_derivative,
    kernel_matmat,
    layer_kernels,
    linearize_kernel,
)
from grsd_jax.jacobian import adjoint, blocks, plan
from oracles import dense_kernel, plain, relative_error

K, N = 2, 4


def outputs_fn(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["w"]) * params["gain"][None]
    return hidden @ params["w"][:, :3]


def batchwise(params, batch):
    """BatchNorm on the batch's own statistics."""
    hidden = batch["x"] @ params["w"]
    hidden = (hidden - jnp.mean(hidden, 0)[None]) * params["gain"][None]
    return jnp.tanh(hidden)[:, :3]


def make(fn=outputs_fn, seed=0, **options):
    noise = np.random.default_rng(seed)
    params = {"w": noise.normal(size=(5, 5)), "gain": noise.normal(size=5)}
    batches = {
        "x": jnp.asarray(noise.normal(size=(K, N, 5)), jnp.float32),
        "label": jnp.asarray(noise.integers(0, 3, (K, N))),
    }
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    return Problem(fn, batches, **options), params


def own(fn):
    """Returns a copy of a function, whose structure is not known yet."""

    def copied(params, batch):
        return fn(params, batch)

    return copied


def explained(problem, params):
    return {row.path: row for row in problem.explain(params).rows}


def test_a_network_that_fits_is_checked_once_without_a_word():
    traces = []

    def counted(params, batch):
        traces.append(1)
        return outputs_fn(params, batch)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem, params = make(counted)
        expected = dense_kernel(problem, params)
        assert relative_error(kernel_dense(problem, params), expected) < 1e-5
        first = len(traces)
        other, moved = make(counted, seed=1)
        other = problem.replace(batches=other.batches)
        got = kernel_dense(other, moved)
    assert len(traces) == first
    assert relative_error(got, dense_kernel(other, moved)) < 1e-5


def test_a_walk_that_fails_says_so_and_takes_the_plain_path(monkeypatch):
    def broken(*_):
        raise TypeError("jaxprs have changed")

    monkeypatch.setattr(plan, "walk", broken)
    problem, params = make(own(outputs_fn))
    with pytest.warns(RuntimeWarning, match="could not be walked: TypeError"):
        got = kernel_dense(problem, params)
    assert relative_error(got, dense_kernel(problem, params)) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        rows = explained(problem, params)
    assert {row.how for row in rows.values()} == {"plain"}
    assert "jaxprs have changed" in rows["w"].why


@pytest.mark.parametrize("wrong", ["_product", "_elementwise", "_leaf_block", "_rows"])
def test_a_wrong_rule_is_found_and_not_used(monkeypatch, wrong):
    right = getattr(blocks, wrong)

    def product(*arguments):
        (inputs, deltas), arrange = right(*arguments)
        return (1.01 * inputs, deltas), arrange

    def leaf_block(leaf, shares, rows, traced):
        return right(leaf, shares[:1], rows, traced)  # forgets a use

    replaced = {
        "_product": product,
        "_elementwise": lambda *arguments: -right(*arguments),
        "_leaf_block": leaf_block,
        "_rows": lambda *_: {},
    }
    monkeypatch.setattr(blocks, wrong, replaced[wrong])
    problem, params = make(own(outputs_fn))
    named = "w" if wrong in ("_product", "_leaf_block") else "gain"
    with pytest.warns(RuntimeWarning, match=f"the factors of {named} do not agree"):
        got = kernel_dense(problem, params)
    assert relative_error(got, dense_kernel(problem, params)) < 1e-5
    rows = explained(problem, params)
    assert rows[named].how == "plain"
    assert rows[named].why == "factors disagree with jax.vjp"
    assert sum(row.how == "plain" for row in rows.values()) == 1


@pytest.mark.filterwarnings("ignore:grsd_jax. the examples:RuntimeWarning")
def test_coupled_examples_go_plainly_or_are_refused():
    problem, params = make(own(batchwise))
    for refused in (kernel_dense, layer_kernels):
        with pytest.raises(ValueError, match="problem: expected an error whose exampl"):
            refused(problem, params)
    assert problem.explain(params).coupled
    assert problem.explain(params).num_factored == 0
    for reduction in ("stack", "mean"):
        reduced = problem.replace(reduction=reduction)
        expected = dense_kernel(reduced, params)
        identity = jnp.eye(len(expected))
        linearized = linearize_kernel(reduced, params).matmat(identity)
        assert relative_error(linearized, expected) < 1e-5
        product = kernel_matmat(reduced, params, identity)
        assert relative_error(product, expected) < 1e-5
    direction = jax.tree.map(jnp.ones_like, params)
    _, moved = jax.jvp(lambda p: dense_kernel(problem, p), (params,), (direction,))
    columns = jnp.eye(problem.dimension(params))
    got = kernel_derivative(problem, params, direction, columns)
    assert relative_error(got, moved) < 1e-5


def shut_gate(params, batch):
    hidden = batch["x"] @ params["w"]
    return (hidden + jax.nn.relu(params["gain"])[None] * jnp.mean(hidden, 0)[None])[
        :, :3
    ]


def zero_head(params, batch):
    """A branch that couples the examples behind a gate and a head of zeros."""
    hidden = batch["x"] @ params["w"]
    normal = hidden / jnp.sqrt(jnp.mean(hidden**2, 0))[None]
    return (hidden + params["gain"][None] * normal @ params["head"])[:, :3]


@pytest.mark.filterwarnings("ignore:grsd_jax. the examples:RuntimeWarning")
@pytest.mark.parametrize("fn", [shut_gate, zero_head])
def test_a_coupling_that_the_first_values_hide_is_found(fn):
    problem, params = make(own(fn))
    start = {**params, "gain": -jnp.ones(5), "head": jnp.zeros((5, 5))}
    if fn is zero_head:
        start["gain"] = jnp.zeros(5)
    assert problem.explain(start).coupled
    later = {**start, "gain": jnp.ones(5), "head": jnp.ones((5, 5))}
    expected = dense_kernel(problem, later)
    got = linearize_kernel(problem, later).matmat(jnp.eye(len(expected)))
    assert relative_error(got, expected) < 1e-5


@pytest.mark.filterwarnings("ignore:grsd_jax. the examples:RuntimeWarning")
def test_a_coupling_behind_an_integer_is_found_while_tracing():
    def masked(params, batch):
        hidden = batch["x"] @ params["w"]
        mean = jnp.where(batch["on"][:, None] > 0, jnp.mean(hidden, 0)[None], 0.0)
        return jnp.tanh(hidden - mean)[:, :3]

    problem, params = make(masked)
    on = jnp.ones((K, N), jnp.int32)
    problem = problem.replace(batches={**problem.batches, "on": on})
    with pytest.raises(ValueError, match="problem: expected an error whose examples"):
        jax.jit(kernel_dense)(problem, params)


def test_complex_weights_are_differentiated_plainly():
    def spectral(params, batch):
        hidden = jax.lax.complex(batch["x"], batch["x"]) @ jax.lax.complex(
            params["w"], params["w"].T
        )
        return hidden.imag @ params["head"]

    problem, params = make(spectral)
    params = {"w": params["w"], "head": jnp.zeros((5, 3))}
    assert explained(problem, params)["w"].how == "plain"
    later = {**params, "head": jnp.ones((5, 3))}
    got = kernel_dense(problem, later)
    assert relative_error(got, dense_kernel(problem, later)) < 1e-5


def test_empty_leaves_and_constants_that_a_scan_reads():
    def scanned(params, batch):
        def step(h, t):
            return jnp.tanh(h @ (params["w"] * (1 + t))), None

        h, _ = jax.lax.scan(step, batch["x"], jnp.arange(3.0))
        return h[:, :3] + jnp.sum(params["empty"])

    problem, params = make(scanned)
    params = {**params, "empty": jnp.zeros((0, 3))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = explained(problem, params)
    assert {row.how for row in rows.values()} <= {"composite", "elementwise", "unused"}
    got = kernel_dense(problem, params)
    assert relative_error(got, dense_kernel(problem, params)) < 1e-5


def _scanned(x, e):
    return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x[:, :3], e)[0]


def _convolved(x, e):
    numbers = ("NHC", "HIO", "NHC")
    out = jax.lax.conv_general_dilated(
        x[:, :, None], e, (1,), "SAME", None, None, numbers
    )
    return jnp.sum(out, (1, 2))[:, None]


#: Shapes of a leaf, and what is added to the outputs ``[N, 3]`` with it.
EMPTY = {
    "wide": ((4, 0), lambda x, e: x @ e @ jnp.zeros((0, 3))),
    "high": ((0, 3), lambda x, e: x[:, :0] @ e),
    "shared": ((4, 0), lambda x, e: (x @ e + x @ e) @ jnp.zeros((0, 3))),
    "of a scan": ((0, 3, 3), _scanned),
    "kernel": ((3, 1, 0), _convolved),
    "joined": ((0, 4), lambda x, e: x @ jnp.concatenate([e, jnp.ones((3, 4))]).T),
    "nowhere": ((4, 3), lambda x, e: jnp.sum(x[:, :0] @ e[:0], keepdims=True)),
}


@pytest.mark.parametrize("name", EMPTY)
def test_what_has_no_entries_costs_no_other_leaf_its_factors(name):
    shape, added = EMPTY[name]

    def fn(params, batch):
        return _minus_mean(params, batch, 0) + added(batch["x"], params["e"])

    params = _two_layers() | {"e": jnp.ones(shape)}
    batches = _two_batches() | {"empty": jnp.zeros((2, 4, 0))}
    problem = Problem(fn, batches)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = explained(problem, params)
    assert [rows[name].how for name in "evw"] == ["unused", "outer", "outer"]
    expected = _kernel(fn, params, batches)
    assert relative_error(kernel_dense(problem, params), expected) < 1e-5
    got = linearize_kernel(problem, params).matmat(jnp.eye(24))
    assert relative_error(got, expected) < 1e-5
    layers = layer_kernels(problem, params, layer_of="/".join)
    assert not np.asarray(layers["e"]).any()


def test_a_loop_without_steps_is_differentiated_plainly():
    def fn(params, batch):
        h = jax.lax.scan(lambda c, _: (c @ params["e"], None), batch["x"], None, 0)[0]
        return _minus_mean(params, batch, 0) + h[:, :3]

    params = _two_layers() | {"e": jnp.ones((4, 4))}
    problem = Problem(fn, _two_batches())
    rows = explained(problem, params)
    assert [rows[name].how for name in "evw"] == ["plain", "outer", "outer"]
    expected = _kernel(fn, params, problem.batches)
    assert relative_error(kernel_dense(problem, params), expected) < 1e-5


def test_coupled_examples_are_named_once():
    problem, params = make(own(batchwise))
    with pytest.warns(RuntimeWarning, match="the examples of the error are coupled"):
        linearize_kernel(problem, params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linearize_kernel(problem, params)


@pytest.mark.filterwarnings("ignore:grsd_jax. the examples:RuntimeWarning")
def test_the_check_is_made_while_tracing():
    problem, params = make(own(outputs_fn))
    got = jax.jit(kernel_dense)(problem, params)
    assert relative_error(got, dense_kernel(problem, params)) < 1e-5
    seen = []

    def spied(problem, params):
        seen.append(plan.verdict_of(problem.at(params)))
        return kernel_matmat(problem, params, jnp.ones((K * N * 3, 1)))

    jax.jit(spied)(problem, params)
    assert seen[0].plan is not None
    coupled, params = make(own(batchwise))
    with pytest.raises(ValueError, match="problem: expected an error whose examples"):
        jax.jit(kernel_dense)(coupled, params)


def test_numbers_that_are_not_finite_are_replaced_in_the_check():
    problem, params = make(own(outputs_fn))
    broken = {**params, "gain": jnp.full(5, jnp.nan, jnp.float32)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        key = plan._key(problem.at(params))
        assert key not in plan._VERDICTS
        assert not np.any(np.isfinite(kernel_dense(problem, broken)))
        assert plan._VERDICTS[key].coupled is False  # settled, and not checked again
        got = kernel_dense(problem, params)
    assert relative_error(got, dense_kernel(problem, params)) < 1e-5


@pytest.mark.filterwarnings("ignore:grsd_jax. the examples:RuntimeWarning")
def test_without_factors_the_examples_are_checked_under_jit_too(monkeypatch):
    def broken(*_):
        raise TypeError("no walk")

    monkeypatch.setattr(plan, "walk", broken)
    problem, params = make(own(batchwise))
    for dense in (jax.jit(kernel_dense), kernel_dense):
        plan._VERDICTS.clear()
        with (
            pytest.warns(RuntimeWarning, match="no walk"),
            pytest.raises(
                ValueError, match="problem: expected an error whose examples"
            ),
        ):
            dense(problem, params)


def reported(match, *, where):
    """Expects a warning, or else none, since one is an error in tests."""
    if where:
        return pytest.warns(RuntimeWarning, match=match)
    return contextlib.nullcontext()


@pytest.mark.parametrize("mode", ["clip", "fill", None])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_embeddings_read_the_rows_that_the_network_reads(mode, dtype):
    def embedded(params, batch):
        rows = params["table"].at[batch["token"]].get(mode=mode, fill_value=0)
        return jnp.tanh(rows.astype(jnp.float32)).reshape(-1, 4) @ params["out"]

    noise = np.random.default_rng(0)
    params = {
        "table": jnp.asarray(noise.normal(size=(700, 2)), dtype),
        "out": jnp.asarray(noise.normal(size=(4, 3)), jnp.float32),
    }
    tokens = jnp.asarray([[[600, 5], [601, -1], [699, 257], [256, 2000]]])
    batches = {"token": tokens, "label": jnp.asarray([[0, 1, 2, 0]])}
    problem = Problem(embedded, batches)
    bound = 1e-5 if dtype == jnp.float32 else 2e-2
    with reported("table is read .* such as 2000 of 700; ", where=mode is None):
        assert explained(problem, params)["table"].how == "lookup"

    def rows(p):
        error = problem.error(p, jax.tree.map(lambda leaf: leaf[0], batches))
        return error.reshape(-1)

    jacobian = jax.jacrev(rows)(params)
    flat = [leaf.reshape(12, -1).astype(jnp.float32) for leaf in jacobian.values()]
    expected = sum(jnp.matmul(leaf, leaf.T, precision="highest") for leaf in flat)
    assert relative_error(kernel_dense(problem, params), expected) < bound
    product = linearize_kernel(problem, params).matmat(jnp.eye(12))
    assert relative_error(product, expected) < bound


def by_rows(params, batch):
    rows = params["table"][batch["token"]]
    return jnp.tanh(rows).reshape(-1, 4) @ params["out"]


def by_columns(params, batch):
    columns = params["table"].T[:, batch["token"]]
    return jnp.tanh(jnp.moveaxis(columns, 0, -1)).reshape(-1, 4) @ params["out"]


def by_entries(params, batch):
    return by_rows(params | {"table": params["table"] ** 2}, batch)


def rematerialised(params, batch):
    return jax.checkpoint(by_rows)(params, batch)


def in_a_loop(params, batch):
    def step(total, token):
        return total + jnp.tanh(params["table"][token]), None

    start = jnp.zeros((len(batch["token"]), 2))
    found, _ = jax.lax.scan(step, start, batch["token"].T)
    return jnp.tile(found, (1, 2)) @ params["out"]


def in_a_branch(params, batch):
    return jax.lax.cond(
        jnp.sum(params["out"]) < 1e6,
        by_rows,
        lambda p, b: 0 * by_rows(p, b),
        params,
        batch,
    )


def of_a_weight(params, batch):
    """A weight is gathered from a parameter at places of which one does not exist."""
    weight = jnp.tanh(params["table"])[jnp.array([1, 9, 0, 1])]
    x = jnp.sin(batch["token"].astype(jnp.float32))
    return jnp.tile(x @ weight[:2] + x @ weight[2:], (1, 2)) @ params["out"]


LOOKUPS = [
    by_rows,
    by_columns,
    by_entries,
    rematerialised,
    in_a_loop,
    in_a_branch,
    of_a_weight,
]


FACTORED = [by_rows, by_entries, of_a_weight]  # the others are of their kinds


@pytest.mark.parametrize(
    ("fn", "path"),
    [*((fn, "plain") for fn in LOOKUPS), *((fn, "factored") for fn in FACTORED)],
)
@pytest.mark.filterwarnings("ignore:.*rows that it does not have:RuntimeWarning")
def test_rows_out_of_range_leave_every_product_symmetric(fn, path):
    noise = np.random.default_rng(0)
    shapes = {"table": (7, 2), "out": (4, 3)}
    params, direction = (
        {k: jnp.asarray(noise.normal(size=s), jnp.float32) for k, s in shapes.items()}
        for _ in range(2)
    )
    tokens = jnp.asarray([[[6, 5], [60, -1], [6, 257], [-30, 2]]])
    batches = {"token": tokens, "label": jnp.asarray([[0, 1, 2, 0]])}
    problem = Problem(fn, batches)
    problem = plain(problem) if path == "plain" else problem

    def error(p):
        one_hot = jax.nn.one_hot(batches["label"][0], 3)
        outputs = fn(p, {"token": tokens[0]})
        return (jax.nn.softmax(outputs) - one_hot).reshape(-1)

    def kernel(p):
        leaves = [
            leaf.reshape(12, -1) for leaf in jax.tree.leaves(jax.jacrev(error)(p))
        ]
        return sum(jnp.matmul(leaf, leaf.T, precision="highest") for leaf in leaves)

    expected, moved = jax.jvp(kernel, (params,), (direction,))
    found = {
        "matmat": kernel_matmat(problem, params, jnp.eye(12)),
        "linearized": linearize_kernel(problem, params).matmat(jnp.eye(12)),
        "dense": kernel_dense(problem, params),
    }
    for got in found.values():
        assert relative_error(got, got.T) < 1e-6
        assert relative_error(got, expected) < 1e-5
    got = kernel_derivative(problem, params, direction, jnp.eye(12))
    assert relative_error(got, got.T) < 1e-6
    assert relative_error(got, moved) < 1e-5


@pytest.mark.parametrize("fn", [by_rows, by_entries])
@pytest.mark.parametrize("token", [60, -30, 9])
def test_rows_out_of_range_are_reported_with_their_index(fn, token):
    noise = np.random.default_rng(0)
    params = {"table": noise.normal(size=(9, 2)), "out": noise.normal(size=(4, 3))}
    params = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in params.items()}

    def measured(token):
        tokens = jnp.asarray([[[8, -9], [0, 1], [3, token]]])
        batches = {"token": tokens, "label": jnp.asarray([[0, 1, 2]])}
        plan._VERDICTS.clear()
        kernel_dense(Problem(fn, batches), params)

    row = token if token > 0 else token + 9
    with reported(f"table is read .* such as {row} of 9; ", where=True):
        measured(token)
    measured(5)


@pytest.mark.filterwarnings("ignore:.*rows that it does not have:RuntimeWarning")
def test_rows_out_of_range_are_counted_also_in_jit():
    noise = np.random.default_rng(0)
    params = {"table": noise.normal(size=(9, 2)), "out": noise.normal(size=(4, 3))}
    params = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in params.items()}
    tokens = jnp.asarray([[[8, -9], [0, 60]], [[-30, 1], [60, 2]]])
    labels = jnp.asarray([[0, 1], [2, 0]])
    key = jax.random.key(0)

    def count(token):
        problem = Problem(by_rows, {"token": token, "label": labels})
        return grsd.measure_coupling(problem, params, key=key).num_misfits

    assert count(tokens) == jax.jit(count)(tokens) == 3
    inside = jnp.clip(tokens, 0, 8)
    assert count(inside) == 0


def test_a_linear_program_that_cannot_be_read_says_so_and_is_used(monkeypatch):
    def broken(*_):
        raise KeyError("an equation of another JAX")

    monkeypatch.setattr(adjoint, "_settle", broken)
    problem, params = make(own(outputs_fn))
    block = jnp.eye(problem.dimension(params))
    with pytest.warns(RuntimeWarning, match="could not be read: KeyError"):
        got = kernel_matmat(problem, params, block)
    assert relative_error(got, dense_kernel(problem, params)) < 1e-5


def test_an_explanation_prints_as_a_table():
    problem, params = make()
    text = str(problem.explain(params))
    assert text.splitlines()[0].split() == ["leaf", "how", "bytes", "flops", "why"]
    assert "2 of 2 leaves factored" in text
    rows = explained(problem, params)
    assert rows["gain"].how == "elementwise"
    assert rows["gain"].bytes == K * N * 2 * 5 * 4  # [N, C - 1, 5] in float32
    assert rows["gain"].flops == 4 * K * N * 2 * 5
    assert rows["w"].how == "composite"
    assert rows["w"].why == "dot_general"


def _kernel(fn, params, batches):
    """M of the softmax error by `jax.jacrev` of whole batches, stacked."""

    def error(p):
        parts = [jax.tree.map(lambda leaf, k=k: leaf[k], batches) for k in range(2)]
        outputs = jnp.stack([fn(p, part) for part in parts])
        hot = jax.nn.one_hot(batches["label"], outputs.shape[-1])
        return (jax.nn.softmax(outputs) - hot).reshape(-1)

    leaves = jax.tree.leaves(jax.jacrev(error)(params))
    rows = jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], 1)
    return rows @ rows.T


def _two_batches(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 4, 4)), dtype)
    return {"x": x, "label": jnp.zeros((2, 4), int)}


def _two_layers():
    rng = np.random.default_rng(1)
    shapes = {"w": (4, 4), "v": (4, 3)}
    return {
        name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()
    }


def _minus_mean(p, batch, share=0.5):
    h = batch["x"].astype(jnp.float32) @ p["w"]
    return jnp.tanh(h - share * jnp.mean(h, 0, keepdims=True)) @ p["v"]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_coupling_in_another_batch_than_the_first_is_seen():
    def clipped(p, batch):
        h = batch["x"] @ p["w"]
        return jnp.tanh(h * jnp.minimum(1.0, 50.0 / jnp.linalg.norm(h))) @ p["v"]

    batches, params = _two_batches(), _two_layers()
    batches["x"] = batches["x"].at[1].multiply(30.0)
    problem = grsd.Problem(clipped, batches)
    with pytest.raises(ValueError, match="examples are coupled"):
        grsd.kernel_dense(problem, params)
    block = jnp.eye(24)
    got = grsd.linearize_kernel(problem, params).matmat(block)
    expected = _kernel(clipped, params, batches)
    assert float(jnp.abs(got - expected).max() / jnp.abs(expected).max()) < 1e-4


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_gradients_that_vanish_settle_nothing():
    def saturating(p, batch):
        return _minus_mean(p, batch) * p["t"]

    batches, params = _two_batches(), _two_layers() | {"t": jnp.float32(1e5)}
    problem = grsd.Problem(saturating, batches)
    assert not np.asarray(grsd.kernel_dense(problem, params)).any()
    with pytest.raises(ValueError, match="examples are coupled"):
        grsd.kernel_dense(problem, params | {"t": jnp.float32(1)})


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_low_precision_of_the_inputs_alone_loosens_no_check():
    problem = grsd.Problem(
        lambda p, batch: _minus_mean(p, batch, 0.1), _two_batches(jnp.bfloat16)
    )
    with pytest.raises(ValueError, match="examples are coupled"):
        grsd.kernel_dense(problem, _two_layers())


def half(params, batch, share=0.0):
    """Computes in bfloat16, with a share of the mean over the examples."""
    w, v = (params[name].astype(jnp.bfloat16) for name in "wv")
    h = batch["x"].astype(jnp.bfloat16) @ w
    h = h - jnp.bfloat16(share) * jnp.mean(h, 0, keepdims=True)
    return (jnp.tanh(h) @ v).astype(jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_wrong_rule_is_found_in_a_program_in_half_precision(monkeypatch, dtype):
    right = blocks._product

    def wrong(*arguments):
        (inputs, deltas), arrange = right(*arguments)
        return (1.02 * inputs, deltas), arrange

    params = jax.tree.map(lambda leaf: leaf.astype(dtype), _two_layers())
    problem = grsd.Problem(own(half), _two_batches())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert problem.explain(params).num_factored == 2
    monkeypatch.setattr(blocks, "_product", wrong)
    problem = grsd.Problem(own(half), _two_batches())
    with pytest.warns(RuntimeWarning, match="the factors of v, w do not agree"):
        assert problem.explain(params).num_factored == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("length", [1, 700])
def test_a_small_coupling_is_found_in_a_program_in_half_precision(length):
    def coupled(params, batch):
        outputs = half(params, batch, 0.02)[:, None]
        return jnp.tile(outputs, (1, length, 1))

    batches = {"x": _two_batches()["x"], "label": jnp.zeros((2, 4, length), int)}
    assert plan.are_coupled(grsd.Problem(coupled, batches).at(_two_layers()))
    alone = grsd.Problem(own(lambda p, batch: half(p, batch)), _two_batches())
    assert not plan.are_coupled(alone.at(_two_layers()))


def test_an_integer_ends_the_path_of_a_weight():
    def outputs_fn(p, batch):
        whole = (3 * p["q"]).astype(jnp.int32).astype(jnp.float32)
        return jnp.tanh(batch["x"] @ p["w"]) @ p["v"] + 0.01 * batch["x"] @ whole

    params = _two_layers() | {"q": jnp.ones((4, 3))}
    problem = grsd.Problem(outputs_fn, _two_batches())
    layers = grsd.layer_kernels(problem, params, layer_of="/".join)
    assert not np.asarray(layers["q"]).any()
    expected = _kernel(outputs_fn, params, problem.batches)
    np.testing.assert_allclose(sum(layers.values()), expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_wide_outputs_are_checked_under_jit_as_well():
    def outputs_fn(p, batch):
        return jnp.tile(_minus_mean(p, batch)[:, None], (1, 700, 1))

    batches = {"x": _two_batches()["x"][:1], "label": jnp.zeros((1, 4, 700), int)}

    @jax.jit
    def dense(p):
        return grsd.kernel_dense(grsd.Problem(outputs_fn, batches), p)

    with pytest.raises(ValueError, match="examples are coupled"):
        dense(_two_layers())


def test_the_parts_of_an_unstacked_leaf_have_blocks_of_their_own():
    def fn(params, batch):
        first, second = jnp.unstack(params["w"])
        return jnp.tanh(batch["x"] @ first) @ second @ params["v"]

    params = _two_layers()
    params["w"] = jnp.stack([params["w"], params["w"].T])
    problem = grsd.Problem(fn, _two_batches())
    assert explained(problem, params)["w"].how == "outer"
    expected = _kernel(fn, params, problem.batches)
    assert relative_error(kernel_dense(problem, params), expected) < 1e-5


def test_what_closes_over_traced_arrays_cannot_be_checked_and_says_so():
    batches, params = _two_batches(), _two_layers()

    def total(scale):
        def outputs_fn(p, batch):
            return jnp.tanh(batch["x"] @ p["w"] * scale) @ p["v"]

        return jnp.trace(grsd.kernel_dense(grsd.Problem(outputs_fn, batches), params))

    step = 1e-3
    with pytest.warns(RuntimeWarning, match="closes over traced arrays"):
        slope = jax.grad(total)(1.0)
    difference = (total(1.0 + step) - total(1.0 - step)) / (2 * step)
    np.testing.assert_allclose(slope, difference, rtol=1e-2)


def test_a_function_that_needs_all_its_examples_is_told():
    def outputs_fn(p, batch):
        return jnp.tanh(batch["x"].reshape(4, 4) @ p["w"]) @ p["v"]

    problem, params = grsd.Problem(outputs_fn, _two_batches()), _two_layers()
    with pytest.raises(ValueError, match="evaluated for any number of examples"):
        grsd.kernel_dense(problem, params)
    assert grsd.kernel_matmat(problem, params, jnp.eye(24)).shape == (24, 24)


def later(params, batch):
    """Couples the examples once the parameter ``t`` is above 1."""
    mean = jnp.mean(batch["x"], 0)[None]
    x = batch["x"] - jnp.where(params["t"] > 1, mean, 0.0)
    return jnp.tanh(x @ params["w"]) @ params["v"]


@pytest.mark.filterwarnings("ignore:grsd_jax. the examples:RuntimeWarning")
def test_a_coupling_that_begins_at_other_parameters_is_found():
    batches, params = _two_batches(), _two_layers() | {"t": jnp.float32(0)}
    problem = grsd.Problem(own(later), batches)
    expected = _kernel(later, params, batches)
    assert relative_error(grsd.kernel_dense(problem, params), expected) < 1e-5
    assert problem.explain(params).num_factored == 3

    params = params | {"t": jnp.float32(2)}
    block = jnp.eye(24)
    got = grsd.linearize_kernel(problem, params).matmat(block)
    assert relative_error(got, _kernel(later, params, batches)) < 1e-5
    with pytest.raises(ValueError, match="examples are coupled"):
        grsd.kernel_dense(problem, params)
    assert problem.explain(params).coupled


@pytest.mark.filterwarnings("ignore:grsd_jax. the examples:RuntimeWarning")
def test_a_coupling_that_begins_with_other_batches_is_found():
    def switched(params, batch):
        return later(params | {"t": batch["t"][0]}, batch)

    batches, params = _two_batches(), _two_layers()
    batches["t"] = jnp.zeros((2, 4))
    problem = grsd.Problem(switched, batches)
    assert problem.explain(params).coupled is False
    problem = problem.replace(batches=batches | {"t": jnp.full((2, 4), 2.0)})
    with pytest.raises(ValueError, match="examples are coupled"):
        grsd.kernel_dense(problem, params)


@pytest.mark.filterwarnings("ignore:grsd_jax. the examples:RuntimeWarning")
def test_a_coupling_of_wide_outputs_that_begins_later_is_found():
    def wide(params, batch):
        return jnp.tile(later(params, batch)[:, None], (1, 700, 1))

    batches = {"x": _two_batches()["x"][:1], "label": jnp.zeros((1, 4, 700), int)}
    params = _two_layers() | {"t": jnp.float32(0)}
    point = grsd.Problem(wide, batches).at(params)
    assert not plan.are_coupled(point)
    params = params | {"t": jnp.float32(2)}
    assert plan.are_coupled(grsd.Problem(wide, batches).at(params))


def test_examples_that_may_meet_are_compared_once_for_each_set_of_values(monkeypatch):
    compared = []
    right = plan._compared

    def counted(point, key, sets):
        compared.append(len(sets))
        return right(point, key, sets)

    monkeypatch.setattr(plan, "_compared", counted)
    batches, params = _two_batches(), _two_layers() | {"t": jnp.float32(0)}
    problem = grsd.Problem(own(later), batches)
    block = jnp.ones((24, 1))
    moved = jax.tree.map(lambda leaf: 1.5 * leaf, params)
    for at, expected in ((params, 0), (params, 0), (moved, 1), (moved, 1), (params, 1)):
        grsd.linearize_kernel(problem, at).matmat(block)
        assert len(compared) == expected
    assert set(compared) == {2}  # in both batches

    network, params = make(own(outputs_fn))
    for seed in range(3):  # proved by the program
        network = network.replace(batches=make(seed=seed)[0].batches)
        linearize_kernel(network, make(seed=seed)[1])
    assert len(compared) == 1
