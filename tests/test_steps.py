import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from grsd_jax.experiments.common.config import Config, UserError
from grsd_jax.experiments.common.networks import init_weights, weights_template
from grsd_jax.experiments.common.training import (
    init_state,
    make_optimizer,
    make_schedule,
    train_step,
)

SHAPE = (8, 8, 3)


class TinyNet(nn.Module):
    """A convolution with BatchNorm; counts how often it is traced in train mode."""

    traces = []  # noqa: RUF012  (shared by all instances on purpose)

    @nn.compact
    def __call__(self, x, train=False):
        if train:
            self.traces.append(x.shape)
        x = nn.Conv(4, (3, 3), strides=2, use_bias=False)(x)
        x = jax.nn.relu(nn.BatchNorm(not train, momentum=0.8)(x))
        return nn.Dense(3)(jnp.mean(x, axis=(1, 2)))


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's schedules divide an integer count by a float."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(5, *SHAPE)).astype(np.float32)
    return images, np.asarray([0, 1, 2, 1, 0], np.int32)


def rates(total_steps=10, steps=(0, 5, 10), **settings):
    schedule = make_schedule(Config(**settings), total_steps=total_steps)
    return [float(schedule(step)) for step in steps]


def test_the_rate_is_constant_by_default():
    assert rates(learning_rate=0.3) == [pytest.approx(0.3)] * 3


def test_a_decay_lasts_for_the_whole_training_by_default():
    found = rates(schedule="cosine_decay_schedule", learning_rate=0.3)
    np.testing.assert_allclose(found, [0.3, 0.15, 0.0], atol=1e-7)


def test_the_peak_is_the_learning_rate_where_there_is_one():
    found = rates(
        schedule="warmup_cosine_decay_schedule",
        schedule_args='{"init_value": 0.0, "warmup_steps": 5}',
        learning_rate=0.3,
    )
    np.testing.assert_allclose(found, [0.0, 0.3, 0.0], atol=1e-7)


def test_arguments_given_win_and_boundaries_are_integers():
    found = rates(
        schedule="piecewise_constant_schedule",
        schedule_args='{"boundaries_and_scales": {"5": 0.1}, "init_value": 1.0}',
        steps=(0, 4, 6),
    )
    np.testing.assert_allclose(found, [1.0, 1.0, 0.1], rtol=1e-6)


def test_a_schedule_that_optax_lacks_is_one_sentence():
    with pytest.raises(UserError, match=r"--schedule: expected .* got 'my_schedule'"):
        make_schedule(Config(schedule="my_schedule"), total_steps=1)


@pytest.mark.parametrize(
    "arguments", ['{"speed": 1}', '{"decay_steps": 0}', '{"init_value": "fast"}']
)
def test_arguments_that_do_not_fit_are_one_sentence(arguments):
    config = Config(schedule="cosine_decay_schedule", schedule_args=arguments)
    with pytest.raises(UserError) as caught:
        make_schedule(config, total_steps=1)
    text = str(caught.value)
    assert text.startswith("--schedule_args: expected arguments of cosine_decay")
    assert "\n" not in text


def test_the_template_is_the_state_without_its_values(batch):
    optimizer = make_optimizer(Config(), total_steps=1)
    start = functools.partial(init_state, optimizer=optimizer)
    template = jax.eval_shape(start, weights_template(TinyNet(), SHAPE))
    state = start(init_weights(TinyNet(), SHAPE, seed=0))
    assert jax.tree.structure(template) == jax.tree.structure(state)
    for leaf, wanted in zip(
        jax.tree.leaves(template), jax.tree.leaves(state), strict=True
    ):
        assert isinstance(leaf, jax.ShapeDtypeStruct)
        assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)


def test_the_initial_weights_are_a_function_of_the_seed(batch):
    kernels = []
    for seed in (0, 0, 1):
        weights = init_weights(TinyNet(), SHAPE, seed=seed)
        kernels.append(weights.params["Dense_0"]["kernel"])
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[0], kernels[2])


def test_a_step_is_momentum_sgd_on_the_mean_cross_entropy(batch):
    """Three steps against the recurrence t <- mu t + g, theta <- theta - eta t."""
    images, labels = batch
    model, config = TinyNet(), Config(learning_rate=0.2, momentum=0.7)
    optimizer = make_optimizer(config, total_steps=3)
    state = init_state(init_weights(model, SHAPE, seed=0), optimizer)

    def loss_fn(params, batch_stats):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, new = model.apply(
            variables, images, train=True, mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), (logits, new["batch_stats"])

    params, stats = jax.tree.map(jnp.copy, (state.params, state.batch_stats))
    trace = jax.tree.map(jnp.zeros_like, params)
    value_and_grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    for step in range(3):
        (loss, (logits, stats)), gradient = value_and_grad(params, stats)
        trace = jax.tree.map(lambda t, g: 0.7 * t + g, trace, gradient)
        params = jax.tree.map(lambda p, t: p - 0.2 * t, params, trace)
        state, metrics = train_step(model, optimizer, state, images, labels)
        assert int(state.step) == step + 1
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
        accuracy = np.mean(np.argmax(logits, axis=-1) == labels)
        np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-6)
    for wanted, found in ((params, state.params), (stats, state.batch_stats)):
        assert jax.tree.structure(wanted) == jax.tree.structure(found)
        for one, two in zip(
            jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True
        ):
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


def test_a_step_tells_whether_everything_is_finite(batch):
    images, labels = batch
    optimizer = make_optimizer(Config(), total_steps=3)
    state = init_state(init_weights(TinyNet(), SHAPE, seed=0), optimizer)
    state, metrics = train_step(TinyNet(), optimizer, state, images, labels)
    assert bool(metrics["finite"])
    # In train mode the stored statistics play no part in the loss.
    poisoned = jax.tree.map(lambda x: x * jnp.nan, state.batch_stats)
    state = state._replace(batch_stats=poisoned)
    _, metrics = train_step(TinyNet(), optimizer, state, images, labels)
    assert np.isfinite(metrics["loss"])
    assert not bool(metrics["finite"])


def test_steps_are_traced_once_and_donate_the_state(batch):
    images, labels = batch
    optimizer = make_optimizer(Config(), total_steps=3)
    state = first = init_state(init_weights(TinyNet(), SHAPE, seed=0), optimizer)
    TinyNet.traces.clear()
    for _ in range(3):
        state, _ = train_step(TinyNet(), optimizer, state, images, labels)
    assert TinyNet.traces == [images.shape]
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))
