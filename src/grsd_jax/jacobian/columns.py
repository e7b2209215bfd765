"""Blocks of columns of the error space: cut by batches, joined, a few at a time."""

from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import on_automatic_mesh, on_mesh_of
from grsd_jax._checks import check_at_least, check_shape
from grsd_jax._typing import PyTree


def in_chunks(
    product: Callable[[jax.Array], jax.Array],
    block: jax.Array,
    column_chunk: int | None,
    *,
    mapped: bool,
) -> jax.Array:
    """Applies ``product`` to the block, in chunks if there is a chunk."""
    if column_chunk is None:
        return product(block)
    column_chunk = check_at_least("column_chunk", column_chunk, 1)
    check_shape("block", block, [None, None])
    return by_chunks(product, vectors=block, width=column_chunk, mapped=mapped)


def as_columns(
    name: str, block: jax.Array, copies: int, error: jax.ShapeDtypeStruct
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Returns a block as columns ``[n, b]``, and what gives a result its shape.

    Raises:
        ValueError: If a split block is not ``[copies, N, C, b]``, or ``[N, C, b]`` for
            one copy.
    """
    given, block = block, on_automatic_mesh(block)
    if jnp.ndim(block) <= 2:
        return block, partial(on_mesh_of, given)
    leading = [(copies, *error.shape)] + ([error.shape] if copies == 1 else [])
    if block.shape[:-1] not in leading:
        wanted = " or ".join(f"{[*axes, 'any']}".replace("'", "") for axes in leading)
        raise ValueError(f"{name}: expected shape {wanted}, got {list(block.shape)}.")
    columns = block.reshape(-1, block.shape[-1])
    return columns, lambda result: on_mesh_of(given, result.reshape(block.shape))


def by_chunks(
    product: Callable[[jax.Array], jax.Array],
    *,
    vectors: jax.Array,
    width: int,
    mapped: bool,
) -> jax.Array:
    """Applies ``product`` to ``width`` columns at a time, one compiled program.

    Eager calls loop in Python, since convolutions in an XLA:CPU loop body are slow; in
    a traced call the chunks are mapped, so that the program does not grow with them.
    """
    num_columns = vectors.shape[1]
    if width >= num_columns:
        return product(vectors)
    if mapped:
        products = jax.lax.map(product, _chunks(vectors, width))
        return jnp.moveaxis(products, 0, 1).reshape(len(vectors), -1)[:, :num_columns]
    chunks = _listed_chunks(vectors, width)
    return _side_by_side([product(chunk) for chunk in chunks], num_columns)


def _chunks(vectors: jax.Array, width: int) -> jax.Array:
    """Returns the columns as ``[count, n, width]``, with zeros behind the last."""
    count = -(-vectors.shape[1] // width)
    padded = jnp.pad(vectors, ((0, 0), (0, count * width - vectors.shape[1])))
    return jnp.moveaxis(padded.reshape(-1, count, width), 1, 0)


@partial(jax.jit, static_argnums=1)
def _listed_chunks(vectors: jax.Array, width: int) -> list[jax.Array]:
    return list(_chunks(vectors, width))


@partial(jax.jit, static_argnums=1)
def _side_by_side(products: list[jax.Array], num_columns: int) -> jax.Array:
    return jnp.concatenate(products, axis=1)[:, :num_columns]


def split_block(
    name: str, block: jax.Array, copies: int, error: jax.ShapeDtypeStruct
) -> list[jax.Array]:
    """Splits columns ``[copies N C, b]`` into arrays ``[N, C, b]``."""
    size = copies * int(np.prod(error.shape))
    check_shape(name, block, [size, None])
    check_at_least(f"{name}.shape[1]", block.shape[1], 1)
    if jnp.result_type(block) != error.dtype:
        raise ValueError(
            f"{name}: expected dtype {error.dtype}, that of the error, "
            f"got {jnp.result_type(block)}."
        )
    return _split(block, (copies, *error.shape, block.shape[1]))


# Jitted, as all that follows: each operation alone would be a program for its shapes.
@partial(jax.jit, static_argnums=1)
def _split(block: jax.Array, shape: tuple[int, ...]) -> list[jax.Array]:
    return list(jnp.reshape(block, shape))


@jax.jit
def join_block(parts: list[jax.Array]) -> jax.Array:
    """Joins arrays ``[N, C, b]`` into columns ``[copies N C, b]``."""
    return jnp.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])


def sum_trees(trees: Iterable[PyTree]) -> PyTree:
    """Adds trees up, one at a time."""
    iterator = iter(trees)
    total = next(iterator)
    for tree in iterator:
        total = _added(total, tree)
    return total


@jax.jit
def _added(left: PyTree, right: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, left, right)
