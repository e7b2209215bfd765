"""One step of training and what it needs: the state, the schedule, the optimiser."""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from grsd_jax._typing import PyTree
from grsd_jax.errors import softmax_cross_entropy
from grsd_jax.experiments.common.config import Config, UserError, parse_schedule_args


class TrainState(NamedTuple):
    """Everything that changes during training.

    Attributes:
        step: Steps done, int32 ``[]``.
        params: Parameters.
        batch_stats: BatchNorm's running statistics, ``{}`` for a model without.
        opt_state: State of the optimiser.
    """

    step: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree


class Callback(Protocol):
    """Looks on while a network trains, with a state that lies in the checkpoints.

    Attributes:
        settings: What the run must be resumed with, beside its own settings.
    """

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings, by the names of their flags."""
        ...

    def init(self, state: TrainState) -> PyTree:
        """Returns the state before the first update, a pytree of arrays."""
        ...

    def rewind(self, step: int) -> None:
        """Drops what was written after ``step``, those steps being done again."""
        ...

    def update(self, own: PyTree, state: TrainState, step: int) -> PyTree:
        """Looks at the training after ``step`` steps, and returns the new state.

        It is called once before the first step, with 0, and once after every step.
        """
        ...


def make_schedule(config: Config, *, total_steps: int) -> optax.Schedule:
    """Returns the learning-rate schedule, any of optax's by name.

    Args:
        config: ``schedule``, ``schedule_args`` and ``learning_rate`` are used. What the
            arguments leave out of ``peak_value``, ``value`` or ``init_value`` (the
            first that the schedule has) is the learning rate, and ``decay_steps`` is
            the whole training.
        total_steps: Steps of the whole training.

    Returns:
        A function from the step to the rate.

    Raises:
        UserError: If optax has no such schedule or its arguments do not fit.
    """
    make = getattr(optax, config.schedule, None)
    if not callable(make):
        raise UserError(
            "--schedule: expected the name of an optax function that ends in "
            f"_schedule, got {config.schedule!r}."
        )
    signature = inspect.signature(make)
    arguments = parse_schedule_args(config.schedule_args)
    rate_names = ("peak_value", "value", "init_value")
    rate_name = next((name for name in rate_names if name in signature.parameters), "")
    defaults = {rate_name: config.learning_rate, "decay_steps": total_steps}
    for name, value in defaults.items():
        if name in signature.parameters:
            arguments.setdefault(name, value)
    try:
        schedule = make(**arguments)
        schedule(0)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"--schedule_args: expected arguments of {config.schedule}{signature}, "
            f"got {arguments} ({error})."
        ) from error
    return schedule


def make_optimizer(config: Config, *, total_steps: int) -> optax.GradientTransformation:
    """Returns SGD with momentum: ``t <- mu t + g``, ``theta <- theta - eta t``.

    Args:
        config: ``momentum`` and the schedule's settings are used.
        total_steps: Steps of the whole training, for schedules that decay.

    Returns:
        The optimiser.

    Raises:
        UserError: As for `make_schedule`.
    """
    schedule = make_schedule(config, total_steps=total_steps)
    return optax.sgd(schedule, momentum=config.momentum)


def init_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image: jax.typing.ArrayLike,
    *,
    seed: int,
) -> TrainState:
    """Returns the state before the first step.

    Args:
        model: A linen module with ``__call__(x, train)``.
        optimizer: The optimiser.
        image: One example ``[H, W, channels]``, for its shape.
        seed: Seed of the weights.

    Returns:
        The state.
    """
    # It runs once, and XLA's CPU backend would take half a minute to optimise the
    # random numbers of every layer (3 seconds without).
    on_cpu = jax.default_backend() == "cpu"
    options = {"xla_backend_optimization_level": 0} if on_cpu else None
    init = partial(_fresh_state, model, optimizer, np.shape(image))
    return jax.jit(init, compiler_options=options)(jax.random.key(seed))


def state_template(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image: jax.typing.ArrayLike,
) -> TrainState:
    """Returns the tree, shapes and dtypes of the state, computing nothing.

    Args:
        model: As for `init_state`.
        optimizer: As for `init_state`.
        image: As for `init_state`.

    Returns:
        A state of `jax.ShapeDtypeStruct`, the template for reading checkpoints.
    """
    init = partial(_fresh_state, model, optimizer, np.shape(image))
    return jax.eval_shape(init, jax.random.key(0))


def _fresh_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    key: jax.Array,
) -> TrainState:
    variables = model.init(key, jnp.zeros((1, *image_shape), jnp.float32))
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(params),
    )


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Does one step of SGD on the mean cross-entropy of a batch.

    Args:
        model: The linen module, static.
        optimizer: The optimiser, static; reuse one so that nothing is traced again.
        state: The state; its buffers are donated and must not be used afterwards.
        images: ``[N, H, W, channels]``.
        labels: ``[N]``, int32.

    Returns:
        The new state; and the batch's ``loss`` and ``accuracy`` before the step, and
        ``finite``, whether the loss and the whole new state are.
    """

    def loss_fn(params: PyTree) -> tuple[jax.Array, tuple[jax.Array, PyTree]]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updated = model.apply(
            variables, images, train=True, mutable=["batch_stats"]
        )
        loss = jnp.mean(softmax_cross_entropy(logits, labels))
        return loss, (logits, updated.get("batch_stats", {}))

    gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (logits, batch_stats)), gradient = gradient_fn(state.params)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    new = TrainState(
        step=state.step + jnp.ones((), jnp.int32),
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
    hits = jnp.argmax(logits, axis=-1) == labels
    metrics = {
        "loss": loss,
        "accuracy": jnp.mean(hits.astype(jnp.float32)),
        "finite": _all_finite((loss, new.params, new.batch_stats)),
    }
    return new, metrics


def _all_finite(tree: PyTree) -> jax.Array:
    # The loss alone does not tell: a relu can turn the NaN of its input into 0.
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves))
