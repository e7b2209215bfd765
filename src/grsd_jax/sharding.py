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
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from grsd_jax._checks import (
    check_at_least,
    check_batches,
    check_choice,
    check_same_tree,
    check_shape,
)
from grsd_jax._jacobian import (
    Jacobian,
    JacobianMap,
    PlainDerivative,
    as_pytree,
    check_problem,
    linearize,
    split_batches,
)
from grsd_jax._typing import ErrorFn, PyTree, Reduction
from grsd_jax.factored import (
    JacobianForm,
    factorize,
    factorize_with_derivative,
    uses_factors,
)
from grsd_jax.kernel import REDUCTIONS, join_block, split_block

_HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How examples and rows lie on the mesh; static.

    Attributes:
        mesh: The mesh.
        axis: The name of its axis over which the examples are spread.
        error: Shape ``[N, C]`` and dtype of one batch's error.
        num_batches: K.
        reduction: ``"mean"`` or ``"stack"``.
    """

    mesh: Mesh
    axis: str
    error: jax.ShapeDtypeStruct
    num_batches: int
    reduction: Reduction

    @property
    def copies(self) -> int:
        """How many error spaces of one batch make up the whole."""
        return self.num_batches if self.reduction == "stack" else 1

    @property
    def dimension(self) -> int:
        """The dimension n of the error space."""
        return self.copies * int(np.prod(self.error.shape))

    @property
    def local_error(self) -> jax.ShapeDtypeStruct:
        """Shape ``[N / D, C]`` and dtype of a device's share of one batch's error."""
        num_examples, num_outputs = self.error.shape
        share = num_examples // self.mesh.shape[self.axis]
        return jax.ShapeDtypeStruct((share, num_outputs), self.error.dtype)


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
    layout: _Layout

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
        return NamedSharding(self.layout.mesh, PartitionSpec(self.layout.axis))

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
        _check_columns("block", block, self.layout)
        return _kernel_product(self, block)


def shard_batches(batches: PyTree, mesh: Mesh, *, axis: str = "examples") -> PyTree:
    """Puts batches on a mesh, the examples spread over one of its axes.

    With several processes each passes the same batches, and keeps its devices' share.

    Args:
        batches: A pytree with leading axes ``[K, N]``, N a multiple of the D devices
            along the axis.
        mesh: A mesh.
        axis: The name of the mesh axis.

    Returns:
        The same tree, every leaf sharded as ``PartitionSpec(None, axis)``.

    Raises:
        ValueError: If there is no such axis, or N does not fit.

    References:
        Ours.
    """
    _check_mesh(batches, mesh, axis)
    return jax.device_put(batches, NamedSharding(mesh, PartitionSpec(None, axis)))


def sharded_kernel(
    error_fn: ErrorFn,
    params: PyTree,
    batches: PyTree,
    mesh: Mesh,
    *,
    axis: str = "examples",
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
        axis: The name of the mesh axis.
        reduction: ``"mean"`` or ``"stack"``.
        jacobian: ``"factored"``, ``"plain"`` or ``"auto"``; see `linearize_kernel`.

    Returns:
        A `ShardedKernel`, whose ``matmat`` equals `kernel_matmat`.

    Raises:
        ValueError: If a shape, dtype, leading axis, mesh axis or choice does not fit.

    References:
        Paper 7.2 and B.2; the distribution is ours.
    """
    layout = _layout(error_fn, params, batches, mesh, axis, reduction)
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
    axis: str = "examples",
    reduction: Reduction = "mean",
    column_chunk: int | None = None,
    jacobian: JacobianForm = "auto",
) -> jax.Array:
    """Projects the kernel's exact derivative onto columns, ``V^T Mdot V``, on a mesh.

    ``A + A^T`` with ``A = (1/K) sum_k V^T Jdot_k G_k`` and ``G_k = J_k^T V``. G is
    summed over the devices like a product of the kernel, A once more, ``r^2`` numbers.

    Args:
        error_fn: ``error_fn(params, batch) -> [N, C]``, examples independent.
        params: Parameters, a pytree of floating arrays.
        batches: A pytree with leading axes ``[K, N]``; see `shard_batches`.
        direction: The tangent d, a tree like ``params``.
        vectors: Columns V, ``[n, r]``, usually Ritz vectors.
        mesh: A mesh whose axis is of type Auto.
        axis: The name of the mesh axis.
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
    check_same_tree("direction", direction, params, "params")
    if column_chunk is not None:
        check_at_least("column_chunk", column_chunk, 1)
    layout = _layout(error_fn, params, batches, mesh, axis, reduction)
    _check_columns("vectors", vectors, layout)
    direction = jax.tree.map(
        lambda d, p: jnp.asarray(d).astype(jnp.result_type(p)), direction, params
    )
    factored = uses_factors(error_fn, jacobian)
    prepare = factorize_with_derivative if factored else _linearized_pair
    fn = as_pytree(error_fn)
    pairs = _prepared(prepare, fn, params, batches, (direction,), layout)
    num_columns = vectors.shape[1]
    width = column_chunk or num_columns
    chunks = [
        _projected(pairs, vectors, vectors[:, first : first + width], layout)
        for first in range(0, num_columns, width)
    ]
    projected = jnp.concatenate(chunks, axis=1)
    return projected + projected.T


@partial(jax.jit, static_argnames=("prepare", "layout"))
def _prepared(
    prepare: Callable[..., PyTree],
    error_fn: ErrorFn,
    params: PyTree,
    batches: PyTree,
    direction: tuple[PyTree, ...],
    layout: _Layout,
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
    run = _on_devices(local, layout, specs, PartitionSpec(layout.axis))
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

    by_rows = PartitionSpec(layout.axis)
    run = _on_devices(local, layout, (by_rows, by_rows), by_rows)
    return run(kernel.jacobians, block)


@partial(jax.jit, static_argnames="layout")
def _projected(
    pairs: PyTree, vectors: jax.Array, chunk: jax.Array, layout: _Layout
) -> jax.Array:
    """Computes ``V^T Jdot J^T U`` of a chunk U of V's columns."""

    def local(pairs: PyTree, vectors: jax.Array, chunk: jax.Array) -> jax.Array:
        moved = _product(_own(pairs), chunk, layout)
        projected = jnp.matmul(vectors.T, moved, precision=_HIGHEST)
        return jax.lax.psum(projected, layout.axis)

    by_rows = PartitionSpec(layout.axis)
    run = _on_devices(local, layout, (by_rows,) * 3, PartitionSpec())
    return run(pairs, vectors, chunk)


def _product(pairs: Any, rows: jax.Array, layout: _Layout) -> jax.Array:
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
        total = reduce(partial(jax.tree.map, jnp.add), shares)
        tangents = jax.lax.psum(total, layout.axis)
        return join_block([pushing.push(tangents) for _, pushing in pairs])
    products = [
        pushing.push(jax.lax.psum(pulling.pull(parts[0]), layout.axis))
        for pulling, pushing in pairs
    ]
    return join_block([reduce(jnp.add, products) / len(products)])


def _on_devices(fn: Any, layout: _Layout, in_specs: Any, out_specs: Any) -> Any:
    # Unchecked, because the check refuses error functions with a `lax.scan` whose
    # carry starts as a constant.
    return jax.shard_map(
        fn, mesh=layout.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def _own(tree: PyTree) -> PyTree:
    """Returns the device's own entry of what `_prepared` made."""
    return jax.tree.map(lambda leaf: leaf[0], tree)


def _local_batches(batches: PyTree, layout: _Layout) -> PyTree:
    """Splits a device's examples into K batches ``[K, N / D, ...]``."""
    leading = (layout.num_batches, layout.local_error.shape[0])
    return jax.tree.map(lambda leaf: leaf.reshape(*leading, *leaf.shape[2:]), batches)


def _layout(
    error_fn: ErrorFn,
    params: PyTree,
    batches: PyTree,
    mesh: Mesh,
    axis: str,
    reduction: Reduction,
) -> _Layout:
    """Checks the problem and the mesh, and returns the layout."""
    check_choice("reduction", reduction, REDUCTIONS)
    error = check_problem(error_fn, params, batches)
    _check_mesh(batches, mesh, axis)
    return _Layout(mesh, axis, error, check_batches(batches)[0], reduction)


def _check_mesh(batches: PyTree, mesh: Mesh, axis: str) -> None:
    check_choice("axis", axis, mesh.axis_names)
    kind = mesh.axis_types[mesh.axis_names.index(axis)]
    if kind != AxisType.Auto:
        raise ValueError(
            f"mesh: expected the axis {axis!r} to be of type Auto, as in "
            f"jax.make_mesh(shape, names, axis_types=(AxisType.Auto,)), got {kind}."
        )
    num_examples, num_devices = check_batches(batches)[1], mesh.shape[axis]
    if num_examples % num_devices:
        raise ValueError(
            f"batches: expected N to be a multiple of the {num_devices} devices along "
            f"{axis!r}, got N = {num_examples}."
        )


def _check_columns(name: str, columns: jax.Array, layout: _Layout) -> None:
    check_shape(name, columns, [layout.dimension, None])
    if jnp.result_type(columns) != layout.error.dtype:
        raise ValueError(
            f"{name}: expected dtype {layout.error.dtype}, that of the error, "
            f"got {jnp.result_type(columns)}."
        )
