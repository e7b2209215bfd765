"""Training with the probe on: one JSON line a record, written as it goes.

The probe's state travels with the training's checkpoints, and lines after the newest
one are dropped when a run resumes, so that a killed run leaves the same records as one
that was never interrupted.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from grsd_jax import Problem, make_probe
from grsd_jax.dynamics import KrylovSteps, ProbeState
from grsd_jax.dynamics.between_ends import cheaper_solver
from grsd_jax.dynamics.spectra import stacked_point
from grsd_jax.experiments.common import files, records
from grsd_jax.experiments.common.config import Config, UserError
from grsd_jax.experiments.common.data import Dataset, measured_batches
from grsd_jax.experiments.common.measurement import PROVENANCE, header
from grsd_jax.experiments.common.networks import make_model
from grsd_jax.experiments.common.training import TrainState, make_schedule, train
from grsd_jax.experiments.track.analyse import summary
from grsd_jax.experiments.track.log import ProbeLog
from grsd_jax.models import linen_outputs
from grsd_jax.shells import SoftShells

#: The settings that decide what is recorded; a run resumes only under the same.
SETTINGS = (
    "record_every",
    "batch_size",
    "num_batches",
    "over",
    "num_shells",
    "shells",
    "solver",
    "num_steps",
)

#: The outer edges of the shells. The spectrum of a fresh network says little of that of
#: a trained one, whose largest value is some hundred or ten thousand times as large.
LAMBDA_RANGE = (1e-2, 1e5)

#: Random vectors behind the counting velocity where eigenpairs are too dear.
_NUM_PROBES = 4


class Tracker:
    """A `Callback` that writes the probe's records to a file of JSON lines.

    Args:
        model: The linen module that is trained.
        dataset: The data; the probe measures on batches of its test set.
        config: The settings.
        path: The file.
    """

    def __init__(self, model: nn.Module, dataset: Dataset, config: Config, path: Path):
        self._model, self.log = model, ProbeLog(path)
        self.settings = {name: getattr(config, name) for name in SETTINGS}
        self.settings["over"] = list(config.over)  # as JSON has it
        batches = measured_batches(dataset, config)
        epoch_steps = len(dataset.train_images) // config.train_batch_size
        steps = epoch_steps * config.epochs
        if 0 < steps < config.record_every:
            raise UserError(
                f"--record_every: expected at most the {steps} steps of the training, "
                f"got {config.record_every}."
            )
        schedule = make_schedule(config, total_steps=steps)
        self._steps = KrylovSteps(config.num_steps, num_probes=_NUM_PROBES)
        solver = self._steps if config.solver == "lanczos" else config.solver
        self._width = 0 if config.shells == "sharp" else 1 / 2
        # The outer edges of open shells are no edges.
        edges = np.geomspace(*LAMBDA_RANGE, config.num_shells + 1)[1:-1]
        self._key = jax.random.key(config.seed)
        self._probe = make_probe(
            Problem(linen_outputs(model, {}), batches),
            every=config.record_every,
            over=config.over,
            solver=solver,
            shells=SoftShells(jnp.asarray(edges, jnp.float32), width=self._width),
            # Momentum mu without dampening moves 1 / (1 - mu) times as far. The time
            # of other optimizers is measured.
            schedule=(
                (lambda step: schedule(step) / (1 - config.momentum))
                if config.optimizer == "sgd"
                else None
            ),
        )
        self._since, self._num_steps = time.perf_counter(), 0

    def init(self, state: TrainState) -> ProbeState:
        """Returns the probe's state before its first record."""
        problem, probe = self._problem(state), self._probe
        if probe.solver == "auto":
            point = stacked_point(problem, state.params)
            solver = cheaper_solver(point, self._width, self._steps)
            self._probe = dataclasses.replace(probe, solver=solver)
        return self._probe.init(self._key, state.params, problem=problem)

    def rewind(self, own: ProbeState) -> None:
        """Drops the lines after this state, and a last one that was cut short."""
        last = int(own.last_step)
        kept = [line["step"] for line in self.log.rewind(last)]
        # The first step has no earlier one, and so no line.
        if last > 0 and kept[-1:] != [last]:
            wanted = f"the record of step {last}, the last before the checkpoint"
            raise files.cannot_read(self.log.path, wanted, f"{kept[-1:]}")

    def update(self, own: ProbeState, state: TrainState, step: int) -> ProbeState:
        """Takes a record if one is due, and appends its line."""
        self._num_steps += 1
        since = step % self._probe.every
        if since and since not in self._probe.over:
            return own
        jax.block_until_ready(state.params)
        passed = time.perf_counter() - self._since
        step_seconds = passed / self._num_steps if step else float("nan")
        own, record = self._probe.update(
            own,
            state.params,
            step,
            problem=self._problem(state),
            step_seconds=step_seconds,
        )
        if record is not None:
            self.log.append(record, train_step_seconds=step_seconds)
        self._since, self._num_steps = time.perf_counter(), 0
        return own

    def _problem(self, state: TrainState) -> Problem:
        """Returns the probe's problem with the training's BatchNorm statistics."""
        outputs_fn = linen_outputs(self._model, {"batch_stats": state.batch_stats})
        return self._probe.problem.replace(outputs_fn=outputs_fn)


def track(
    dataset: Dataset, config: Config, names: Sequence[str]
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Trains networks with the probe on, or resumes or returns what is there already.

    Args:
        dataset: The data.
        config: The settings.
        names: The networks, of `config.MODELS`.

    Returns:
        The contents of ``results.json``, and the records of each network.

    Raises:
        UserError: As for `train`.
    """
    entries, lines = {}, {}
    for name in names:
        folder = Path(config.workdir) / name
        model = make_model(name, dataset.num_classes, config)
        settings = dataclasses.replace(config, model=name)
        tracker = Tracker(model, dataset, settings, folder / "records.jsonl")
        result = train(
            model, dataset, settings, config.workdir, name=name, callback=tracker
        )
        lines[name] = tracker.log.read()
        with files.reading(tracker.log.path, "the records of a probe"):
            entries[name] = summary(lines[name]) | PROVENANCE
        entries[name] |= {
            "test_accuracy": result.test_accuracy,
            "train_seconds": _train_seconds(folder / "metrics.jsonl"),
            "effective_time": (
                "sum of learning rate / (1 - momentum) over the steps"
                if config.optimizer == "sgd"
                else "measured by the gradient of the probe's loss at both ends"
            ),
            "data_fingerprint": dataset.fingerprint,
        }
    return header(config) | {"tracks": entries}, lines


def _train_seconds(path: Path) -> float:
    """Returns the wall time of a training, from its last line of metrics."""
    metrics = records.read_jsonl(path)
    with files.reading(path, "the metrics of a training"):
        return float(metrics[-1]["seconds"])
