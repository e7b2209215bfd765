"""The exact dense kernel and its derivative, from per-example Jacobians.

Examples are independent (BatchNorm runs on stored statistics), so row block i of J
depends on example i alone, and all n rows cost C backward passes over the batch, not n.
Parameter leaves are taken in groups and examples in chunks, so that the rows held at a
time stay under a bound: ``M = sum_l J_l J_l^T`` adds up group by group.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._checks import (
    check_at_least,
    check_batches,
    check_choice,
    check_same_tree,
)
from grsd_jax._jacobian import as_pytree, check_problem
from grsd_jax._typing import ErrorFn, PyTree, Reduction
from grsd_jax.kernel import REDUCTIONS

#: Bytes of Jacobian rows held at a time by default.
MAX_JACOBIAN_BYTES = 4 * 2**30

#: Examples differentiated together by default.
EXAMPLE_CHUNK = 32

Rows = list[jax.Array]


def kernel_dense(
    error_fn: ErrorFn,
    params: PyTree,
    batches: PyTree,
    *,
    reduction: Reduction = "mean",
    example_chunk: int = EXAMPLE_CHUNK,
    max_jacobian_bytes: int = MAX_JACOBIAN_BYTES,
) -> jax.Array:
    """Forms the kernel exactly: ``M = (1/K) sum_k sum_l J_kl J_kl^T``.

    Assumes that example i of the error depends on example i of the batch alone; an
    error function that couples examples (BatchNorm in training mode, say) needs the
    matrix-free `kernel_matmat`.

    Args:
        error_fn: ``error_fn(params, batch) -> [N, C]``.
        params: Parameters, a pytree of floating arrays.
        batches: A pytree with leading axes ``[K, N]``.
        reduction: ``"mean"`` or ``"stack"``.
        example_chunk: Examples differentiated together; bounds the activations held.
        max_jacobian_bytes: Bytes of Jacobian rows held at a time. Below ``n P`` entries
            the backward passes are repeated for each group of parameter leaves; a group
            holds at least one leaf.

    Returns:
        M, ``[n, n]``, symmetric positive semidefinite to rounding, ``n = N C`` or
        ``K N C``.

    Raises:
        ValueError: If a shape, dtype, leading axis or choice does not fit.

    References:
        Paper 7.2; the layer-wise sum is ours.
    """
    return _accumulate(
        error_fn,
        params,
        batches,
        None,
        reduction=reduction,
        example_chunk=example_chunk,
        max_jacobian_bytes=max_jacobian_bytes,
    )[0]


def kernel_derivative_dense(
    error_fn: ErrorFn,
    params: PyTree,
    batches: PyTree,
    direction: PyTree,
    *,
    reduction: Reduction = "mean",
    example_chunk: int = EXAMPLE_CHUNK,
    max_jacobian_bytes: int = MAX_JACOBIAN_BYTES,
) -> jax.Array:
    """Forms the kernel's derivative: ``Mdot = (1/K) sum_k (Jdot J^T + J Jdot^T)``.

    Args:
        error_fn: ``error_fn(params, batch) -> [N, C]``, examples independent.
        params: Parameters, a pytree of floating arrays.
        batches: A pytree with leading axes ``[K, N]``.
        direction: The tangent d, a tree like ``params``.
        reduction: ``"mean"`` or ``"stack"``.
        example_chunk: Examples differentiated together.
        max_jacobian_bytes: Bytes of Jacobian rows (with their derivatives) held at a
            time.

    Returns:
        Mdot, ``[n, n]``, symmetric, in units of M per unit of s.

    Raises:
        ValueError: If a shape, tree, dtype, leading axis or choice does not fit.

    References:
        Paper 7.2 and B.5; the exact form is ours.
    """
    return kernel_with_derivative_dense(
        error_fn,
        params,
        batches,
        direction,
        reduction=reduction,
        example_chunk=example_chunk,
        max_jacobian_bytes=max_jacobian_bytes,
    )[1]


def kernel_with_derivative_dense(
    error_fn: ErrorFn,
    params: PyTree,
    batches: PyTree,
    direction: PyTree,
    *,
    reduction: Reduction = "mean",
    example_chunk: int = EXAMPLE_CHUNK,
    max_jacobian_bytes: int = MAX_JACOBIAN_BYTES,
) -> tuple[jax.Array, jax.Array]:
    """Forms the kernel and its derivative from one pass of per-example Jacobians.

    Args:
        error_fn: ``error_fn(params, batch) -> [N, C]``, examples independent.
        params: Parameters, a pytree of floating arrays.
        batches: A pytree with leading axes ``[K, N]``.
        direction: The tangent d, a tree like ``params``.
        reduction: ``"mean"`` or ``"stack"``.
        example_chunk: Examples differentiated together.
        max_jacobian_bytes: Bytes of Jacobian rows (with their derivatives) held at a
            time.

    Returns:
        ``(M, Mdot)``, both ``[n, n]``.

    Raises:
        ValueError: If a shape, tree, dtype, leading axis or choice does not fit.

    References:
        Paper 7.2 and B.5.
    """
    check_same_tree("direction", direction, params, "params")
    kernel, derivative = _accumulate(
        error_fn,
        params,
        batches,
        direction,
        reduction=reduction,
        example_chunk=example_chunk,
        max_jacobian_bytes=max_jacobian_bytes,
    )
    return kernel, derivative


def _accumulate(
    error_fn: ErrorFn,
    params: PyTree,
    batches: PyTree,
    direction: PyTree | None,
    *,
    reduction: Reduction,
    example_chunk: int,
    max_jacobian_bytes: int,
) -> tuple[jax.Array, ...]:
    """Returns ``(M,)``, or ``(M, Mdot)`` if a direction is given."""
    check_choice("reduction", reduction, REDUCTIONS)
    check_at_least("example_chunk", example_chunk, 1)
    check_at_least("max_jacobian_bytes", max_jacobian_bytes, 1)
    num_batches, num_examples = check_batches(batches)
    error = check_problem(error_fn, params, batches)
    fn = as_pytree(error_fn)
    if reduction == "stack":
        batches = jax.tree.map(
            lambda leaf: leaf.reshape(1, num_batches * num_examples, *leaf.shape[2:]),
            batches,
        )
    num_rows = check_batches(batches)[1] * error.shape[1]
    copies = 1 if direction is None else 2
    groups = _leaf_groups(params, max_jacobian_bytes // (copies * num_rows))
    terms = [
        _gram([_rows(fn, params, direction, group, chunk) for chunk in chunks])
        for chunks in _chunked(batches, example_chunk)
        for group in groups
    ]
    scale = num_batches if reduction == "mean" else 1
    return tuple(sum(parts[1:], parts[0]) / scale for parts in zip(*terms, strict=True))


def _leaf_groups(params: PyTree, max_row_bytes: int) -> list[tuple[int, ...]]:
    """Groups the indices of the leaves so that a group's row stays under the bound."""
    groups: list[tuple[int, ...]] = []
    held = 0
    for index, leaf in enumerate(jax.tree.leaves(params)):
        size = np.size(leaf) * jnp.result_type(leaf).itemsize
        if groups and held + size <= max_row_bytes:
            groups[-1], held = (*groups[-1], index), held + size
        else:
            groups.append((index,))
            held = size
    return groups


def _chunked(batches: PyTree, example_chunk: int) -> Iterator[list[PyTree]]:
    """Yields each batch as a list of chunks of almost equal numbers of examples."""
    num_batches, num_examples = check_batches(batches)
    num_chunks = -(-num_examples // example_chunk)
    bounds = [num_examples * i // num_chunks for i in range(num_chunks + 1)]
    for k in range(num_batches):
        yield [
            jax.tree.map(lambda leaf, k=k, i=i, j=j: leaf[k, i:j], batches)
            for i, j in itertools.pairwise(bounds)
        ]


@partial(jax.jit, static_argnames="group")
def _rows(
    error_fn: ErrorFn,
    params: PyTree,
    direction: PyTree | None,
    group: tuple[int, ...],
    chunk: PyTree,
) -> tuple[Rows, ...]:
    """Returns ``(J,)`` or ``(J, Jdot)`` of a chunk: one ``[rows, size]`` for each leaf.

    Args:
        error_fn: The error function, a pytree.
        params: Parameters.
        direction: The tangent of ``Jdot``, or None.
        group: Indices of the parameter leaves to differentiate with respect to.
        chunk: Examples, leading axis ``[c]``.
    """

    def jacobian(p: PyTree) -> Rows:
        leaves, tree = jax.tree.flatten(p)

        def error(selected: Sequence[Any], example: PyTree) -> jax.Array:
            merged = list(leaves)
            for index, leaf in zip(group, selected, strict=True):
                merged[index] = leaf
            batch = jax.tree.map(lambda leaf: leaf[None], example)
            return error_fn(jax.tree.unflatten(tree, merged), batch)[0]

        selected = [leaves[index] for index in group]
        per_example = jax.vmap(jax.jacrev(error), in_axes=(None, 0))(selected, chunk)
        return [
            jacobian.reshape(-1, leaf.size)
            for jacobian, leaf in zip(per_example, selected, strict=True)
        ]

    if direction is None:
        return (jacobian(params),)
    return jax.jvp(jacobian, (params,), (direction,))


def _gram(chunks: list[tuple[Rows, ...]]) -> tuple[jax.Array, ...]:
    """Returns ``J J^T``, and ``Jdot J^T + J Jdot^T`` if the chunks hold Jdot.

    Two programs, rows first, run faster than one: XLA schedules the joint one worse.
    Blocks below the diagonal are the transposes of those above.
    """
    count = len(chunks)
    upper = {
        (i, j): _gram_block(chunks[i], chunks[j])
        for i in range(count)
        for j in range(i, count)
    }

    def assembled(which: int) -> jax.Array:
        block = [
            [
                upper[i, j][which] if i <= j else upper[j, i][which].T
                for j in range(count)
            ]
            for i in range(count)
        ]
        matrix = jnp.block(block)
        return (matrix + matrix.T) / 2

    return tuple(assembled(which) for which in range(len(chunks[0])))


@jax.jit
def _gram_block(
    left: tuple[Rows, ...], right: tuple[Rows, ...]
) -> tuple[jax.Array, ...]:
    kernel = _inner(left[0], right[0])
    if len(left) == 1:
        return (kernel,)
    return kernel, _inner(left[1], right[0]) + _inner(left[0], right[1])


def _inner(left: Rows, right: Rows) -> jax.Array:
    """Sums ``A_l B_l^T`` over the leaves l."""
    terms = [
        jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
        for a, b in zip(left, right, strict=True)
    ]
    return sum(terms[1:], terms[0])
