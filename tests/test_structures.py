"""Parameters, states, batches and directions of every kind that users bring."""

import warnings

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import grsd_jax as grsd
from grsd_jax import models
from oracles import dense_kernel, random_batches, relative_error

KEY = jax.random.key(0)
BATCHES = random_batches(1, 4, (5,), 3)
SHELLS = grsd.Binning(num_shells=2, window=2, num_bootstrap=0)
INSTANT = grsd.dynamics.Instantaneous(num_bootstrap=0)


@pytest.fixture(autouse=True)
def _as_users_run_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def outputs_fn(params, batch):
    return jnp.tanh(batch["image"] @ params["w"]) @ params["v"]


def make_params():
    keys = jax.random.split(KEY)
    shapes = {"w": (5, 4), "v": (4, 3)}
    return {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def agrees(problem, params, expected=None, tolerance=1e-5):
    """Asserts that products, dense kernel and derivative are those of `jax.jacrev`."""
    if expected is None:
        expected = dense_kernel(problem, params)
    identity = jnp.eye(len(expected))
    direction = grsd.gradient_flow_direction(problem, params)
    kernel, moved = grsd.kernel_dense(problem, params, direction)
    assert relative_error(kernel, expected) < tolerance
    product = grsd.kernel_matmat(problem, params, identity)
    assert relative_error(product, expected) < tolerance
    linearized = grsd.linearize_kernel(problem, params)
    assert relative_error(linearized.matmat(identity), expected) < tolerance
    projected = grsd.kernel_derivative(problem, params, direction, identity)
    assert relative_error(projected, moved) < 10 * tolerance
    return kernel, moved


# Networks that share a layer, run part of it, or differentiate inside.


class SharedWithQueries(nn.Module):
    """One layer applied to the examples and to learned queries."""

    @nn.compact
    def __call__(self, x):
        layer, q = nn.Dense(8), self.param("q", nn.initializers.normal(1.0), (7, 5))
        v = nn.tanh(layer(q))
        return nn.Dense(3)(nn.softmax(nn.tanh(layer(x)) @ v.T) @ v)


class PlusAndMinus(nn.Module):
    """One layer applied to x and to -x."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(8)
        return nn.Dense(3)(nn.tanh(layer(x)) + nn.tanh(layer(-x)) ** 2)


class Sobolev(nn.Module):
    """The outputs are the derivative of a network, by Flax's own `jvp`."""

    def setup(self):
        self.a, self.b = nn.Dense(8), nn.Dense(3)

    def net(self, x):
        return self.b(nn.tanh(self.a(x)))

    def __call__(self, x):
        along = jnp.ones_like(x)
        return nn.jvp(Sobolev.net, self, (x,), (along,), variable_tangents={})[1]


class Switched(nn.Module):
    """One of two heads, by Flax's own `switch`."""

    def setup(self):
        self.heads = [nn.Dense(3) for _ in range(2)]

    def __call__(self, x):
        if self.is_initializing():
            for head in self.heads:
                head(x)
        branches = [lambda m, z, i=i: m.heads[i](z) for i in range(2)]
        return nn.switch(jnp.int32(1), branches, self, x)


class ScannedByHand(nn.Module):
    """`jax.lax.scan` around a bound layer."""

    @nn.compact
    def __call__(self, x):
        cell = nn.Dense(5)
        if self.is_initializing():
            cell(x)
        x, _ = jax.lax.scan(lambda h, _: (nn.tanh(cell(h)), None), x, None, length=2)
        return nn.Dense(3)(x)


class Partitioned(nn.Module):
    """Parameters in a box that says how they lie on a mesh."""

    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        return nn.Dense(3)(nn.tanh(nn.Dense(8, kernel_init=init)(x)))


class ByPosition(nn.Module):
    """Attention that is told by position not to drop."""

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(4)(x)[:, None] * jnp.arange(1.0, 4.0)[:, None]
        attention = nn.SelfAttention(2, dropout_rate=0.1)
        return nn.Dense(3)(attention(h, None, True).mean(1))


class ConvOnImages(nn.Module):
    """A convolution of whole numbers, which it converts itself."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.tanh(nn.Conv(4, (3, 3))(x) / 255).mean((1, 2)))


def linen_problem(model, batches=BATCHES):
    variables = dict(model.init(jax.random.key(1), batches["image"][0]))
    params = variables.pop("params")
    return grsd.Problem(models.linen_outputs(model, variables), batches), params


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of SelfAttention
@pytest.mark.parametrize(
    "model",
    [
        SharedWithQueries(),
        pytest.param(PlusAndMinus(), marks=pytest.mark.scheduled),
        Sobolev(),
        pytest.param(Switched(), marks=pytest.mark.scheduled),
        ScannedByHand(),
        Partitioned(),
        ByPosition(),
    ],
    ids=lambda model: type(model).__name__,
)
def test_every_use_of_a_linen_layer_is_counted(model):
    agrees(*linen_problem(model))


def test_a_convolution_of_images_of_bytes_moves_as_that_of_jacrev():
    image = jax.random.randint(KEY, (1, 4, 6, 6, 1), 0, 255).astype(jnp.uint8)
    problem, params = linen_problem(ConvOnImages(), {**BATCHES, "image": image})
    _, moved = agrees(problem, params)
    direction = grsd.gradient_flow_direction(problem, params)
    oracle = jax.jvp(lambda p: dense_kernel(problem, p), (params,), (direction,))[1]
    assert relative_error(moved, oracle) < 1e-4


class Tokens(nn.Module):
    """A bfloat16 table whose indices are equal once rounded to bfloat16."""

    @nn.compact
    def __call__(self, t):
        h = nn.Embed(1000, 4, param_dtype=jnp.bfloat16)(t).astype(jnp.float32)
        return nn.Dense(3)(nn.tanh(4 * h).reshape(len(t), -1))


def test_indices_are_not_rounded_with_the_table_that_they_read():
    tokens = jnp.array([[[600, 5], [601, 700], [602, 702], [599, 701]]])
    problem, params = linen_problem(Tokens(), {**BATCHES, "image": tokens})
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    expected = dense_kernel(problem, wide)
    agrees(problem, params, expected, tolerance=1e-2)


def test_a_linearised_network_has_the_kernel_of_its_centre():
    start = make_params()

    def linearised(params, batch):
        moved = jax.tree.map(jnp.subtract, params, start)
        outputs = jax.jvp(lambda p: outputs_fn(p, batch), (start,), (moved,))
        return outputs[0] + outputs[1]

    one_hot = jax.nn.one_hot(BATCHES["label"], 3)
    problem = grsd.Problem(linearised, {**BATCHES, "label": one_hot}, loss="squared")
    own = problem.replace(outputs_fn=outputs_fn)
    params = jax.tree.map(lambda leaf: leaf + 0.3, start)
    kernel, moved = grsd.kernel_dense(problem, params, params)
    expected = dense_kernel(own, start)
    assert relative_error(kernel, expected) < 1e-5
    assert np.max(np.abs(moved)) < 1e-5 * np.max(np.abs(expected))
    product = grsd.kernel_matmat(problem, params, jnp.eye(12))
    assert relative_error(product, expected) < 1e-5


# Examples that are coupled, in every framework.


def linen_coupled():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Dense(4)(x)
            h = (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-5)
            return nn.Dense(3)(nn.tanh(h))

    problem, params = linen_problem(Net())
    return problem.objective.outputs_fn, params


def nnx_coupled():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a, self.o = nnx.Linear(5, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x):
            return self.o(jnp.tanh(self.norm(self.a(x))))

    return models.nnx_outputs(Net(nnx.Rngs(0)))  # in training mode, the default


def equinox_coupled():
    class Net(eqx.Module):
        a: eqx.nn.Linear
        o: eqx.nn.Linear
        norm: eqx.nn.BatchNorm

        def __init__(self, key):
            keys = jax.random.split(key)
            self.a = eqx.nn.Linear(5, 4, key=keys[0])
            self.o = eqx.nn.Linear(4, 3, key=keys[1])
            self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch")

        def __call__(self, x, state):
            x, state = self.norm(self.a(x), state)
            return self.o(jnp.tanh(x)), state

    model, state = eqx.nn.make_with_state(Net)(KEY)
    params, rest = eqx.partition(model, eqx.is_inexact_array)

    def outputs(params, batch):
        model = eqx.combine(params, rest)
        run = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        return run(batch["image"], state)[0]

    return outputs, params


def haiku_coupled():
    def net(x):
        h = hk.BatchNorm(True, True, 0.9)(hk.Linear(4)(x), is_training=True)
        return hk.Linear(3)(jnp.tanh(h))

    transformed = hk.transform_with_state(net)
    params, state = transformed.init(KEY, BATCHES["image"][0])
    return models.haiku_outputs(transformed, state), params


@pytest.mark.parametrize(
    "make", [linen_coupled, nnx_coupled, equinox_coupled, haiku_coupled]
)
def test_batch_norm_on_the_batchs_own_statistics_couples_the_examples(make):
    outputs, params = make()
    problem = grsd.Problem(outputs, BATCHES)
    expected = dense_kernel(problem, params)
    identity, options = jnp.eye(12), {"key": KEY, "shells": SHELLS}
    with pytest.warns(RuntimeWarning, match="the examples of the error are coup") as w:
        measured = grsd.measure_coupling(problem, params, **options)
    assert len(w) == 1
    assert measured.coupled
    assert measured.solver == "lanczos"
    assert measured.finite
    leading = np.linalg.eigvalsh(np.asarray(expected, np.float64))[::-1][:4]
    np.testing.assert_allclose(measured.values[:4], leading, rtol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        product = grsd.kernel_matmat(problem, params, identity)
        linearized = grsd.linearize_kernel(problem, params).matmat(identity)
        assert relative_error(product, expected) < 1e-5
        assert relative_error(linearized, expected) < 1e-5
        for refused in (
            lambda: grsd.kernel_dense(problem, params),
            lambda: grsd.layer_kernels(problem, params),
            lambda: grsd.measure_coupling(problem, params, solver="dense", **options),
            lambda: grsd.make_probe(problem, every=1, solver="dense").init(KEY, params),
        ):
            with pytest.raises(ValueError, match=r"^problem: expected .* independent"):
                refused()


@pytest.mark.filterwarnings("ignore:grsd_jax. the examples:RuntimeWarning")
def test_a_probe_of_coupled_examples_says_so():
    outputs, coupled_params = nnx_coupled()[:2]
    for fn, params, coupled in (
        (outputs, coupled_params, True),
        (outputs_fn, make_params(), False),
    ):
        problem = grsd.Problem(fn, BATCHES)
        probe = grsd.make_probe(problem, every=1, shells=3, instantaneous=INSTANT)
        state, _ = probe.update(probe.init(KEY, params), params, 0)
        _, record = probe.update(state, jax.tree.map(lambda p: 1.1 * p, params), 1)
        assert record.coupled is coupled
        assert record.finite
        assert record.instantaneous.closure.total_error < 0.05
        assert (record.num_columns > 0) is coupled


def test_dropout_that_draws_is_refused_or_drawn_from_a_state():
    """The error has to be one function of the parameters."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.Dropout(0.5, deterministic=False)(nn.Dense(8)(x)))

    keys = {"params": KEY, "dropout": KEY}
    params = Net().init(keys, BATCHES["image"][0])["params"]
    problem = grsd.Problem(models.linen_outputs(Net(), {}), BATCHES)
    with pytest.raises(ValueError, match="model: expected dropout with deterministic"):
        grsd.kernel_matmat(problem, params, jnp.eye(12))

    class Stateful(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(5, 4, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.o = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.o(self.drop(jnp.tanh(self.a(x))))

    # The stream restarts in each call: one mask, drawn for the whole batch.
    outputs, params = models.nnx_outputs(Stateful(nnx.Rngs(0)))
    problem = grsd.Problem(outputs, BATCHES)
    expected = dense_kernel(problem, params)
    product = grsd.kernel_matmat(problem, params, jnp.eye(12))
    assert relative_error(product, expected) < 1e-5
    with (
        pytest.warns(RuntimeWarning, match="the examples of the error are coupled"),
        pytest.raises(ValueError, match=r"^problem: expected .* independent"),
    ):
        grsd.kernel_dense(problem, params)


# Leaves of other kinds.


class Normed(nn.Module):
    """A layer on inputs that a state shifts and scales."""

    @nn.compact
    def __call__(self, x):
        mean = self.variable("norm", "mean", lambda: jnp.zeros(5)).value
        scale = self.variable("norm", "scale", lambda: jnp.ones(())).value
        return nn.Dense(3)(nn.tanh(nn.Dense(8)((x - mean) * scale)))


@pytest.mark.parametrize("scale", [np.float32(2), np.float64(2), 2.0, 2, np.int64(2)])
def test_numbers_in_a_state_are_arrays_in_all_but_name(scale):
    """As restored from a checkpoint."""
    model = Normed()
    params = model.init(KEY, BATCHES["image"][0])["params"]
    state = {"norm": {"mean": np.zeros(5, np.float32), "scale": scale}}
    problem = grsd.Problem(models.linen_outputs(model, state), BATCHES)

    def by_hand(params, batch):
        second, first = params["Dense_0"], params["Dense_1"]
        hidden = 2 * batch["image"] @ first["kernel"] + first["bias"]
        return jnp.tanh(hidden) @ second["kernel"] + second["bias"]

    agrees(problem, params, dense_kernel(problem.replace(outputs_fn=by_hand), params))


def test_a_state_that_holds_no_numbers_is_named_by_its_path():
    state = {"norm": {"mean": np.zeros(5), "tag": "last"}}
    with pytest.raises(ValueError, match=r"^state\['norm'\]\['tag'\]: .*, got str"):
        models.linen_outputs(Normed(), state)
    transformed = hk.transform_with_state(lambda x: x)
    with pytest.raises(ValueError, match=r"^state\['a'\]: .* dtype object"):
        models.haiku_outputs(transformed, {"a": np.array([None])})


@pytest.mark.parametrize(
    ("leaf", "got"),
    [
        (np.array([[b"a", b"b", b"c", b"d"]], object), "an array of dtype object"),
        (np.array([["a", "b", "c", "d"]]), "an array of dtype <U1"),
        (np.array([[b"a", b"b", b"c", b"d"]]), r"an array of dtype \|S1"),
        (np.zeros((1, 4), "datetime64[s]"), r"an array of dtype datetime64\[s\]"),
        ("train", "str"),
    ],
    ids=["object", "str", "bytes", "date", "name"],
)
def test_a_batch_leaf_without_numbers_is_named_by_its_path(leaf, got):
    problem = grsd.Problem(outputs_fn, {**BATCHES, "id": leaf})
    message = rf"^batches\['id'\]: expected an array of numbers, got {got}\.$"
    for use in (grsd.kernel_dense, grsd.gradient_flow_direction):
        with pytest.raises(ValueError, match=message):
            use(problem, make_params())
    with pytest.raises(ValueError, match=message):
        grsd.make_probe(problem, every=1)


def test_nothing_in_a_batch_and_random_keys_are_taken():
    expected = grsd.kernel_dense(grsd.Problem(outputs_fn, BATCHES), make_params())
    keys = jax.random.split(KEY, 4)[None]
    batches = {**BATCHES, "mask": None, "key": keys}
    got = grsd.kernel_dense(grsd.Problem(outputs_fn, batches), make_params())
    assert relative_error(got, expected) < 1e-6


def test_an_equinox_model_may_be_the_parameters():
    model = eqx.nn.MLP(5, 3, 8, 1, key=KEY)
    problem = grsd.Problem(lambda m, b: jax.vmap(m)(b["image"]), BATCHES)
    outputs, params = models.equinox_outputs(model)
    expected = dense_kernel(problem.replace(outputs_fn=outputs), params)
    agrees(problem, model, expected)
    probe = grsd.make_probe(problem, every=1, shells=3, instantaneous=INSTANT)
    direction = grsd.gradient_flow_direction(problem, model)
    state = probe.init(KEY, model)
    for step, given in enumerate((None, direction)):
        state, record = probe.update(state, model, step, direction=given)
        assert record.finite
    assert np.all(np.isfinite(record.balance.energies))


@pytest.mark.parametrize(
    ("leaf", "got"),
    [({1, 2}, "set"), (np.array([None]), "ndarray of dtype object")],
    ids=["set", "objects"],
)
def test_a_parameter_leaf_that_cannot_be_held_is_named(leaf, got):
    problem = grsd.Problem(outputs_fn, BATCHES)
    with pytest.raises(ValueError, match=rf"^params\['cfg'\]: .*, got {got}\.$"):
        grsd.kernel_dense(problem, {**make_params(), "cfg": leaf})
    held = jax.tree_util.Partial(lambda cfg, p, b: outputs_fn(p, b), {"cfg": leaf})
    with pytest.raises(ValueError, match=rf"^outputs_fn.*'cfg'\]: .*, got {got}\.$"):
        grsd.Problem(held, BATCHES)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "int32"])
def test_a_direction_is_cast_to_the_parameters_once(dtype):
    """Optimizers answer in other dtypes than they were asked in."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), make_params())
    image = BATCHES["image"].astype(jnp.float32)
    problem = grsd.Problem(outputs_fn, {**BATCHES, "image": image})
    given = jax.tree.map(lambda p: jnp.round(4 * p).astype(dtype), params)
    same = jax.tree.map(lambda d: d.astype(jnp.float32), given)
    identity = jnp.eye(12, dtype=jnp.float32)
    probe = grsd.make_probe(problem, every=1, shells=3, instantaneous=INSTANT)
    state = probe.init(KEY, params)

    def coupling_along(d, solver):
        return grsd.measure_coupling(
            problem, params, d, key=KEY, solver=solver, shells=SHELLS
        ).coupling

    uses = [
        lambda d: grsd.kernel_dense(problem, params, d)[1],
        lambda d: grsd.kernel_derivative(problem, params, d, identity),
        lambda d: probe.update(state, params, 0, direction=d)[1].instantaneous.drift,
        lambda d: coupling_along(d, "dense"),
        lambda d: coupling_along(d, grsd.Lanczos(4, 2)),
    ]
    for use in uses:
        assert use(given).dtype == jnp.float32
        np.testing.assert_array_equal(use(given), use(same))


def test_updates_that_are_zero_at_most_steps_are_records():
    """Gradients that accumulate over schedule-free AdamW."""
    problem, params = grsd.Problem(outputs_fn, BATCHES), make_params()
    inner = optax.contrib.schedule_free_adamw(1e-2)
    inner = optax.chain(optax.clip_by_global_norm(1.0), inner)
    optimizer = optax.MultiSteps(inner, 2)
    probe = grsd.make_probe(problem, every=1, shells=3, instantaneous=INSTANT)
    state, own = probe.init(KEY, params), optimizer.init(params)
    update = jax.tree.map(jnp.zeros_like, params)
    moves, lost = [], []
    for step in range(4):
        state, record = probe.update(state, params, step, direction=update)
        assert record.finite
        moves.append(bool(np.any(record.instantaneous.dynamics.energy_rate)))
        lost.append(step > 0 and bool(np.any(record.balance.lost)))
        update, own = optimizer.update(jax.grad(problem.loss)(params), own, params)
        params = optax.apply_updates(params, update)
    assert moves == lost == [False, False, True, False]


# Half precision.


@pytest.mark.parametrize(
    ("dtype", "loss"),
    [
        ("bfloat16", "softmax_cross_entropy"),
        ("float16", "squared"),
        ("bfloat16", "own"),
    ],
)
def test_outputs_in_half_precision_are_raised_before_the_error(dtype, loss):
    def half(params, batch):
        low = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, batch["image"]))
        return outputs_fn(low[0], {"image": low[1]})

    options = {"loss": loss}
    if loss == "own":
        options["loss"] = lambda z, y: jnp.sum(jnp.square(z - jax.nn.one_hot(y, 3)))
    problem, params = grsd.Problem(half, BATCHES, **options), make_params()
    batch = jax.tree.map(lambda leaf: leaf[0], BATCHES)
    error = problem.error(params, batch)
    assert error.dtype == problem.loss(params).dtype == jnp.float32
    # The digits of the error are those of float32: nothing rounds after the network.
    raised = problem.replace(outputs_fn=lambda p, b: half(p, b).astype(jnp.float32))
    np.testing.assert_array_equal(error, raised.error(params, batch))
    assert np.any(error != error.astype(dtype))
    whole = problem.replace(outputs_fn=outputs_fn)
    direction = grsd.gradient_flow_direction(whole, params)
    got = grsd.kernel_dense(problem, params, direction)
    oracle = lambda p: dense_kernel(whole, p)  # noqa: E731
    expected = jax.jvp(oracle, (params,), (direction,))
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == jnp.float32
        assert relative_error(one, other) < 0.05
    for solver in ("dense", grsd.Lanczos(4, 2)):
        measured = grsd.measure_coupling(
            problem, params, key=KEY, solver=solver, shells=SHELLS
        )
        assert measured.finite
        np.testing.assert_allclose(
            measured.values[0], np.linalg.eigvalsh(expected[0])[-1], rtol=0.05
        )


def test_an_error_in_half_precision_has_no_derivative():
    """Its digits are gone; the kernel itself is left to the caller."""

    def error_fn(params, batch):
        return outputs_fn(params, batch).astype(jnp.bfloat16)

    problem, params = grsd.Problem.from_error(error_fn, BATCHES), make_params()
    assert grsd.kernel_dense(problem, params).dtype == jnp.bfloat16
    block = jnp.ones((12, 2), jnp.bfloat16)
    assert grsd.kernel_matmat(problem, params, block).dtype == jnp.bfloat16
    message = r"^error_fn: expected an error in float32 or float64, .* got bfloat16"
    for refused in (
        lambda: grsd.kernel_dense(problem, params, params),
        lambda: grsd.layer_kernels(problem, params, params),
        lambda: grsd.kernel_derivative(problem, params, params, block),
        lambda: grsd.kernel.linearize_derivative(problem, params, params),
        lambda: grsd.measure_coupling(problem, params, params, key=KEY),
        lambda: grsd.make_probe(problem, every=1).init(KEY, params),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
