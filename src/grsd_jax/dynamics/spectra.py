"""The kernel's pairs and the error at one set of parameters, and on which data.

Two such snapshots, or two Krylov spaces of the same two errors, are what
`grsd_jax.dynamics.transport` compares.
"""

import jax
import jax.numpy as jnp

from grsd_jax._arrays import divisor, magnitude, matmul, outside, ratio, unit_vectors
from grsd_jax._checks import (
    check_at_least,
    check_choice,
    check_key,
    check_single_or_double,
)
from grsd_jax._typing import PyTree
from grsd_jax.dynamics.amounts import Pairing, Spectrum
from grsd_jax.dynamics.fingerprint import fingerprint
from grsd_jax.kernel.dense import dense_at
from grsd_jax.kernel.operator import multiply_at
from grsd_jax.kernel.products import held_products
from grsd_jax.linalg.eigenpairs import leading_eigenpairs
from grsd_jax.linalg.lanczos import LanczosResult
from grsd_jax.linalg.ritz import descending_pairs
from grsd_jax.objective import check_digits, evaluate
from grsd_jax.problem import Point, Problem, point_at
from grsd_jax.results import NamedResult, result

#: Largest residual of a leading pair, relative to its value.
_CONVERGENCE = 1e-5

#: Columns of a block of the search for leading pairs.
_BLOCK = 8


@result(axes={"2": "word"})
class SpectralSnapshot(NamedResult):
    """What `exact_balance` needs of one end, without parameters and batches.

    Attributes:
        values: ``[r]``, eigenvalues, descending.
        vectors: ``[n, r]``, eigenvectors; zero where a leading pair was not found.
        error: ``[n]``, e.
        fingerprint: [2] uint32, of the batches and targets, in their order, and of the
            name of the loss.
        rounding: [], the rounding of products with the kernel, relative, which one more
            product measures; far above the dtype's epsilon if they run in reduced
            precision. At least half the largest residual of leading pairs.
        complete: [] bool, whether no copy of a repeated eigenvalue can be missing among
            the pairs. If not, the rest of the spectrum may lie as high as the first.
    """

    values: jax.Array
    vectors: jax.Array
    error: jax.Array
    fingerprint: jax.Array
    rounding: jax.Array
    complete: jax.Array


def spectral_snapshot(
    problem: Problem,
    params: PyTree,
    *,
    num_pairs: int | None = None,
    key: jax.Array | None = None,
) -> SpectralSnapshot:
    """Returns the eigenpairs of the kernel and the error, for an exact balance.

    Args:
        problem: The problem; its batches are one set of ``n = K N C`` errors, so that
            the reduction is ``"stack"``, or K is 1.
        params: Parameters.
        num_pairs: Leading pairs r, by Lanczos, outside of `jit`; all n from the dense
            kernel if None.
        key: Consumed by Lanczos, and needed for it alone.

    Returns:
        The snapshot.

    Raises:
        ValueError: If the problem does not fit, its examples are coupled for the dense
            kernel, or ``num_pairs`` is given without ``key`` or out of range.

    References:
        Ours; ``docs/what_moved.md``.
    """
    point = stacked_point(problem, params)
    if num_pairs is None:
        return dense_snapshot(point, fingerprint(problem))
    num_pairs = check_at_least("num_pairs", num_pairs, 1)
    key = check_key(key, "leading pairs")
    values, vectors, residual, complete = _leading_pairs(point, num_pairs, key)
    found = _snapshot(point, values, vectors, fingerprint(problem))
    rounding = jnp.maximum(found.rounding, residual)
    return found._replace(rounding=rounding, complete=complete)


def dense_snapshot(point: Point, data: jax.Array) -> SpectralSnapshot:
    """Returns the snapshot of all n pairs, by the dense kernel.

    Args:
        point: The problem at its parameters, examples independent.
        data: [2] uint32, the `fingerprint` of its batches.

    Returns:
        The snapshot.
    """
    (kernel,) = dense_at(point)
    values, vectors = all_pairs(kernel)
    return _snapshot(point, values, vectors, data)


def _snapshot(
    point: Point, values: jax.Array, vectors: jax.Array, data: jax.Array
) -> SpectralSnapshot:
    """Returns the snapshot of pairs, with the rounding of the error's part in them."""
    error = errors_at(point)
    rounding = product_rounding(point, *_spectral_product(values, vectors, error))
    return SpectralSnapshot(values, vectors, error, data, rounding, jnp.bool_(True))


@jax.jit
def _spectral_product(
    values: jax.Array, vectors: jax.Array, error: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the error's part in the pairs and where M moves it, and their product."""
    inside = matmul(vectors.T, error / magnitude(error))
    inside = jnp.where(jnp.any(inside != 0), inside, 1)  # of no error: of every pair
    both = jnp.stack([inside, values * inside], axis=1)
    inside = jnp.sum(unit_vectors(both, axes=0)[0], axis=1)
    return matmul(vectors, inside), matmul(vectors, values * inside)


def product_rounding(point: Point, column: jax.Array, product: jax.Array) -> jax.Array:
    """Returns the rounding of the kernel behind a product, relative, [].

    The same product is taken afresh, by another program: in reduced precision the two
    round differently. At least epsilon.

    Args:
        point: The problem at its parameters.
        column: ``[n]``, v.
        product: ``[n]``, ``M v`` by the spectrum that is used.

    Returns:
        [], the root mean square of the difference over the largest entry.
    """
    return _difference(multiply_at(point, column[:, None])[:, 0], product)


@jax.jit
def _difference(fresh: jax.Array, product: jax.Array) -> jax.Array:
    size = divisor(jnp.max(jnp.abs(fresh)))
    apart = jnp.sqrt(jnp.mean(jnp.square((fresh - product) / size)))
    return jnp.maximum(apart, jnp.finfo(fresh.dtype).eps)


def stacked_point(problem: Problem, params: PyTree) -> Point:
    """Returns the problem at its parameters, if all batches share one error space.

    Raises:
        ValueError: If they do not, or the problem does not fit.
    """
    point = point_at(problem, params)
    if point.copies != point.num_batches:
        check_choice("problem.reduction", problem.reduction, ("stack",))
    check_digits(point.error.dtype)
    check_single_or_double("error", point.error.dtype)
    return point


def errors_at(point: Point) -> jax.Array:
    """Returns the error e of all batches, ``[n]``."""
    return _flat([evaluate(point.error_fn, point.params, b) for b in point.parts])


@jax.jit
def _flat(parts: list[jax.Array]) -> jax.Array:
    return jnp.concatenate([part.reshape(-1) for part in parts])


def pair_snapshots(before: SpectralSnapshot, after: SpectralSnapshot) -> list[Pairing]:
    """Returns both spectra, and the overlap of their vectors.

    What of an error lies outside the given pairs is a pair of eigenvalue zero of its
    own, so that shell 0, below all others, holds the rest of the spectrum. Its true
    place is anywhere below the last pair that was found: a second pairing has it there.

    Args:
        before: The first snapshot.
        after: The second, of the same n.

    Returns:
        The pairing, and the second one unless all n pairs are given.
    """
    vectors = mean_and_change(before.error, after.error)
    first, left = _with_rest(before, vectors)
    second, right = _with_rest(after, vectors)
    lowest = Pairing(first, second, matmul(left.T, right))
    size = vectors.shape[0]
    if before.vectors.shape[1] == after.vectors.shape[1] == size:
        return [lowest]
    highest = lowest._replace(
        before=_raised(first, before, size), after=_raised(second, after, size)
    )
    return [lowest, highest]


def _raised(spectrum: Spectrum, snapshot: SpectralSnapshot, size: int) -> Spectrum:
    """Returns the spectrum with the rest at the last pair before one is missing.

    At the first, if copies of any may be missing.
    """
    rank = snapshot.vectors.shape[1]
    if rank == size:
        return spectrum
    found = jnp.cumprod((snapshot.values > 0).astype(jnp.int32)) > 0
    last = jnp.min(snapshot.values, where=found, initial=jnp.inf)
    last = jnp.where(snapshot.complete, last, snapshot.values[0])
    return spectrum._replace(values=spectrum.values.at[rank:].set(last))


def mean_and_change(before: jax.Array, after: jax.Array) -> jax.Array:
    """Returns ``e_m = (e_0 + e_1) / 2`` and ``delta = e_1 - e_0``, ``[n, 2]``."""
    return jnp.stack([before / 2 + after / 2, after - before], axis=1)


def pair_krylov(
    before: LanczosResult, after: LanczosResult, vectors: jax.Array, num_steps: int
) -> Pairing:
    """Returns the Ritz pairs of the first steps of two runs, as a pairing.

    Args:
        before: The run of the first kernel, from ``e_m``, or ``e_m`` and ``delta``.
        after: The run of the second kernel, from the same block.
        vectors: ``[n, 2]``, ``e_m`` and ``delta``.
        num_steps: Steps to use of each.

    Returns:
        The pairing.
    """
    used = num_steps * before.block_size
    rotations, ends = [], []
    for run in (before, after):
        values, rotation = jnp.linalg.eigh(run.tridiagonal[:used, :used])
        inside = matmul(run.basis[:, :used].T, vectors)
        ends.append(Spectrum(values, matmul(rotation.T, inside)))
        rotations.append(rotation)
    overlap = matmul(before.basis[:, :used].T, after.basis[:, :used])
    overlap = matmul(rotations[0].T, matmul(overlap, rotations[1]))
    return Pairing(ends[0], ends[1], overlap)


all_pairs = jax.jit(descending_pairs)


def _leading_pairs(
    point: Point, num_pairs: int, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns leading pairs by Lanczos, and half their largest relative residual.

    Pairs that did not converge are zero. Last, whether no copy is missing above them.
    """
    start_key, key = jax.random.split(key)
    width = min(_BLOCK, num_pairs)
    start = jax.random.normal(start_key, (point.dimension, width), point.error.dtype)
    found = leading_eigenpairs(
        held_products(point), start, num_pairs, key=key, tolerance=_CONVERGENCE
    )
    values = jnp.where(found.converged, found.values, 0)
    values = jnp.where(found.finite, values, jnp.nan)
    vectors = jnp.where(found.converged[None, :], found.vectors, 0)
    # A residual turns its vector as a kernel would that is off by as much. Half of it,
    # since floors take the kernel to be off by three times the rounding.
    worst = jnp.max(jnp.where(found.converged, found.residuals, 0))
    return values, vectors, ratio(worst, found.values[0]) / 2, found.proven


def _with_rest(
    snapshot: SpectralSnapshot, vectors: jax.Array
) -> tuple[Spectrum, jax.Array]:
    """Returns the spectrum and its vectors, with what lies outside as two pairs."""
    inside = matmul(snapshot.vectors.T, vectors)
    if snapshot.vectors.shape[0] == snapshot.vectors.shape[1]:
        return Spectrum(snapshot.values, inside), snapshot.vectors
    rest, triangular = jnp.linalg.qr(outside(snapshot.vectors, vectors))
    values = jnp.pad(snapshot.values, (0, 2))
    coefficients = jnp.concatenate([inside, triangular])
    return Spectrum(values, coefficients), jnp.concatenate(
        [snapshot.vectors, rest], axis=1
    )
