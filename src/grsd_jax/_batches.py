"""Batches with leading axes ``[K, N]``, one by one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import is_traced
from grsd_jax._checks import check_batches
from grsd_jax._typing import PyTree


def split_batches(batches: PyTree, most: int | None = None) -> list[PyTree]:
    """Returns the K batches one by one, or the first few."""
    num_batches, _ = check_batches(batches)
    count = num_batches if most is None else min(most, num_batches)
    leaves, tree = jax.tree.flatten(batches)
    if is_traced(batches):
        cut = _split(leaves, count)
    else:  # what NumPy holds keeps its dtype
        arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
        cut = [
            [next(parts) if isinstance(leaf, jax.Array) else leaf[k] for leaf in leaves]
            for k, parts in enumerate(map(iter, _split_arrays(arrays, count)))
        ]
    return [jax.tree.unflatten(tree, part) for part in cut]


def _split(leaves: list[Any], count: int) -> list[list[Any]]:
    return [[leaf[k] for leaf in leaves] for k in range(count)]


#: One program, where each leaf alone would take two.
_split_arrays = jax.jit(_split, static_argnums=1)


def one_batch_shapes(batches: PyTree) -> PyTree:
    """Returns the shapes of one batch."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf)[1:], jnp.result_type(leaf)),
        batches,
    )


def num_examples_of(batch: PyTree) -> int:
    """Returns the examples N of one batch."""
    return jax.tree.leaves(batch)[0].shape[0]
