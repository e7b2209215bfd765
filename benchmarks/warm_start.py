"""How many products the probe saves when Lanczos starts from the previous pairs.

Trains a network of two hidden layers on the embedded textures, and finds the leading
pairs of its kernel every few steps, to the same tolerance from a Gaussian block (cold)
and from a Gaussian block of the span of the pairs before (warm). Prints the columns
that either multiplied, and the largest error of a value against the dense kernel.

Example:
  python benchmarks/warm_start.py --out docs/results/warm_start.json
"""

import argparse

import grsd_jax as grsd
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from grsd_jax.dynamics.moving_spectrum import start_block
from grsd_jax.experiments.common import records
from grsd_jax.experiments.common.data import evaluation_batches, synthetic_textures
from grsd_jax.experiments.common.runs import environment
from grsd_jax.linalg import leading_eigenpairs
from grsd_jax.models import linen_outputs

NUM_PAIRS, TOLERANCE, RATE, RECORDS = 32, 1e-3, 0.05, 6


class Network(nn.Module):
    """Two hidden layers of gelu."""

    @nn.compact
    def __call__(self, x):
        """Returns the logits."""
        x = x.reshape(x.shape[0], -1)
        for _ in range(2):
            x = jax.nn.gelu(nn.Dense(64)(x))
        return nn.Dense(10)(x)


class Training:
    """The network, its batches, and a training that repeats itself."""

    def __init__(self):
        self.data = synthetic_textures(num_train=512, num_test=64)
        model = Network()
        example = self.data.train_images[:1]
        self.params = model.init(jax.random.key(0), example)["params"]
        batches = evaluation_batches(
            self.data.test_images,
            self.data.test_labels,
            num_batches=1,
            batch_size=40,
            seed=0,
        )
        self.problem = problem = grsd.Problem(linen_outputs(model, {}), batches)

        @jax.jit
        def step(params, batch):
            batches = jax.tree.map(lambda leaf: leaf[None], batch)
            gradient = jax.grad(problem.replace(batches=batches).loss)(params)
            return jax.tree.map(lambda p, g: p - RATE * g, params, gradient)

        self.step = step

    def train(self, params, first, count):
        """Does ``count`` steps after the first ``first`` ones."""
        for step in range(first, first + count):
            chosen = np.random.default_rng(step).integers(0, 512, 64)
            images, labels = self.data.train_images, self.data.train_labels
            batch = {"image": images[chosen], "label": labels[chosen]}
            params = self.step(params, batch)
        return params

    def kernel(self, params):
        """Returns the kernel, and its eigenvalues from the dense matrix, descending."""
        dense = grsd.kernel_dense(self.problem, params)
        values = np.linalg.eigvalsh(np.asarray(dense, np.float64))[::-1]
        return grsd.linearize_kernel(self.problem, params), values


def compare(training: Training, width: int, every: int) -> dict[str, float]:
    """Returns mean columns and largest errors of cold and warm starts."""
    columns, errors = {"cold": [], "warm": []}, {"cold": [], "warm": []}
    params, vectors = training.train(training.params, 0, 50), None
    for record in range(RECORDS):
        key = jax.random.fold_in(jax.random.key(1), record)
        kernel, exact = training.kernel(params)
        cold = jnp.zeros((kernel.dimension, NUM_PAIRS), kernel.dtype)
        starts = {"cold": cold} | ({} if vectors is None else {"warm": vectors})
        for name, basis in starts.items():
            block = start_block(basis, key, name == "warm", width=width)
            found = leading_eigenpairs(
                kernel.matmat, block, NUM_PAIRS, key=key, tolerance=TOLERANCE
            )
            assert found.converged.all()
            if vectors is not None:
                columns[name].append(found.num_columns)
                error = np.abs(np.asarray(found.values) / exact[:NUM_PAIRS] - 1)
                errors[name].append(error.max())
            latest = found.vectors
        vectors = latest
        params = training.train(params, 50 + record * every, every)
    means = {f"{name}_columns": float(np.mean(columns[name])) for name in columns}
    worst = {f"{name}_error": float(np.max(errors[name])) for name in errors}
    return {"block_size": width, "every": every} | means | worst


def main(out: str | None) -> None:
    """Measures every combination, prints the rows and writes them."""
    training, rows = Training(), []
    for width in (4, 8):
        for every in (1, 10, 50):
            rows.append(compare(training, width, every))
            print(rows[-1], flush=True)
    if out:
        options = {"num_pairs": NUM_PAIRS, "tolerance": TOLERANCE, "n": 400}
        results = {"config": options, "rows": rows}
        results["environment"] = environment(precision="default")
        records.write_json(out, results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", help="Write the rows to this JSON file.")
    main(parser.parse_args().out)
