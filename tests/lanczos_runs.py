"""Block Lanczos of dense matrices, as several test files run it."""

import functools

import jax
import jax.numpy as jnp

from grsd_jax.linalg import block_lanczos
from oracles import symmetric_with_spectrum


def run(matrix, block_size, num_steps, driver="scan", seed=7):
    dtype = matrix.dtype
    start = jax.random.normal(
        jax.random.key(seed), (matrix.shape[0], block_size), dtype
    )

    def matmat(block):
        return jnp.matmul(matrix, block, precision="highest")

    return block_lanczos(matmat, start, num_steps, key=jax.random.key(1), driver=driver)


@functools.partial(jax.jit, static_argnums=(1, 2))
def scanned(matrix, block_size, num_steps, seed=7):
    """Returns `run` of the matrix, compiled once for each shape."""
    return run(matrix, block_size, num_steps, seed=seed)


def run_spectrum(spectrum, block_size, num_steps, seed=0):
    """Returns a run in float32 of a matrix with the given eigenvalues."""
    dense, _ = symmetric_with_spectrum(spectrum)
    return scanned(jnp.asarray(dense, jnp.float32), block_size, num_steps, seed)
