"""What the spectra of two kernels say of the energy: amounts, and growth.

The errors before and after enter as their mean and their difference, in the vectors of
each kernel.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from grsd_jax._arrays import divisor, matmul, ratio
from grsd_jax.shells.soft_shells import SoftShells

#: How far a spectrum may have grown or shrunk, in log lambda, and the halvings to it.
_MOST_GROWTH, _HALVINGS = 40.0, 64


class Spectrum(NamedTuple):
    """One kernel's pairs, as the two errors see them.

    Attributes:
        values: ``[r]``, eigenvalues or Ritz values.
        coefficients: ``[r, 2]``, of ``e_m = (e_0 + e_1) / 2`` and of
            ``delta = e_1 - e_0`` in the pairs' vectors, whose span holds both errors.
    """

    values: jax.Array
    coefficients: jax.Array


class Pairing(NamedTuple):
    """The spectra of both kernels, and how their vectors lie to each other.

    Attributes:
        before: Spectrum of the first kernel.
        after: Spectrum of the second.
        overlap: ``[r_0, r_1]``, the products of the vectors of both.
    """

    before: Spectrum
    after: Spectrum
    overlap: jax.Array


class Amounts(NamedTuple):
    """What both kernels' spectra determine; the fields of `ExactBalance` of this name.

    Attributes:
        energies: ``[2, S]``, before and after.
        lost: [S], because the error changed.
        moved: ``[S, S]``, because the kernel changed.
        flux: [q], past each edge.
        density: [q], energy at each edge per unit of log lambda.
        effective_edges: [q], where that energy lies.
    """

    energies: jax.Array
    lost: jax.Array
    moved: jax.Array
    flux: jax.Array
    density: jax.Array
    effective_edges: jax.Array


def size_of(pairing: Pairing) -> jax.Array:
    """Returns the size of the errors, by which they are divided, [], above zero."""
    return divisor(jnp.max(jnp.abs(pairing.before.coefficients), initial=0))


def restored(amount: jax.Array, size: jax.Array) -> jax.Array:
    """Returns what is quadratic in the error, of errors that are larger by a size.

    In two factors, since the square of the size alone may leave the dtype.
    """
    return amount * size * size


def in_dtype(amount: jax.Array, floor: jax.Array, size: jax.Array) -> jax.Array:
    """Returns where the dtype holds restored amounts.

    Args:
        amount: The amounts of errors of size one.
        floor: What rounding may do to them, so that what is smaller does not count; of
            their last axes.
        size: [], of the errors.

    Returns:
        Booleans: no amount is infinite, and no floor is lost.
    """
    floor, least = jnp.broadcast_to(floor, amount.shape), jnp.finfo(floor.dtype).tiny
    kept = (floor == 0) | (restored(floor, size) >= least)
    return kept & jnp.isfinite(restored(amount, size))


def scaled(pairing: Pairing, scale: jax.Array) -> Pairing:
    """Returns the pairing of errors that are smaller by a factor."""

    def smaller(end: Spectrum) -> Spectrum:
        return end._replace(coefficients=end.coefficients / scale)

    return Pairing(smaller(pairing.before), smaller(pairing.after), pairing.overlap)


def weights_of(end: Spectrum, square: bool) -> jax.Array:
    """Returns the energy in each pair, ``[r]``, the mean of that of both errors."""
    mean, change = end.coefficients.T
    return jnp.square(mean) + (jnp.square(change) / 4 if square else 0)


def amounts_of(pairing: Pairing, shells: SoftShells, square: bool) -> Amounts:
    """Returns what the spectra determine, by the equations of `balance_spectra`.

    Args:
        pairing: The spectra of both kernels.
        shells: The shells.
        square: Whether to count what is quadratic in ``delta``.

    Returns:
        The amounts.
    """
    # Both kernels' pairs in one list, the old ones first.
    number = len(pairing.before.values)
    values = jnp.concatenate([pairing.before.values, pairing.after.values])
    ends = [pairing.before, pairing.after]
    old, new = (weights_of(end, square) for end in ends)
    weights = jnp.concatenate([old, new])
    crossed = jnp.concatenate([jnp.prod(end.coefficients, axis=1) for end in ends])
    members, windows = shells.members(values), shells.windows(values)

    joint = _joint(pairing, members, 0)
    if square:
        joint = joint + _joint(pairing, members, 1) / 4
    before, after = members[:number].T, members[number:].T
    density = matmul(windows.T, weights) / 2
    moment = matmul((windows * shells.offsets(values)).T, weights) / 2
    return Amounts(
        energies=jnp.stack(
            [
                matmul(before, old - crossed[:number]),
                matmul(after, new + crossed[number:]),
            ]
        ),
        lost=-matmul(members.T, crossed),
        moved=joint.T - joint,
        flux=matmul(shells.above(values).T, jnp.concatenate([-old, new])),
        density=density,
        effective_edges=shells.edges * jnp.exp(ratio(moment, density)),
    )


def _joint(pairing: Pairing, members: jax.Array, which: int) -> jax.Array:
    """Returns ``W_ba = c^T P_b^0 P_a^1 c``, ``[S, S]``, of one of the two vectors."""
    before, after = pairing.before.coefficients, pairing.after.coefficients
    left = members[: len(before)] * before[:, which, None]
    right = members[len(before) :] * after[:, which, None]
    return matmul(left.T, matmul(pairing.overlap, right))


def growth_of(
    pairings: Sequence[Pairing],
    shells: SoftShells,
    flux_error: jax.Array,
    square: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns u_k with ``e^T up_k(e^u M_0) e = e^T up_k(M_1) e``.

    Args:
        pairings: The spectra of both kernels; then others to compare with.
        shells: The shells.
        flux_error: [q], the errors of the flux.
        square: As for `amounts_of`.

    Returns:
        u, [q]; its error: how far it lies from where the right side is higher or lower
        by the error of the flux, and from that of the other spectra; and whether there
        is such a u.
    """
    if not shells.width:
        nothing = jnp.zeros_like(flux_error)
        return nothing, nothing, jnp.zeros(nothing.shape, bool)
    known = jnp.isfinite(flux_error)
    error = jnp.where(known, flux_error, 0)
    offsets = jnp.stack([jnp.zeros_like(error), -error, error])
    (growth, *ends), (reached, *ended) = _grown(pairings[0], shells, offsets, square)
    apart = jnp.maximum(*(jnp.abs(end - growth) for end in ends))
    bounded = known & ended[0] & ended[1]
    for other in pairings[1:]:
        again, found = _grown(other, shells, offsets[:1], square)
        apart = apart + jnp.abs(again[0] - growth)
        bounded &= found[0]
    return growth, jnp.where(bounded, apart, jnp.inf), reached


def _grown(
    pairing: Pairing, shells: SoftShells, offsets: jax.Array, square: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns the growths at which the sides differ by ``offsets``, ``[targets, q]``.

    By bisection; and whether there is one, 0 where there is not.
    """
    before = weights_of(pairing.before, square)
    above = matmul(
        shells.above(pairing.after.values).T, weights_of(pairing.after, square)
    )
    targets = above[None] + offsets

    @jax.vmap
    def held(growth: jax.Array) -> jax.Array:
        return matmul(shells.above(pairing.before.values, growth).T, before)

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = (low + high) / 2
        under = held(middle) < targets
        return jnp.where(under, middle, low), jnp.where(under, high, middle)

    low = jnp.full_like(targets, -_MOST_GROWTH)
    reached = (held(low) < targets) & (targets < held(-low))
    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, (low, -low))
    return jnp.where(reached, (low + high) / 2, 0), reached
