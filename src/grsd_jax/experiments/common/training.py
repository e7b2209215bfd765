"""Training of the networks: optimizer, checkpoints, metrics and resuming.

The loop is a Python loop over one jitted step: convolutions inside ``lax.scan`` are
slow on XLA's CPU backend. A run that is killed and started again repeats the same
batches in the same order from its newest checkpoint, and ends with the same bits.
"""

import inspect
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from grsd_jax._arrays import all_finite
from grsd_jax._checks import check_at_least
from grsd_jax._typing import PyTree
from grsd_jax.errors import softmax_cross_entropy
from grsd_jax.experiments.common import files, records
from grsd_jax.experiments.common.checkpoints import Checkpoints
from grsd_jax.experiments.common.config import (
    TRAINING_FIELDS,
    Config,
    UserError,
    parse_schedule_args,
)
from grsd_jax.experiments.common.data import Dataset
from grsd_jax.experiments.common.networks import (
    Weights,
    check_weights,
    init_weights,
    weights_template,
)
from grsd_jax.experiments.common.runs import (
    check_same_run,
    progress_bar,
    workdir_lock,
)


class TrainState(NamedTuple):
    """Everything that changes during training.

    Attributes:
        step: Steps done, int32 ``[]``.
        params: Parameters.
        batch_stats: BatchNorm's running statistics, ``{}`` for a model without.
        opt_state: State of the optimizer.
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

    def rewind(self, own: PyTree) -> None:
        """Drops what was written after this state, those steps being done again."""
        ...

    def update(self, own: PyTree, state: TrainState, step: int) -> PyTree:
        """Looks at the training after ``step`` steps, and returns the new state.

        It is called once before the first step, with 0, and once after every step.
        """
        ...


#: Steps of a training at which its learning rate is checked before it begins.
_CHECKED_RATES = 100


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
        UserError: If optax has no such schedule, its arguments do not fit, or it gives
            a rate that is negative or not finite.
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
        last = max(total_steps - 1, 0)
        steps = np.unique(np.linspace(0, last, _CHECKED_RATES, dtype=int)).tolist()
        rates = np.array([schedule(step) for step in steps], np.float64)
    except Exception as error:  # whatever optax does with arguments of any kind
        raise UserError(
            f"--schedule_args: expected arguments of {config.schedule}{signature}, "
            f"got {arguments} ({files.reason(error)})."
        ) from error
    good = np.isfinite(rates) & (rates >= 0)
    if rates.ndim != 1 or not good.all():
        bad = rates[0] if rates.ndim != 1 else rates[~good][0]
        raise UserError(
            "--schedule_args: expected finite learning rates >= 0 over the whole "
            f"training, got {bad} with {arguments}."
        )
    return schedule


def make_optimizer(config: Config, *, total_steps: int) -> optax.GradientTransformation:
    """Returns the optimizer of the settings, one of optax's.

    ``sgd`` with momentum is ``t <- mu t + g``, ``theta <- theta - eta t``; ``adamw``
    and ``muon`` have optax's defaults but for the learning rate.

    Args:
        config: ``optimizer``, ``momentum`` and the schedule's settings are used.
        total_steps: Steps of the whole training, for schedules that decay.

    Returns:
        The optimizer.

    Raises:
        UserError: As for `make_schedule`.
    """
    schedule = make_schedule(config, total_steps=total_steps)
    if config.optimizer == "sgd":
        return optax.sgd(schedule, momentum=config.momentum)
    make = {"adamw": optax.adamw, "muon": optax.contrib.muon}[config.optimizer]
    return make(schedule)


def init_state(weights: Weights, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step.

    Args:
        weights: Those that training starts from.
        optimizer: The optimizer.

    Returns:
        The state; from a template of the weights under `jax.eval_shape`, its template.
    """
    opt_state = jax.jit(optimizer.init)(weights.params)
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, weights.params, weights.batch_stats, opt_state)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Does one step on the mean cross-entropy of a batch.

    Args:
        model: The linen module, static.
        optimizer: The optimizer, static; reuse one so that nothing is traced again.
        state: The state; its buffers are donated and must not be used afterward.
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
    # The loss alone does not tell: a relu can turn the NaN of its input into 0.
    finite = all_finite((loss, new.params, new.batch_stats))
    metrics = {
        "loss": loss,
        "accuracy": _hits(logits, labels, finite) / len(labels),
        "finite": finite,
    }
    return new, metrics


class TrainResult(NamedTuple):
    """What `train` returns.

    Attributes:
        state: The final state.
        test_accuracy: Share of the test set classified right, in evaluation mode.
        resumed_from: The step the run was resumed from, 0 for a new one.
        checkpoint_dir: The folder of the checkpoints.
    """

    state: TrainState
    test_accuracy: float
    resumed_from: int
    checkpoint_dir: Path


def evaluate(
    model: nn.Module,
    weights: Weights,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    batch_size: int = 256,
) -> float:
    """Returns the share of examples classified right, in evaluation mode.

    Args:
        model: The linen module.
        weights: Its weights.
        images: ``[examples, H, W, channels]``.
        labels: ``[examples]``.
        batch_size: Examples of one forward pass; the last batch is padded.

    Returns:
        The accuracy, in [0, 1]; NaN if weights or outputs are not finite.

    Raises:
        ValueError: If there are no examples or the batch size is below 1.
    """
    check_at_least("batch_size", batch_size, 1)
    check_at_least("len(images)", len(images), 1)
    batch_size = min(batch_size, len(images))
    counts = []
    for start in range(0, len(images), batch_size):
        batch, classes = images[start:][:batch_size], labels[start:][:batch_size]
        missing = batch_size - len(batch)
        if missing:
            # No prediction is -1, so that padding never counts.
            batch = np.pad(batch, [(0, missing)] + [(0, 0)] * (batch.ndim - 1))
            classes = np.pad(classes, (0, missing), constant_values=-1)
        counts.append(_count_hits(model, weights, batch, classes))
    return sum(float(count) for count in counts) / len(images)


def train(
    model: nn.Module,
    dataset: Dataset,
    config: Config,
    workdir: files.PathLike,
    *,
    name: str,
    callback: Callback | None = None,
) -> TrainResult:
    """Trains a network, or resumes or returns the training that is there already.

    Everything lies in ``workdir/name``: ``config.json`` (the settings), metrics as JSON
    lines in ``metrics.jsonl`` and Orbax checkpoints in ``checkpoints/``.

    Args:
        model: The linen module.
        dataset: The data.
        config: The settings; those in `TRAINING_FIELDS` must be those of the run that
            is resumed.
        workdir: The folder.
        name: The run's own folder in it.
        callback: Called before the first step and after each; its state travels with
            the checkpoints, so that a resumed run goes on as if never interrupted. With
            one, a training that stops being finite goes on.

    Returns:
        The final state and its test accuracy.

    Raises:
        UserError: If the folder holds another run or cannot be written, a checkpoint
            is damaged, or the loss stops being finite without a callback.
    """
    with workdir_lock(Path(workdir) / name) as folder:
        return _Run(model, dataset, config, folder, callback).run()


@partial(jax.jit, static_argnums=0)
def _count_hits(
    model: nn.Module, weights: Weights, images: jax.Array, labels: jax.Array
) -> jax.Array:
    logits = model.apply(weights._asdict(), images, train=False)
    assert isinstance(logits, jax.Array)
    return _hits(logits, labels, all_finite((logits, weights)))


def _hits(logits: jax.Array, labels: jax.Array, finite: jax.Array) -> jax.Array:
    """Returns how many examples are right, NaN of a network that is not finite.

    NaN would count as the first class.
    """
    right = jnp.sum(jnp.argmax(logits, axis=-1) == labels, dtype=jnp.float32)
    return jnp.where(finite, right, jnp.nan)


class _Run:
    """One training run in its folder."""

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        config: Config,
        folder: Path,
        callback: Callback | None,
    ):
        self.callback = callback
        self.model, self.dataset, self.config = model, dataset, config
        self.folder, self.metrics = folder, folder / "metrics.jsonl"
        num_train = len(dataset.train_images)
        if config.train_batch_size > num_train:
            raise UserError(
                f"--train_batch_size: expected at most the {num_train} training "
                f"examples, got {config.train_batch_size}."
            )
        # The examples left over from the last whole batch change with every epoch.
        self.epoch_steps = num_train // config.train_batch_size
        self.total_steps = self.epoch_steps * config.epochs
        if self.total_steps >= 2**31:  # steps are counted in int32
            most = (2**31 - 1) // self.epoch_steps
            raise UserError(f"--epochs: expected at most {most}, got {config.epochs}.")
        check_weights(model, dataset.train_images.shape[1:])
        self.schedule = make_schedule(config, total_steps=self.total_steps)
        self.optimizer = make_optimizer(config, total_steps=self.total_steps)

    def run(self) -> TrainResult:
        """Trains from the newest checkpoint, or from the start, to the end."""
        self._check_settings()
        shape = self.dataset.train_images.shape[1:]
        directory = self.folder / "checkpoints"
        keep = self.config.keep_checkpoints
        with Checkpoints(directory, max_to_keep=keep) as checkpoints:
            first = checkpoints.latest_step() or 0
            if first:
                start = partial(init_state, optimizer=self.optimizer)
                template = weights_template(self.model, shape)
                state = checkpoints.restore(jax.eval_shape(start, template))
            else:
                weights = init_weights(self.model, shape, self.config.seed)
                state = init_state(weights, self.optimizer)
            seconds = self._rewind_metrics(first)
            own = self._start_callback(state, first, checkpoints)
            started = time.monotonic() - seconds
            state = self._loop(state, own, first, checkpoints, started)
        accuracy = self._test_accuracy(state)
        return TrainResult(state, accuracy, first, directory)

    def _start_callback(
        self, state: TrainState, first: int, checkpoints: Checkpoints
    ) -> PyTree:
        """Returns the callback's state at the step the run begins with."""
        if self.callback is None:
            return None
        own = self.callback.init(state)
        if first:
            own = checkpoints.restore({"callback": own})["callback"]
        self.callback.rewind(own)
        return own if first else self.callback.update(own, state, 0)

    def _loop(
        self,
        state: TrainState,
        own: PyTree,
        first: int,
        checkpoints: Checkpoints,
        started: float,
    ) -> TrainState:
        """Does the steps after ``first``, with metrics and checkpoints."""
        config, pending = self.config, []
        progress = progress_bar(
            total=self.total_steps, initial=first, desc=self.folder.name
        )
        with progress:
            for step, images, labels in self._batches(first):
                state, metrics = train_step(
                    self.model, self.optimizer, state, images, labels
                )
                pending.append(metrics)
                if self.callback is not None:
                    own = self.callback.update(own, state, step)
                epoch_ends = step % self.epoch_steps == 0
                saves = step % config.checkpoint_every == 0 or step == self.total_steps
                # A line at every checkpoint cuts the averages at the same steps
                # whether or not the run was interrupted there.
                if step % config.log_every == 0 or epoch_ends or saves:
                    line = self._summary(step, pending, started)
                    if epoch_ends:
                        line["test_accuracy"] = self._test_accuracy(state)
                    records.append_jsonl(self.metrics, line)
                    progress.set_postfix(loss=f"{line['loss']:.3f}", refresh=False)
                    pending = []
                if saves:
                    whole = state._asdict()
                    if self.callback is not None:
                        whole["callback"] = own
                    checkpoints.save(step, whole)
                progress.update()
        return state

    def _batches(self, first: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yields ``(step, images, labels)``; the order is a function of the seed."""
        size, data = self.config.train_batch_size, self.dataset
        order, epoch = np.zeros(0, np.int64), -1
        for step in range(first, self.total_steps):
            if step // self.epoch_steps != epoch:
                epoch = step // self.epoch_steps
                rng = np.random.default_rng([self.config.seed, epoch])
                order = rng.permutation(len(data.train_images))
            chosen = order[step % self.epoch_steps * size :][:size]
            yield step + 1, data.train_images[chosen], data.train_labels[chosen]

    def _summary(
        self, step: int, pending: list[dict[str, jax.Array]], started: float
    ) -> dict[str, Any]:
        """Returns one line of metrics; raises UserError after a step that diverged."""
        values = jax.device_get(pending)
        losses = [float(value["loss"]) for value in values]
        finite = [bool(value["finite"]) for value in values]
        # With someone looking on, who says so, a broken training goes on.
        if not all(finite) and self.callback is None:
            first = finite.index(False)
            raise UserError(
                "training: expected a finite loss, weights and statistics, got "
                f"others at step {step - len(values) + 1 + first} (loss "
                f"{losses[first]:.4g}); a smaller --learning_rate may help, and the "
                f"checkpoints in '{self.folder}' are from before."
            )
        return {
            "step": step,
            "epoch": (step - 1) // self.epoch_steps + 1,
            "loss": sum(losses) / len(losses),
            "accuracy": sum(float(v["accuracy"]) for v in values) / len(values),
            "learning_rate": float(np.asarray(self.schedule(step - 1))),
            "seconds": round(time.monotonic() - started, 3),
        }

    def _test_accuracy(self, state: TrainState) -> float:
        data = self.dataset
        weights = Weights(state.params, state.batch_stats)
        return evaluate(self.model, weights, data.test_images, data.test_labels)

    def _rewind_metrics(self, step: int) -> float:
        """Drops the lines after ``step``; returns the seconds spent until then.

        There is a line for every checkpoint, written before it.
        """
        kept = records.rewind_jsonl(self.metrics, step)
        if not step:
            return 0.0
        with files.reading(self.metrics, "a line of metrics at every checkpoint"):
            if not kept or kept[-1]["step"] != step:
                raise ValueError(f"none at the newest one, of step {step}")
            return float(kept[-1]["seconds"])

    def _check_settings(self) -> None:
        """Writes config.json, or checks that the run there has the same settings."""
        settings = {name: getattr(self.config, name) for name in TRAINING_FIELDS}
        settings["data_fingerprint"] = self.dataset.fingerprint
        settings |= self.callback.settings if self.callback is not None else {}
        path = self.folder / "config.json"
        if not path.exists():
            if (self.folder / "checkpoints").exists():
                raise UserError(
                    f"--workdir: expected config.json beside the checkpoints in "
                    f"'{self.folder}', got none."
                )
            records.write_json(path, settings)
            return
        check_same_run(self.folder, settings)
