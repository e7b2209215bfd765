"""A GPT in plain JAX, and the Gauss-Newton product that its kernel is measured beside.

Pre-norm blocks with causal attention, learned positions, and the embedding as the
output layer; the loss is the cross-entropy over the vocabulary at every position.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Size(NamedTuple):
    """The sizes of a GPT and of its batch.

    Attributes:
        layers: L.
        width: d, a multiple of 64 or below it.
        vocabulary: V.
        positions: T.
        examples: N.
    """

    layers: int
    width: int
    vocabulary: int
    positions: int
    examples: int

    @property
    def heads(self) -> int:
        """Attention heads, of 64 features each."""
        return max(1, self.width // 64)

    @property
    def dimension(self) -> int:
        """The dimension ``n = N T V`` of the error space."""
        return self.examples * self.positions * self.vocabulary


SIZES = {
    "gpt10": Size(6, 320, 8192, 256, 4),
    "gpt124": Size(12, 768, 50257, 256, 2),
}
TINY = Size(1, 16, 32, 8, 2)


def make_params(size: Size) -> dict[str, Any]:
    """Returns random weights, normal with variance ``1 / fan_in``."""
    keys = iter(jax.random.split(jax.random.key(0), 4 * size.layers + 2))
    width = size.width
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> jax.Array:
        values = jax.random.normal(next(keys), (rows, columns), jnp.float32)
        return values * np.float32(scale / math.sqrt(rows))

    def norm() -> dict[str, jax.Array]:
        return {"scale": 1 + zeros(width), "bias": zeros(width)}

    params: dict[str, Any] = {
        "tokens": matrix(width, size.vocabulary).T,
        "positions": matrix(width, size.positions, 0.3).T,
        "norm": norm(),
    }
    branch = 1 / math.sqrt(2 * size.layers)
    for layer in range(size.layers):
        params[f"block{layer + 1}"] = {
            "norm1": norm(),
            "qkv": matrix(width, 3 * width),
            "out": matrix(width, width, branch),
            "norm2": norm(),
            "up": matrix(width, 4 * width),
            "up_bias": zeros(4 * width),
            "down": matrix(4 * width, width, branch),
            "down_bias": zeros(width),
        }
    return params


def make_batches(size: Size) -> dict[str, jax.Array]:
    """Returns one batch of random tokens, with the leading axis K = 1."""
    shape = (1, size.examples, size.positions + 1)
    tokens = np.random.default_rng(1).integers(0, size.vocabulary, shape)
    tokens = jnp.asarray(tokens, jnp.int32)
    return {"tokens": tokens[..., :-1], "label": tokens[..., 1:]}


def random_vectors(params: dict[str, Any], count: int) -> dict[str, Any]:
    """Returns a tree like the parameters, of normal numbers with a leading axis b."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    drawn = [
        jax.random.normal(key, (count, *leaf.shape))
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, drawn)


def logits(params: dict[str, Any], batch: dict[str, jax.Array]) -> jax.Array:
    """Maps tokens ``[N, T]`` to logits ``[N, T, V]``."""
    tokens = batch["tokens"]
    width = params["tokens"].shape[1]
    x = params["tokens"][tokens] + params["positions"][None, : tokens.shape[1]]
    depth = sum(name.startswith("block") for name in params)
    for layer in range(depth):
        block = params[f"block{layer + 1}"]
        x = x + _attention(block, _normalized(block["norm1"], x), max(1, width // 64))
        hidden = _normalized(block["norm2"], x) @ block["up"] + block["up_bias"]
        x = x + jax.nn.gelu(hidden) @ block["down"] + block["down_bias"]
    return _normalized(params["norm"], x) @ params["tokens"].T


def _normalized(norm: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    centered = x - jnp.mean(x, axis=-1, keepdims=True)
    deviation = jnp.sqrt(jnp.mean(centered**2, axis=-1, keepdims=True) + 1e-5)
    return centered / deviation * norm["scale"] + norm["bias"]


def _attention(block: dict[str, Any], x: jax.Array, heads: int) -> jax.Array:
    count, positions, width = x.shape
    split = (x @ block["qkv"]).reshape(count, positions, 3, heads, width // heads)
    query, key, value = (split[:, :, index] for index in range(3))
    scores = jnp.einsum("nthd,nshd->nhts", query, key) / math.sqrt(width // heads)
    past = jnp.tril(jnp.ones((positions, positions), bool))
    scores = jax.nn.softmax(jnp.where(past, scores, -1e30), axis=-1)
    mixed = jnp.einsum("nhts,nshd->nthd", scores, value)
    return mixed.reshape(count, positions, width) @ block["out"]


@jax.jit
def gradient(params: dict[str, Any], batch: dict[str, jax.Array]) -> dict[str, Any]:
    """Returns the gradient of the mean loss, whose time is the unit of products."""

    def loss(params: dict[str, Any]) -> jax.Array:
        likelihoods = jax.nn.log_softmax(logits(params, batch))
        chosen = jnp.take_along_axis(likelihoods, batch["label"][..., None], -1)
        return -jnp.mean(chosen)

    return jax.grad(loss)(params)


@jax.jit
def gauss_newton(
    params: dict[str, Any], batch: dict[str, jax.Array], vectors: dict[str, Any]
) -> dict[str, Any]:
    """Computes ``J^T H J v`` for vectors with a leading axis b, as curvlinops does.

    One linearization and one pullback; H is the Hessian of the mean cross-entropy by
    the logits.
    """
    outputs, push = jax.linearize(lambda p: logits(p, batch), params)
    _, pull = jax.vjp(lambda p: logits(p, batch), params)
    chances = jax.nn.softmax(outputs)
    positions = outputs.shape[0] * outputs.shape[1]

    def product(vector: dict[str, Any]) -> dict[str, Any]:
        moved = push(vector)
        mean = jnp.sum(chances * moved, axis=-1, keepdims=True)
        return pull(chances * (moved - mean) / positions)[0]

    return jax.vmap(product)(vectors)
