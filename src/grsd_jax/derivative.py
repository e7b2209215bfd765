"""The derivative of the kernel along a direction of the parameters, projected.

``Mdot = d/ds M(theta + s d)`` at ``s = 0`` says how the kernel moves while training
moves the parameters along d (paper 7.2, B.5). The paper takes a finite difference; the
exact derivative costs less. For piecewise-linear activations the two differ in kind:
the exact one sees a single activation pattern, a finite step also sees patterns flip.
"""

from collections.abc import Callable, Iterable
from functools import reduce

import jax
import jax.numpy as jnp

from grsd_jax._checks import (
    check_at_least,
    check_batches,
    check_choice,
    check_positive,
    check_same_tree,
)
from grsd_jax._jacobian import (
    Jacobian,
    JacobianMap,
    PlainDerivative,
    as_pytree,
    check_problem,
    is_traced,
    linearize,
    split_batches,
)
from grsd_jax._typing import Derivative, ErrorFn, LossFn, PyTree, Reduction
from grsd_jax.factored import JacobianForm, factorize_with_derivative, uses_factors
from grsd_jax.kernel import (
    REDUCTIONS,
    join_block,
    kernel_matmat,
    split_block,
    stacked_pull,
)

DERIVATIVES = ("exact", "finite_difference")
_HIGHEST = jax.lax.Precision.HIGHEST

#: Along its gradient a trained network bends over a small part of |theta|; steps of the
#: cube root of eps alone leave the linear range.
_BEND = 0.02


def gradient_flow_direction(loss_fn: LossFn, params: PyTree, batches: PyTree) -> PyTree:
    """Returns the gradient flow ``d = -grad L``, L the mean loss over the K batches.

    Args:
        loss_fn: ``loss_fn(params, batch) -> []``, the mean loss of one batch.
        params: Parameters, a pytree of floating arrays.
        batches: A pytree with leading axes ``[K, N]``.

    Returns:
        A tree like ``params``, in units of loss over parameter.

    Raises:
        ValueError: If the leading axes do not fit or the loss is not a scalar.

    References:
        Paper 7.2 and B.5.
    """
    parts = split_batches(batches)
    loss_fn = as_pytree(loss_fn)
    gradients = [_loss_gradient(loss_fn, params, batch) for batch in parts]
    return jax.tree.map(lambda *leaves: -sum(leaves) / len(leaves), *gradients)


def kernel_derivative(
    error_fn: ErrorFn,
    params: PyTree,
    batches: PyTree,
    direction: PyTree,
    vectors: jax.Array,
    *,
    method: Derivative = "exact",
    step: float | None = None,
    reduction: Reduction = "mean",
    column_chunk: int | None = None,
    jacobian: JacobianForm = "auto",
) -> jax.Array:
    """Projects the kernel's derivative onto columns: ``V^T Mdot V``.

    ``exact``: ``A + A^T`` with ``A = (1/K) sum_k V^T Jdot_k (J_k^T V)``, one pullback
    and one derivative of a push-forward per column. ``finite_difference``:
    ``V^T (M(theta + h d) - M(theta - h d)) V / 2h`` with ``h = step |theta| / |d|``.

    Args:
        error_fn: ``error_fn(params, batch) -> [N, C]``.
        params: Parameters, a pytree of floating arrays.
        batches: A pytree with leading axes ``[K, N]``.
        direction: The tangent d, a tree like ``params``.
        vectors: Columns V, ``[n, r]``, usually Ritz vectors.
        method: ``"exact"`` or ``"finite_difference"``.
        step: Relative step of the difference; if None, a fiftieth of the cube root of
            the dtype's epsilon (1e-4 in float32). Ignored by the exact derivative.
        reduction: ``"mean"`` or ``"stack"``.
        column_chunk: Columns taken at a time, which bounds memory; all if None.
        jacobian: ``"factored"``, ``"plain"`` or ``"auto"``, for the exact derivative;
            see `linearize_kernel`.

    Returns:
        The symmetric matrix ``[r, r]``, in units of M per unit of s.

    Raises:
        ValueError: If a shape, tree, dtype, leading axis or choice does not fit.

    References:
        Paper 7.2 and B.5; the exact form is ours.
    """
    check_choice("method", method, DERIVATIVES)
    check_choice("reduction", reduction, REDUCTIONS)
    check_same_tree("direction", direction, params, "params")
    if column_chunk is not None:
        check_at_least("column_chunk", column_chunk, 1)
    error = check_problem(error_fn, params, batches)
    copies = check_batches(batches)[0] if reduction == "stack" else 1
    split_block("vectors", vectors, copies, error)
    direction = _like(direction, params)

    if method == "exact":
        pairs = _prepared(
            error_fn, params, batches, direction, uses_factors(error_fn, jacobian)
        )

        def product(block: jax.Array) -> jax.Array:
            parts = split_block("vectors", block, copies, error)
            return _half_derivative(pairs, parts, reduction)

        scale = 1.0
    else:

        def product(block: jax.Array) -> jax.Array:
            def moved(p: PyTree) -> jax.Array:
                return kernel_matmat(error_fn, p, batches, block, reduction=reduction)

            return central_difference(moved, params, direction, step=step)

        scale = 0.5
    moved_columns = _by_chunks(
        product,
        vectors,
        column_chunk or vectors.shape[1],
        mapped=is_traced((params, batches, direction, vectors)),
    )
    projected = jnp.matmul(vectors.T, moved_columns, precision=_HIGHEST)
    return scale * (projected + projected.T)


def central_difference(
    fn: Callable[[PyTree], jax.Array],
    params: PyTree,
    direction: PyTree,
    *,
    step: float | None = None,
) -> jax.Array:
    """Computes the central difference of ``fn`` along a direction of the parameters.

    ``(f(theta + h d) - f(theta - h d)) / 2h`` with ``h = step |theta| / |d|``; h = step
    where theta or d vanishes. The two points are evaluated one after the other, because
    a `vmap` over parameters makes grouped convolutions.

    Args:
        fn: ``fn(params) -> array``.
        params: Parameters theta, a pytree of floating arrays.
        direction: The tangent d, a tree like ``params``.
        step: Relative step; if None, a fiftieth of the cube root of the dtype's
            epsilon (1e-4 in float32).

    Returns:
        The difference quotient, in the units of ``fn`` per unit of s.

    Raises:
        ValueError: If the trees differ or ``step`` is not a finite number above zero.

    References:
        Paper 7.2 and B.5.
    """
    check_same_tree("direction", direction, params, "params")
    if step is None:
        dtype = jnp.result_type(*jax.tree.leaves(params))
        step = _BEND * float(jnp.finfo(dtype).eps) ** (1 / 3)
    check_positive("step", step)
    size, speed = _norm(params), _norm(direction)
    usable = (size > 0) & (speed > 0)
    h = step * jnp.where(usable, size, 1) / jnp.where(usable, speed, 1)

    def at(sign: int) -> jax.Array:
        return fn(
            jax.tree.map(
                lambda p, d: p + (sign * h).astype(p.dtype) * d.astype(p.dtype),
                params,
                direction,
            )
        )

    forward, backward = at(1), at(-1)
    return (forward - backward) / (2 * h).astype(forward.dtype)


def _prepared(
    error_fn: ErrorFn,
    params: PyTree,
    batches: PyTree,
    direction: PyTree,
    factored: bool,
) -> Callable[[], Iterable[tuple[Jacobian, JacobianMap]]]:
    """Returns what yields ``(J_k, Jdot_k)`` of each batch.

    Factors are made once and held; plain linearisations are cheap, and made anew each
    time so that one batch's residuals are held at a time.
    """
    parts = split_batches(batches)
    if factored:
        held = [
            factorize_with_derivative(error_fn, params, batch, direction)
            for batch in parts
        ]
        return lambda: held
    fn = as_pytree(error_fn)
    return lambda: (
        (
            linearize(error_fn, params, batch),
            PlainDerivative(fn, params, batch, direction),
        )
        for batch in parts
    )


def _half_derivative(
    pairs: Callable[[], Iterable[tuple[Jacobian, JacobianMap]]],
    parts: list[jax.Array],
    reduction: Reduction,
) -> jax.Array:
    """Computes ``(1/K) sum_k Jdot_k J_k^T V`` (mean) or ``Jdot J^T V`` (stack)."""
    if reduction == "stack":
        tangents = stacked_pull((jacobian for jacobian, _ in pairs()), parts)
        return join_block([moved.push(tangents) for _, moved in pairs()])
    products = [moved.push(jacobian.pull(parts[0])) for jacobian, moved in pairs()]
    return join_block([reduce(jnp.add, products) / len(products)])


def _by_chunks(
    product: Callable[[jax.Array], jax.Array],
    vectors: jax.Array,
    width: int,
    *,
    mapped: bool,
) -> jax.Array:
    """Applies ``product`` to ``width`` columns at a time, one compiled program.

    Eager calls loop in Python, since convolutions in an XLA:CPU loop body are slow; in
    a traced call the chunks are mapped, so that the program does not grow with them.
    """
    num_columns = vectors.shape[1]
    num_chunks = -(-num_columns // width)
    padding = num_chunks * width - num_columns
    padded = jnp.pad(vectors, ((0, 0), (0, padding)))
    chunks = jnp.moveaxis(padded.reshape(-1, num_chunks, width), 1, 0)
    if mapped and num_chunks > 1:
        products = jax.lax.map(product, chunks)
    else:
        products = jnp.stack([product(chunk) for chunk in chunks])
    return jnp.moveaxis(products, 0, 1).reshape(padded.shape)[:, :num_columns]


@jax.jit
def _loss_gradient(loss_fn: LossFn, params: PyTree, batch: PyTree) -> PyTree:
    loss = jax.eval_shape(loss_fn, params, batch)
    if getattr(loss, "shape", None) != ():
        raise ValueError(
            "loss_fn: expected a scalar, the mean loss of one batch, got "
            f"{getattr(loss, 'shape', jax.tree.structure(loss))}."
        )
    return jax.grad(loss_fn)(params, batch)


def _like(direction: PyTree, params: PyTree) -> PyTree:
    """Gives the leaves of ``direction`` the dtypes of ``params``."""
    return jax.tree.map(
        lambda d, p: jnp.asarray(d).astype(jnp.result_type(p)), direction, params
    )


def _norm(tree: PyTree) -> jax.Array:
    squares = [jnp.sum(jnp.square(jnp.abs(leaf))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares[1:], squares[0]))
