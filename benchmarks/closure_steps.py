"""Over which steps the balance of the shells closes, with relu and with gelu.

Takes the ResNet-18 that track.py left in WORKDIR, in float64 and in float32, and
compares the predicted rates of the shells' energies with central differences over
several relative steps, once as it is and once with gelu in the place of relu.

Example:
  python benchmarks/closure_steps.py --workdir runs/track_cifar --dataset cifar10 \
      --out docs/results/track_cifar10_w16/closure_steps_w8.json
"""

import argparse
import dataclasses

import grsd_jax as grsd
import jax
import jax.numpy as jnp
import numpy as np
from grsd_jax.dynamics import Instantaneous
from grsd_jax.experiments.common import records
from grsd_jax.experiments.common.config import Config
from grsd_jax.experiments.common.data import evaluation_batches, load_dataset
from grsd_jax.experiments.common.networks import load_weights, make_model
from grsd_jax.experiments.common.runs import environment
from grsd_jax.experiments.track.run import LAMBDA_RANGE
from grsd_jax.models import linen_outputs
from grsd_jax.shells import SoftShells

STEPS = {"float64": (1e-3, 1e-4, 1e-6, 1e-8), "float32": (1e-3, 1e-4, 1e-5)}


def closure_errors(model, weights, batches, dtype):
    """Returns the closure error for each relative step."""

    def cast(leaf):
        leaf = np.asarray(leaf)
        return jnp.asarray(leaf, dtype if leaf.dtype.kind == "f" else leaf.dtype)

    params, stats, batches = jax.tree.map(cast, (*weights, batches))
    outputs_fn = linen_outputs(model, {"batch_stats": stats})
    problem = grsd.Problem(outputs_fn, batches)
    found = {}
    for step in STEPS[np.dtype(dtype).name]:
        probe = grsd.make_probe(
            problem,
            every=1,
            solver="dense",
            shells=SoftShells(jnp.asarray(np.geomspace(*LAMBDA_RANGE, 13)[1:-1])),
            instantaneous=Instantaneous(closure_step=step),
        )
        _, record = probe.update(probe.init(jax.random.key(0), params), params, 0)
        found[f"{step:g}"] = float(record.instantaneous.closure.total_error)
    return found


def main(arguments: argparse.Namespace) -> None:
    """Measures every combination, prints the rows and writes them."""
    config = Config(workdir=arguments.workdir, dataset=arguments.dataset)
    dataset = load_dataset(config)
    weights = load_weights("resnet18", dataset, config)
    batches = evaluation_batches(
        dataset.test_images, dataset.test_labels, num_batches=1, batch_size=12, seed=0
    )
    rows = []
    for activation in ("relu", "gelu"):
        settings = dataclasses.replace(config, activation=activation)
        model = make_model("resnet18", dataset.num_classes, settings)
        for dtype in (jnp.float64, jnp.float32):
            with jax.enable_x64(dtype is jnp.float64):
                errors = closure_errors(model, weights, batches, dtype)
            row = {"activation": activation, "dtype": np.dtype(dtype).name}
            rows.append(row | {"closure_error": errors})
            print(rows[-1], flush=True)
    if arguments.out:
        results = {"rows": rows, "environment": environment(precision="default")}
        records.write_json(arguments.out, results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", required=True, help="The folder of track.py.")
    parser.add_argument("--dataset", default="synthetic", help="As for track.py.")
    parser.add_argument("--out", help="Write the rows to this JSON file.")
    main(parser.parse_args())
