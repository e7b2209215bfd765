"""Training of the networks: SGD with momentum, checkpoints, metrics and resuming.

The loop is a Python loop over one jitted step: convolutions inside ``lax.scan`` are
slow on XLA's CPU backend. A run that is killed and started again repeats the same
batches in the same order from its newest checkpoint, and ends with the same bits.
"""

import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from grsd_jax._checks import check_at_least
from grsd_jax._typing import PyTree
from grsd_jax.experiments.common import records
from grsd_jax.experiments.common.checkpoints import Checkpoints
from grsd_jax.experiments.common.config import TRAINING_FIELDS, Config, UserError
from grsd_jax.experiments.common.data import Dataset
from grsd_jax.experiments.common.progress import progress_bar
from grsd_jax.experiments.common.steps import (
    Callback,
    TrainState,
    init_state,
    make_optimizer,
    make_schedule,
    state_template,
    train_step,
)


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
    params: PyTree,
    batch_stats: PyTree,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    batch_size: int = 256,
) -> float:
    """Returns the share of examples classified right, in evaluation mode.

    Args:
        model: The linen module.
        params: Parameters.
        batch_stats: BatchNorm's running statistics.
        images: ``[examples, H, W, channels]``.
        labels: ``[examples]``.
        batch_size: Examples of one forward pass; the last batch is padded.

    Returns:
        The accuracy, in [0, 1].

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
        counts.append(_count_hits(model, params, batch_stats, batch, classes))
    return sum(int(count) for count in counts) / len(images)


def train(
    model: nn.Module,
    dataset: Dataset,
    config: Config,
    workdir: records.PathLike,
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
    with records.workdir_lock(Path(workdir) / name) as folder:
        return _Run(model, dataset, config, folder, callback).run()


def check_same_run(folder: Path, settings: Mapping[str, Any]) -> None:
    """Checks that the run in a folder was made with the given settings.

    Args:
        folder: The folder of a run, with its ``config.json``.
        settings: The settings that matter, by the names of their flags.

    Raises:
        UserError: If one differs, or the file cannot be read.
    """
    written = records.read_json(folder / "config.json")
    for name, value in settings.items():
        there = written.get(name) if isinstance(written, dict) else None
        if there != value:
            raise UserError(
                f"--{name}: expected {there!r} as in the run that is in '{folder}', "
                f"got {value!r}; choose another --workdir for other settings."
            )


def recalibrate_batch_stats(
    model: nn.Module,
    params: PyTree,
    batch_stats: PyTree,
    images: np.ndarray,
    *,
    batch_size: int,
    num_batches: int,
) -> PyTree:
    """Re-estimates BatchNorm's statistics: the plain average over batches.

    A running update is affine, ``new = m old + (1 - m) batch``, whatever the momentum
    m of a layer. One pass with ``old = 0`` gives ``(1 - m) batch``, and the derivative
    along ``old`` gives m exactly.

    Args:
        model: The linen module, in train mode in these passes; every layer sees the
            batch's own statistics, so that the stored ones play no part.
        params: Parameters.
        batch_stats: The statistics to replace, for their tree and shapes.
        images: ``[examples, H, W, channels]``, used in order.
        batch_size: Examples of one batch.
        num_batches: Batches to average.

    Returns:
        The new statistics.

    Raises:
        ValueError: If there are fewer than ``batch_size * num_batches`` images.

    References:
        Paper 7.1; the protocol ``recalibrated``.
    """
    check_at_least("batch_size", batch_size, 1)
    check_at_least("num_batches", num_batches, 1)
    if not jax.tree.leaves(batch_stats):
        return batch_stats  # a model without BatchNorm
    if batch_size * num_batches > len(images):
        raise UserError(
            "batch_size * num_batches: expected at most the "
            f"{len(images)} images, got {batch_size * num_batches}."
        )
    total = jax.tree.map(jnp.zeros_like, batch_stats)
    for start in range(0, batch_size * num_batches, batch_size):
        batch = images[start : start + batch_size]
        measured = _batch_statistics(model, params, batch_stats, batch)
        total = jax.tree.map(jnp.add, total, measured)
    return jax.tree.map(lambda x: x / jnp.asarray(num_batches, x.dtype), total)


@partial(jax.jit, static_argnums=0)
def _batch_statistics(
    model: nn.Module, params: PyTree, batch_stats: PyTree, images: jax.Array
) -> PyTree:
    def update(old: PyTree) -> PyTree:
        variables = {"params": params, "batch_stats": old}
        _, new = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return new["batch_stats"]

    zeros = jax.tree.map(jnp.zeros_like, batch_stats)
    ones = jax.tree.map(jnp.ones_like, batch_stats)
    new, momentum = jax.jvp(update, (zeros,), (ones,))
    return jax.tree.map(lambda x, m: x / (jnp.ones_like(m) - m), new, momentum)


@partial(jax.jit, static_argnums=0)
def _count_hits(
    model: nn.Module,
    params: PyTree,
    batch_stats: PyTree,
    images: jax.Array,
    labels: jax.Array,
) -> jax.Array:
    variables = {"params": params, "batch_stats": batch_stats}
    logits = model.apply(variables, images, train=False)
    assert isinstance(logits, jax.Array)
    return jnp.sum(jnp.argmax(logits, axis=-1) == labels, dtype=jnp.int32)


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
        self.schedule = make_schedule(config, total_steps=self.total_steps)
        self.optimizer = make_optimizer(config, total_steps=self.total_steps)

    def run(self) -> TrainResult:
        """Trains from the newest checkpoint, or from the start, to the end."""
        self._check_settings()
        image = self.dataset.train_images[0]
        directory = self.folder / "checkpoints"
        keep = self.config.keep_checkpoints
        with Checkpoints(directory, max_to_keep=keep) as checkpoints:
            first = checkpoints.latest_step() or 0
            if first:
                template = state_template(self.model, self.optimizer, image)
                state = checkpoints.restore(template)
            else:
                seed = self.config.seed
                state = init_state(self.model, self.optimizer, image, seed=seed)
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
        self.callback.rewind(first or -1)  # without a checkpoint, step 0 comes again
        if first == 0:
            return self.callback.update(own, state, 0)
        return checkpoints.restore({"callback": own})["callback"]

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
        return evaluate(
            self.model,
            state.params,
            state.batch_stats,
            data.test_images,
            data.test_labels,
        )

    def _rewind_metrics(self, step: int) -> float:
        """Drops the lines after ``step``; returns the seconds spent until then."""
        kept = records.rewind_jsonl(self.metrics, step)
        return float(kept[-1].get("seconds", 0.0)) if kept else 0.0

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
