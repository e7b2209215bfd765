"""Which solver is cheaper, by floating-point operations and memory; and null spaces.

With f the operations of one example's forward pass, ``Q`` evaluation batches of the
reduction (K for ``mean``, where each is one error space) and r Krylov columns:

- dense: each example's J costs C backward passes (2 f each), Jdot twice as much again;
  the Gram products of J and Jdot cost ``6 n^2 P``, the eigenvectors about ``20 n^3``.
- Lanczos: a product costs 4 f a column and example, its derivative 1.5 times that.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._checks import check_at_least, check_batches, check_choice
from grsd_jax._jacobian import as_pytree, check_problem, split_batches
from grsd_jax._typing import ErrorFn, PyTree, Reduction
from grsd_jax.kernel import REDUCTIONS

SOLVERS = ("auto", "dense", "lanczos")

#: Bytes that the dense solver may use for its n x n matrices.
MAX_DENSE_BYTES = 4 * 2**30

#: n x n arrays alive at once in the dense solver: M, Mdot, V, and work space.
_DENSE_MATRICES = 8


def choose_solver(
    error_fn: ErrorFn,
    params: PyTree,
    batches: PyTree,
    *,
    reduction: Reduction = "mean",
    num_columns: int,
    max_dense_bytes: int = MAX_DENSE_BYTES,
) -> Literal["dense", "lanczos"]:
    """Chooses between the dense solver and Lanczos, from shapes alone.

    The counts of operations are those of the module's docstring; the forward pass's
    come from the compiler's own cost analysis. The dense solver is also passed over if
    its n x n matrices would need more than ``max_dense_bytes``.

    Args:
        error_fn: ``error_fn(params, batch) -> [N, C]``.
        params: Parameters.
        batches: A pytree with leading axes ``[K, N]``.
        reduction: ``"mean"`` or ``"stack"``.
        num_columns: The Krylov dimension r that Lanczos would have.
        max_dense_bytes: Bytes that the dense solver may use for n x n matrices.

    Returns:
        ``"dense"`` or ``"lanczos"``.

    Raises:
        ValueError: If a shape, leading axis or choice does not fit.

    References:
        Ours.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_at_least("num_columns", num_columns, 1)
    num_batches, num_examples = check_batches(batches)
    error = check_problem(error_fn, params, batches)
    num_outputs = error.shape[1]
    spaces, copies = (num_batches, 1) if reduction == "mean" else (1, num_batches)
    size = copies * num_examples * num_outputs
    if _DENSE_MATRICES * size**2 * error.dtype.itemsize > max_dense_bytes:
        return "lanczos"
    if num_columns >= size:  # Lanczos would span the whole space and save nothing
        return "dense"
    num_params = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
    forward = num_batches * _forward_flops(error_fn, params, batches)
    dense = 6 * num_outputs * forward + spaces * 6 * size**2 * num_params + 20 * size**3
    lanczos = 4 * forward * num_columns * 2.5
    return "dense" if dense <= lanczos else "lanczos"


def class_sums_vanish(
    error_fn: ErrorFn, params: PyTree, batches: PyTree, key: jax.Array
) -> jax.Array:
    """Finds out whether ``sum_c de_ic / dtheta = 0``, as for a softmax error.

    Then the constant over classes is an exact null vector of M for every example. A
    random tangent u decides it: ``sum_c (J u)_ic`` vanishes with probability one only
    if every row sum does.

    Args:
        error_fn: ``error_fn(params, batch) -> [N, C]``.
        params: Parameters.
        batches: A pytree with leading axes ``[K, N]``; the first batch is used.
        key: Consumed for the tangent.

    Returns:
        [] bool.

    References:
        Paper 7.1; the observation is ours.
    """
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    tangent = [
        jax.random.normal(k, np.shape(leaf), jnp.result_type(leaf))
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return _class_sums_vanish(
        as_pytree(error_fn),
        params,
        split_batches(batches)[0],
        jax.tree.unflatten(tree, tangent),
    )


@jax.jit
def _class_sums_vanish(
    error_fn: ErrorFn, params: PyTree, batch: PyTree, tangent: PyTree
) -> jax.Array:
    # J u as the transpose of the pullback, which custom VJPs have and JVPs lack.
    error, pullback = jax.vjp(lambda p: error_fn(p, batch), params)
    moved = jax.linear_transpose(lambda u: pullback(u)[0], error)(tangent)[0]
    tolerance = 100 * jnp.finfo(moved.dtype).eps * jnp.max(jnp.abs(moved))
    return jnp.max(jnp.abs(jnp.sum(moved, axis=1))) <= tolerance


def _forward_flops(error_fn: ErrorFn, params: PyTree, batches: PyTree) -> float:
    """Returns the operations of one batch's error; 2 P N if the backend is silent."""
    one_batch = jax.tree.map(lambda leaf: _struct(leaf, drop=1), batches)
    arguments = (as_pytree(error_fn), jax.tree.map(_struct, params), one_batch)
    leaves, tree = jax.tree.flatten(jax.tree.map(_struct, arguments))
    flops = _counted_flops(tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
    if flops > 0:
        return flops
    num_params = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
    return 2.0 * num_params * check_batches(batches)[1]


@functools.lru_cache(maxsize=64)
def _counted_flops(tree: Any, avals: tuple[tuple[Any, Any], ...]) -> float:
    leaves = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in avals]
    error_fn, params, batch = jax.tree.unflatten(tree, leaves)
    lowered = jax.jit(lambda f, p, x: f(p, x)).lower(error_fn, params, batch)
    analysis = lowered.cost_analysis() or {}
    return float(analysis.get("flops", 0.0))


def _struct(leaf: Any, drop: int = 0) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf)[drop:], jnp.result_type(leaf))
