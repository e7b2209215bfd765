"""Eigenpairs, errors and their motion at one set of parameters.

The batches are one evaluation set (the ``stack`` of `grsd_jax.kernel.operator`), so
that the error is one vector ``e`` of R^n and ``M = J J^T`` moves it. The direction d
determines both ``Mdot`` and ``e_dot = J d``, whatever the loss.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from grsd_jax._arrays import matmul, outside
from grsd_jax._typing import Matmat, PyTree
from grsd_jax.dynamics.spectra import errors_at
from grsd_jax.jacobian.autodiff import linearize
from grsd_jax.kernel.dense import dense_at
from grsd_jax.kernel.derivative import Derivative
from grsd_jax.kernel.products import held_products, projected_derivative
from grsd_jax.linalg.eigenpairs import leading_eigenpairs
from grsd_jax.linalg.lanczos import block_lanczos
from grsd_jax.linalg.ritz import RitzPairs, resolved_pairs, ritz_pairs
from grsd_jax.problem import Point
from grsd_jax.shells.measurement import diagonalize
from grsd_jax.shells.options import Window

#: Products spent on where the unresolved error lies.
_REST_STEPS = 16


class MovingSpectrum(NamedTuple):
    """Eigenpairs and errors at one set of parameters, and how they move along d.

    Attributes:
        pairs: All n pairs from the dense kernel; from Lanczos the leading ones, then
            the unresolved Ritz pairs of the Krylov space of the rest of the error.
        coupling: ``V^T Mdot V``, ``[r, r]``; zeros if no direction was given.
        error: e, ``[n]``.
        error_rate: ``e_dot = J d``, ``[n]``; zeros if no direction was given.
        num_columns: Columns that were multiplied by M, 0 for the dense kernel.
        complete: [] bool, whether no copy of a repeated eigenvalue can be missing among
            the leading pairs.
    """

    pairs: RitzPairs
    coupling: jax.Array
    error: jax.Array
    error_rate: jax.Array
    num_columns: int
    complete: jax.Array


class Finder(NamedTuple):
    """How pairs are found.

    Attributes:
        window: Which pairs are used; Lanczos finds its ``num_pairs``.
        block_size: b.
        convergence: Largest residual at which Lanczos stops, relative to the value.
    """

    window: Window
    block_size: int
    convergence: float

    def resolved(self, values: jax.Array, residuals: jax.Array) -> jax.Array:
        """Marks the pairs that are used, ``[r]`` bool."""
        return resolved_pairs(
            values,
            residuals,
            tolerance=self.window.tolerance,
            floor=self.window.floor,
        )


def moving_spectrum(
    point: Point,
    basis: PyTree,
    finder: Finder,
    *,
    warm: bool | jax.Array,
    key: jax.Array,
) -> MovingSpectrum:
    """Returns the moving spectrum, by the solver that the basis belongs to.

    Args:
        point: The problem at its parameters, without a direction for what needs none.
        basis: ``{}`` for the dense solver, or ``{"vectors": [n, r]}`` for Lanczos and
            as many pairs, with earlier eigenvectors if ``warm``.
        finder: How pairs are found.
        warm: Whether to start from the basis.
        key: Consumed.

    Returns:
        The spectrum.
    """
    if not basis:
        return dense_spectrum(point, finder)
    vectors = basis["vectors"]
    start_key, key = jax.random.split(key)
    width = min(finder.block_size, vectors.shape[0])
    start = start_block(vectors, start_key, warm, width=width)
    return lanczos_spectrum(point, start, vectors.shape[1], finder, key=key)


def dense_spectrum(point: Point, finder: Finder) -> MovingSpectrum:
    """Returns the moving spectrum of all n pairs, from the dense kernel.

    Args:
        point: The problem at its parameters; examples must be independent.
        finder: Which pairs are resolved.

    Returns:
        The spectrum, ``r = n``.
    """
    if point.direction is None:
        (kernel,) = dense_at(point)
        moved = jnp.zeros_like(kernel)
    else:
        kernel, moved = dense_at(point)
    window = finder.window
    pairs, coupling = diagonalize(
        kernel, moved, tolerance=window.tolerance, floor=window.floor
    )
    error = errors_at(point)
    error_rate = _error_rate(point, error)
    complete = jnp.bool_(True)
    return MovingSpectrum(pairs, coupling, error, error_rate, 0, complete)


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
    inside = matmul(vectors, matmul(vectors.T, cold))
    return jnp.where(warm, inside, cold)


def lanczos_spectrum(
    point: Point,
    start: jax.Array,
    num_pairs: int,
    finder: Finder,
    *,
    key: jax.Array,
) -> MovingSpectrum:
    """Returns the moving spectrum of leading pairs, by Lanczos from a start block.

    Args:
        point: The problem at its parameters.
        start: ``[n, b]``, see `start_block`.
        num_pairs: Leading pairs to find.
        finder: How pairs are found, and which are resolved.
        key: Consumed for the replacements of dead directions.

    Returns:
        The spectrum; with a direction, a few unresolved pairs are added.
    """
    matmat = held_products(point)
    lead_key, rest_key = jax.random.split(key)
    found = leading_eigenpairs(
        matmat, start, num_pairs, key=lead_key, tolerance=finder.convergence
    )
    resolved = finder.resolved(found.values, found.residuals) & found.finite
    pairs = RitzPairs(found.values, found.vectors, found.residuals, resolved)
    error = errors_at(point)
    error_rate = _error_rate(point, error)
    num_columns, complete = found.num_columns, found.proven
    if point.direction is None:
        coupling = jnp.zeros((num_pairs,) * 2, start.dtype)
        return MovingSpectrum(pairs, coupling, error, error_rate, num_columns, complete)
    num_rest = min(_REST_STEPS, point.dimension - num_pairs)
    if num_rest:
        pairs = _with_rest(matmat, pairs, error, num_rest, rest_key)
    coupling = projected_derivative(point, pairs.vectors, Derivative(), start.shape[1])
    num_columns += num_rest
    return MovingSpectrum(pairs, coupling, error, error_rate, num_columns, complete)


def _with_rest(
    matmat: Matmat,
    pairs: RitzPairs,
    error: jax.Array,
    num_steps: int,
    key: jax.Array,
) -> RitzPairs:
    """Adds Ritz pairs of the Krylov space of the error's part outside the pairs.

    Pair i gains from the rest ``2 g_i (Mdot v_i)^T (lambda_i - M)^-1 e_rest``. The rest
    of the spectrum lies below lambda_i, so the matrix is definite, and a few steps from
    ``e_rest`` solve with it for all i at once.
    """

    def deflated(block: jax.Array) -> jax.Array:
        return _outside(pairs.vectors, matmat(_outside(pairs.vectors, block)))

    start = _outside(pairs.vectors, error[:, None])
    run = block_lanczos(deflated, start, num_steps, key=key, driver="host")
    rest = ritz_pairs(run)
    rest = rest._replace(
        # Random vectors that follow a closed Krylov space may overlap the pairs.
        vectors=_outside(pairs.vectors, rest.vectors),
        resolved=jnp.zeros(num_steps, bool),
    )
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-1), pairs, rest)


_outside = jax.jit(outside)


def _error_rate(point: Point, error: jax.Array) -> jax.Array:
    """Returns ``J d`` of all batches, ``[n]``; zeros without a direction."""
    if point.direction is None:
        return jnp.zeros_like(error)
    fn, params = point.error_fn, point.params
    # The transpose of the pullback, since custom VJPs have no JVP.
    tangent = jax.tree.map(lambda leaf: leaf[None], point.direction)
    rates = [linearize(fn, params, batch).push(tangent) for batch in point.parts]
    return jnp.concatenate([rate.reshape(-1) for rate in rates])
