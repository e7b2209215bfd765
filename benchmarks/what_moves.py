"""What really moves: networks, activations and optimizers side by side, on CIFAR-10.

Trains an MLP, a ResNet-18 and a PlainNet-18 for 128 steps under six settings, each of
which changes one thing of the first: SGD at rate 0.02 with gelu; relu; a small and a
large rate; momentum 0.9 at a rate that keeps the effective time of a step; AdamW. At
chosen steps it keeps all eigenpairs of the kernel of 32 test images, and takes the
exact balance between them. Writes what_moves.json, with everything that is drawn, and a
figure. A killed run goes on when the same command is given again.

Examples:
  python benchmarks/what_moves.py --data_dir PATH --out docs/results/what_moves
  python benchmarks/what_moves.py --data_dir PATH --seeds 0 1 2 --out runs/what_moves
  python benchmarks/what_moves.py --rehearse --out runs/rehearsal
"""

import argparse
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grsd_jax as grsd
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from grsd_jax.dynamics import ExactBalance, SpectralSnapshot, spectral_snapshot
from grsd_jax.dynamics.elapsed_time import MeasuredTime, time_between
from grsd_jax.experiments.common import plotting, records
from grsd_jax.experiments.common.config import TITLES, Config
from grsd_jax.experiments.common.data import (
    Dataset,
    evaluation_batches,
    load_dataset,
    measured_batches,
)
from grsd_jax.experiments.common.measurement import made_by
from grsd_jax.experiments.common.networks import make_model
from grsd_jax.experiments.common.runs import cached, environment
from grsd_jax.experiments.common.tables import aligned, number
from grsd_jax.experiments.common.training import TrainState, train
from grsd_jax.experiments.track.log import balance_line
from grsd_jax.experiments.track.quantities import lost_share, moved_share
from grsd_jax.experiments.transport.protocol import Protocol, grid_of
from grsd_jax.experiments.transport.quantities import law_of, resolution_of
from grsd_jax.models import linen_outputs

from comparison.machine import describe_machine

#: What each setting changes of the first.
SETTINGS: dict[str, dict[str, Any]] = {
    "SGD 0.02, gelu": {},
    "relu": {"activation": "relu"},
    "rate 0.005": {"learning_rate": 0.005},
    "rate 0.1": {"learning_rate": 0.1},
    "momentum 0.9, rate 0.002": {"momentum": 0.9, "learning_rate": 0.002},
    "AdamW 0.001": {"optimizer": "adamw", "learning_rate": 0.001},
}

NETWORKS = ("mlp", "resnet18", "plainnet18")

#: Features of the MLP; the others have 8 channels in their first stage.
_FEATURES = 64

#: Training steps, enough for three intervals of doubling time and all lengths h.
_STEPS = 128

#: Batches of training images, and their size, by whose loss the time is measured.
_TIMED = 8, 32


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains and compares what is not there yet, and writes what was found."""
    options = parsed(arguments)
    found = []
    for seed, network, setting in itertools.product(
        options.seeds, options.networks, options.settings
    ):
        config = configured(options, seed, network, setting)
        dataset = cut(load_dataset(config), config)
        path = options.out / "cells" / f"{network}-{_slug(setting)}-{seed}"
        origin = made_by(config, dataset) | {"steps": _STEPS}
        entry, _ = cached(path, origin, lambda c=config, d=dataset: (run(d, c), {}))
        found.append({"network": network, "setting": setting, "seed": seed} | entry)
        print(table(found[-1:]), flush=True)
    report = {
        "settings": SETTINGS,
        "runs": found,
        "machine": describe_machine(),
        "environment": environment(precision="highest"),
    }
    records.write_json(options.out / "what_moves.json", report)
    print(table(found))
    draw = {"what_moves": lambda: figure(found)}
    for path in plotting.save_figures(draw, options.out):
        print(path)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options of the command line, those of a rehearsal if it is one."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--dataset", default="cifar10", help="Dataset.")
    add("--data_dir", help="The folder of the TFDS data.")
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        help="One run of each for every seed.",
    )
    add("--networks", nargs="+", default=NETWORKS, choices=NETWORKS, help="Networks.")
    add(
        "--settings",
        nargs="+",
        default=list(SETTINGS),
        choices=SETTINGS,
        help="Settings.",
    )
    add("--rehearse", action="store_true", help="Run tiny sizes, for a test.")
    add("--out", type=Path, required=True, help="The folder for all files.")
    options = parser.parse_args(arguments)
    if options.rehearse:
        smaller = {"dataset": "synthetic", "networks": ["mlp"]}
        vars(options).update(smaller, settings=list(SETTINGS)[::5])
    return options


def configured(
    options: argparse.Namespace, seed: int, network: str, setting: str
) -> Config:
    """Returns the settings of one training."""
    chosen: dict[str, Any] = {
        "dataset": options.dataset,
        "data_dir": options.data_dir,
        "activation": "gelu",
        "learning_rate": 0.02,
        "momentum": 0.0,
        "train_batch_size": 8 if options.rehearse else 96,
        "batch_size": 4 if options.rehearse else 32,
        "num_batches": 1,
        "epochs": 1,
        "seed": seed,
        "model": network,
        "width": _FEATURES if network == "mlp" else 8,
        "checkpoint_every": _STEPS,
    }
    return Config(**chosen | SETTINGS[setting])


def cut(dataset: Dataset, config: Config) -> Dataset:
    """Returns the data with as many training images as the steps need."""
    size = _STEPS * config.train_batch_size
    return dataset._replace(
        train_images=dataset.train_images[:size],
        train_labels=dataset.train_labels[:size],
    )


class Watcher:
    """A `Callback` that keeps spectral snapshots, and what the time is measured by.

    Attributes:
        snapshots: By their steps.
        ends: Parameters and gradient flow of the training loss, by their steps.
    """

    settings: Mapping[str, Any] = {}

    def __init__(self, model: nn.Module, dataset: Dataset, config: Config):
        self._model, self._protocol = model, Protocol()
        outputs_fn = linen_outputs(model, {})
        self._problem = grsd.Problem(outputs_fn, measured_batches(dataset, config))
        batches = evaluation_batches(
            dataset.train_images,
            dataset.train_labels,
            num_batches=_TIMED[0],
            batch_size=_TIMED[1],
            seed=config.seed,
        )
        self._training = grsd.Problem(outputs_fn, batches)
        self.snapshots: dict[int, SpectralSnapshot] = {}
        self.ends: dict[int, tuple[Any, Any]] = {}

    def init(self, state: TrainState) -> dict[str, Any]:
        """Returns no state: a training is watched from its beginning or not at all."""
        del state
        return {}

    def rewind(self, own: Any) -> None:
        """Does nothing."""

    def update(self, own: Any, state: TrainState, step: int) -> Any:
        """Keeps what belongs to a step."""
        outputs_fn = linen_outputs(self._model, {"batch_stats": state.batch_stats})
        if step in self._protocol.instants(_STEPS):
            problem = self._problem.replace(outputs_fn=outputs_fn)
            self.snapshots[step] = spectral_snapshot(problem, state.params)
        if step in (0, *self._protocol.ends(_STEPS)):
            problem = self._training.replace(outputs_fn=outputs_fn)
            flow = grsd.gradient_flow_direction(problem, state.params)
            # The loop gives its buffers away.
            self.ends[step] = jax.tree.map(jnp.copy, state.params), flow
        return own

    def time(self, start: int, end: int) -> MeasuredTime:
        """Returns the effective time between two steps."""
        params, flows = zip(self.ends[start], self.ends[end], strict=True)
        return time_between(list(params), list(flows))


def run(dataset: Dataset, config: Config) -> dict[str, Any]:
    """Trains a network under one setting, and returns what moved."""
    model, protocol = make_model(config.model, dataset.num_classes, config), Protocol()
    watcher = Watcher(model, dataset, config)
    with tempfile.TemporaryDirectory() as folder:
        done = train(model, dataset, config, folder, name="run", callback=watcher)
    ends, rate = protocol.ends(_STEPS), config.learning_rate / (1 - config.momentum)
    measured = [watcher.time(*pair) for pair in itertools.pairwise((0, *ends))]
    measured = np.cumsum([float(time.elapsed) for time in measured])
    # That of SGD needs no measurement.
    times = rate * np.array(ends) if config.optimizer == "sgd" else measured
    entry = {
        "test_accuracy": done.test_accuracy,
        "ends": ends,
        "times": times,
        "measured_times": measured,
        "resolution": resolution_of(watcher.snapshots, protocol.looks(_STEPS)),
        **last_interval(watcher.snapshots, ends),
    }
    if np.all(np.isfinite(times)):
        by_step = dict(zip(ends, times, strict=True))
        law = law_of(watcher.snapshots, by_step, ends, width=1 / 2, grid="top")
        entry |= {name: law.numbers[name] for name in ("exponents", "exponent_errors")}
    return entry


def last_interval(
    snapshots: Mapping[int, SpectralSnapshot], ends: Sequence[int]
) -> dict[str, Any]:
    """Returns the balance of the last interval, in soft and in sharp shells.

    Velocities are amounts here, shifts in log lambda: the time is taken as 1.
    """
    before, after = snapshots[ends[-2]], snapshots[ends[-1]]
    top = float(np.sqrt(before.values[0] * after.values[0]))

    def balance(width: float) -> ExactBalance:
        shells = grid_of("top", top, width)
        return grsd.dynamics.exact_balance(before, after, shells, elapsed=1.0)

    soft, sharp = balance(1 / 2), balance(0)
    line, energy = balance_line(jax.device_get(soft)), np.sum(soft.energies[0])
    rotation, drift = (np.asarray(x) / energy for x in (sharp.rotation, sharp.drift))
    return {
        "steps": [ends[-2], ends[-1]],
        "top": top,
        "lost": lost_share(line),
        "moved": moved_share(line),
        "energies": np.asarray(sharp.energies) / energy,
        "flux": np.asarray(soft.flux) / energy,
        "flux_error": np.asarray(soft.flux_error) / energy,
        "rotation": rotation,
        "drift": drift,
        "shift": np.where(soft.velocity_mask, soft.velocity, np.nan),
        "shift_error": np.where(soft.velocity_mask, soft.velocity_error, np.nan),
        "null": np.where(soft.velocity_mask, soft.counting_velocity, np.nan),
    }


def turned(entry: Mapping[str, Any]) -> float:
    """Returns the share of rotation in the flux, by the absolute amounts at edges."""
    turning, growing = (np.sum(np.abs(entry[name])) for name in ("rotation", "drift"))
    return float(turning / (turning + growing))


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table with a row for each run."""
    headings = [
        "network", "setting", "seed", "accuracy", "tau", "measured", "lost",
        "moved", "rotation", "shift", "of it growth", "p",
        "moved, h = 1", "non-adjacent", "h = 64", "non-adjacent, 64",
    ]  # fmt: skip
    return aligned([headings, *map(_row, runs)])


def _row(entry: Mapping[str, Any]) -> list[str]:
    looks = {x["length"]: x for x in entry["resolution"]}
    numbers = [
        entry["test_accuracy"],
        entry["times"][-1],
        entry["measured_times"][-1],
        entry["lost"],
        entry["moved"],
        turned(entry),
        _median(entry["shift"]),
        _median(entry["null"]),
        _median(entry.get("exponents", [])),
        *(looks[h][x] for h in (1, 64) for x in ("moved", "non_adjacent_share")),
    ]
    cells = [number(float(x), ".2f") for x in _numbers(numbers)]
    return [entry["network"], entry["setting"], str(entry["seed"]), *cells]


def figure(runs: Sequence[Mapping[str, Any]]) -> Any:
    """Draws the first seed: a column for each network, a color for each setting."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(entry["network"] for entry in runs))
    drawn = Figure(figsize=(plotting.PAGE_WIDTH, 8.2), layout="constrained")
    axes = drawn.subplots(5, len(names), sharey="row", squeeze=False)
    lengths = Protocol().lengths
    colors = dict(zip(SETTINGS, mpl.colormaps["Dark2"].colors, strict=False))
    for column, name in zip(axes.T, names, strict=True):
        column[0].set_title(TITLES[name])
        for entry in runs:
            if entry["network"] == name and entry["seed"] == runs[0]["seed"]:
                _draw(column, entry, colors[entry["setting"]])
        column[0].set(xlabel="sharp shell, from small to large")
        for axis in column[1:3]:
            axis.axhline(0, color="0.8", linewidth=0.6, zorder=0)
            axis.set(xscale="log", xlabel="edge over the largest eigenvalue")
        for axis in column[3:]:
            axis.set_xscale("log", base=2)
            axis.set_xticks(lengths, [str(length) for length in lengths])
            axis.set_xlabel("training steps $h$")
    labels = (
        "energy before,\nshare", "flux $F_k\\,/\\,|e\\,|^2$",
        "shift $F_k/\\varepsilon_k$;\ndotted: growth", "moved, share",
        "non-adjacent\nshare of it",
    )  # fmt: skip
    for axis, label in zip(axes[:, 0], labels, strict=True):
        axis.set_ylabel(label)
    for axis in axes[3:, 0]:  # when all are drawn, since a row shares its limits
        axis.set_ylim(bottom=0)
    plotting.shared_legend(drawn, axes.flat, loc="outside upper center", ncols=3)
    return drawn


def _draw(column: Any, entry: Mapping[str, Any], color: Any) -> None:
    label, places = entry["setting"], np.asarray(grid_of("top", 1.0, 0).edges)
    options = {"color": color, "marker": ".", "markersize": 3}
    column[0].plot(_numbers(entry["energies"][0]), label=label, **options)
    column[1].errorbar(
        places, _numbers(entry["flux"]), _numbers(entry["flux_error"]), **options
    )
    column[2].errorbar(
        places, _numbers(entry["shift"]), _numbers(entry["shift_error"]), **options
    )
    column[2].plot(places, _numbers(entry["null"]), ":", **options)
    looks = entry["resolution"]
    lengths = [look["length"] for look in looks]
    for axis, name in zip(column[3:], ("moved", "non_adjacent_share"), strict=True):
        axis.plot(lengths, _numbers(look[name] for look in looks), **options)


def _numbers(values: Any) -> np.ndarray:
    """Returns numbers as an array, NaN for the null of a file."""
    return np.array([np.nan if x is None else x for x in values], np.float64)


def _median(values: Any) -> float:
    known = _numbers(values)
    known = known[np.isfinite(known)]
    return float(np.median(known)) if len(known) else float("nan")


def _slug(setting: str) -> str:
    return "".join(x if x.isalnum() else "_" for x in setting)


if __name__ == "__main__":
    main()
