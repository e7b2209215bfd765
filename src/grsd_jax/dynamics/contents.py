"""What of a problem changes in a training, as plain arrays, and back.

Loops donate their buffers, and checkpoints hold arrays alone: what is kept of a problem
and its parameters are copies of their leaves, in the form of those at hand later.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import is_traced
from grsd_jax._typing import PyTree
from grsd_jax.problem import Point

Contents = dict[str, list[jax.Array]]


def contents_of(point: Point) -> Contents:
    """Returns the parameters, and what else the problem holds but batches.

    Args:
        point: The problem at its parameters.

    Returns:
        ``params`` and ``state``, lists of arrays; random keys as their numbers.
    """

    def plain(leaf: Any) -> jax.Array:
        return jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf)

    return {
        name: [plain(leaf) for leaf in leaves]
        for name, leaves in _leaves(point).items()
    }


def point_of(contents: Contents, like: Point) -> Point:
    """Returns the point of earlier contents.

    Args:
        contents: As `contents_of` returns them.
        like: A point of the same problem, whose form and batches it has.

    Returns:
        The point.
    """

    def restored(leaf: Any, now: Any) -> Any:
        if _is_key(now):
            return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(now))
        if isinstance(now, int | float | complex) and not is_traced(leaf):
            return type(now)(leaf)  # a Python number has a dtype of its own
        return leaf

    def rebuilt(leaves: list[jax.Array], form: PyTree) -> PyTree:
        now, tree = jax.tree.flatten(form)
        return jax.tree.unflatten(tree, map(restored, leaves, now))

    return dataclasses.replace(
        like,
        params=rebuilt(contents["params"], like.params),
        error_fn=rebuilt(contents["state"], like.error_fn),
    )


def check_same_sizes(contents: Contents, point: Point) -> None:
    """Raises ValueError unless a point has arrays of the shapes of earlier contents."""
    check_same_shapes("params", contents["params"], point.params)
    check_same_shapes("problem", contents["state"], point.error_fn)


def check_same_shapes(name: str, kept: list[jax.Array], tree: PyTree) -> None:
    """Raises ValueError unless a tree has arrays of the shapes that were kept.

    Args:
        name: The name of the tree's argument.
        kept: The leaves of such a tree at `Probe.init`.
        tree: The tree.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    if len(kept) != len(leaves):
        raise ValueError(
            f"{name}: expected {len(kept)} arrays as at init, got {len(leaves)}."
        )
    for there, (path, leaf) in zip(kept, leaves, strict=True):
        if not _is_key(leaf) and np.shape(leaf) != np.shape(there):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)}: expected shape "
                f"{list(np.shape(there))} as at init, got {list(np.shape(leaf))}."
            )


def _leaves(point: Point) -> dict[str, list[Any]]:
    parts = {"params": point.params, "state": point.error_fn}
    return {name: jax.tree.leaves(part) for name, part in parts.items()}


def _is_key(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
