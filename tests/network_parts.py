"""Parameters, inputs and layers of which the networks of the tests are built."""

import jax
import jax.numpy as jnp
import numpy as np


def normals(seed, /, **shapes):
    """Returns a dictionary of normal numbers, float64 where 64 bits are on."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(0.6 * rng.normal(size=shape), float)
        for name, shape in shapes.items()
    }


def vectors(*shape, num_examples=3, num_classes=3, seed=7):
    """Returns a batch of normal inputs ``[N, *shape]`` with one label an example."""
    rng = np.random.default_rng(seed)
    return {
        "x": jnp.asarray(rng.normal(size=(num_examples, *shape)), float),
        "label": jnp.asarray(rng.integers(0, num_classes, num_examples), jnp.int32),
    }


def tokens(length=4, vocabulary=3, num_examples=3, seed=7):
    """Returns a batch of integers ``[N, T]`` with a label at every position."""
    rng = np.random.default_rng(seed)
    shape = (num_examples, length)
    return {
        "x": jnp.asarray(rng.integers(0, vocabulary, shape), jnp.int32),
        "label": jnp.asarray(rng.integers(0, vocabulary, shape), jnp.int32),
    }


def rms_norm(x, gain):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * gain


def layer_norm(x, gain, shift):
    centred = x - jnp.mean(x, -1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-6)
    return centred * scale * gain + shift
