"""The kernel and its derivative with the examples spread over the devices of a mesh.

Each device holds some of the examples: their rows of J, and the same rows of every
vector of the error space. ``J^T V`` is then a sum over devices, the one communication
of a product, and each device applies its own rows of J to that sum:

``G = sum_d J_d^T V_d``, ``(M V)_d = J_d G``.

Meshes, arrays and collectives are JAX's own, and nothing here asks how many processes
there are. Only these products are written out device by device: left to the compiler, a
`vmap` over columns merges them with the examples, and the examples are gathered. What
comes after (Lanczos, Ritz vectors) is partitioned by the compiler, from the sharding of
the rows.
"""

import dataclasses
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grsd_jax._arrays import is_traced
from grsd_jax._checks import check_at_least, check_choice, check_same_tree
from grsd_jax._typing import Derivative, ErrorFn, PyTree, Reduction
from grsd_jax.jacobian.autodiff import (
    Jacobian,
    JacobianMap,
    PlainDerivative,
    as_pytree,
    linearize,
    split_batches,
)
from grsd_jax.jacobian.columns import by_chunks, join_block, split_block, sum_trees
from grsd_jax.jacobian.factored import (
    JacobianForm,
    factorize,
    factorize_with_derivative,
    uses_factors,
)
from grsd_jax.kernel.derivative import (
    DERIVATIVES,
    difference_of,
    like_params,
    project,
)
from grsd_jax.kernel.mesh import Layout, check_mesh, make_layout


@partial(
    jax.tree_util.register_dataclass, data_fields=["jacobians"], meta_fields=["layout"]
)
@dataclasses.dataclass(frozen=True)
class ShardedKernel:
    """The kernel at fixed parameters, its examples spread over a mesh axis.

    A pytree, like `LinearizedKernel`: it crosses `jit` without retracing.

    Attributes:
        jacobians: J_k of each batch; every leaf has a leading axis of devices, and each
            device's entry is what it needs for its own examples.
        layout: The mesh, the axis and the shapes.
    """

    jacobians: tuple[Jacobian, ...]
    layout: Layout

    @property
    def dimension(self) -> int:
        """The dimension n of the error space."""
        return self.layout.dimension

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the columns."""
        return np.dtype(self.layout.error.dtype)

    @property
    def row_sharding(self) -> NamedSharding:
        """The sharding of columns ``[n, b]``, by rows."""
        return self.layout.row_sharding

    def matmat(self, block: jax.Array) -> jax.Array:
        """Applies the kernel to a block of columns.

        ``mean`` sums ``J_k^T V`` of every batch over the devices, ``K P b`` numbers;
        ``stack`` sums ``J^T V`` once, ``P b`` numbers.

        Args:
            block: Columns V, ``[n, b]``, in the dtype of the error; moved to
                `row_sharding` if it lies otherwise.

        Returns:
            ``M V``, ``[n, b]``, sharded by rows.

        Raises:
            ValueError: If the shape or dtype of ``block`` does not fit.
        """
        self.layout.check_columns("block", block)
        return _kernel_product(self, block)


def shard_batches(batches: PyTree, mesh: Mesh, *, axis: str | None = None) -> PyTree:
    """Puts batches on a mesh, the examples spread over one of its axes.

    With several processes each passes the same batches, and keeps its devices' share.

    Args:
        batches: A pytree with leading axes ``[K, N]``, N a multiple of the D devices
            along the axis.
        mesh: A mesh.
        axis: The name of the mesh axis, the first if None.

    Returns:
        The same tree, every leaf sharded as ``PartitionSpec(None, axis)``.

    Raises:
        ValueError: If there is no such axis, or N does not fit.

    References:
        Ours.
    """
    axis = check_mesh(batches, mesh, axis)
    return jax.device_put(batches, NamedSharding(mesh, PartitionSpec(None, axis)))


def sharded_kernel(
    error_fn: ErrorFn,
    params: PyTree,
    batches: PyTree,
    mesh: Mesh,
    *,
    axis: str | None = None,
    reduction: Reduction = "mean",
    jacobian: JacobianForm = "auto",
) -> ShardedKernel:
    """Linearises the kernel at ``params``, each device its own examples.

    Examples must be independent: each device evaluates ``error_fn`` on its share of the
    batch alone. Rows are ordered as everywhere. Under ``mean`` device d holds the d-th
    part of every batch's examples; under ``stack`` the d-th part of all K N examples in
    order, so the batches move once more if they lie as `shard_batches` puts them.

    Args:
        error_fn: ``error_fn(params, batch) -> [N, C]``.
        params: Parameters, a pytree of floating arrays; every device holds all of them.
        batches: A pytree with leading axes ``[K, N]``, N a multiple of the D devices
            along the axis; see `shard_batches`.
        mesh: A mesh whose axis is of type Auto.
        axis: The name of the mesh axis, the first if None.
        reduction: ``"mean"`` or ``"stack"``.
        jacobian: ``"factored"``, ``"plain"`` or ``"auto"``; see `linearize_kernel`.

    Returns:
        A `ShardedKernel`, whose ``matmat`` equals `kernel_matmat`.

    Raises:
        ValueError: If a shape, dtype, leading axis, mesh axis or choice does not fit.

    References:
        Paper 7.2 and B.2; the distribution is ours.
    """
    layout = make_layout(error_fn, params, batches, mesh, axis, reduction)
    prepare = factorize if uses_factors(error_fn, jacobian) else linearize
    fn = as_pytree(error_fn)
    jacobians = _prepared(prepare, fn, params, batches, (), layout)
    return ShardedKernel(jacobians, layout)


def sharded_kernel_derivative(
    error_fn: ErrorFn,
    params: PyTree,
    batches: PyTree,
    direction: PyTree,
    vectors: jax.Array,
    mesh: Mesh,
    *,
    axis: str | None = None,
    method: Derivative = "exact",
    step: float | None = None,
    reduction: Reduction = "mean",
    column_chunk: int | None = None,
    jacobian: JacobianForm = "auto",
) -> jax.Array:
    """Projects the kernel's derivative onto columns, ``V^T Mdot V``, on a mesh.

    The exact one is ``A + A^T`` with ``A = (1/K) sum_k V^T Jdot_k G_k`` and
    ``G_k = J_k^T V``. G is summed over the devices like a product of the kernel, A once
    more, ``r^2`` numbers.

    Args:
        error_fn: ``error_fn(params, batch) -> [N, C]``, examples independent.
        params: Parameters, a pytree of floating arrays.
        batches: A pytree with leading axes ``[K, N]``; see `shard_batches`.
        direction: The tangent d, a tree like ``params``.
        vectors: Columns V, ``[n, r]``, usually Ritz vectors.
        mesh: A mesh whose axis is of type Auto.
        axis: The name of the mesh axis, the first if None.
        method: ``"exact"`` or ``"finite_difference"``.
        step: Relative step of the difference; see `kernel_derivative`.
        reduction: ``"mean"`` or ``"stack"``.
        column_chunk: Columns taken at a time, which bounds memory; all if None.
        jacobian: ``"factored"``, ``"plain"`` or ``"auto"``; see `linearize_kernel`.

    Returns:
        The symmetric matrix ``[r, r]``, on every device; equal to `kernel_derivative`.

    Raises:
        ValueError: If a shape, tree, dtype, leading axis, mesh axis or choice does not
            fit.

    References:
        Paper 7.2 and B.5; the exact form and the distribution are ours.
    """
    check_choice("method", method, DERIVATIVES)
    check_same_tree("direction", direction, params, "params")
    if column_chunk is not None:
        check_at_least("column_chunk", column_chunk, 1)
    layout = make_layout(error_fn, params, batches, mesh, axis, reduction)
    layout.check_columns("vectors", vectors)
    direction = like_params(direction, params)
    chunked = partial(
        by_chunks,
        vectors=vectors,
        width=column_chunk or vectors.shape[1],
        mapped=is_traced((params, batches, direction, vectors)),
    )
    fn = as_pytree(error_fn)
    if method == "finite_difference":

        def product(p: PyTree, block: jax.Array) -> jax.Array:
            jacobians = _prepared(linearize, fn, p, batches, (), layout)
            return _kernel_product(ShardedKernel(jacobians, layout), block)

        moved = chunked(difference_of(product, params, direction, step))
        projected = project(vectors, moved)
        return (projected + projected.T) / 2
    projected = project(
        vectors,
        _moved(error_fn, params, batches, direction, jacobian, layout, chunked),
    )
    return projected + projected.T


def _moved(
    error_fn: ErrorFn,
    params: PyTree,
    batches: PyTree,
    direction: PyTree,
    jacobian: JacobianForm,
    layout: Layout,
    chunked: Callable[[Callable[[jax.Array], jax.Array]], jax.Array],
) -> jax.Array:
    """Computes ``(1/K) sum_k Jdot_k J_k^T V``, or that of the stack, by rows.

    The mean takes one batch after the other, and holds the factors of one at a time.
    """
    factored = uses_factors(error_fn, jacobian)
    prepare = factorize_with_derivative if factored else _linearized_pair
    fn = as_pytree(error_fn)
    num_spaces = 1 if layout.reduction == "stack" else layout.num_batches
    each = layout.num_batches // num_spaces
    layout = dataclasses.replace(layout, num_batches=each)
    moved = []
    for first in range(0, num_spaces * each, each):
        space = jax.tree.map(lambda leaf, k=first: leaf[k : k + each], batches)
        pairs = _prepared(prepare, fn, params, space, (direction,), layout)
        moved.append(chunked(partial(_half_product, pairs, layout=layout)))
    return reduce(jnp.add, moved) / num_spaces


@partial(jax.jit, static_argnames=("prepare", "layout"))
def _prepared(
    prepare: Callable[..., PyTree],
    error_fn: ErrorFn,
    params: PyTree,
    batches: PyTree,
    direction: tuple[PyTree, ...],
    layout: Layout,
) -> tuple[PyTree, ...]:
    """Returns ``prepare(error_fn, params, batch, *direction)`` of each batch's shares.

    Every leaf has a leading axis of devices. Residuals have their examples on any axis,
    and some are weights and have none, so that this is the one rule that fits all.
    """

    def local(
        error_fn: ErrorFn, params: PyTree, batches: PyTree, direction: PyTree
    ) -> PyTree:
        parts = split_batches(_local_batches(batches, layout))
        made = tuple(prepare(error_fn, params, part, *direction) for part in parts)
        return jax.tree.map(lambda leaf: leaf[None], made)

    if layout.reduction == "stack":  # devices share the rows, and so these, in order
        batches = jax.tree.map(
            lambda leaf: leaf.reshape(1, -1, *leaf.shape[2:]), batches
        )
    everywhere, examples = PartitionSpec(), PartitionSpec(None, layout.axis)
    specs = (everywhere, everywhere, examples, everywhere)
    run = layout.on_devices(local, specs, layout.by_rows)
    return run(error_fn, params, batches, direction)


def _linearized_pair(
    error_fn: ErrorFn, params: PyTree, batch: PyTree, direction: PyTree
) -> tuple[Jacobian, JacobianMap]:
    """Returns ``(J, Jdot)`` of one batch by the plain path."""
    moved = PlainDerivative(error_fn, params, batch, direction)
    return linearize(error_fn, params, batch), moved


@jax.jit
def _kernel_product(kernel: ShardedKernel, block: jax.Array) -> jax.Array:
    layout = kernel.layout

    def local(jacobians: PyTree, rows: jax.Array) -> jax.Array:
        pairs = [(jacobian, jacobian) for jacobian in _own(jacobians)]
        return _product(pairs, rows, layout)

    run = layout.on_devices(local, (layout.by_rows, layout.by_rows), layout.by_rows)
    return run(kernel.jacobians, block)


@partial(jax.jit, static_argnames="layout")
def _half_product(pairs: PyTree, block: jax.Array, *, layout: Layout) -> jax.Array:
    """Computes ``Jdot J^T V``, by rows."""

    def local(pairs: PyTree, rows: jax.Array) -> jax.Array:
        return _product(_own(pairs), rows, layout)

    run = layout.on_devices(local, (layout.by_rows, layout.by_rows), layout.by_rows)
    return run(pairs, block)


def _product(pairs: Any, rows: jax.Array, layout: Layout) -> jax.Array:
    """Computes a device's rows of ``(1/K) sum_k B_k A_k^T V``, or ``B A^T V``.

    Args:
        pairs: What pulls, A, and what pushes, B, of each batch on this device.
        rows: The device's rows of V.
        layout: The layout.
    """
    parts = split_block("block", rows, layout.copies, layout.local_error)
    if layout.reduction == "stack":
        shares = [
            pulling.pull(part) for (pulling, _), part in zip(pairs, parts, strict=True)
        ]
        tangents = jax.lax.psum(sum_trees(shares), layout.axis)
        return join_block([pushing.push(tangents) for _, pushing in pairs])
    products = [
        pushing.push(jax.lax.psum(pulling.pull(parts[0]), layout.axis))
        for pulling, pushing in pairs
    ]
    return join_block([sum_trees(products) / len(products)])


def _own(tree: PyTree) -> PyTree:
    """Returns the device's own entry of what `_prepared` made."""
    return jax.tree.map(lambda leaf: leaf[0], tree)


def _local_batches(batches: PyTree, layout: Layout) -> PyTree:
    """Splits a device's examples into K batches ``[K, N / D, ...]``."""
    leading = (layout.num_batches, layout.local_error.shape[0])
    return jax.tree.map(lambda leaf: leaf.reshape(*leading, *leaf.shape[2:]), batches)
