"""Stage 3: ResNet-18 and PlainNet-18 at width 64, trained on CIFAR-10 and measured.

Each network is trained for a share of the minutes with a cosine decay of the rate, its
products at TF32; the measurement is at the highest precision, over one stack of test
images. The quantities are those of the study; eigenvalues and couplings are kept, so
that other statistics need no new run.

Example:
  python benchmarks/gpu/science.py --data_dir "$TFDS_DATA_DIR" --out runs/gpu
"""

import argparse
import dataclasses
import functools
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import packed
from flax.traverse_util import flatten_dict, unflatten_dict
from grsd_jax import measure_coupling
from grsd_jax.experiments.common import data
from grsd_jax.experiments.common.config import Config, UserError
from grsd_jax.experiments.common.measurement import (
    PROVENANCE,
    measurement_arrays,
    measurement_entry,
    measurement_options,
    network_problem,
)
from grsd_jax.experiments.common.networks import Weights, init_weights, make_model
from grsd_jax.experiments.common.quantities import coupling_quantities
from grsd_jax.experiments.common.training import evaluate, init_state, train_step

NETWORKS = ("resnet18", "plainnet18")

#: Of which network's weights each measurement is made; that of the paper comes last.
MEASUREMENTS = {
    "resnet18": ("resnet18", "resnet18"),
    "plainnet18": ("plainnet18", "plainnet18"),
    "plainnet18_shared": ("plainnet18", "resnet18"),
}

#: Share of a network's half of the time that it trains; the rest is for compiling and
#: measuring.
_TRAINING = 0.4

#: Steps that are timed to tell how many there is time for.
_TIMED_STEPS = 10


def main() -> None:
    """Runs what the command line asks for."""
    options = arguments()
    common.set_xla_flags(options.xla_flags)
    clock = common.Clock(options.minutes)
    try:
        config, dataset = settings(options), load(options)
    except UserError as error:
        sys.exit(str(error))
    common.claim(
        options.out,
        "science",
        {**dataclasses.asdict(config), "data_fingerprint": dataset.fingerprint},
    )
    results = common.Results(options.out / "science", clock)
    seconds = _TRAINING * 60 * options.minutes / len(NETWORKS)
    for name in NETWORKS:
        results.measure(
            f"{name}_training",
            functools.partial(train, name, dataset, config, results.folder, seconds),
            needs=min(20.0, 12 * options.minutes),
        )
        results.measure(name, measuring(name, dataset, config, results.folder))
    last = "plainnet18_shared"
    results.measure(last, measuring(last, dataset, config, results.folder))
    report = {
        "header": common.header(common.jax_device()),
        "rehearsal": options.rehearse,
        "data": {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "train": len(dataset.train_images),
            "test": len(dataset.test_images),
        },
        "config": dataclasses.asdict(config),
        "left_out": results.left_out,
        **{
            name: common.read_json(results.path(name))
            for name in (*MEASUREMENTS, *(f"{n}_training" for n in NETWORKS))
        },
    }
    common.write_json(options.out / "science.json", report)
    print(table(report))


def arguments() -> argparse.Namespace:
    """Returns what the command line says."""
    parser = common.parser(__doc__, minutes=4)
    parser.add_argument("--data_dir", help="TFDS data, or what pack.py wrote.")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=32, help="N.")
    parser.add_argument("--num_batches", type=int, default=4, help="K.")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def settings(options: argparse.Namespace) -> Config:
    """Returns the settings of the study, at the width and on the batches asked for."""
    small = options.rehearse
    return Config(
        dataset="synthetic" if options.data_dir is None else "cifar10",
        seed=options.seed,
        width=2 if small else options.width,
        train_batch_size=8 if small else 128,
        batch_size=2 if small else options.batch_size,
        num_batches=2 if small else options.num_batches,
        solver="dense",
        reduction="stack",
    )


def load(options: argparse.Namespace) -> data.Dataset:
    """Returns the data: packed, in the layout of TFDS, or textures to rehearse."""
    if options.data_dir is None and options.rehearse:
        return data.synthetic_textures(num_train=64, num_test=32)
    if options.data_dir and (Path(options.data_dir) / packed.FILE).exists():
        return packed.read(Path(options.data_dir) / packed.FILE)
    return data.load_cifar10(options.data_dir)


def train(
    name: str, dataset: data.Dataset, config: Config, folder: Path, seconds: float
) -> dict[str, Any]:
    """Trains a network for so many seconds, after its program has been compiled.

    Returns:
        Steps, epochs, times, losses and the accuracy on the test images.
    """
    model = make_model(name, dataset.num_classes, config)
    weights = init_weights(model, dataset.train_images.shape[1:], config.seed)
    # The rate is part of the state, so that one program serves any number of steps.
    optimizer = optax.inject_hyperparams(optax.sgd)(
        learning_rate=config.learning_rate, momentum=config.momentum
    )
    state = init_state(weights, optimizer)
    images = jnp.asarray(dataset.train_images)
    labels = jnp.asarray(dataset.train_labels)
    order = batches_of(len(labels), config.train_batch_size, config.seed)
    losses = []

    def step(state: Any, rate: float) -> tuple[Any, Any]:
        state.opt_state.hyperparams["learning_rate"] = jnp.float32(rate)
        chosen = next(order)
        return train_step(model, optimizer, state, *_take(images, labels, chosen))

    with jax.default_matmul_precision("tensorfloat32"):
        began = time.perf_counter()
        state, metrics = step(state, config.learning_rate)
        jax.block_until_ready(metrics)
        compiling = time.perf_counter() - began
        began, total, done = time.perf_counter(), math.inf, 1
        while done < total:
            share = 0.0 if math.isinf(total) else done / total
            rate = config.learning_rate * (1 + math.cos(math.pi * share)) / 2
            state, metrics = step(state, rate)
            done += 1
            if done == _TIMED_STEPS + 1:
                jax.block_until_ready(metrics)
                each = (time.perf_counter() - began) / _TIMED_STEPS
                total = max(done + 1, int(seconds / each))
            if done % 50 == 0:
                losses.append(float(metrics["loss"]))
                if time.perf_counter() - began > 1.5 * seconds:
                    break  # far slower than the first steps told
        jax.block_until_ready(state)
        training = time.perf_counter() - began
    if not bool(metrics["finite"]):
        raise FloatingPointError(f"{name}: the training is not finite")
    weights = Weights(state.params, state.batch_stats)
    save_weights(folder / f"{name}.weights.npz", weights)
    test = (dataset.test_images, dataset.test_labels)
    return {
        "steps": done,
        "planned_steps": total,
        "epochs": done * config.train_batch_size / len(labels),
        "compile_seconds": compiling,
        "training_seconds": training,
        "losses_every_50_steps": losses,
        "last_loss": float(metrics["loss"]),
        "test_accuracy": evaluate(model, weights, *test),
    }


def batches_of(count: int, size: int, seed: int) -> Any:
    """Yields the indices of batch after batch, in a new order every epoch."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(count)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


@jax.jit
def _take(images: jax.Array, labels: jax.Array, chosen: jax.Array) -> Any:
    return images[chosen], labels[chosen]


def save_weights(path: Path, weights: Weights) -> None:
    """Writes weights, whole or not at all."""
    partial = path.with_name(f"{path.stem}.part.npz")
    np.savez(partial, **flatten_dict(weights._asdict(), sep="/"))
    partial.replace(path)


def load_weights(path: Path) -> Weights:
    """Returns the weights of `save_weights`."""
    with np.load(path) as file:
        arrays = {name: jnp.asarray(file[name]) for name in file.files}
    return Weights(**unflatten_dict(arrays, sep="/"))


def measuring(
    title: str, dataset: data.Dataset, config: Config, folder: Path
) -> Callable[[], dict[str, Any]]:
    """Returns what measures a network at its weights, and keeps the arrays."""

    def run() -> dict[str, Any]:
        name, trained = MEASUREMENTS[title]
        weights = load_weights(folder / f"{trained}.weights.npz")
        model = make_model(name, dataset.num_classes, config)
        batches = data.measured_batches(dataset, config)
        batches = jax.tree.map(jnp.asarray, batches)
        problem = network_problem(model, weights, batches, config)
        options = measurement_options(problem, weights.params, config)
        started = time.perf_counter()
        with jax.default_matmul_precision("highest"):
            measured = jax.device_get(
                measure_coupling(
                    problem, weights.params, key=jax.random.key(config.seed), **options
                )
            )
        if not measured.finite:
            raise FloatingPointError(f"{title}: the measurement is not finite")
        arrays = measurement_arrays(measured)
        partial = folder / f"{title}.arrays.part.npz"
        np.savez_compressed(partial, **arrays)
        partial.replace(folder / f"{title}.arrays.npz")
        test = (dataset.test_images, dataset.test_labels)
        return {
            "seconds": common.summary([time.perf_counter() - started]),
            "weights_of": trained,
            "test_accuracy": evaluate(model, weights, *test),
            "quantities": coupling_quantities(measured),
            **measurement_entry(measured, config),
            **PROVENANCE,
        }

    return run


def table(report: dict[str, Any]) -> str:
    """Returns a short table of the quantities of each measurement."""
    lines = []
    for title in MEASUREMENTS:
        if report[title] is None:
            lines.append(f"{title}: not measured")
            continue
        found = report[title]
        numbers = {"test_accuracy": found["test_accuracy"], **found["quantities"]}
        told = ", ".join(f"{name} {number:.3g}" for name, number in numbers.items())
        lines.append(f"{title}: n {found['n']}, {told}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
