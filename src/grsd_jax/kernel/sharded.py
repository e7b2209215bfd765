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
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from grsd_jax._arrays import is_traced
from grsd_jax._batches import split_batches
from grsd_jax._typing import PyTree
from grsd_jax.jacobian.autodiff import (
    Jacobian,
)
from grsd_jax.jacobian.columns import (
    as_columns,
    by_chunks,
    in_chunks,
    join_block,
    split_block,
    sum_trees,
)
from grsd_jax.jacobian.factored import held_jacobian, held_pair
from grsd_jax.jacobian.plan import Plan, check_independent
from grsd_jax.kernel.mesh import Layout
from grsd_jax.objective import Objective
from grsd_jax.problem import Point


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

    def matmat(self, block: jax.Array, *, column_chunk: int | None = None) -> jax.Array:
        """Applies the kernel to a block of columns.

        ``mean`` sums ``J_k^T V`` of every batch over the devices, ``K P b`` numbers;
        ``stack`` sums ``J^T V`` once, ``P b`` numbers.

        Args:
            block: Columns V, ``[n, b]`` or split, in the dtype of the error; moved to
                `row_sharding` if it lies otherwise.
            column_chunk: Columns taken at a time, which bounds memory; all if None.

        Returns:
            ``M V``, ``[n, b]``, sharded by rows.

        Raises:
            ValueError: If the shape or dtype of ``block`` does not fit.
        """
        columns, restore = as_columns(
            "block", block, self.layout.copies, self.layout.error
        )
        self.layout.check_columns("block", columns)
        product = partial(_kernel_product, self)
        traced = is_traced((self, block))
        return restore(in_chunks(product, columns, column_chunk, mapped=traced))


def shard_kernel(point: Point, layout: Layout, *, plan: Plan | None) -> ShardedKernel:
    """Linearizes the kernel, each device its own examples.

    Examples must be independent: each device evaluates the network on its share of the
    batch alone. Rows are ordered as everywhere. Under ``mean`` device d holds the d-th
    part of every batch's examples; under ``stack`` the d-th part of all K N examples in
    order, so the batches move once more if they lie as `shard_batches` puts them.

    Args:
        point: The problem at its parameters; every device holds all of them.
        layout: How the examples lie on the mesh.
        plan: The factors to hold, None to linearize plainly.

    Returns:
        A `ShardedKernel`, whose ``matmat`` equals `kernel_matmat`.

    References:
        Paper 7.2 and B.2; the distribution is ours.
    """
    check_independent(point)
    point = placed(point, layout)
    jacobians = _prepared(
        point.error_fn, point.params, point.batches, (), layout, plan=plan
    )
    return ShardedKernel(jacobians, layout)


def placed(point: Point, layout: Layout) -> Point:
    """Returns the problem with everything but the batches on all devices."""
    held = (point.error_fn, point.params, point.direction)
    if is_traced(held):
        return point
    everywhere = NamedSharding(layout.mesh, PartitionSpec())
    error_fn, params, direction = jax.device_put(held, everywhere)
    return dataclasses.replace(
        point, error_fn=error_fn, params=params, direction=direction
    )


def sharded_half(
    point: Point,
    layout: Layout,
    vectors: jax.Array,
    width: int,
    *,
    plan: Plan | None,
) -> jax.Array:
    """Computes ``(1/K) sum_k Jdot_k J_k^T V``, or that of the stack, by rows.

    ``G_k = J_k^T V`` is summed over the devices like a product of the kernel. The mean
    takes one batch after the other, and holds the factors of one at a time.

    Args:
        point: The problem, with its direction.
        layout: How the examples lie on the mesh.
        vectors: Columns V, ``[n, r]``.
        width: Columns taken at a time.
        plan: The factors to hold, None to linearize plainly.

    Returns:
        Columns ``[n, r]``, by rows.
    """
    check_independent(point)
    point = placed(point, layout)
    num_spaces = layout.num_batches // layout.copies
    layout = dataclasses.replace(layout, num_batches=layout.copies)
    traced = is_traced((point.params, point.batches, point.direction, vectors))
    moved = []
    for space in range(num_spaces):
        first = space * layout.num_batches
        batches = jax.tree.map(
            lambda leaf, k=first: leaf[k : k + layout.num_batches], point.batches
        )
        pairs = _prepared(
            point.error_fn,
            point.params,
            batches,
            (point.direction,),
            layout,
            plan=plan,
        )
        half = partial(_half_product, pairs, layout=layout)
        moved.append(by_chunks(half, vectors=vectors, width=width, mapped=traced))
    return reduce(jnp.add, moved) / num_spaces


@partial(jax.jit, static_argnames=("layout", "plan"))
def _prepared(
    error_fn: Objective,
    params: PyTree,
    batches: PyTree,
    direction: tuple[PyTree, ...],
    layout: Layout,
    *,
    plan: Plan | None,
) -> tuple[PyTree, ...]:
    """Returns J, or J and Jdot if there is a direction, of each batch's shares.

    Every leaf has a leading axis of devices. Residuals have their examples on any axis,
    and some are weights and have none, so that this is the one rule that fits all.
    """

    def local(
        error_fn: Objective, params: PyTree, batches: PyTree, direction: PyTree
    ) -> PyTree:
        parts = split_batches(_local_batches(batches, layout))
        prepare = held_pair if direction else held_jacobian
        made = tuple(
            prepare(error_fn, params, part, *direction, plan=plan) for part in parts
        )
        return jax.tree.map(lambda leaf: leaf[None], made)

    if layout.reduction == "stack":  # devices share the rows, and so these, in order
        batches = jax.tree.map(
            lambda x: x.reshape(1, x.shape[0] * x.shape[1], *x.shape[2:]), batches
        )
    everywhere, examples = PartitionSpec(), PartitionSpec(None, layout.axis)
    specs = (everywhere, everywhere, examples, everywhere)
    run = layout.on_devices(local, specs, layout.by_rows)
    return run(error_fn, params, batches, direction)


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
