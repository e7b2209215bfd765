"""A training run traces and compiles in its first step alone, and no value freezes."""

import functools
import itertools

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import grsd_jax as grsd
from grsd_jax import models
from grsd_jax.kernel import dense, products
from oracles import dense_kernel, random_batches, relative_error

KEY = jax.random.key(0)
SHELLS = grsd.Binning(num_shells=2, window=2, num_bootstrap=2)


@pytest.fixture(autouse=True)
def _as_users_run_it(monkeypatch):
    # What is free moves with the machine's other work, and programs follow it.
    for module in (products, dense):
        monkeypatch.setattr(module, "default_bytes", lambda: 2**28)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def compiled():
    """Counts the programs that were traced or compiled since it was last cleared."""
    found = []

    def listen(event, duration, **details):
        if event.endswith(("backend_compile_duration", "jaxpr_trace_duration")):
            found.append(details.get("fun_name", event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def batches_of(step):
    batches = random_batches(1, 4, (5,), 3)
    return {**batches, "image": batches["image"] * (1 + step / 4)}


# Each returns ``at(step)``: the problem and the parameters after so many steps of a
# training that changes parameters, statistics and batches, restated as users do.


def plain_loop():
    def outputs_fn(scale, state, params, batch):
        hidden = jnp.tanh((batch["image"] - state["mean"]) @ params["w"])
        return scale * hidden @ params["v"] / state["count"]

    keys = jax.random.split(KEY)
    start = {"w": jax.random.normal(keys[0], (5, 4)), "v": jnp.ones((4, 3))}
    start["v"] = jax.random.normal(keys[1], (4, 3))

    def at(step):
        # Numbers in a Partial, a NumPy scalar in its state: as JAX's own `jit` has it.
        state = {"mean": jnp.full(5, 0.1 * step), "count": np.float32(1 + step)}
        fn = jax.tree_util.Partial(outputs_fn, 1.0 + step, state)
        params = jax.tree.map(lambda leaf: leaf * (1 + step / 8), start)
        return grsd.Problem(fn, batches_of(step)), params

    return at


class LinenNetwork(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.Dense(3)(nn.tanh(x))


def moved(tree, step):
    """Returns a tree whose floating leaves have moved on."""

    def one(leaf):
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf * (1 + step / 8) + step / 16 if floating else leaf

    return jax.tree.map(one, tree)


def linen_loop():
    variables = dict(LinenNetwork().init(KEY, batches_of(0)["image"][0]))

    def at(step):
        there = moved(variables, step)
        params = there.pop("params")  # the module itself is rebuilt: it is compared
        outputs_fn = models.linen_outputs(LinenNetwork(), there)
        return grsd.Problem(outputs_fn, batches_of(step)), params

    return at


class NNXNetwork(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(5, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.tanh(self.norm(self.hidden(x)))))


def nnx_loop():
    model = NNXNetwork(nnx.Rngs(0))
    start = jax.tree.map(jnp.copy, nnx.state(model))

    def at(step):
        nnx.update(model, moved(start, step))  # one model, changed in place
        model.eval()
        outputs_fn, params = models.nnx_outputs(model)
        return grsd.Problem(outputs_fn, batches_of(step)), params

    return at


class EquinoxNetwork(eqx.Module):
    hidden: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    out: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.hidden = eqx.nn.Linear(5, 4, key=keys[0])
        self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch")
        self.out = eqx.nn.Linear(4, 3, key=keys[1])

    def __call__(self, x, state):
        x, state = self.norm(self.hidden(x), state)
        return self.out(jnp.tanh(x)), state


def equinox_loop():
    start, state = eqx.nn.make_with_state(EquinoxNetwork)(KEY)

    def at(step):
        arrays, static = eqx.partition(start, eqx.is_array)
        model = eqx.combine(moved(arrays, step), static)
        outputs_fn, params = models.equinox_outputs(model, moved(state, step))
        return grsd.Problem(outputs_fn, batches_of(step)), params

    return at


def equinox_as_parameters_loop():
    start = eqx.nn.MLP(5, 3, 4, 1, key=KEY)

    def outputs_fn(model, batch):
        return jax.vmap(model)(batch["image"])

    def at(step):
        arrays, static = eqx.partition(start, eqx.is_array)
        model = eqx.combine(moved(arrays, step), static)
        return grsd.Problem(outputs_fn, batches_of(step)), model

    return at


def haiku_loop():
    def network(x, is_training):
        x = hk.BatchNorm(True, True, 0.9)(hk.Linear(4)(x), is_training)
        return hk.Linear(3)(jnp.tanh(x))

    transformed = hk.transform_with_state(network)
    start = transformed.init(KEY, batches_of(0)["image"][0], is_training=True)

    def at(step):
        params, state = moved(start, step)
        outputs_fn = models.haiku_outputs(transformed, state)
        return grsd.Problem(outputs_fn, batches_of(step)), params

    return at


LOOPS = (
    plain_loop,
    linen_loop,
    nnx_loop,
    equinox_loop,
    equinox_as_parameters_loop,
    haiku_loop,
)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_traces_in_its_first_step_alone_and_sees_every_value(loop, compiled):
    at = loop()
    problem, params = at(0)
    probe = grsd.make_probe(problem, every=1, shells=3, solver="dense")
    state = probe.init(KEY, params)
    stated = [at(step) for step in range(4)]
    measured, records, counts = [], [], []
    for step, (problem, params) in enumerate(stated):
        jax.block_until_ready((problem, params))
        compiled.clear()
        direction = grsd.gradient_flow_direction(problem, params)
        result = grsd.measure_coupling(
            problem,
            params,
            direction,
            key=KEY,
            solver=grsd.Lanczos(4, 3),
            shells=SHELLS,
        )
        kernel = grsd.linearize_kernel(problem, params)
        kernel.matmat(result.vectors)
        # The examples of a probe stay; everything else is that of the step.
        still = problem.replace(batches=probe.problem.batches)
        state, record = probe.update(state, params, step, problem=still)
        counts.append(list(compiled))
        measured.append(result)
        records.append(record)
    assert counts[0]
    assert counts[2:] == [[], []]  # the first step gives no record, the next one does
    assert records[0] is None
    for (problem, params), result in zip(stated, measured, strict=True):
        if loop is equinox_as_parameters_loop:  # `jacrev` takes arrays alone
            outputs_fn, params = models.equinox_outputs(params)
            problem = problem.replace(outputs_fn=outputs_fn)
        values = np.linalg.eigvalsh(np.asarray(dense_kernel(problem, params)))[::-1]
        np.testing.assert_allclose(result.values[:3], values[:3], rtol=1e-4)
    for (problem, params), record in zip(stated[1:], records[1:], strict=True):
        if loop is equinox_as_parameters_loop:
            outputs_fn, params = models.equinox_outputs(params)
            problem = problem.replace(outputs_fn=outputs_fn)
        still = problem.replace(batches=batches_of(0))
        values = np.linalg.eigvalsh(np.asarray(dense_kernel(still, params)))[::-1]
        np.testing.assert_allclose(record.values[:3], values[:3], rtol=1e-4)
        assert record.finite
    for now, later in itertools.pairwise(measured):
        assert relative_error(later.values[:1], now.values[:1]) > 1e-3


class Rated:
    """A callable whose settings are static, and compared by value."""

    def __init__(self, rate):
        self.rate = rate

    def __eq__(self, other):
        return isinstance(other, Rated) and self.rate == other.rate

    def __hash__(self):
        return hash(self.rate)

    def __call__(self, params, batch):
        return self.rate * batch["image"] @ params["w"]


def test_static_values_are_compared_by_value(compiled):
    params = {"w": jax.random.normal(KEY, (5, 3))}

    def mode_outputs(mode, train, scale, params, batch):
        assert train is True
        x = jnp.tanh(batch["image"]) if mode == "tanh" else batch["image"]
        return scale * x @ params["w"]

    makers = [
        Rated,
        lambda rate: jax.tree_util.Partial(mode_outputs, "tanh", True, rate),
        lambda rate: jax.tree_util.Partial(mode_outputs, "none", True, rate),
    ]
    found = []
    for make in makers:
        for rate, again in ((2.0, False), (2.0, True), (3.0, make is not Rated)):
            problem = grsd.Problem(make(rate), batches_of(0))
            compiled.clear()
            kernel = grsd.kernel_dense(problem, params)
            assert bool(compiled) is not again
            found.append(kernel)
            assert relative_error(kernel, dense_kernel(problem, params)) < 1e-5
    assert relative_error(found[3], found[6]) > 1e-2  # the two modes


def test_a_bound_method_traces_once(compiled):
    class Task:
        def outputs(self, params, batch):
            return jnp.tanh(batch["image"]) @ params["w"]

    task = Task()
    params = {"w": jax.random.normal(KEY, (5, 3))}
    counts = []
    for step in range(3):
        problem = grsd.Problem(task.outputs, batches_of(0))
        compiled.clear()
        grsd.kernel_dense(problem, jax.tree.map(lambda x, s=step: x + s, params))
        counts.append(list(compiled))
    assert counts[0]
    assert counts[1:] == [[], []]


def test_integer_counts_and_scalars_of_numpy_among_parameters_are_data(compiled):
    def outputs_fn(params, batch):
        return batch["image"] @ params["w"] / (1 + params["step"])

    w = jax.random.normal(KEY, (5, 3))
    kinds = (np.int32, jnp.int32, functools.partial(np.full, (), dtype=np.int32))
    for kind in kinds:
        kernels, counts = [], []
        for step in (0, 1, 2):
            params = {"w": w, "step": kind(step)}
            problem = grsd.Problem(outputs_fn, batches_of(0))
            compiled.clear()
            kernels.append(grsd.kernel_dense(problem, params))
            counts.append(len(compiled))
            alone = {"image": batches_of(0)["image"] / (1 + step)}
            held = problem.replace(
                outputs_fn=lambda p, b: b["image"] @ p["w"],
                batches={**problem.batches, **alone},
            )
            expected = dense_kernel(held, {"w": w})
            assert relative_error(kernels[-1], expected) < 1e-5
        assert counts[1:] == [0, 0]
        assert relative_error(kernels[1], kernels[0]) > 0.1
