"""The exact dense kernel and its derivative, whole or layer by layer.

Examples are independent (BatchNorm runs on stored statistics), so all n rows of J cost
C backward passes over the batch, not n. An error function that knows its layers needs
no weight gradients in them either (see `factored`).
"""

from collections.abc import Callable

import jax

from grsd_jax._checks import check_same_tree
from grsd_jax._typing import ErrorFn, PyTree, Reduction
from grsd_jax.jacobian.factored import JacobianForm
from grsd_jax.kernel.dense_blocks import DenseOptions, accumulate
from grsd_jax.parameter_blocks import parameter_paths


def kernel_dense(
    error_fn: ErrorFn,
    params: PyTree,
    batches: PyTree,
    *,
    reduction: Reduction = "mean",
    example_chunk: int | None = None,
    max_jacobian_bytes: int | None = None,
    jacobian: JacobianForm = "auto",
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
        example_chunk: Examples differentiated together; bounds the activations held. If
            None, an eighth of the examples, but no fewer than 8 and no more than 32,
            and 32 if all blocks of J take at most 16 MiB:
            small chunks stay in the caches, and make more products of smaller blocks.
        max_jacobian_bytes: Bytes of blocks of J held at a time; a quarter of the memory
            that is free if None. If they need more, the backward passes are repeated
            for each group of parameter leaves; a group holds at least one leaf.
        jacobian: ``"factored"``, ``"plain"``, or ``"auto"``: factored where the error
            function knows its layers.

    Returns:
        M, ``[n, n]``, symmetric positive semidefinite to rounding, ``n = N C`` or
        ``K N C``.

    Raises:
        ValueError: If a shape, dtype, leading axis or choice does not fit.

    References:
        Paper 7.2; the layer-wise sum is ours.
    """
    options = DenseOptions(reduction, example_chunk, max_jacobian_bytes, jacobian)
    labels = [""] * len(jax.tree.leaves(params))
    (kernel,) = accumulate(error_fn, params, batches, None, labels, options)[""]
    return kernel


def kernel_derivative_dense(
    error_fn: ErrorFn,
    params: PyTree,
    batches: PyTree,
    direction: PyTree,
    *,
    reduction: Reduction = "mean",
    example_chunk: int | None = None,
    max_jacobian_bytes: int | None = None,
    jacobian: JacobianForm = "auto",
) -> jax.Array:
    """Forms the kernel's derivative: ``Mdot = (1/K) sum_k (Jdot J^T + J Jdot^T)``.

    Args:
        error_fn: ``error_fn(params, batch) -> [N, C]``, examples independent.
        params: Parameters, a pytree of floating arrays.
        batches: A pytree with leading axes ``[K, N]``.
        direction: The tangent d, a tree like ``params``.
        reduction: ``"mean"`` or ``"stack"``.
        example_chunk: Examples differentiated together, see `kernel_dense`.
        max_jacobian_bytes: Bytes of blocks of J and Jdot held at a time, see
            `kernel_dense`.
        jacobian: ``"factored"``, ``"plain"`` or ``"auto"``.

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
        jacobian=jacobian,
    )[1]


def kernel_with_derivative_dense(
    error_fn: ErrorFn,
    params: PyTree,
    batches: PyTree,
    direction: PyTree,
    *,
    reduction: Reduction = "mean",
    example_chunk: int | None = None,
    max_jacobian_bytes: int | None = None,
    jacobian: JacobianForm = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Forms the kernel and its derivative from one pass of per-example Jacobians.

    Args:
        error_fn: ``error_fn(params, batch) -> [N, C]``, examples independent.
        params: Parameters, a pytree of floating arrays.
        batches: A pytree with leading axes ``[K, N]``.
        direction: The tangent d, a tree like ``params``.
        reduction: ``"mean"`` or ``"stack"``.
        example_chunk: Examples differentiated together, see `kernel_dense`.
        max_jacobian_bytes: Bytes of blocks of J and Jdot held at a time, see
            `kernel_dense`.
        jacobian: ``"factored"``, ``"plain"`` or ``"auto"``.

    Returns:
        ``(M, Mdot)``, both ``[n, n]``.

    Raises:
        ValueError: If a shape, tree, dtype, leading axis or choice does not fit.

    References:
        Paper 7.2 and B.5.
    """
    check_same_tree("direction", direction, params, "params")
    options = DenseOptions(reduction, example_chunk, max_jacobian_bytes, jacobian)
    labels = [""] * len(jax.tree.leaves(params))
    kernel, derivative = accumulate(
        error_fn, params, batches, direction, labels, options
    )[""]
    return kernel, derivative


def layer_kernels(
    error_fn: ErrorFn,
    params: PyTree,
    batches: PyTree,
    *,
    layer_of: Callable[[tuple[str, ...]], str] | None = None,
    reduction: Reduction = "mean",
    example_chunk: int | None = None,
    max_jacobian_bytes: int | None = None,
    jacobian: JacobianForm = "auto",
) -> dict[str, jax.Array]:
    """Forms every layer's own kernel, ``M_l = (1/K) sum_k J_kl J_kl^T``.

    They add up to M: ``M = sum_l M_l``. One pass makes them all, at no more operations
    than M alone; each takes the memory of M.

    Args:
        error_fn: ``error_fn(params, batch) -> [N, C]``, examples independent.
        params: Parameters, a pytree of floating arrays.
        batches: A pytree with leading axes ``[K, N]``.
        layer_of: ``layer_of(path) -> name`` of the layer that a parameter belongs to,
            from the names along its path; the path without its last name if None.
        reduction: ``"mean"`` or ``"stack"``.
        example_chunk: Examples differentiated together, see `kernel_dense`.
        max_jacobian_bytes: Bytes of blocks of J held at a time, see `kernel_dense`.
        jacobian: ``"factored"``, ``"plain"`` or ``"auto"``.

    Returns:
        ``{name: M_l}``, each ``[n, n]``, in the order of the tree.

    Raises:
        ValueError: If a shape, dtype, leading axis or choice does not fit.

    References:
        Paper 3.2 and A.3, the additive structure.
    """
    options = DenseOptions(reduction, example_chunk, max_jacobian_bytes, jacobian)
    labels = [(layer_of or _parent)(path) for path in parameter_paths(params)]
    matrices = accumulate(error_fn, params, batches, None, labels, options)
    return {label: kernel for label, (kernel,) in matrices.items()}


def layer_kernels_with_derivative(
    error_fn: ErrorFn,
    params: PyTree,
    batches: PyTree,
    direction: PyTree,
    *,
    layer_of: Callable[[tuple[str, ...]], str] | None = None,
    reduction: Reduction = "mean",
    example_chunk: int | None = None,
    max_jacobian_bytes: int | None = None,
    jacobian: JacobianForm = "auto",
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Forms every layer's kernel and its derivative, from one pass.

    ``M_l = (1/K) sum_k J_kl J_kl^T`` and ``Mdot_l = (1/K) sum_k (Jdot_kl J_kl^T + J_kl
    Jdot_kl^T)``, where all parameters move along ``direction``. They add up:
    ``M = sum_l M_l``, ``Mdot = sum_l Mdot_l``. One pass makes them all, at no more
    operations than M and Mdot alone.

    Args:
        error_fn: ``error_fn(params, batch) -> [N, C]``, examples independent.
        params: Parameters, a pytree of floating arrays.
        batches: A pytree with leading axes ``[K, N]``.
        direction: The tangent d, a tree like ``params``.
        layer_of: As for `layer_kernels`.
        reduction: ``"mean"`` or ``"stack"``.
        example_chunk: Examples differentiated together.
        max_jacobian_bytes: Bytes of blocks of J and Jdot held at a time.
        jacobian: ``"factored"``, ``"plain"`` or ``"auto"``.

    Returns:
        ``{name: (M_l, Mdot_l)}``, each ``[n, n]``, in the order of the tree.

    Raises:
        ValueError: If a shape, tree, dtype, leading axis or choice does not fit.

    References:
        Paper 3.2 and A.3, the additive structure.
    """
    check_same_tree("direction", direction, params, "params")
    options = DenseOptions(reduction, example_chunk, max_jacobian_bytes, jacobian)
    labels = [(layer_of or _parent)(path) for path in parameter_paths(params)]
    matrices = accumulate(error_fn, params, batches, direction, labels, options)
    return {label: (kernel, moved) for label, (kernel, moved) in matrices.items()}


def _parent(path: tuple[str, ...]) -> str:
    return "/".join(path[:-1]) or "/".join(path)
