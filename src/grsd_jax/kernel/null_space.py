"""The exact null space that an error's constraints give M, whatever the parameters."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._typing import ErrorFn, PyTree
from grsd_jax.problem import Point


def free_start(point: Point, block: jax.Array, key: jax.Array) -> jax.Array:
    """Projects the exact null space of a softmax error out of a start block.

    Args:
        point: The problem at its parameters.
        block: ``[n, b]``.
        key: Consumed, where a random tangent has to decide; see `class_sums_vanish`.

    Returns:
        ``[n, b]``, orthogonal to the null vectors that are known.

    References:
        Paper 7.1; the observation is ours.
    """
    free = _centered(block, point.num_classes or point.error.shape[1])
    if point.num_classes is not None:
        return free
    return jnp.where(class_sums_vanish(point, key), free, block)


@partial(jax.jit, static_argnums=1)
def _centered(block: jax.Array, classes: int) -> jax.Array:
    """Returns a block without its means over the classes."""
    by_class = block.reshape(-1, classes, block.shape[1])
    free = by_class - jnp.mean(by_class, axis=1, keepdims=True)
    return free.reshape(block.shape)


def class_sums_vanish(point: Point, key: jax.Array) -> jax.Array:
    """Finds out whether ``sum_c de_ic / dtheta = 0``, as for a softmax error.

    Then the constant over classes is an exact null vector of M for every example. A
    random tangent u decides it: ``sum_c (J u)_ic`` vanishes with probability one only
    if every row sum does.

    Args:
        point: The problem; its first batch is used.
        key: Consumed for the tangent.

    Returns:
        [] bool.

    References:
        Paper 7.1; the observation is ours.
    """
    leaves, tree = jax.tree.flatten(point.params)
    keys = jax.random.split(key, len(leaves))
    tangent = [
        jax.random.normal(k, np.shape(leaf), jnp.result_type(leaf))
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return _class_sums_vanish(
        point.error_fn, point.params, point.parts[0], jax.tree.unflatten(tree, tangent)
    )


@jax.jit
def _class_sums_vanish(
    error_fn: ErrorFn, params: PyTree, batch: PyTree, tangent: PyTree
) -> jax.Array:
    # J u as the transpose of the pullback, which custom VJPs have and JVPs lack.
    error, pullback = jax.vjp(lambda p: error_fn(p, batch), params)
    moved = jax.linear_transpose(lambda u: pullback(u)[0], error)(tangent)[0]
    tolerance = 100 * jnp.finfo(moved.dtype).eps * jnp.max(jnp.abs(moved))
    return jnp.max(jnp.abs(jnp.sum(moved, axis=1))) <= tolerance
