"""The kernel ``M = J J^T``, matrix-free: recomputed each time, or linearized once.

``J = de/dtheta`` is the Jacobian of the error vector (paper 2.1, 7.2, B.2). With K
batches there are two operators: the ``stack`` ``M = J J^T`` of all batches as one set,
and the ``mean`` ``M = (1/K) sum_k J_k J_k^T`` on the error space of one batch.
"""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial

import jax
import numpy as np

from grsd_jax._arrays import is_traced, owned
from grsd_jax._typing import PyTree, Reduction
from grsd_jax.jacobian.autodiff import (
    Jacobian,
    PlainDerivative,
    RestrictedErrorFn,
    ZeroJacobian,
    linearize,
)
from grsd_jax.jacobian.columns import (
    as_columns,
    in_chunks,
    join_block,
    split_block,
    sum_trees,
)
from grsd_jax.jacobian.factored import factorize_by_groups, held_jacobian
from grsd_jax.jacobian.plan import Plan, plan_of
from grsd_jax.kernel.mesh import layout_of
from grsd_jax.kernel.sharded import ShardedKernel, shard_kernel
from grsd_jax.parameter_blocks import ParameterBlocks, check_blocks
from grsd_jax.problem import Point, Problem, point_at


def kernel_matmat(
    problem: Problem,
    params: PyTree,
    block: jax.Array,
    *,
    column_chunk: int | None = None,
) -> jax.Array:
    """Applies the kernel to a block of columns, ``M V``, without forming it.

    ``stack``: ``g = sum_k J_k^T V_k``, then ``(M V)_k = J_k g``. ``mean``:
    ``M V = (1/K) sum_k J_k (J_k^T V)``. Each batch is linearized, used and dropped, so
    that the residuals of one batch are held at a time; `linearize_kernel` keeps them.

    Args:
        problem: The problem; if its batches lie on a mesh, see `shard_batches`, each
            device passes its own examples through the network.
        params: Parameters.
        block: Columns V, ``[n, b]``, or split as ``[K, N, C, b]`` (``stack``) or
            ``[N, C, b]`` (``mean``), in the dtype of the error.
        column_chunk: Columns taken at a time, which bounds memory; all if None.

    Returns:
        ``M V``, in the shape of ``block``, in the squared units of ``de/dtheta``.

    Raises:
        ValueError: If a shape, dtype or leading axis does not fit.

    References:
        Paper 7.2 and B.2.
    """
    return multiply_at(point_at(problem, params), block, column_chunk=column_chunk)


def multiply_at(
    point: Point, block: jax.Array, *, column_chunk: int | None = None
) -> jax.Array:
    """Applies the kernel of a checked problem, see `kernel_matmat`."""
    layout = layout_of(point)
    if layout is not None:
        kernel = shard_kernel(point, layout, plan=None)
        return kernel.matmat(block, column_chunk=column_chunk)

    def product(columns: jax.Array) -> jax.Array:
        return _matmat(lambda: _linearizations(point), point, columns)

    columns, restore = as_columns("block", block, point.copies, point.error)
    traced = is_traced((point.params, point.batches, block))
    return restore(in_chunks(product, columns, column_chunk, mapped=traced))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["jacobians"],
    meta_fields=["error", "reduction"],
)
@dataclasses.dataclass(frozen=True)
class LinearizedKernel:
    """The kernel at fixed parameters, linearized once for many products.

    A pytree: it crosses `jit` as an argument, and kernels made by `linearize_kernel` at
    other parameters of the same shapes do not retrace the function that takes them.

    Attributes:
        jacobians: J_k of each batch, with its residuals or its factors.
        error: Shape ``[N, C]`` and dtype of one batch's error.
        reduction: ``"mean"`` or ``"stack"``.
    """

    jacobians: tuple[Jacobian, ...]
    error: jax.ShapeDtypeStruct
    reduction: Reduction

    @property
    def copies(self) -> int:
        """How many error spaces of one batch make up the whole, K or 1."""
        return len(self.jacobians) if self.reduction == "stack" else 1

    @property
    def dimension(self) -> int:
        """The dimension n of the error space."""
        return self.copies * int(np.prod(self.error.shape))

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the columns."""
        return np.dtype(self.error.dtype)

    def matmat(self, block: jax.Array, *, column_chunk: int | None = None) -> jax.Array:
        """Applies the kernel to a block of columns.

        Args:
            block: Columns V, ``[n, b]``, or split as for `kernel_matmat`, in the dtype
                of the error.
            column_chunk: Columns taken at a time, which bounds memory; all if None.

        Returns:
            ``M V``, in the shape of ``block``.

        Raises:
            ValueError: If the shape or dtype of ``block`` does not fit, or the chunk is
                not a count.
        """

        def product(columns: jax.Array) -> jax.Array:
            return _matmat(lambda: self.jacobians, self, columns)

        columns, restore = as_columns("block", block, self.copies, self.error)
        traced = is_traced((self, block))
        return restore(in_chunks(product, columns, column_chunk, mapped=traced))


def linearize_kernel(
    problem: Problem, params: PyTree
) -> LinearizedKernel | ShardedKernel:
    """Linearizes the kernel at ``params`` once, for many products.

    Where the network allows it, J is held as factors: one backward pass
    for each output first and C times the activations, then nothing passes through the
    network any more. Elsewhere the products share the primal pass and its residuals
    (about the activations) of all K batches.

    Args:
        problem: The problem; examples must be independent for factors. If its batches
            lie on a mesh, so do the factors or residuals of their examples.
        params: Parameters.

    Returns:
        What has the ``matmat`` of `kernel_matmat`, as a pytree.

    Raises:
        ValueError: If a shape, dtype or leading axis does not fit.

    References:
        Paper 7.2 and B.2.
    """
    point = point_at(problem, params)
    return linearize_point(point, plan=plan_of(point))


def linearize_point(
    point: Point, *, plan: Plan | None
) -> LinearizedKernel | ShardedKernel:
    """Linearizes the kernel of a checked problem, by factors or plainly.

    Args:
        point: The problem at its parameters.
        plan: The factors to hold, None to linearize plainly.

    Returns:
        The kernel, on the devices of the batches' mesh if they lie on one.
    """
    layout = layout_of(point)
    if layout is not None:
        return shard_kernel(point, layout, plan=plan)
    # Several batches of a stack are all pulled before one is pushed.
    once = point.copies == 1
    jacobians = tuple(
        held_jacobian(point.error_fn, point.params, b, plan=plan, multiplied=once)
        for b in point.parts
    )
    return LinearizedKernel(jacobians, point.error, point.reduction)


def linearize_block_kernels(
    problem: Problem, params: PyTree, blocks: ParameterBlocks
) -> tuple[LinearizedKernel, ...]:
    """Linearizes the kernel of every block of parameters, ``M_l = J_l J_l^T``.

    They add up to M. Where J comes as factors all come from one set of them;
    elsewhere each is linearized in its own parameters, the others held fixed.

    Args:
        problem: The problem.
        params: Parameters.
        blocks: The partition, L blocks.

    Returns:
        L kernels, in the order of the blocks.

    Raises:
        ValueError: If a shape, dtype or leading axis does not fit, or ``blocks`` is not
            a partition of ``params``.

    References:
        Paper 4.1, the additive operator.
    """
    point = point_at(problem, params)
    check_blocks(blocks, params)
    fn, params = point.error_fn, point.params
    blocks = blocks.over(params)
    groups = [blocks.leaves_of(block) for block in range(len(blocks.names))]
    # A block whose leaves are all held constant has none left.
    filled = [group for group in groups if group]
    by_batch: list[list[Jacobian]] = []
    plan, once = plan_of(point), point.copies == 1
    for batch in point.parts:
        if plan is not None:
            grouped = factorize_by_groups(
                fn, params, batch, filled, plan=plan, multiplied=once
            )
            by_batch.append([*grouped])
        else:
            restricted = [RestrictedErrorFn(fn, params, group) for group in filled]
            by_batch.append([linearize(f, f.selected(), batch) for f in restricted])
    found = zip(*by_batch, strict=True)
    zero = (ZeroJacobian(point.error),) * point.num_batches
    return tuple(
        LinearizedKernel(next(found) if group else zero, point.error, point.reduction)
        for group in groups
    )


def linearize_derivative(
    problem: Problem, params: PyTree, direction: PyTree
) -> LinearizedKernel:
    """Returns the Gram operator of the Jacobian's derivative, ``Jdot Jdot^T``.

    ``Jdot = d/ds J(theta + s d)`` at ``s = 0``. Its largest eigenvalue is
    ``|Jdot|_op^2``, its trace ``|Jdot|_F^2``. Nothing is held: each product passes
    through the network twice, by a JVP of a VJP and back.

    Args:
        problem: The problem.
        params: Parameters.
        direction: The tangent d, a tree like ``params``.

    Returns:
        A `LinearizedKernel` whose ``matmat`` applies ``Jdot Jdot^T``.

    Raises:
        ValueError: If a shape, tree, dtype or leading axis does not fit.

    References:
        Paper 3.2, Condition 3.
    """
    point = owned(point_at(problem, params, direction))
    derivatives = tuple(
        PlainDerivative(point.error_fn, point.params, batch, point.direction)
        for batch in point.parts
    )
    return LinearizedKernel(derivatives, point.error, point.reduction)


def _linearizations(point: Point) -> Iterable[Jacobian]:
    return (linearize(point.error_fn, point.params, batch) for batch in point.parts)


def _matmat(
    jacobians: Callable[[], Iterable[Jacobian]],
    space: Point | LinearizedKernel,
    block: jax.Array,
) -> jax.Array:
    """Applies the kernel whose batches have the given Jacobians, streamed."""
    parts = split_block("block", block, space.copies, space.error)
    if space.reduction == "stack" and space.copies > 1:
        tangents = stacked_pull(jacobians(), parts)
        return join_block([jacobian.push(tangents) for jacobian in jacobians()])
    products = [jacobian.multiply(parts[0]) for jacobian in jacobians()]
    return join_block([sum_trees(products) / len(products)])


def stacked_pull(jacobians: Iterable[Jacobian], parts: list[jax.Array]) -> PyTree:
    """Computes ``G = sum_k J_k^T V_k`` of the stacked batches."""
    return sum_trees(
        jacobian.pull(part) for jacobian, part in zip(jacobians, parts, strict=True)
    )
