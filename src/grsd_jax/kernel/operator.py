"""The kernel ``M = J J^T``, matrix-free: recomputed each time, or linearised once.

``J = de/dtheta`` is the Jacobian of the error vector (paper 2.1, 7.2, B.2). With K
batches there are two operators: the ``mean`` ``M = (1/K) sum_k J_k J_k^T`` on the
error space of one batch, and the ``stack`` ``M = J J^T`` of all batches as one set.
"""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial

import jax
import numpy as np

from grsd_jax._arrays import is_traced
from grsd_jax._checks import (
    check_batches,
    check_choice,
    check_same_tree,
)
from grsd_jax._typing import ErrorFn, PyTree, Reduction
from grsd_jax.jacobian.autodiff import (
    Jacobian,
    PlainDerivative,
    RestrictedErrorFn,
    as_pytree,
    check_problem,
    linearize,
    split_batches,
)
from grsd_jax.jacobian.columns import in_chunks, join_block, split_block, sum_trees
from grsd_jax.jacobian.factored import (
    JacobianForm,
    factorize,
    factorize_by_groups,
    uses_factors,
)
from grsd_jax.parameter_blocks import ParameterBlocks, check_blocks

REDUCTIONS = ("mean", "stack")


def kernel_matmat(
    error_fn: ErrorFn,
    params: PyTree,
    batches: PyTree,
    block: jax.Array,
    *,
    reduction: Reduction = "mean",
    column_chunk: int | None = None,
) -> jax.Array:
    """Applies the kernel to a block of columns, ``M V``, without forming it.

    ``mean``: ``M V = (1/K) sum_k J_k (J_k^T V)``. ``stack``: ``g = sum_k J_k^T V_k``,
    then ``(M V)_k = J_k g``. Each batch is linearised, used and dropped, so that the
    residuals of one batch are held at a time; `linearize_kernel` keeps them instead.

    Args:
        error_fn: ``error_fn(params, batch) -> [N, C]``. A fresh lambda at every call is
            a new function and traces again; reuse one, or one that is a pytree.
        params: Parameters, a pytree of floating arrays.
        batches: A pytree with leading axes ``[K, N]``.
        block: Columns V, ``[n, b]``, ``n = N C`` (``mean``) or ``K N C`` (``stack``),
            in the dtype of the error.
        reduction: ``"mean"`` or ``"stack"``.
        column_chunk: Columns taken at a time, which bounds memory; all if None.

    Returns:
        ``M V``, ``[n, b]``, in the squared units of ``de/dtheta``.

    Raises:
        ValueError: If a shape, dtype, leading axis or choice does not fit.

    References:
        Paper 7.2 and B.2.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    error = check_problem(error_fn, params, batches)
    parts = split_batches(batches)

    def jacobians() -> Iterable[Jacobian]:
        return (linearize(error_fn, params, batch) for batch in parts)

    def product(columns: jax.Array) -> jax.Array:
        return _matmat(jacobians, len(parts), error, columns, reduction)

    traced = is_traced((params, batches, block))
    return in_chunks(product, block, column_chunk, mapped=traced)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["jacobians"],
    meta_fields=["error", "reduction"],
)
@dataclasses.dataclass(frozen=True)
class LinearizedKernel:
    """The kernel at fixed parameters, linearised once for many products.

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
    def dimension(self) -> int:
        """The dimension n of the error space."""
        copies = len(self.jacobians) if self.reduction == "stack" else 1
        return copies * int(np.prod(self.error.shape))

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the columns."""
        return np.dtype(self.error.dtype)

    def matmat(self, block: jax.Array, *, column_chunk: int | None = None) -> jax.Array:
        """Applies the kernel to a block of columns.

        Args:
            block: Columns V, ``[n, b]``, in the dtype of the error.
            column_chunk: Columns taken at a time, which bounds memory; all if None.

        Returns:
            ``M V``, ``[n, b]``.

        Raises:
            ValueError: If the shape or dtype of ``block`` does not fit, or the chunk is
                not a count.
        """

        def product(columns: jax.Array) -> jax.Array:
            return _matmat(
                lambda: self.jacobians,
                len(self.jacobians),
                self.error,
                columns,
                self.reduction,
            )

        traced = is_traced((self, block))
        return in_chunks(product, block, column_chunk, mapped=traced)


def linearize_kernel(
    error_fn: ErrorFn,
    params: PyTree,
    batches: PyTree,
    *,
    reduction: Reduction = "mean",
    jacobian: JacobianForm = "auto",
) -> LinearizedKernel:
    """Linearises the kernel at ``params`` once, for many products.

    The plain form shares the primal pass between the products and holds its residuals
    (about the activations) of all K batches. The factored form, for error functions
    that know their layers, spends one backward pass for each output first and holds C
    times the activations; then nothing passes through the network any more.

    Args:
        error_fn: ``error_fn(params, batch) -> [N, C]``.
        params: Parameters, a pytree of floating arrays.
        batches: A pytree with leading axes ``[K, N]``.
        reduction: ``"mean"`` or ``"stack"``.
        jacobian: ``"factored"`` (examples must be independent), ``"plain"``, or
            ``"auto"``: factored where the error function has factors.

    Returns:
        A `LinearizedKernel`, whose ``matmat`` equals `kernel_matmat`.

    Raises:
        ValueError: If a shape, dtype, leading axis or choice does not fit.

    References:
        Paper 7.2 and B.2.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    error = check_problem(error_fn, params, batches)
    parts = split_batches(batches)
    jacobians: list[Jacobian]
    if uses_factors(error_fn, jacobian):
        once = reduction == "mean"  # a stack pulls all batches before it pushes one
        jacobians = [
            factorize(error_fn, params, batch, multiplied=once) for batch in parts
        ]
    else:
        jacobians = [linearize(error_fn, params, batch) for batch in parts]
    return LinearizedKernel(tuple(jacobians), error, reduction)


def linearize_block_kernels(
    error_fn: ErrorFn,
    params: PyTree,
    batches: PyTree,
    blocks: ParameterBlocks,
    *,
    reduction: Reduction = "mean",
    jacobian: JacobianForm = "auto",
) -> tuple[LinearizedKernel, ...]:
    """Linearises the kernel of every block of parameters, ``M_l = J_l J_l^T``.

    They add up to M. In the factored form all come from one set of factors; in the
    plain form each is linearised in its own parameters, the others held fixed.

    Args:
        error_fn: ``error_fn(params, batch) -> [N, C]``.
        params: Parameters, a pytree of floating arrays.
        batches: A pytree with leading axes ``[K, N]``.
        blocks: The partition, L blocks.
        reduction: ``"mean"`` or ``"stack"``.
        jacobian: ``"factored"``, ``"plain"`` or ``"auto"``; see `linearize_kernel`.

    Returns:
        L kernels, in the order of the blocks.

    Raises:
        ValueError: If a shape, dtype, leading axis or choice does not fit, or
            ``blocks`` is not a partition of ``params``.

    References:
        Paper 4.1, the additive operator.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_blocks(blocks, params)
    error = check_problem(error_fn, params, batches)
    groups = [blocks.leaves_of(block) for block in range(len(blocks.names))]
    by_batch: list[list[Jacobian]] = []
    for batch in split_batches(batches):
        if uses_factors(error_fn, jacobian):
            by_batch.append(
                [
                    *factorize_by_groups(
                        error_fn,
                        params,
                        batch,
                        groups,
                        multiplied=reduction == "mean",
                    )
                ]
            )
        else:
            fn = as_pytree(error_fn)
            parts = [RestrictedErrorFn(fn, params, group) for group in groups]
            by_batch.append([linearize(fn, fn.selected(), batch) for fn in parts])
    return tuple(
        LinearizedKernel(jacobians, error, reduction)
        for jacobians in zip(*by_batch, strict=True)
    )


def linearize_derivative(
    error_fn: ErrorFn,
    params: PyTree,
    batches: PyTree,
    direction: PyTree,
    *,
    reduction: Reduction = "mean",
) -> LinearizedKernel:
    """Returns the Gram operator of the Jacobian's derivative, ``Jdot Jdot^T``.

    ``Jdot = d/ds J(theta + s d)`` at ``s = 0``. Its largest eigenvalue is
    ``|Jdot|_op^2``, its trace ``|Jdot|_F^2``. Nothing is held: each product passes
    through the network twice, by a JVP of a VJP and back.

    Args:
        error_fn: ``error_fn(params, batch) -> [N, C]``.
        params: Parameters, a pytree of floating arrays.
        batches: A pytree with leading axes ``[K, N]``.
        direction: The tangent d, a tree like ``params``.
        reduction: ``"mean"`` or ``"stack"``.

    Returns:
        A `LinearizedKernel` whose ``matmat`` applies ``Jdot Jdot^T``.

    Raises:
        ValueError: If a shape, tree, dtype, leading axis or choice does not fit.

    References:
        Paper 3.2, Condition 3.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_same_tree("direction", direction, params, "params")
    error = check_problem(error_fn, params, batches)
    fn = as_pytree(error_fn)
    derivatives = tuple(
        PlainDerivative(fn, params, batch, direction)
        for batch in split_batches(batches)
    )
    return LinearizedKernel(derivatives, error, reduction)


def error_dimension(
    error_fn: ErrorFn, params: PyTree, batches: PyTree, *, reduction: Reduction = "mean"
) -> int:
    """Returns the dimension n of the error space, from shapes alone.

    Args:
        error_fn: ``error_fn(params, batch) -> [N, C]``.
        params: Parameters.
        batches: A pytree with leading axes ``[K, N]``.
        reduction: ``"mean"`` (``n = N C``) or ``"stack"`` (``n = K N C``).

    Returns:
        The dimension n.

    Raises:
        ValueError: If a shape, leading axis or choice does not fit.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    error = check_problem(error_fn, params, batches)
    copies = check_batches(batches)[0] if reduction == "stack" else 1
    return copies * int(np.prod(error.shape))


def _matmat(
    jacobians: Callable[[], Iterable[Jacobian]],
    num_batches: int,
    error: jax.ShapeDtypeStruct,
    block: jax.Array,
    reduction: Reduction,
) -> jax.Array:
    """Applies the kernel whose batches have the given Jacobians, streamed."""
    copies = num_batches if reduction == "stack" else 1
    parts = split_block("block", block, copies, error)
    if reduction == "stack":
        tangents = stacked_pull(jacobians(), parts)
        return join_block([jacobian.push(tangents) for jacobian in jacobians()])
    products = (jacobian.multiply(parts[0]) for jacobian in jacobians())
    return join_block([sum_trees(products) / num_batches])


def stacked_pull(jacobians: Iterable[Jacobian], parts: list[jax.Array]) -> PyTree:
    """Computes ``G = sum_k J_k^T V_k`` of the stacked batches."""
    return sum_trees(
        jacobian.pull(part) for jacobian, part in zip(jacobians, parts, strict=True)
    )
