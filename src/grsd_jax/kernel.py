"""The kernel ``M = J J^T``, matrix-free: recomputed each time, or linearised once.

``J = de/dtheta`` is the Jacobian of the error vector (paper 2.1, 7.2, B.2). With K
batches there are two operators: the ``mean`` ``M = (1/K) sum_k J_k J_k^T`` on the
error space of one batch, and the ``stack`` ``M = J J^T`` of all batches as one set.
"""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._checks import check_batches, check_choice, check_shape
from grsd_jax._jacobian import (
    Pullback,
    check_problem,
    linearize,
    pull,
    push,
    split_batches,
)
from grsd_jax._typing import ErrorFn, PyTree, Reduction

REDUCTIONS = ("mean", "stack")


def kernel_matmat(
    error_fn: ErrorFn,
    params: PyTree,
    batches: PyTree,
    block: jax.Array,
    *,
    reduction: Reduction = "mean",
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

    def pullbacks() -> Iterable[Pullback]:
        return (linearize(error_fn, params, batch) for batch in parts)

    return _matmat(pullbacks, len(parts), error, block, reduction)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["pullbacks"],
    meta_fields=["error", "reduction"],
)
@dataclasses.dataclass(frozen=True)
class LinearizedKernel:
    """The kernel at fixed parameters, linearised once for many products.

    A pytree: it crosses `jit` as an argument, and kernels made by `linearize_kernel` at
    other parameters of the same shapes do not retrace the function that takes them.

    Attributes:
        pullbacks: ``u -> (J_k^T u,)`` of each batch, with its residuals.
        error: Shape ``[N, C]`` and dtype of one batch's error.
        reduction: ``"mean"`` or ``"stack"``.
    """

    pullbacks: tuple[Pullback, ...]
    error: jax.ShapeDtypeStruct
    reduction: Reduction

    @property
    def dimension(self) -> int:
        """The dimension n of the error space."""
        copies = len(self.pullbacks) if self.reduction == "stack" else 1
        return copies * int(np.prod(self.error.shape))

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the columns."""
        return np.dtype(self.error.dtype)

    def matmat(self, block: jax.Array) -> jax.Array:
        """Applies the kernel to a block of columns.

        Args:
            block: Columns V, ``[n, b]``, in the dtype of the error.

        Returns:
            ``M V``, ``[n, b]``.

        Raises:
            ValueError: If the shape or dtype of ``block`` does not fit.
        """
        return _matmat(
            lambda: self.pullbacks,
            len(self.pullbacks),
            self.error,
            block,
            self.reduction,
        )


def linearize_kernel(
    error_fn: ErrorFn,
    params: PyTree,
    batches: PyTree,
    *,
    reduction: Reduction = "mean",
) -> LinearizedKernel:
    """Linearises the kernel at ``params`` once, for many products.

    The primal pass is shared by every product, at the cost of holding the residuals
    (about the activations) of all K batches.

    Args:
        error_fn: ``error_fn(params, batch) -> [N, C]``.
        params: Parameters, a pytree of floating arrays.
        batches: A pytree with leading axes ``[K, N]``.
        reduction: ``"mean"`` or ``"stack"``.

    Returns:
        A `LinearizedKernel`, whose ``matmat`` equals `kernel_matmat`.

    Raises:
        ValueError: If a shape, dtype, leading axis or choice does not fit.

    References:
        Paper 7.2 and B.2.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    error = check_problem(error_fn, params, batches)
    pullbacks = tuple(
        linearize(error_fn, params, batch) for batch in split_batches(batches)
    )
    return LinearizedKernel(pullbacks, error, reduction)


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
    pullbacks: Callable[[], Iterable[Pullback]],
    num_batches: int,
    error: jax.ShapeDtypeStruct,
    block: jax.Array,
    reduction: Reduction,
) -> jax.Array:
    """Applies the kernel whose batches have the given pullbacks, streamed."""
    copies = num_batches if reduction == "stack" else 1
    parts = split_block("block", block, copies, error)
    example = jnp.zeros(error.shape, error.dtype)
    if reduction == "stack":
        tangents = stacked_pull(pullbacks(), parts)
        return join_block([push(p, tangents, example) for p in pullbacks()])
    products = (push(p, pull(p, parts[0]), example) for p in pullbacks())
    return join_block([_sum(products) / num_batches])


def stacked_pull(pullbacks: Iterable[Pullback], parts: list[jax.Array]) -> PyTree:
    """Computes ``G = sum_k J_k^T V_k`` of the stacked batches."""
    pulled = (pull(p, part) for p, part in zip(pullbacks, parts, strict=True))
    return _sum(pulled)


def split_block(
    name: str, block: jax.Array, copies: int, error: jax.ShapeDtypeStruct
) -> list[jax.Array]:
    """Splits columns ``[copies N C, b]`` into arrays ``[N, C, b]``."""
    size = copies * int(np.prod(error.shape))
    check_shape(name, block, [size, None])
    if jnp.result_type(block) != error.dtype:
        raise ValueError(
            f"{name}: expected dtype {error.dtype}, that of the error, "
            f"got {jnp.result_type(block)}."
        )
    return list(jnp.reshape(block, (copies, *error.shape, block.shape[1])))


def join_block(parts: list[jax.Array]) -> jax.Array:
    """Joins arrays ``[N, C, b]`` into columns ``[copies N C, b]``."""
    return jnp.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])


def _sum(trees: Iterable[PyTree]) -> PyTree:
    iterator = iter(trees)
    total = next(iterator)
    for tree in iterator:
        total = jax.tree.map(jnp.add, total, tree)
    return total
