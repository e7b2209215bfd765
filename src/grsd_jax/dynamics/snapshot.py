"""What the shell dynamics need of one set of parameters: pairs, errors, and motion.

The batches are one evaluation set (the ``stack`` of `grsd_jax.kernel.operator`), so that the
error is one vector ``e`` of R^n and ``M = J J^T`` moves it. The direction d carries
everything: ``Mdot``, and ``e_dot = J d``, whatever the loss.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from grsd_jax._typing import ErrorFn, PyTree
from grsd_jax.jacobian.autodiff import evaluate, linearize, split_batches
from grsd_jax.jacobian.factored import JacobianForm
from grsd_jax.kernel.dense import kernel_dense, kernel_with_derivative_dense
from grsd_jax.kernel.derivative import kernel_derivative
from grsd_jax.kernel.operator import LinearizedKernel, linearize_kernel
from grsd_jax.linalg.eigenpairs import LeadingEigenpairs, leading_eigenpairs
from grsd_jax.linalg.lanczos import block_lanczos
from grsd_jax.linalg.ritz import RitzPairs, resolved_pairs, ritz_pairs
from grsd_jax.shells.measurement import diagonalize

_HIGHEST = jax.lax.Precision.HIGHEST

#: Products spent on where the unresolved error lies.
_REST_STEPS = 16


class Snapshot(NamedTuple):
    """Eigenpairs and errors at one set of parameters, and how they move along d.

    Attributes:
        pairs: All n pairs from the dense kernel; from Lanczos the leading ones, then
            the unresolved Ritz pairs of the Krylov space of the rest of the error.
        coupling: ``V^T Mdot V``, ``[r, r]``; zeros if no direction was given.
        error: e, ``[n]``.
        error_rate: ``e_dot = J d``, ``[n]``; zeros if no direction was given.
        num_columns: Columns that were multiplied by M, 0 for the dense kernel.
    """

    pairs: RitzPairs
    coupling: jax.Array
    error: jax.Array
    error_rate: jax.Array
    num_columns: int


class Finder(NamedTuple):
    """How pairs are found.

    Attributes:
        num_pairs: Leading pairs that Lanczos finds.
        block_size: b.
        convergence: Largest residual at which Lanczos stops, relative to the value.
        tolerance: Largest residual of a resolved pair, relative to its value.
        floor: Smallest resolved value, relative to the largest; ten eps if None.
    """

    num_pairs: int
    block_size: int
    convergence: float
    tolerance: float
    floor: float | None


class Problem(NamedTuple):
    """The functions and the data that every snapshot is taken of.

    Attributes:
        error_fn: ``error_fn(params, batch) -> [N, C]``.
        batches: A pytree with leading axes ``[K, N]``.
        jacobian: ``"auto"``, ``"plain"`` or ``"factored"``.
    """

    error_fn: ErrorFn
    batches: PyTree
    jacobian: JacobianForm


def take_snapshot(
    problem: Problem,
    params: PyTree,
    direction: PyTree | None,
    basis: PyTree,
    finder: Finder,
    *,
    warm: bool | jax.Array,
    key: jax.Array,
) -> Snapshot:
    """Takes a snapshot by the solver that the basis is for.

    Args:
        problem: The functions and the data.
        params: Parameters.
        direction: The tangent d, or None for what needs none.
        basis: ``{}`` for the dense solver, or ``{"vectors": [n, r]}`` for Lanczos and
            as many pairs, with earlier eigenvectors if ``warm``.
        finder: How pairs are found.
        warm: Whether to start from the basis.
        key: Consumed.

    Returns:
        The snapshot.

    Raises:
        ValueError: If a shape, tree, dtype, leading axis or choice does not fit.
    """
    if not basis:
        return dense_snapshot(problem, params, direction, finder)
    size, num_pairs = basis["vectors"].shape
    finder = finder._replace(num_pairs=num_pairs)
    start_key, key = jax.random.split(key)
    width = min(finder.block_size, size)
    start = start_block(basis["vectors"], start_key, warm, width=width)
    return lanczos_snapshot(problem, params, direction, start, finder, key=key)


def dense_snapshot(
    problem: Problem,
    params: PyTree,
    direction: PyTree | None,
    finder: Finder,
) -> Snapshot:
    """Takes all n pairs from the dense kernel.

    Args:
        problem: The functions and the data; examples must be independent.
        params: Parameters.
        direction: The tangent d, or None for what needs none.
        finder: Which pairs are resolved.

    Returns:
        The snapshot, ``r = n``.

    Raises:
        ValueError: If a shape, tree, dtype, leading axis or choice does not fit.
    """
    fn, batches, jacobian = problem
    if direction is None:
        kernel = kernel_dense(fn, params, batches, reduction="stack", jacobian=jacobian)
        moved = jnp.zeros_like(kernel)
    else:
        kernel, moved = kernel_with_derivative_dense(
            fn, params, batches, direction, reduction="stack", jacobian=jacobian
        )
    pairs, coupling = diagonalize(
        kernel, moved, tolerance=finder.tolerance, floor=finder.floor
    )
    return Snapshot(pairs, coupling, *_errors(problem, params, direction), 0)


@partial(jax.jit, static_argnames="width")
def start_block(
    vectors: jax.Array, key: jax.Array, warm: bool | jax.Array, *, width: int
) -> jax.Array:
    """Returns a Gaussian block to start Lanczos from, warm or cold.

    Args:
        vectors: ``[n, r]``, earlier eigenvectors.
        key: Consumed.
        warm: [] bool, whether to draw from the span of ``vectors``, where the pairs are
            found with fewer products. Narrow blocks spend fewer columns than all
            eigenvectors at once would.
        width: b.

    Returns:
        ``[n, b]``.
    """
    cold = jax.random.normal(key, (vectors.shape[0], width), vectors.dtype)
    mixed = jnp.matmul(vectors.T, cold, precision=_HIGHEST)
    inside = jnp.matmul(vectors, mixed, precision=_HIGHEST)
    return jnp.where(warm, inside, cold)


def lanczos_snapshot(
    problem: Problem,
    params: PyTree,
    direction: PyTree | None,
    start: jax.Array,
    finder: Finder,
    *,
    key: jax.Array,
) -> Snapshot:
    """Finds the leading pairs by block Lanczos from a start block.

    Args:
        problem: The functions and the data.
        params: Parameters.
        direction: The tangent d, or None for what needs none.
        start: ``[n, b]``, see `start_block`.
        finder: How pairs are found, and which are resolved.
        key: Consumed for the replacements of dead directions.

    Returns:
        The snapshot; with a direction, a few unresolved pairs are added.

    Raises:
        ValueError: If a shape, tree, dtype, leading axis or choice does not fit.
    """
    (fn, batches, jacobian), num_pairs = problem, finder.num_pairs
    kernel = linearize_kernel(fn, params, batches, reduction="stack", jacobian=jacobian)
    lead_key, rest_key = jax.random.split(key)
    found = leading_eigenpairs(
        kernel.matmat,
        start,
        num_pairs,
        key=lead_key,
        tolerance=finder.convergence,
    )
    pairs = _as_pairs(found, finder)
    error, error_rate = _errors(problem, params, direction)
    num_columns = found.num_columns
    if direction is None:
        coupling = jnp.zeros((num_pairs,) * 2, start.dtype)
        return Snapshot(pairs, coupling, error, error_rate, num_columns)
    num_rest = min(_REST_STEPS, kernel.dimension - num_pairs)
    if num_rest:
        pairs = _with_rest(kernel, pairs, error, num_rest, rest_key)
    coupling = kernel_derivative(
        fn,
        params,
        batches,
        direction,
        pairs.vectors,
        reduction="stack",
        column_chunk=start.shape[1],
        jacobian=jacobian,
    )
    return Snapshot(pairs, coupling, error, error_rate, num_columns + num_rest)


def _as_pairs(found: LeadingEigenpairs, finder: Finder) -> RitzPairs:
    values, vectors, residuals = found[:3]
    resolved = resolved_pairs(
        values, residuals, tolerance=finder.tolerance, floor=finder.floor
    )
    return RitzPairs(values, vectors, residuals, resolved & found.finite)


def _with_rest(
    kernel: LinearizedKernel,
    pairs: RitzPairs,
    error: jax.Array,
    num_steps: int,
    key: jax.Array,
) -> RitzPairs:
    """Adds Ritz pairs of the Krylov space of the error outside the pairs.

    Pair i gains from the rest ``2 g_i (Mdot v_i)^T (lambda_i - M)^-1 e_rest``. The rest
    of the spectrum lies below lambda_i, so the matrix is definite, and a few steps from
    ``e_rest`` solve with it for all i at once.
    """

    def deflated(block: jax.Array) -> jax.Array:
        return _outside(pairs.vectors, kernel.matmat(_outside(pairs.vectors, block)))

    start = _outside(pairs.vectors, error[:, None])
    run = block_lanczos(deflated, start, num_steps, key=key, driver="host")
    rest = ritz_pairs(run)
    rest = rest._replace(
        # The Krylov space may have closed, and random vectors gone on outside it.
        vectors=_outside(pairs.vectors, rest.vectors),
        resolved=jnp.zeros(num_steps, bool),
    )
    parts = zip(pairs, rest, strict=True)
    return RitzPairs(*(jnp.concatenate(part, axis=-1) for part in parts))


@jax.jit
def _outside(vectors: jax.Array, block: jax.Array) -> jax.Array:
    for _ in range(2):  # once leaves the rounding of the part that is taken away
        inside = jnp.matmul(vectors.T, block, precision=_HIGHEST)
        block = block - jnp.matmul(vectors, inside, precision=_HIGHEST)
    return block


def _errors(
    problem: Problem, params: PyTree, direction: PyTree | None
) -> tuple[jax.Array, jax.Array]:
    """Returns ``e`` and ``J d`` of all batches, ``[n]`` each."""
    parts = split_batches(problem.batches)
    errors = [evaluate(problem.error_fn, params, batch) for batch in parts]
    error = jnp.concatenate([part.reshape(-1) for part in errors])
    if direction is None:
        return error, jnp.zeros_like(error)
    # As the transpose of the pullback, which custom VJPs have and JVPs lack.
    tangent = jax.tree.map(lambda leaf: leaf[None], direction)
    rates = [linearize(problem.error_fn, params, b).push(tangent) for b in parts]
    return error, jnp.concatenate([rate.reshape(-1) for rate in rates])
