"""What a record of the probe costs, in gradients and in training steps.

Trains a ResNet-18 on the embedded textures, with three probes that look on in turn: one
that records the exact balance by the dense solver, one by Lanczos, and one with the
instantaneous rates beside the balance, which is what the probe recorded alone in its
first version. What the rates cost is the difference of the third and the first.

Example:
  python benchmarks/record_cost.py --out docs/results/track/record_cost.json
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grsd_jax as grsd
import jax
import numpy as np
from grsd_jax.dynamics import KrylovSteps
from grsd_jax.experiments.common import records
from grsd_jax.experiments.common.config import Config
from grsd_jax.experiments.common.data import evaluation_batches, synthetic_textures
from grsd_jax.experiments.common.networks import init_weights, make_model
from grsd_jax.experiments.common.runs import environment
from grsd_jax.experiments.common.tables import aligned, number
from grsd_jax.models import linen_outputs

from comparison.machine import describe_machine

#: How the probes differ.
PROBES: dict[str, dict[str, Any]] = {
    "balance, dense": {"solver": "dense"},
    "balance, Lanczos": {"solver": KrylovSteps()},
    "balance and rates, dense": {"solver": "dense", "instantaneous": True},
}

RATE, BATCH, CLASSES = 0.02, 96, 10


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table, and writes it."""
    options = parsed(arguments)
    rows, about = measured(options)
    print(table(rows))
    if options.out:
        report = {
            "settings": {k: v for k, v in vars(options).items() if k != "out"} | about,
            "rows": rows,
            "machine": describe_machine(),
            "environment": environment(precision="default"),
        }
        records.write_json(options.out, report)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options of the command line, those of a rehearsal if it is one."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="resnet18", help="The network.")
    add("--width", type=int, default=8, help="Channels of its first stage.")
    add("--images", type=int, default=32, help="Images N that the probes measure on.")
    add("--every", type=int, default=8, help="Training steps between two records.")
    add("--records", type=int, default=5, help="Records that count, after the first.")
    add("--rehearse", action="store_true", help="Run tiny sizes, for a test.")
    add("--out", type=Path, help="The JSON file.")
    options = parser.parse_args(arguments)
    if options.rehearse:
        vars(options).update(model="mlp", images=4, every=1, records=1)
    return options


def measured(
    options: argparse.Namespace,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns the medians of each probe, and n and P."""
    data = synthetic_textures(num_train=BATCH, num_test=options.images)
    config = Config(model=options.model, width=options.width)
    model = make_model(options.model, CLASSES, config)
    weights = init_weights(model, data.test_images.shape[1:], 0)
    outputs = linen_outputs(model, {"batch_stats": weights.batch_stats})

    def problem_of(images: np.ndarray, labels: np.ndarray) -> grsd.Problem:
        size = {"num_batches": 1, "batch_size": len(images), "seed": 0}
        return grsd.Problem(outputs, evaluation_batches(images, labels, **size))

    problem = problem_of(data.test_images, data.test_labels)
    trained = problem_of(data.train_images, data.train_labels)

    @jax.jit
    def step(params: Any) -> Any:
        gradient = jax.grad(trained.loss)(params)
        return jax.tree.map(lambda p, g: p - RATE * g, params, gradient)

    probes = {
        name: grsd.make_probe(problem, every=options.every, schedule=RATE, **settings)
        for name, settings in PROBES.items()
    }
    params = weights.params
    states = {
        name: probe.init(jax.random.key(0), params) for name, probe in probes.items()
    }
    found: dict[str, list[Any]] = {name: [] for name in probes}
    seconds = [_seconds(step, params) for _ in range(4)][1:]  # the first one compiles
    # The first multiple is remembered, and the first record compiles.
    for done in range((options.records + 2) * options.every):
        if done % options.every == 0:
            for name, probe in probes.items():
                states[name], record = probe.update(
                    states[name], params, done, step_seconds=float(np.median(seconds))
                )
                found[name] += [] if done < 2 * options.every else [record]
        params = step(params)
    rows = [
        {"probe": name}
        | {
            quantity: float(np.median([getattr(x, quantity) for x in each]))
            for quantity in ("seconds", "cost", "cost_in_steps")
        }
        for name, each in found.items()
    ]
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    about = {"n": problem.dimension(params), "num_params": size}
    return rows, about | {"step_seconds": float(np.median(seconds))}


def _seconds(step: Any, params: Any) -> float:
    started = time.perf_counter()
    jax.block_until_ready(step(params))
    return time.perf_counter() - started


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the medians, a row for each probe and one for the rates alone."""
    by_name = {row["probe"]: row for row in rows}
    names = ("seconds", "cost", "cost_in_steps")
    both, alone = (by_name[x] for x in ("balance and rates, dense", "balance, dense"))
    rates = {name: both[name] - alone[name] for name in names}
    cells = [["a record of", "seconds", "gradients", "training steps"]]
    for title, row in [*by_name.items(), ("rates alone, by difference", rates)]:
        cells.append([title, *(number(row[name], ".3g") for name in names)])
    return aligned(cells)


if __name__ == "__main__":
    main()
