"""One line from a model of each framework to a problem."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import grsd_jax as grsd
from grsd_jax import models
from oracles import MLP, dense_kernel, random_batches, relative_error

BATCHES = random_batches(2, 4, (5,), 3)
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def _as_users_run_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class NNXNetwork(nnx.Module):
    """Dropout draws from a stream; BatchNorm keeps statistics."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(5, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(nnx.tanh(self.norm(self.hidden(x))))
        return self.out(x)


class EquinoxNetwork(eqx.Module):
    """A layer, a permutation that is no parameter, BatchNorm with state, dropout."""

    hidden: eqx.nn.Linear
    order: jax.Array
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    out: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.hidden = eqx.nn.Linear(5, 4, key=keys[0])
        self.order = jnp.array([2, 0, 3, 1])
        self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch")
        self.dropout = eqx.nn.Dropout(0.5)
        self.out = eqx.nn.Linear(4, 3, key=keys[1])

    def __call__(self, x, state):
        x, state = self.norm(self.hidden(x)[self.order], state)
        return self.out(self.dropout(jnp.tanh(x))), state


def haiku_network(x, is_training):
    x = hk.BatchNorm(True, True, 0.9)(hk.Linear(4)(x), is_training)
    return hk.Linear(3)(jnp.tanh(x))


class LinenNetwork(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.Dense(3)(nn.tanh(x))


def scaled(tree, scale):
    """Returns a tree whose floating leaves are scaled, and lie off their start."""

    def one(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return (leaf + 0.1) * scale

    return jax.tree.map(one, tree)


# Each returns the outputs function, the parameters, and the plain function of them, at
# parameters and a state that differ with the scale, as after another step of training.


def nnx_model(scale, inputs="image"):
    model = NNXNetwork(nnx.Rngs(0))
    model.eval()
    nnx.update(model, scaled(nnx.state(model), scale))
    outputs_fn, params = models.nnx_outputs(model, inputs=inputs)

    def direct(params, x):
        nnx.update(model, params)
        return model(x)

    return outputs_fn, params, direct


def equinox_model(scale, inputs="image"):
    model, state = eqx.nn.make_with_state(EquinoxNetwork)(KEY)
    model, state = scaled(eqx.filter(model, eqx.is_array), scale), scaled(state, scale)
    whole, _ = eqx.nn.make_with_state(EquinoxNetwork)(KEY)
    model = eqx.combine(model, eqx.filter(whole, eqx.is_array, inverse=True))
    outputs_fn, params = models.equinox_outputs(model, state, inputs=inputs)

    def direct(params, x):
        whole = eqx.nn.inference_mode(eqx.combine(params, model))
        return jnp.stack([whole(row, state)[0] for row in x])

    return outputs_fn, params, direct


TRANSFORMED = hk.transform_with_state(haiku_network)
LINEN = LinenNetwork()


def haiku_model(scale, inputs="image"):
    x = BATCHES["image"][0]
    params, state = scaled(TRANSFORMED.init(KEY, x, is_training=True), scale)
    outputs_fn = models.haiku_outputs(TRANSFORMED, state, inputs=inputs)

    def direct(params, x):
        return TRANSFORMED.apply(params, state, None, x, is_training=False)[0]

    return outputs_fn, params, direct


def linen_model(scale, inputs="image"):
    variables = scaled(dict(LINEN.init(KEY, BATCHES["image"][0])), scale)
    params = variables.pop("params")
    outputs_fn = models.linen_outputs(LINEN, variables, inputs=inputs)

    def direct(params, x):
        return LINEN.apply({"params": params, **variables}, x, train=False)

    return outputs_fn, params, direct


by_framework = pytest.mark.parametrize(
    "make", [linen_model, nnx_model, equinox_model, haiku_model]
)


@by_framework
def test_the_outputs_are_those_of_the_model_in_evaluation(make):
    outputs_fn, params, direct = make(1.3)
    batch = jax.tree.map(lambda leaf: leaf[0], BATCHES)
    expected = direct(params, batch["image"])
    np.testing.assert_allclose(outputs_fn(params, batch), expected, atol=1e-6)
    # The state is not spent by a call.
    np.testing.assert_allclose(outputs_fn(params, batch), expected, atol=1e-6)
    moved = jax.tree.map(lambda leaf: 1.5 * leaf, params)
    assert relative_error(outputs_fn(moved, batch), expected) > 0.01


@by_framework
def test_the_kernel_agrees_with_jacrev_and_new_values_retrace_nothing(make):
    num_traces = 0

    @jax.jit
    def dense(problem, params):
        nonlocal num_traces
        num_traces += 1
        return grsd.kernel_dense(problem, params)

    kernels = []
    for scale in (1.0, 1.2):
        outputs_fn, params, _ = make(scale)
        problem = grsd.Problem(outputs_fn, BATCHES)
        kernels.append(dense(problem, params))
        assert relative_error(kernels[-1], dense_kernel(problem, params)) < 1e-5
    assert num_traces == 1
    assert relative_error(*kernels) > 0.01


@by_framework
def test_new_statistics_alone_change_the_outputs(make):
    batch = jax.tree.map(lambda leaf: leaf[0], BATCHES)
    (outputs_fn, params, _), (other, _, _) = make(1.0), make(1.4)
    assert jax.tree.structure(outputs_fn) == jax.tree.structure(other)
    hash(jax.tree.structure(outputs_fn))
    assert relative_error(other(params, batch), outputs_fn(params, batch)) > 0.01


def second(batch):
    return batch["x"][..., ::-1]


@by_framework
def test_the_inputs_are_a_key_of_the_batch_or_a_function_of_it(make):
    batch = {"x": BATCHES["image"][0]}
    outputs_fn, params, direct = make(1.3, "x")
    expected = direct(params, batch["x"])
    np.testing.assert_allclose(outputs_fn(params, batch), expected, atol=1e-6)
    outputs_fn, params, direct = make(1.3, second)
    expected = direct(params, second(batch))
    np.testing.assert_allclose(outputs_fn(params, batch), expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"inputs: expected a key .* with \['y'\]"):
        make(1.3, "x")[0](params, {"y": batch["x"]})
    with pytest.raises(ValueError, match="inputs: expected a key of the batch"):
        make(1.3, 3)


def test_an_equinox_model_without_state():
    model = eqx.nn.MLP(5, 3, 4, depth=1, key=KEY)
    outputs_fn, params = models.equinox_outputs(model)
    batch = jax.tree.map(lambda leaf: leaf[0], BATCHES)
    expected = jax.vmap(model)(batch["image"])
    np.testing.assert_allclose(outputs_fn(params, batch), expected, atol=1e-6)


class Counting(eqx.Module):
    """A layer that counts its calls in its state, also in inference mode."""

    count: eqx.nn.StateIndex
    out: eqx.nn.Linear

    def __init__(self, key):
        self.count = eqx.nn.StateIndex(jnp.array(1.0))
        self.out = eqx.nn.Linear(5, 3, key=key)

    def __call__(self, x, state):
        count = state.get(self.count)
        return self.out(x) * count, state.set(self.count, count + 1)


def test_a_state_that_a_layer_writes_to_stays_as_it_is():
    model, state = eqx.nn.make_with_state(Counting)(KEY)
    outputs_fn, params = models.equinox_outputs(model, state)
    batch = jax.tree.map(lambda leaf: leaf[0], BATCHES)
    first = outputs_fn(params, batch)
    np.testing.assert_array_equal(outputs_fn(params, batch), first)
    assert state.get(model.count) == 1


def test_arrays_of_an_equinox_model_that_are_no_parameters_are_data():
    (outputs_fn, params, _), (other, _, _) = equinox_model(1.0), equinox_model(1.0)
    order = jnp.array([0, 1, 2, 3])
    other = eqx.tree_at(lambda f: f.arrays.order, other, order)
    assert params.order is None
    batch = jax.tree.map(lambda leaf: leaf[0], BATCHES)
    evaluate = jax.jit(lambda f, params: f(params, batch))
    first, changed = evaluate(outputs_fn, params), evaluate(other, params)
    assert evaluate._cache_size() == 1
    assert relative_error(changed, first) > 0.01


@pytest.mark.parametrize("without_rng", [False, True])
@pytest.mark.parametrize("state", [None, {}])
def test_a_haiku_function_without_state(without_rng, state):
    transformed = hk.transform(lambda x: hk.nets.MLP([4, 3])(x))
    if without_rng:
        transformed = hk.without_apply_rng(transformed)
    batch = jax.tree.map(lambda leaf: leaf[0], BATCHES)
    params = transformed.init(KEY, batch["image"])
    outputs_fn = models.haiku_outputs(transformed, state)
    rng = () if without_rng else (None,)
    expected = transformed.apply(params, *rng, batch["image"])
    np.testing.assert_array_equal(outputs_fn(params, batch), expected)


def test_a_haiku_function_with_state_and_without_a_key():
    transformed = hk.without_apply_rng(TRANSFORMED)
    x = BATCHES["image"][0]
    params, state = transformed.init(KEY, x, is_training=True)
    outputs_fn = models.haiku_outputs(transformed, state)
    expected, _ = transformed.apply(params, state, x, is_training=False)
    np.testing.assert_array_equal(outputs_fn(params, {"image": x}), expected)


def test_a_haiku_function_that_draws_numbers_is_refused():
    transformed = hk.transform(
        lambda x: hk.Linear(3)(hk.dropout(hk.next_rng_key(), 0.5, x))
    )
    batch = jax.tree.map(lambda leaf: leaf[0], BATCHES)
    params = transformed.init(KEY, batch["image"])
    with pytest.raises(ValueError, match="non-None PRNGKey"):
        models.haiku_outputs(transformed)(params, batch)


MODES = ("train", "training", "is_training", "deterministic", "use_running_average")


def doubled_in_training(mode, layer, x, **told):
    """Returns a layer's outputs, twice as large in training, which is the default."""
    still = mode in ("deterministic", "use_running_average")
    assert set(told) <= {mode}
    value = told.get(mode, not still)
    return layer(x) * (1 if value == still else 2)


@pytest.mark.parametrize("mode", MODES)
def test_a_model_is_told_that_it_is_not_trained_by_any_of_the_usual_names(mode):
    batch = jax.tree.map(lambda leaf: leaf[0], BATCHES)
    scope = {"nn": nn, "hk": hk, "doubled": doubled_in_training}
    default = mode in ("train", "training", "is_training")
    exec(  # the name of an argument cannot be a parameter
        "class Network(nn.Module):\n"
        "    @nn.compact\n"
        f"    def __call__(self, x, {mode}={default}):\n"
        f"        return doubled('{mode}', nn.Dense(3), x, {mode}={mode})\n"
        f"def network(x, {mode}={default}):\n"
        f"    return doubled('{mode}', hk.Linear(3), x, {mode}={mode})\n",
        scope,
    )
    model = scope["Network"]()
    params = model.init(KEY, batch["image"])["params"]
    weights, bias = params["Dense_0"]["kernel"], params["Dense_0"]["bias"]
    got = models.linen_outputs(model, {})(params, batch)
    np.testing.assert_allclose(got, batch["image"] @ weights + bias, rtol=1e-5)
    transformed = hk.transform(scope["network"])
    params = transformed.init(KEY, batch["image"])
    got = models.haiku_outputs(transformed)(params, batch)
    wanted = batch["image"] @ params["linear"]["w"] + params["linear"]["b"]
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_a_layer_whose_field_tells_its_mode_is_not_told_twice():
    batch = jax.tree.map(lambda leaf: leaf[0], BATCHES)
    for still, told in ((True, {}), (None, {"deterministic": True})):
        model = nn.Dropout(0.5, deterministic=still)
        got = models.linen_outputs(model, {})({}, batch)
        np.testing.assert_array_equal(got, batch["image"])
        np.testing.assert_array_equal(model.apply({}, batch["image"], **told), got)
    drawing = models.linen_outputs(nn.Dropout(0.5, deterministic=False), {})
    with pytest.raises(ValueError, match="expected dropout with deterministic=True"):
        drawing({}, batch)


def test_nnx_outputs_leave_the_model_alone():
    model = NNXNetwork(nnx.Rngs(0))  # in training mode: it writes statistics, counts
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.BatchStat))
    outputs_fn, params = models.nnx_outputs(model)
    batch = jax.tree.map(lambda leaf: leaf[0], BATCHES)
    first = outputs_fn(params, batch)
    np.testing.assert_array_equal(outputs_fn(params, batch), first)
    after = nnx.state(model, nnx.BatchStat)
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"model: expected a callable flax\.nnx\.Modu"):
        models.nnx_outputs(MLP())
    with pytest.raises(ValueError, match="model: expected a callable pytree, got dict"):
        models.equinox_outputs({"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="model: expected a pytree with floating arr"):
        models.equinox_outputs(eqx.nn.Lambda(jnp.tanh))
    with pytest.raises(ValueError, match=r"state: expected an eqx\.nn\.State or None"):
        models.equinox_outputs(eqx.nn.MLP(5, 3, 4, depth=1, key=KEY), {})
    with pytest.raises(ValueError, match=r"transformed: expected what hk\.transform"):
        models.haiku_outputs(haiku_network)
    with pytest.raises(ValueError, match="state: expected the state that transform_w"):
        models.haiku_outputs(TRANSFORMED)
    with pytest.raises(ValueError, match=r"state: expected None after hk\.transform"):
        models.haiku_outputs(
            hk.transform(haiku_network), {"norm": {"mean": jnp.ones(2)}}
        )
