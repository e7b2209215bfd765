"""Arguments turned into checked arrays, and what can be told of arrays."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from grsd_jax._checks import check_floating, check_shape
from grsd_jax._typing import PyTree


def as_floating(
    name: str, array: jax.typing.ArrayLike, shape: Sequence[int | None]
) -> jax.Array:
    """Returns ``array`` as a floating-point JAX array of the given shape.

    Raises:
        ValueError: If the dtype is not a real floating one, or the shape differs.
    """
    result = jnp.asarray(array)
    check_floating(name, result)
    check_shape(name, result, shape)
    return result


def as_mask(
    name: str, mask: jax.typing.ArrayLike | None, shape: Sequence[int | None]
) -> jax.Array:
    """Returns ``mask`` as a boolean JAX array of the given shape, all True for None.

    Raises:
        ValueError: If the dtype is not bool, or the shape differs.
    """
    if mask is None:
        return jnp.ones(tuple(size for size in shape if size is not None), bool)
    result = jnp.asarray(mask)
    if result.dtype != jnp.bool_:
        raise ValueError(f"{name}: expected a bool dtype, got {result.dtype}.")
    check_shape(name, result, shape)
    return result


def as_scalar(
    name: str, value: jax.typing.ArrayLike, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Returns one real number as a JAX array of the given floating dtype.

    Raises:
        ValueError: If it is not a single number.
    """
    check_shape(name, value, [])
    return jnp.asarray(value).astype(dtype)


def ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Divides, with 0 where the denominator is not positive."""
    positive = denominator > 0
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1), 0)


def is_traced(tree: PyTree) -> bool:
    """Whether any leaf is an abstract value of an enclosing transformation."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            try:
                leaf.devices()  # an abstract value lies on no device
            except jax.errors.ConcretizationTypeError:
                return True
    return False
