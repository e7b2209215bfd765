"""Prints the peak memory of one measurement in this process, as JSON.

Run as ``python stack_memory.py NUM_BATCHES MAX_BYTES``: the stack of batches of 50
images through a small convolutional network, by Lanczos on the plain path, which holds
the residuals of all batches if they fit in MAX_BYTES.
"""

import json
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp

import grsd_jax
from grsd_jax import Binning, Lanczos, Problem
from grsd_jax import _memory as memory
from grsd_jax.kernel import products
from oracles import plain

NUM_EXAMPLES, NUM_CLASSES, SIDE = 50, 10, 16


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = nn.gelu(nn.Conv(8, (3, 3))(x))
        return nn.Dense(NUM_CLASSES)(jnp.mean(x, axis=(1, 2)))


def main(num_batches, max_bytes):
    products.default_bytes = lambda: max_bytes
    model = Network()
    leading = (num_batches, NUM_EXAMPLES)
    keys = jax.random.split(jax.random.key(0), 3)
    batches = {
        "image": jax.random.normal(keys[0], (*leading, SIDE, SIDE, 3)),
        "label": jax.random.randint(keys[1], leading, 0, NUM_CLASSES),
    }
    params = model.init(keys[2], batches["image"][0])["params"]

    def outputs_fn(params, batch):
        return model.apply({"params": params}, batch["image"])

    measured = grsd_jax.measure_coupling(
        plain(Problem(outputs_fn, batches)),
        params,
        key=keys[0],
        solver=Lanczos(block_size=8, num_steps=2),
        shells=Binning(num_shells=4, window=2, num_bootstrap=0),
    )
    jax.block_until_ready(measured)
    assert measured.jacobian == "plain"
    peak_mib = memory.peak_bytes() / 2**20
    print(json.dumps({"n": measured.vectors.shape[0], "peak_mib": peak_mib}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
