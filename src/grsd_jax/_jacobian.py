"""Products with the Jacobian of one batch: ``J^T V``, ``J G`` and ``Jdot G``.

Everything rests on the pullback ``u -> J^T u`` and on its linear transpose, so that
functions with a custom VJP, which have no JVP, work as well. Each program is jitted
here once and takes the error function as a pytree, so that eager loops over batches
and column chunks compile it once, and an enclosing `jit` inlines it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._checks import check_batches, check_floating
from grsd_jax._typing import ErrorFn, PyTree

Pullback = Callable[[jax.Array], tuple[PyTree]]


def as_pytree(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``fn`` as a callable that may be an argument of a jitted function.

    A callable that is a pytree of arrays keeps its arrays as data; any other becomes
    static, compared by equality.
    """
    leaves = jax.tree.leaves(fn)
    if all(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves):
        return fn
    return jax.tree_util.Partial(fn)


def is_traced(tree: PyTree) -> bool:
    """Whether any leaf is an abstract value of an enclosing transformation."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            try:
                leaf.devices()  # an abstract value lies on no device
            except jax.errors.ConcretizationTypeError:
                return True
    return False


def split_batches(batches: PyTree) -> list[PyTree]:
    """Returns the K batches one by one.

    A Python list, not a scan: XLA runs convolutions inside a loop body on its slow path
    on CPU, and K is small.
    """
    num_batches, _ = check_batches(batches)
    return [
        jax.tree.map(lambda leaf, k=k: leaf[k], batches) for k in range(num_batches)
    ]


def check_problem(
    error_fn: ErrorFn, params: PyTree, batches: PyTree
) -> jax.ShapeDtypeStruct:
    """Checks parameters, batches and error function; returns the error's shape.

    Raises:
        ValueError: If a leaf of params is not floating, the batches do not share
            leading axes, or the error function does not return ``[N, C]``.
    """
    _, num_examples = check_batches(batches)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        check_floating(f"params{jax.tree_util.keystr(path)}", leaf)
    one_batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf)[1:], jnp.result_type(leaf)),
        batches,
    )
    out = _evaluate.eval_shape(as_pytree(error_fn), params, one_batch)
    shape = getattr(out, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != num_examples or shape[1] == 0:
        got = list(shape) if shape is not None else jax.tree.structure(out)
        raise ValueError(
            "error_fn: expected an array [N, C] with the batch's "
            f"N = {num_examples} examples and C >= 1, got {got}."
        )
    check_floating("error_fn(params, batch)", out)
    return out


def evaluate(error_fn: ErrorFn, params: PyTree, batch: PyTree) -> jax.Array:
    """Evaluates ``e``, ``[N, C]``, on one batch."""
    return _evaluate(as_pytree(error_fn), params, batch)


def linearize(error_fn: ErrorFn, params: PyTree, batch: PyTree) -> Pullback:
    """Returns the pullback ``u -> (J^T u,)`` of one batch, a pytree of residuals.

    Because it leaves a jitted function, pullbacks at other parameters of the same
    shapes have the same tree structure: passing them to `jit` traces nothing again.
    """
    return _linearize(as_pytree(error_fn), params, batch)


@jax.jit
def _evaluate(error_fn: ErrorFn, params: PyTree, batch: PyTree) -> jax.Array:
    return error_fn(params, batch)


@jax.jit
def _linearize(error_fn: ErrorFn, params: PyTree, batch: PyTree) -> Pullback:
    return jax.vjp(lambda p: error_fn(p, batch), params)[1]


@jax.jit
def pull(pullback: Pullback, block: jax.Array) -> PyTree:
    """Computes ``J^T V`` of columns ``[N, C, b]``: a params tree, leading axis b."""
    return jax.vmap(lambda u: pullback(u)[0], in_axes=-1)(block)


@jax.jit
def push(pullback: Pullback, tangents: PyTree, example: jax.Array) -> jax.Array:
    """Computes ``J G`` of a params tree with leading axis b.

    Args:
        pullback: The pullback of one batch.
        tangents: G, a params tree with leading axis b.
        example: Any array of the error's shape and dtype ``[N, C]``.

    Returns:
        Columns ``[N, C, b]``.
    """
    return jax.vmap(lambda g: _transpose(pullback, g, example), out_axes=-1)(tangents)


@jax.jit
def push_derivative(
    error_fn: ErrorFn,
    params: PyTree,
    batch: PyTree,
    direction: PyTree,
    tangents: PyTree,
) -> jax.Array:
    """Computes ``Jdot G``, with ``Jdot`` the derivative of J along ``direction``.

    Args:
        error_fn: The error function, a pytree.
        params: Parameters.
        batch: One batch.
        direction: A params tree.
        tangents: G, a params tree with leading axis b.

    Returns:
        Columns ``[N, C, b]``.
    """

    def pushed(p: PyTree, tangent: PyTree) -> jax.Array:
        error, pullback = jax.vjp(lambda q: error_fn(q, batch), p)
        return _transpose(pullback, tangent, error)

    def derivative(tangent: PyTree) -> jax.Array:
        return jax.jvp(lambda p: pushed(p, tangent), (params,), (direction,))[1]

    return jax.vmap(derivative, out_axes=-1)(tangents)


def _transpose(pullback: Pullback, tangent: PyTree, example: jax.Array) -> jax.Array:
    """Computes ``J g``, the linear transpose of ``u -> J^T u``."""
    return jax.linear_transpose(lambda u: pullback(u)[0], example)(tangent)[0]
