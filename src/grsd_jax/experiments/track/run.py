"""Training with the probe on: one JSON line a record, written as it goes.

The probe's state travels with the training's checkpoints, and lines after the newest
one are dropped when a run resumes, so that a killed run leaves the same records as one
that was never interrupted.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from grsd_jax import Problem, Window, make_probe
from grsd_jax.dynamics import ProbeState
from grsd_jax.experiments.common import files, records
from grsd_jax.experiments.common.config import TITLES, Config, UserError
from grsd_jax.experiments.common.data import Dataset, measured_batches
from grsd_jax.experiments.common.measurement import PROVENANCE, header
from grsd_jax.experiments.common.networks import make_model
from grsd_jax.experiments.common.tables import aligned, number
from grsd_jax.experiments.common.training import TrainState, make_schedule, train
from grsd_jax.experiments.track.log import ProbeLog
from grsd_jax.models import linen_outputs

#: The settings that decide what is recorded; a run resumes only under the same.
SETTINGS = (
    "record_every",
    "batch_size",
    "num_batches",
    "num_shells",
    "solver",
    "block_size",
    "num_pairs",
)

#: The outer edges of the shells. The spectrum of a fresh network says little of that of
#: a trained one, whose largest value is some hundred or ten thousand times as large.
LAMBDA_RANGE = (1e-2, 1e5)


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
        batches = measured_batches(dataset, config)
        epoch_steps = len(dataset.train_images) // config.train_batch_size
        steps = epoch_steps * config.epochs
        if 0 < steps < config.record_every:
            raise UserError(
                f"--record_every: expected at most the {steps} steps of the training, "
                f"got {config.record_every}."
            )
        schedule = make_schedule(config, total_steps=steps)
        self._key = jax.random.key(config.seed)
        self._probe = make_probe(
            Problem(linen_outputs(model, {}), batches),
            every=config.record_every,
            solver=config.solver,
            edges=np.geomspace(*LAMBDA_RANGE, config.num_shells + 1).tolist(),
            window=Window(config.num_pairs, tolerance=0.01),
            # Momentum mu without dampening moves 1 / (1 - mu) times as far.
            schedule=lambda step: schedule(step) / (1 - config.momentum),
        )
        self._since, self._steps = time.perf_counter(), 0

    def init(self, state: TrainState) -> ProbeState:
        """Returns the probe's state before its first record."""
        return self._probe.init(self._key, state.params, problem=self._problem(state))

    def rewind(self, own: ProbeState) -> None:
        """Drops the lines after this state, and a last one that was cut short."""
        last = int(own.last_step)
        kept = [line["step"] for line in self.log.rewind(last)]
        if last >= 0 and kept[-1:] != [last]:
            wanted = f"the record of step {last}, the last before the checkpoint"
            raise files.cannot_read(self.log.path, wanted, f"{kept[-1:]}")

    def update(self, own: ProbeState, state: TrainState, step: int) -> ProbeState:
        """Takes a record if one is due, and appends its line."""
        self._steps += 1
        if step % self._probe.every:
            return own
        jax.block_until_ready(state.params)
        passed = time.perf_counter() - self._since
        step_seconds = passed / self._steps if step else float("nan")
        own, record = self._probe.update(
            own,
            state.params,
            step,
            problem=self._problem(state),
            step_seconds=step_seconds,
        )
        if record is not None:
            self.log.append(record, train_step_seconds=step_seconds)
        self._since, self._steps = time.perf_counter(), 0
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
        metrics = records.read_jsonl(folder / "metrics.jsonl")
        with files.reading(tracker.log.path, "the records of a probe"):
            entries[name] = summary(lines[name]) | PROVENANCE
        entries[name] |= {
            "test_accuracy": result.test_accuracy,
            "train_seconds": metrics[-1]["seconds"],
            "effective_time": "sum of learning rate / (1 - momentum) over the steps",
            "data_fingerprint": dataset.fingerprint,
        }
    return header(config) | {"tracks": entries}, lines


def summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarises the records of one network.

    Args:
        lines: The records, in order.

    Returns:
        Counts, the last exponent, and medians of the closure error, of the share
        between shells that are not neighbours, and of the probe's cost, the first two
        records left out of the cost because they compile.
    """
    return {
        "num_records": len(lines),
        "finite": all(line["finite"] for line in lines),
        "num_resolved": lines[-1]["num_resolved"],
        "exponent": lines[-1]["exponent"],
        "exponent_interval": lines[-1]["exponent_interval"],
        "closure_error_median": _median(lines, "closure_error"),
        "non_adjacent_share_median": _median(lines, "non_adjacent_share"),
        "record_seconds_median": _median(lines[2:], "seconds"),
        "train_step_seconds_median": _median(lines[2:], "train_step_seconds"),
        "cost_in_steps_median": _median(lines[2:], "cost_in_steps"),
        "cost_in_gradients_median": _median(lines[2:], "cost"),
    }


#: The rows of `format_tracks`: a key of `summary`, what the table says, its format.
_ROWS = (
    ("test_accuracy", "test accuracy", ".4f"),
    ("num_records", "records", "d"),
    ("num_resolved", "resolved pairs, last record", "d"),
    ("exponent", "velocity exponent p, last record", ".2f"),
    ("closure_error_median", "closure error, median", ".2f"),
    ("non_adjacent_share_median", "non-adjacent share, median", ".2f"),
    ("record_seconds_median", "seconds a record, median", ".2f"),
    ("cost_in_steps_median", "cost of a record in training steps", ".1f"),
)


def format_tracks(tracks: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns what was tracked as a table, a column for each network.

    Args:
        tracks: Entries of ``results.json`` by the network's name.

    Returns:
        The table, with its legend.
    """
    rows = [["quantity", *(TITLES[name] for name in tracks)]]
    for key, title, spec in _ROWS:
        cells = [_cell(track.get(key), spec) for track in tracks.values()]
        rows.append([title, *cells])
    legend = (
        "Closure error: |predicted - measured change of the shells' energies| over the "
        "measured one.\n"
        "Non-adjacent share: of the transfer, between shells that are not neighbours."
    )
    return f"{aligned(rows)}\n{legend}"


def _cell(value: Any, spec: str) -> str:
    return number(value, spec if isinstance(value, int) else spec.replace("d", ".0f"))


def _median(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    found = [line[name] for line in lines if line.get(name) is not None]
    return float(np.median(found)) if found else None
