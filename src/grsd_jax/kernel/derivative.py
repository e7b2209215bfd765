"""The derivative of the kernel along a direction of the parameters, projected.

``Mdot = d/ds M(theta + s d)`` at ``s = 0`` says how the kernel moves while training
moves the parameters along d (paper 7.2, B.5). The paper takes a finite difference; the
exact derivative costs less. For piecewise-linear activations the two differ in kind:
the exact one sees a single activation pattern, a finite step also sees patterns flip.
"""

from collections.abc import Callable, Iterable
from functools import partial, reduce

import jax
import jax.numpy as jnp

from grsd_jax._arrays import is_traced
from grsd_jax._checks import (
    check_at_least,
    check_batches,
    check_choice,
    check_positive,
    check_same_tree,
)
from grsd_jax._typing import Derivative, ErrorFn, LossFn, PyTree, Reduction
from grsd_jax.jacobian.autodiff import (
    Jacobian,
    JacobianMap,
    PlainDerivative,
    as_pytree,
    check_problem,
    linearize,
    linearize_pair,
    split_batches,
)
from grsd_jax.jacobian.columns import by_chunks, join_block, split_block, sum_trees
from grsd_jax.jacobian.factored import (
    JacobianForm,
    factorize_with_derivative,
    uses_factors,
)
from grsd_jax.kernel.operator import REDUCTIONS, kernel_matmat

DERIVATIVES = ("exact", "finite_difference")
_HIGHEST = jax.lax.Precision.HIGHEST

Pairs = Callable[[], Iterable[tuple[Jacobian, JacobianMap]]]

#: Columns, in units of C, up to which plain differentiation is the cheaper.
_FEW_COLUMNS = 1.5

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

    ``exact``: ``A + A^T`` with ``A = (1/K) sum_k V^T Jdot_k (J_k^T V)``, by pulling
    both Jacobians back where all columns are taken at once, else by one pullback and
    one push-forward per column. ``finite_difference``:
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
    direction = like_params(direction, params)

    width = column_chunk or vectors.shape[1]
    traced = is_traced((params, batches, direction, vectors))
    chunked = partial(by_chunks, vectors=vectors, width=width, mapped=traced)
    if method == "finite_difference":

        def product(p: PyTree, block: jax.Array) -> jax.Array:
            return kernel_matmat(error_fn, p, batches, block, reduction=reduction)

        moved = chunked(difference_of(product, params, direction, step))
        projected = project(vectors, moved)
        return (projected + projected.T) / 2

    if jacobian == "auto" and vectors.shape[1] <= _FEW_COLUMNS * error.shape[1]:
        jacobian = "plain"  # too few columns to make up for the factors
    at_once = width >= vectors.shape[1] and not uses_factors(error_fn, jacobian)
    # The mean takes one batch after the other, and holds the factors of one at a time.
    batch_list = split_batches(batches)
    spaces = [[b] for b in batch_list] if reduction == "mean" else [batch_list]
    halves = []
    for space in spaces:
        if at_once:
            parts = split_block("vectors", vectors, copies, error)
            halves.append(_pulled_half(error_fn, params, space, direction, parts))
            continue
        pairs = _pairs(error_fn, params, space, direction, jacobian)

        def half(block: jax.Array, pairs: Pairs = pairs) -> jax.Array:
            parts = split_block("vectors", block, copies, error)
            return _half_product(pairs(), parts)

        halves.append(project(vectors, chunked(half)))
    projected = reduce(jnp.add, halves) / len(spaces)
    return projected + projected.T


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
        step = default_step(jnp.result_type(*jax.tree.leaves(params)))
    check_positive("step", step)
    size, speed = _usable_norms(params, direction)
    h = step * size / speed
    forward, backward = (fn(_shifted(params, direction, by)) for by in (h, -h))
    return (forward - backward) / (2 * h).astype(forward.dtype)


def default_step(dtype: jax.typing.DTypeLike) -> float:
    """Returns the relative step of a central difference where none is given."""
    return _BEND * float(jnp.finfo(dtype).eps) ** (1 / 3)


def difference_of(
    product: Callable[[PyTree, jax.Array], jax.Array],
    params: PyTree,
    direction: PyTree,
    step: float | None,
) -> Callable[[jax.Array], jax.Array]:
    """Returns ``V -> (M(theta + h d) V - M(theta - h d) V) / 2h`` of a product."""
    return lambda block: central_difference(
        lambda p: product(p, block), params, direction, step=step
    )


def project(vectors: jax.Array, columns: jax.Array) -> jax.Array:
    """Computes ``V^T W``."""
    return jnp.matmul(vectors.T, columns, precision=_HIGHEST)


def _pairs(
    error_fn: ErrorFn,
    params: PyTree,
    parts: list[PyTree],
    direction: PyTree,
    jacobian: JacobianForm,
) -> Pairs:
    """Returns what yields ``(J_k, Jdot_k)`` of the given batches.

    Factors are made once and held; plain linearisations are cheap, and made anew each
    time so that one batch's residuals are held at a time.
    """
    if uses_factors(error_fn, jacobian):
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


def _half_product(
    pairs: Iterable[tuple[Jacobian, JacobianMap]], parts: list[jax.Array]
) -> jax.Array:
    """Computes ``Jdot J^T V`` of stacked batches, columns ``[N, C, b]`` of each."""
    tangents, derivatives = None, []
    for (jacobian, derivative), part in zip(pairs, parts, strict=True):
        pulled = jacobian.pull(part)
        tangents = pulled if tangents is None else sum_trees([tangents, pulled])
        derivatives.append(derivative)
    return join_block([derivative.push(tangents) for derivative in derivatives])


def _pulled_half(
    error_fn: ErrorFn,
    params: PyTree,
    batches: list[PyTree],
    direction: PyTree,
    parts: list[jax.Array],
) -> jax.Array:
    """Computes ``V^T Jdot J^T V`` as ``(Jdot^T V)^T (J^T V)``.

    Six passes a column, one less than by pushing, since both pulls share one. It holds
    two parameter trees a column.
    """
    pulled, moved = sum_trees(
        linearize_pair(error_fn, params, batch, direction).pull(part)
        for batch, part in zip(batches, parts, strict=True)
    )
    return _tree_products(moved, pulled)


@jax.jit
def _tree_products(left: PyTree, right: PyTree) -> jax.Array:
    """Computes the inner products ``[b, b']`` of trees with leading axes b and b'."""
    products = jax.tree.map(
        lambda x, y: jnp.matmul(
            x.reshape(len(x), -1), y.reshape(len(y), -1).T, precision=_HIGHEST
        ),
        left,
        right,
    )
    return sum(jax.tree.leaves(products)[1:], jax.tree.leaves(products)[0])


@jax.jit
def _loss_gradient(loss_fn: LossFn, params: PyTree, batch: PyTree) -> PyTree:
    loss = jax.eval_shape(loss_fn, params, batch)
    if getattr(loss, "shape", None) != ():
        raise ValueError(
            "loss_fn: expected a scalar, the mean loss of one batch, got "
            f"{getattr(loss, 'shape', jax.tree.structure(loss))}."
        )
    return jax.grad(loss_fn)(params, batch)


def like_params(direction: PyTree, params: PyTree) -> PyTree:
    """Gives the leaves of ``direction`` the dtypes of ``params``."""
    return jax.tree.map(
        lambda d, p: jnp.asarray(d).astype(jnp.result_type(p)), direction, params
    )


# Jitted: an operation for each leaf, one by one, would cost more than the products.
@jax.jit
def _usable_norms(params: PyTree, direction: PyTree) -> tuple[jax.Array, jax.Array]:
    """Computes ``(|theta|, |d|)``, ones if either vanishes."""
    size, speed = _norm(params), _norm(direction)
    usable = (size > 0) & (speed > 0)
    return jnp.where(usable, size, 1), jnp.where(usable, speed, 1)


@jax.jit
def _shifted(params: PyTree, direction: PyTree, by: jax.Array) -> PyTree:
    return jax.tree.map(
        lambda p, d: p + by.astype(p.dtype) * d.astype(p.dtype), params, direction
    )


def _norm(tree: PyTree) -> jax.Array:
    squares = [jnp.sum(jnp.square(jnp.abs(leaf))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares[1:], squares[0]))
