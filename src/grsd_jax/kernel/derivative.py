"""The derivative of the kernel along a direction of the parameters, projected.

``Mdot = d/ds M(theta + s d)`` at ``s = 0`` says how the kernel moves while training
moves the parameters along d (paper 7.2, B.5). The paper takes a finite difference; the
exact derivative costs less. For piecewise-linear activations the two differ in kind:
the exact one sees a single activation pattern, a finite step also sees patterns flip.
"""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import (
    is_traced,
    matmul,
    norm,
    on_automatic_mesh,
    on_host,
    on_mesh_of,
)
from grsd_jax._checks import (
    check_at_least,
    check_choice,
    check_positive,
    check_same_tree,
    check_shape,
    check_tree_single_or_double,
    check_type,
    make_plain,
)
from grsd_jax._typing import DerivativeMethod, PyTree
from grsd_jax.jacobian.autodiff import (
    Jacobian,
    JacobianMap,
    linearize,
    linearize_pair,
    pull,
    pull_derivative,
    push_derivative,
)
from grsd_jax.jacobian.columns import (
    as_columns,
    by_chunks,
    join_block,
    split_block,
    sum_trees,
)
from grsd_jax.jacobian.factored import held_pair
from grsd_jax.jacobian.plan import Plan, plan_of
from grsd_jax.kernel.mesh import layout_of
from grsd_jax.kernel.operator import multiply_at
from grsd_jax.kernel.sharded import sharded_half
from grsd_jax.objective import Objective
from grsd_jax.problem import Point, Problem, point_at

DERIVATIVES = ("exact", "finite_difference")

Pairs = Callable[[], Iterable[tuple[Jacobian, JacobianMap]]]

#: Columns, in units of C, up to which plain differentiation is the cheaper.
_FEW_COLUMNS = 1.5

#: Along its gradient a trained network bends over a small part of |theta|; steps of the
#: cube root of eps alone leave the linear range.
_BEND = 0.02


@dataclasses.dataclass(frozen=True)
class Derivative:
    """How the kernel's derivative along a direction is taken.

    Attributes:
        method: ``"exact"`` or ``"finite_difference"``.
        step: Relative step of the difference, see `kernel_derivative`; that of the
            cross-check where the method is exact.
        cross_checked: Whether a measurement compares its M and Mdot with other forms of
            theirs, plain differentiation and a finite difference, on the leading pairs.
            It takes a program more, and for b pairs 3 b gradients.
    """

    method: DerivativeMethod = "exact"
    step: float | None = None
    cross_checked: bool = False

    def __post_init__(self) -> None:
        """Checks the options."""
        make_plain(self)
        check_choice("method", self.method, DERIVATIVES)
        if self.step is not None:
            check_positive("step", self.step)
        check_type("cross_checked", self.cross_checked, bool)


def gradient_flow_direction(problem: Problem, params: PyTree) -> PyTree:
    """Returns the gradient flow ``d = -grad L``, L the mean loss over the K batches.

    Args:
        problem: The problem.
        params: Parameters.

    Returns:
        A tree like ``params``, in units of loss over parameter; zeros for arrays and
        numbers that are held, None for other leaves.

    Raises:
        ValueError: If the problem does not fit, or has no loss.

    References:
        Paper 7.2 and B.5.
    """
    return jax.tree.map(
        lambda leaf, d: _zero_like(leaf) if d is None else on_mesh_of(leaf, d),
        params,
        flow_at(point_at(problem, params)),
        is_leaf=lambda leaf: leaf is None,
    )


def flow_at(point: Point) -> PyTree:
    """Returns the gradient flow of a checked problem, a tree like its ``params``."""
    count = len(point.parts)
    return sum_trees(
        _descent(point.error_fn, point.params, batch, count=count)
        for batch in point.parts
    )


def kernel_derivative(
    problem: Problem,
    params: PyTree,
    direction: PyTree,
    vectors: jax.Array,
    *,
    method: DerivativeMethod = "exact",
    step: float | None = None,
    column_chunk: int | None = None,
) -> jax.Array:
    """Projects the kernel's derivative onto columns: ``V^T Mdot V``.

    ``exact``: ``A + A^T`` with ``A = (1/K) sum_k V^T Jdot_k (J_k^T V)`` (without the
    mean for a stack), by pulling both Jacobians back where all columns are taken at
    once, else by one pullback and one push-forward per column. ``finite_difference``:
    ``V^T (M(theta + h d) - M(theta - h d)) V / 2h`` with ``h = step |theta| / |d|``.

    Args:
        problem: The problem; see `kernel_matmat` for batches on a mesh.
        params: Parameters.
        direction: The tangent d, a tree like ``params``.
        vectors: Columns V, ``[n, r]``, usually Ritz vectors.
        method: ``"exact"`` or ``"finite_difference"``.
        step: Relative step of the difference; if None, a fiftieth of the cube root of
            the dtype's epsilon (1e-4 in float32). Ignored by the exact derivative.
            A difference needs parameters in float32 or float64.
        column_chunk: Columns taken at a time, which bounds memory; all if None.

    Returns:
        The symmetric matrix ``[r, r]``, in units of M per unit of s.

    Raises:
        ValueError: If a shape, tree, dtype, leading axis or choice does not fit.

    References:
        Paper 7.2 and B.5; the exact form is ours.
    """
    point = point_at(problem, params, direction)
    vectors = on_automatic_mesh(vectors)
    check_shape("vectors", vectors, [point.dimension, None])
    # Too few columns do not make up for the factors.
    enough = vectors.shape[1] > _FEW_COLUMNS * point.error.shape[1]
    return project_derivative(
        point,
        vectors,
        Derivative(method, step),
        plan=plan_of(point) if enough else None,
        column_chunk=column_chunk,
    )


def kernel_derivative_matmat(
    problem: Problem, params: PyTree, direction: PyTree, block: jax.Array
) -> jax.Array:
    """Applies the kernel's derivative to a block of columns, ``Mdot V``.

    ``Mdot V = (1/K) sum_k (Jdot_k J_k^T + J_k Jdot_k^T) V``, without the mean for a
    stack, by plain differentiation; about three products of the kernel a column.

    Args:
        problem: The problem, its batches on one device.
        params: Parameters.
        direction: The tangent d, a tree like ``params``.
        block: Columns V, ``[n, b]``, or split as for `kernel_matmat`.

    Returns:
        ``Mdot V``, in the shape of ``block``, in units of M per unit of s.

    Raises:
        ValueError: If a shape, tree, dtype or leading axis does not fit, or the batches
            lie on a mesh.

    References:
        Paper 7.2 and B.5.
    """
    point = point_at(problem, params, direction)
    if layout_of(point) is not None:
        raise ValueError("problem.batches: expected one device, got a mesh.")
    columns, restore = as_columns("block", block, point.copies, point.error)
    parts = split_block("block", columns, point.copies, point.error)
    if point.reduction == "stack":
        return restore(join_block(_moved(point, point.parts, parts)))
    moved = [_moved(point, [batch], parts)[0] for batch in point.parts]
    return restore(join_block([sum_trees(moved) / len(moved)]))


def _moved(
    point: Point, batches: list[PyTree], parts: list[jax.Array]
) -> list[jax.Array]:
    """Computes ``(Jdot J^T + J Jdot^T) V`` of stacked batches, ``[N, C, b]`` each."""
    fn, params, direction = point.error_fn, point.params, point.direction
    jacobians = [linearize(fn, params, batch) for batch in batches]
    pulled = sum_trees(
        jacobian.pull(part) for jacobian, part in zip(jacobians, parts, strict=True)
    )
    changed = sum_trees(
        pull_derivative(fn, params, batch, direction, part)
        for batch, part in zip(batches, parts, strict=True)
    )
    return [
        push_derivative(fn, params, batch, direction, pulled) + jacobian.push(changed)
        for batch, jacobian in zip(batches, jacobians, strict=True)
    ]


def project_derivative(
    point: Point,
    vectors: jax.Array,
    derivative: Derivative,
    *,
    plan: Plan | None,
    column_chunk: int | None = None,
) -> jax.Array:
    """Projects the derivative of a checked problem, see `kernel_derivative`.

    Args:
        point: The problem, with its direction.
        vectors: Columns V, ``[n, r]``.
        derivative: How it is taken.
        plan: The factors that the exact one holds, None for none.
        column_chunk: Columns taken at a time; all if None.

    Returns:
        The symmetric matrix ``[r, r]``.
    """
    if column_chunk is not None:
        column_chunk = check_at_least("column_chunk", column_chunk, 1)
    split_block("vectors", vectors, point.copies, point.error)
    width = column_chunk or vectors.shape[1]
    if derivative.method == "finite_difference":
        projected = _difference(point, vectors, derivative.step, width)
        return (projected + projected.T) / 2
    layout = layout_of(point)
    if layout is not None:
        half = sharded_half(point, layout, vectors, width, plan=plan)
        projected = project(vectors, half)
    else:
        # The mean takes one batch after the other, and holds one batch's factors.
        parts = point.parts
        spaces = [parts] if point.reduction == "stack" else [[b] for b in parts]
        halves = [
            _projected_half(point, space, vectors, width, plan=plan) for space in spaces
        ]
        projected = _mean(halves)
    return _with_transpose(projected)


@jax.jit
def _mean(parts: list[jax.Array]) -> jax.Array:
    return reduce(jnp.add, parts) / len(parts)


@jax.jit
def _with_transpose(half: jax.Array) -> jax.Array:
    return half + half.T


def project_kernel(point: Point, vectors: jax.Array) -> jax.Array:
    """Projects the kernel of a checked problem plainly: ``V^T M V = G^T G``.

    ``G = J^T V``, so that nothing is pushed. It holds a parameter tree a column.

    Args:
        point: The problem at its parameters.
        vectors: Columns V, ``[n, r]``.

    Returns:
        The symmetric matrix ``[r, r]``.
    """
    if layout_of(point) is not None:
        return project(vectors, multiply_at(point, vectors))
    parts = split_block("vectors", vectors, point.copies, point.error)
    stack = point.reduction == "stack"
    pulled = (
        pull(point.error_fn, point.params, batch, parts[k if stack else 0])
        for k, batch in enumerate(point.parts)
    )
    if stack:
        tangents = sum_trees(pulled)
        return _tree_products(tangents, tangents)
    products = sum_trees(_tree_products(each, each) for each in pulled)
    return products / point.num_batches


def _difference(
    point: Point, vectors: jax.Array, step: float | None, width: int
) -> jax.Array:
    """Computes ``V^T (M(theta + h d) - M(theta - h d)) V / 2h``."""
    if width >= vectors.shape[1]:
        return central_difference(
            lambda p: project_kernel(point.moved(p), vectors),
            point.params,
            point.direction,
            step=step,
        )

    def difference(block: jax.Array) -> jax.Array:
        return central_difference(
            lambda p: multiply_at(point.moved(p), block),
            point.params,
            point.direction,
            step=step,
        )

    traced = is_traced((point.params, point.batches, point.direction, vectors))
    moved = by_chunks(difference, vectors=vectors, width=width, mapped=traced)
    return project(vectors, moved)


def _projected_half(
    point: Point,
    batches: list[PyTree],
    vectors: jax.Array,
    width: int,
    *,
    plan: Plan | None,
) -> jax.Array:
    """Computes ``V^T Jdot J^T V`` of stacked batches."""
    copies, error = len(batches), point.error
    if width >= vectors.shape[1] and plan is None:
        return _pulled_half(
            point, batches, split_block("vectors", vectors, copies, error)
        )
    pairs = _pairs(point, batches, plan)

    def half(block: jax.Array) -> jax.Array:
        return _half_product(pairs(), split_block("vectors", block, copies, error))

    traced = is_traced((point.params, point.batches, point.direction, vectors))
    moved = by_chunks(half, vectors=vectors, width=width, mapped=traced)
    return project(vectors, moved)


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
        params: Parameters theta, a pytree of arrays in float32 or float64: half
            precision rounds small steps away.
        direction: The tangent d, a tree like ``params``.
        step: Relative step; if None, a fiftieth of the cube root of the dtype's
            epsilon (1e-4 in float32). Rounding adds an error of about
            ``epsilon / step`` times ``|fn| |d| / |theta|``.

    Returns:
        The difference quotient, in the units of ``fn`` per unit of s.

    Raises:
        ValueError: If the trees differ, a parameter is of another dtype, or ``step`` is
            not a finite number of at least the dtype's epsilon.

    References:
        Paper 7.2 and B.5.
    """
    check_same_tree("direction", direction, params, "params")
    step = usable_step(params, step)
    size, speed = _usable_norms(params, direction)
    h = step * size / speed
    forward, backward = (fn(_shifted(params, direction, by)) for by in (h, -h))
    return (forward - backward) / (2 * h).astype(forward.dtype)


def default_step(dtype: jax.typing.DTypeLike) -> float:
    """Returns the relative step of a central difference where none is given."""
    return _BEND * float(jnp.finfo(dtype).eps) ** (1 / 3)


def usable_step(params: PyTree, step: float | None) -> float:
    """Returns the relative step of a difference, after checking that it can be taken.

    Args:
        params: Parameters theta.
        step: The step, the default for their dtype if None.

    Returns:
        The step.

    Raises:
        ValueError: As `central_difference`.
    """
    dtype = coarsest_dtype(params)
    step = default_step(dtype) if step is None else step
    step = check_positive("step", step)
    if step < jnp.finfo(dtype).eps:
        raise ValueError(
            f"step: expected at least {jnp.finfo(dtype).eps:.2g}, the rounding of "
            f"parameters in {dtype}, got {step!r}."
        )
    return step


def coarsest_dtype(params: PyTree) -> np.dtype:
    """Returns the dtype of the parameters with the largest epsilon.

    Raises:
        ValueError: If a parameter is of another dtype than float32 and float64, or
            there is none.
    """
    check_tree_single_or_double("params", params)
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(params)]
    if not dtypes:
        raise ValueError("params: expected at least one floating array, got none.")
    return max(dtypes, key=lambda dtype: float(jnp.finfo(dtype).eps))


@jax.jit
def project(vectors: jax.Array, columns: jax.Array) -> jax.Array:
    """Computes ``V^T W``."""
    return matmul(vectors.T, columns)


def _pairs(point: Point, batches: list[PyTree], plan: Plan | None) -> Pairs:
    """Returns what yields ``(J_k, Jdot_k)`` of the given batches.

    Factors are made once and held; plain linearizations are cheap, and made each
    time so that one batch's residuals are held at a time.
    """
    fn, params, direction = point.error_fn, point.params, point.direction

    def made() -> Iterable[tuple[Jacobian, JacobianMap]]:
        return (held_pair(fn, params, b, direction, plan=plan) for b in batches)

    if plan is None:
        return made
    held = list(made())
    return lambda: held


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
    point: Point, batches: list[PyTree], parts: list[jax.Array]
) -> jax.Array:
    """Computes ``V^T Jdot J^T V`` as ``(Jdot^T V)^T (J^T V)``.

    Six passes a column, one less than by pushing, since both pulls share one. It holds
    two parameter trees a column.
    """
    fn, params, direction = point.error_fn, point.params, point.direction
    pulled, moved = sum_trees(
        linearize_pair(fn, params, batch, direction).pull(part)
        for batch, part in zip(batches, parts, strict=True)
    )
    return _tree_products(moved, pulled)


@jax.jit
def _tree_products(left: PyTree, right: PyTree) -> jax.Array:
    """Computes the inner products ``[b, b']`` of trees with leading axes b and b'."""
    products = jax.tree.map(
        lambda x, y: matmul(x.reshape(len(x), -1), y.reshape(len(y), -1).T),
        left,
        right,
    )
    return sum(jax.tree.leaves(products)[1:], jax.tree.leaves(products)[0])


@partial(jax.jit, static_argnames="count")
def _descent(
    error_fn: Objective, params: PyTree, batch: PyTree, *, count: int
) -> PyTree:
    """Returns what one of ``count`` batches adds to the gradient flow."""
    gradient = jax.grad(error_fn.mean_loss)(params, batch)
    return jax.tree.map(lambda leaf: -leaf / count, gradient)


def _zero_like(leaf: Any) -> Any:
    """Returns a zero of the array's or the number's kind, None for anything else."""
    if isinstance(leaf, jax.Array | np.ndarray | np.generic):
        return jnp.zeros_like(leaf)
    return type(leaf)(0) if isinstance(leaf, bool | int | float | complex) else None


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
    """Computes the Euclidean norm of all leaves together."""
    leaves = on_host(tree)
    if leaves is None:
        return _traced_norm(tree)
    norms = [np.linalg.norm(leaf.astype(np.float64)) for leaf in leaves]
    return jnp.asarray(np.linalg.norm(norms))


# Jitted: an operation for each leaf, one by one, would cost more than the products.
@jax.jit
def _traced_norm(tree: PyTree) -> jax.Array:
    return norm(jnp.stack([norm(leaf) for leaf in jax.tree.leaves(tree)]))
