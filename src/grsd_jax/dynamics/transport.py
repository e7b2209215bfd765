"""The exact energy balance between two kernels, from their spectra.

Between two snapshots the energy of every shell changes because the error changed, which
is what was lost, and because the shell's subspace changed, which is what moved. Both
follow from the two errors and the two kernels alone, whatever step, optimizer and
network lie between them. The balance is an identity and closes for wrong eigenpairs
too, so that closure is no evidence of accuracy.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import divisor, matmul, norm, ratio, where_defined
from grsd_jax.results import NamedResult, Result, number, result, span
from grsd_jax.shells.soft_shells import SoftShells

#: The size of what rounding adds to a kernel, over ``eps lambda_max``, and to sums of
#: energies, over ``eps |e|^2``: bounds on small networks.
_KERNEL_ROUNDING, _SUM_ROUNDING = 3.0, 4.0

#: Pairs this many roundings from a sharp edge may lie on either side of it.
_AMBIGUOUS = 8.0

#: Eigenvalues relatively closer than this have the mean of both slopes as the divided
#: difference of a step, which would cancel.
_NEAR = 1e-3

#: How far a spectrum may have grown or shrunk, in log lambda, and the halvings to it.
_MOST_GROWTH, _HALVINGS = 40.0, 64

#: The fields of a balance that are errors.
ERRORS = ("energy_error", "lost_error", "moved_error", "flux_error", "density_error")

#: The fields of a balance that mean nothing if one of them is not finite.
_NUMBERS = (
    "energies",
    "lost",
    "moved",
    "flux",
    "rotation",
    "density",
    "floor",
    "rounding",
    *ERRORS,
)


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


@result()
class Counting(NamedResult):
    """How many eigenvalues lie above the edges, and at them.

    Attributes:
        moved: ``[q]``, ``tr up_k(M_1) - tr up_k(M_0)``.
        density: ``[q]``, ``tr (d up_k / d log lambda)``, the mean of both kernels.
        stderr: ``[q]``, the standard error of the ratio of both; 0 from all pairs,
            infinite from a single random vector.
    """

    moved: jax.Array
    density: jax.Array
    stderr: jax.Array


@result(
    masks={
        **dict.fromkeys(_NUMBERS, "finite"),
        "effective_edges": "has_energy",
        "growth": "grows",
        "elapsed": "timed",
    },
    units=dict.fromkeys(("energies", "lost", "moved", "flux"), "|e|^2"),
    derived=(
        "drift",
        "velocity",
        "velocity_error",
        "shift_velocity",
        "counting_velocity",
        "excess_velocity",
        "velocity_mask",
        "non_adjacent_share",
    ),
)
@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "shells",
        "energies",
        "lost",
        "moved",
        "flux",
        "rotation",
        "density",
        "effective_edges",
        "growth",
        "grows",
        "counting",
        "elapsed",
        "floor",
        "flux_error",
        "energy_error",
        "lost_error",
        "moved_error",
        "density_error",
        "converged",
        "rounding",
        "comparable",
        "finite",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactBalance(Result):
    r"""What happened to the energy between two snapshots.

    .. math:: E_a^1 - E_a^0 = -D_a + \sum_b T_{ab}

    Amounts, in squared units of the error; the properties that are rates divide by the
    time that passed. Index 0 is the shell below all edges, or the lowest edge.

    Attributes:
        shells: The shells, q edges and ``S = q + 1`` shells.
        energies: ``[2, S]``, ``E_a`` before and after.
        lost: [S], ``D_a``, what was lost because the error changed.
        moved: ``[S, S]``, ``T_ab``, what a gained from b because the kernel changed;
            antisymmetric.
        flux: [q], ``F_k``, net energy that passed each edge upward.
        rotation: [q], the part of it that is due to the turning of eigenvectors: pairs
            matched by rank, each kept in its old shell. None from Lanczos.
        density: [q], ``eps_k``, energy per unit of log lambda at each edge.
        effective_edges: [q], ``lambda_eff``, where the energy at each edge lies; NaN
            where there is none.
        growth: [q], the shift ``u_k`` in log lambda by which the old kernel would have
            to grow to hold as much of both errors above the edge as the new one; NaN
            where it is not known.
        grows: [q] bool, where it is: not for sharp shells, nor if no growth does it.
        counting: The same of the number of eigenvalues; None if it was not computed.
        elapsed: [], the time that passed; NaN if it is unknown or has no meaning.
        floor: [q], what rounding may do to the flux.
        flux_error: [q], the floor, and what fewer steps of Lanczos change, or the
            place of what lies outside leading pairs; infinite where the edge has not
            converged.
        energy_error: ``[2, S]``, the same of ``energies``.
        lost_error: [S], the same of ``lost``.
        moved_error: ``[S, S]``, the same of ``moved``.
        density_error: [q], the same of ``density``.
        converged: [q] bool, whether three quarters and half of the Lanczos steps agree
            with all of them, here and at every edge above; from leading pairs, whether
            they reach down to here. True from all pairs.
        rounding: [], the rounding of products with the kernel, relative; far above the
            dtype's epsilon if they run in reduced precision.
        comparable: [] bool, whether both ends hold the same examples and targets in the
            same order, and the same loss. If not, no number means anything.
        finite: [] bool, whether all numbers are finite. If not, they are NaN.

    Inside `jit` no NaN is made: what is undefined is 0 there, where `has_energy`,
    ``grows``, `timed` or ``finite`` is False, and a velocity or share is infinite.
    """

    shells: SoftShells
    energies: jax.Array
    lost: jax.Array
    moved: jax.Array
    flux: jax.Array
    rotation: jax.Array | None
    density: jax.Array
    effective_edges: jax.Array
    growth: jax.Array
    grows: jax.Array
    counting: Counting | None
    elapsed: jax.Array
    floor: jax.Array
    flux_error: jax.Array
    energy_error: jax.Array
    lost_error: jax.Array
    moved_error: jax.Array
    density_error: jax.Array
    converged: jax.Array
    rounding: jax.Array
    comparable: jax.Array
    finite: jax.Array

    @property
    def drift(self) -> jax.Array | None:
        """The rest of the flux, [q]: eigenvalues that grew past the edges."""
        return None if self.rotation is None else self.flux - self.rotation

    @property
    def has_energy(self) -> jax.Array:
        """Whether there is energy at each edge, [q] bool."""
        return self.density != 0

    @property
    def timed(self) -> jax.Array:
        """Whether the time that passed is known, [] bool."""
        return self.elapsed > 0

    @property
    def velocity(self) -> jax.Array:
        """``v_k = F_k / (Delta tau eps_k)``, [q], in log lambda per time."""
        return _over(self.flux, self.density, self._time)

    @property
    def velocity_error(self) -> jax.Array:
        """The error of `velocity`, [q], from those of flux and density."""
        shift = jnp.abs(ratio(self.flux, self.density))
        # Both errors are infinite where an edge has not converged.
        error = self.flux_error + shift * jnp.where(shift > 0, self.density_error, 0)
        return _over(error, self.density, self._time)

    @property
    def shift_velocity(self) -> jax.Array:
        """``u_k / Delta tau``, [q], for large intervals, where `velocity` is coarse."""
        return _over(self.growth, self._time, where=self.grows)

    @property
    def counting_velocity(self) -> jax.Array | None:
        """``v^N_k``, [q], by the number of eigenvalues in place of energy."""
        if self.counting is None:
            return None
        return _over(self.counting.moved, self.counting.density, self._time)

    @property
    def excess_velocity(self) -> jax.Array | None:
        """``v_k - v^N_k``, [q]: zero for a kernel that only grows."""
        if self.counting is None:
            return None
        shift, counted = (
            ratio(part, density)
            for part, density in (
                (self.flux, self.density),
                (self.counting.moved, self.counting.density),
            )
        )
        both = self.has_energy & (self.counting.density != 0)
        return _over(shift - counted, self._time, where=both)

    @property
    def velocity_mask(self) -> jax.Array:
        """The edges whose velocity can be used, [q] bool.

        Those that have converged and have more energy than rounding makes, which lies
        within w of the edge in log lambda.
        """
        places = jnp.where(self.has_energy, self.effective_edges, self.shells.edges)
        near = jnp.abs(jnp.log(places / self.shells.edges)) <= self.shells.reach()
        usable = self.converged & near & (self.density > self.density_error)
        sound = self.finite & self.comparable & self.timed
        return usable & sound[..., None]

    @property
    def non_adjacent_share(self) -> jax.Array:
        """``sum |T_ab|`` over shells that are not neighbors, over that of all, [].

        Of the transfers that exceed their error; NaN if none does, or if a soft shell
        is less than 8 w wide: overlap alone would read as transport.
        """
        sizes = jnp.abs(self.moved)
        sizes = jnp.where(sizes > self.moved_error, sizes, 0)
        far = jnp.triu(sizes, 2) + jnp.tril(sizes, -2)
        far, whole = (jnp.sum(part, axis=(-2, -1)) for part in (far, sizes))
        return _over(far, whole, where=self.shells.are_wide())

    @property
    def _time(self) -> jax.Array:
        return jnp.where(jnp.isnan(self.elapsed), 0, self.elapsed)[..., None]

    def _headline(self) -> list[tuple[str, str]]:
        totals = [number(total) for total in np.sum(self.energies, axis=1)]
        usable, q = int(jnp.sum(self.velocity_mask)), len(self.flux)
        rows = [
            ("energy |e|^2", f"{totals[0]} before, {totals[1]} after"),
            ("lost as the error changed", number(np.sum(self.lost))),
            ("flux past the edges", self._flux_text()),
            ("elapsed time", number(self.elapsed)),
            ("edges with a usable velocity", f"{usable} of {q}"),
        ]
        if usable:
            shown = self.velocity[self.velocity_mask]
            rows.append(("velocity there", span(shown, "in log lambda per time")))
        share = f"{number(self.non_adjacent_share)} of all"
        if np.isnan(self.non_adjacent_share):
            share = "n/a (narrow shells, or none above its error)"
        same = "the same examples" if self.comparable else "NOT the same examples"
        finite = "finite" if self.finite else "NOT finite"
        return [
            *rows,
            ("transfers between non-neighbors", share),
            ("both ends", f"{same}, {finite}"),
        ]

    def _flux_text(self) -> str:
        """Returns the span of the flux where its error is not infinite."""
        unknown = np.isinf(self.flux_error)
        text = span(np.asarray(self.flux)[~unknown], "|e|^2")
        count = f"{unknown.sum()} of {unknown.size} edges not converged"
        return f"{text}, {count}" if unknown.any() else text

    def _tables(self) -> dict[str, dict[str, Any]]:
        before, after = self.energies
        optional = {"excess": self.excess_velocity, "rotation": self.rotation}
        edges = {
            "lambda": self.shells.edges,
            "flux": self.flux,
            "+-": self.flux_error,
            "velocity": self.velocity,
            "+- ": self.velocity_error,
            **{name: column for name, column in optional.items() if column is not None},
            "usable": self.velocity_mask,
        }
        shells = {
            "shell": jnp.arange(len(before), dtype=jnp.int32),
            "energy before": before,
            "after": after,
            "lost": self.lost,
            "+-": self.lost_error,
            "moved in": np.sum(self.moved, axis=1),
        }
        return {
            "edges (flux in |e|^2, velocity in log lambda per time)": edges,
            "shells, from small to large lambda (in |e|^2)": shells,
        }


class _Amounts(NamedTuple):
    """The fields of `ExactBalance` that both kernels' spectra determine."""

    energies: jax.Array
    lost: jax.Array
    moved: jax.Array
    flux: jax.Array
    density: jax.Array
    effective_edges: jax.Array


def balance_spectra(
    pairings: Sequence[Pairing],
    shells: SoftShells,
    *,
    matched: bool,
    square: bool = True,
    change: jax.typing.ArrayLike | None = None,
    rounding: jax.typing.ArrayLike | None = None,
    agreement: float = 0.02,
) -> ExactBalance:
    r"""Returns the balance between two kernels whose spectra are given.

    .. math:: D_a = -2 e_m^\top \bar P_a \delta, \qquad
              T_{ab} = \tfrac12 \sum_{e \in \{e_0, e_1\}}
              \left[ W_{ba}(e) - W_{ab}(e) \right], \qquad
              W_{ba}(e) = e^\top P_b^0 P_a^1 e, \qquad
              F_k = \tfrac12 \sum_e e^\top
              \left[ \mathrm{up}_k(M_1) - \mathrm{up}_k(M_0) \right] e

    Args:
        pairings: The spectra; then others that are as good as far as one knows, such as
            those of fewer Lanczos steps, to compare with.
        shells: The shells, as `SoftShells.checked` returns them.
        matched: Whether the i-th pair of one kernel continues the i-th of the other,
            both in descending order, for the rotation.
        square: Whether the spectra are accurate for ``delta`` too. If not, what is
            quadratic in it is left out.
        change: [], ``|delta|``, of which the spectra may hold a part alone; None if
            they hold all of it.
        rounding: [], of products with the kernel, relative; epsilon if None.
        agreement: By how much of what passed an edge, in both directions, the others
            may change its flux for it to count as converged.

    Returns:
        The balance, with no time, no count and comparable ends.

    References:
        Ours; ``docs/what_moved.md``.
    """
    dtype = pairings[0].overlap.dtype
    rounding = jnp.finfo(dtype).eps if rounding is None else rounding
    rounding = jnp.asarray(rounding, dtype)
    scale, units = _units(pairings[0])
    pairings = [_scaled(pairing, scale) for pairing in pairings]
    found, *coarser = (_amounts(pairing, shells, square) for pairing in pairings)
    floors = rounding_floors(pairings[0], shells, rounding)
    others = [*coarser]
    if not square:  # four times what was left out, as far as the spectra know it
        others += 4 * [_amounts(pairings[0], shells, square=True)]
    converged = _converged(found, coarser, floors, agreement)
    errors = _errors(floors, found, others, converged)
    if change is not None:
        unseen = _unseen(pairings[0], jnp.asarray(change, dtype) / scale, shells)
        errors = jax.tree.map(jnp.add, errors, unseen)
    full = pairings[0]
    before, after = _weights(full.before, square), _weights(full.after, square)
    rotation = None
    if matched:
        old = shells.above(full.before.values)
        rotation = matmul(old.T, after - before)
    growth, grows = _growth(full, shells, before, after)
    amounts = (found.energies, found.lost, found.moved, found.flux, found.density)
    return ExactBalance(
        shells=shells,
        energies=units * found.energies,
        lost=units * found.lost,
        moved=units * found.moved,
        flux=units * found.flux,
        rotation=None if rotation is None else units * rotation,
        density=units * found.density,
        effective_edges=found.effective_edges,
        growth=growth,
        grows=grows,
        counting=None,
        elapsed=jnp.zeros((), dtype),
        floor=units * floors.flux,
        flux_error=units * errors.flux,
        energy_error=units * errors.energies,
        lost_error=units * errors.lost,
        moved_error=units * errors.moved,
        density_error=units * errors.density,
        converged=converged,
        rounding=rounding,
        comparable=jnp.bool_(True),
        finite=jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in amounts])),
    )


def count_pairs(before: jax.Array, after: jax.Array, shells: SoftShells) -> Counting:
    """Counts all eigenvalues of two kernels above the edges, and at them.

    Args:
        before: ``[r]``, all eigenvalues of the first kernel.
        after: ``[r]``, those of the second.
        shells: The shells.

    Returns:
        The count.
    """
    moved = jnp.sum(shells.above(after), axis=0) - jnp.sum(shells.above(before), axis=0)
    both = jnp.concatenate([before, after])
    return Counting(
        moved, jnp.sum(shells.windows(both), axis=0) / 2, jnp.zeros_like(moved)
    )


def _over(
    numerator: jax.Array,
    *denominators: jax.Array,
    where: jax.typing.ArrayLike = True,
) -> jax.Array:
    """Divides where all denominators are neither 0 nor NaN, and where it is said.

    NaN elsewhere; infinity inside `jit`.
    """
    for denominator in denominators:
        usable = (denominator != 0) & ~jnp.isnan(denominator)
        numerator = jnp.where(where, numerator, 0) / jnp.where(usable, denominator, 1)
        where = where & usable
    return where_defined(where, numerator)


def _units(pairing: Pairing) -> tuple[jax.Array, jax.Array]:
    """Returns the size of the errors, by which they are divided, and its square."""
    size = jnp.max(jnp.abs(pairing.before.coefficients), initial=0)
    size = jnp.where(size > 0, size, 1)
    return size, jnp.square(size)


def _scaled(pairing: Pairing, scale: jax.Array) -> Pairing:
    """Returns the pairing of errors that are smaller by a factor."""

    def smaller(end: Spectrum) -> Spectrum:
        return end._replace(coefficients=end.coefficients / scale)

    return Pairing(smaller(pairing.before), smaller(pairing.after), pairing.overlap)


def _weights(end: Spectrum, square: bool) -> jax.Array:
    """Returns the energy in each pair, ``[r]``, the mean of both errors."""
    mean, change = end.coefficients.T
    return jnp.square(mean) + (jnp.square(change) / 4 if square else 0)


def _amounts(pairing: Pairing, shells: SoftShells, square: bool) -> _Amounts:
    """Returns what the spectra determine, as in `balance_spectra`."""
    # Both kernels' pairs in one list, the old ones first.
    number = len(pairing.before.values)
    values = jnp.concatenate([pairing.before.values, pairing.after.values])
    ends = [pairing.before, pairing.after]
    old, new = (_weights(end, square) for end in ends)
    weights = jnp.concatenate([old, new])
    crossed = jnp.concatenate([jnp.prod(end.coefficients, axis=1) for end in ends])
    members, windows = shells.members(values), shells.windows(values)

    joint = _joint(pairing, members, 0)
    if square:
        joint = joint + _joint(pairing, members, 1) / 4
    before, after = members[:number].T, members[number:].T
    density = matmul(windows.T, weights) / 2
    moment = matmul((windows * shells.offsets(values)).T, weights) / 2
    return _Amounts(
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


def _growth(
    pairing: Pairing, shells: SoftShells, before: jax.Array, after: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns u_k with ``e^T up_k(e^u M_0) e = e^T up_k(M_1) e``, and if there is one.

    By bisection.
    """
    target = matmul(shells.above(pairing.after.values).T, after)
    if not shells.width:
        return jnp.zeros_like(target), jnp.zeros(target.shape, bool)

    def held(growth: jax.Array) -> jax.Array:
        return matmul(shells.above(pairing.before.values, growth).T, before)

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = (low + high) / 2
        under = held(middle) < target
        return jnp.where(under, middle, low), jnp.where(under, high, middle)

    low = jnp.full_like(target, -_MOST_GROWTH)
    reached = (held(low) < target) & (target < held(-low))
    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, (low, -low))
    return jnp.where(reached, (low + high) / 2, 0), reached


class _Errors(NamedTuple):
    """The errors of the amounts."""

    energies: jax.Array
    lost: jax.Array
    moved: jax.Array
    flux: jax.Array
    density: jax.Array


def rounding_floors(
    pairing: Pairing, shells: SoftShells, rounding: jax.Array
) -> _Errors:
    """Returns what rounding may do to the amounts.

    Args:
        pairing: The spectra of both kernels.
        shells: The shells.
        rounding: [], of products with the kernel, relative.

    Returns:
        The floors, by the names of the amounts.
    """
    ends = [pairing.before, pairing.after]
    weights = [_weights(end, square=True) for end in ends]
    energy = (jnp.sum(weights[0]) + jnp.sum(weights[1])) / 2
    change = jnp.sum(jnp.square(pairing.after.coefficients[:, 1]))
    noise = _KERNEL_ROUNDING * rounding
    turned = [
        _stirred(end.values, weight, shells, noise)
        for end, weight in zip(ends, weights, strict=True)
    ]
    summing = _SUM_ROUNDING * rounding * energy
    flux = jnp.sqrt(jnp.square(turned[0]) + jnp.square(turned[1])) + summing
    shell = jnp.pad(flux, (1, 0)) + jnp.pad(flux, (0, 1))
    return _Errors(
        energies=shell,
        lost=2 * shell * jnp.sqrt(ratio(change, energy)) + summing,
        # The turning of one shell's neighbors is seen by every other.
        moved=jnp.maximum(shell[:, None], shell[None, :]),
        flux=flux,
        density=flux / (shells.width or 1.0),
    )


def _stirred(
    values: jax.Array, weights: jax.Array, shells: SoftShells, noise: jax.Array
) -> jax.Array:
    r"""Returns what a random kernel of norm ``noise lambda_max`` does to ``up_k``, [q].

    To first order ``e^T (up_k(M + E) - up_k(M)) e = sum_ij g_i g_j up_k[i, j] E_ij``,
    with the divided differences of the step; this is its root mean square.
    """
    largest = jnp.max(values, initial=0)

    def one(edge: jax.Array, up: jax.Array, window: jax.Array) -> jax.Array:
        places, size = jnp.maximum(values, 0) / edge, noise * largest / edge
        gaps = jnp.abs(places[:, None] - places[None, :])
        steps = jnp.abs(up[:, None] - up[None, :])
        if shells.width:
            slopes = window / divisor(places)
            near = gaps <= _NEAR * jnp.maximum(places[:, None], places[None, :])
            slopes = (slopes[:, None] + slopes[None, :]) / 2
            divided = jnp.where(near, slopes, steps / jnp.where(near, 1, gaps))
        else:  # whoever lies on the edge may fall on either side of it
            divided = steps / divisor(jnp.maximum(gaps, size))
            on_edge = jnp.abs(places - 1) <= _AMBIGUOUS * size
            divided = divided + jnp.diag(jnp.where(on_edge, 1 / divisor(size), 0))
        pairs = matmul(jnp.square(divided), weights[:, None])[:, 0]
        return size * jnp.sqrt(jnp.sum(weights * pairs))

    columns = shells.above(values).T, shells.windows(values).T
    return jax.lax.map(lambda args: one(*args), (shells.edges, *columns))


def _errors(
    floors: _Errors,
    found: _Amounts,
    others: Sequence[_Amounts],
    converged: jax.Array,
) -> _Errors:
    """Returns the floors, and what other forms of the amounts change added to them.

    Infinite where an edge has not converged: fewer steps then say nothing of more.
    """
    above = jnp.pad(converged, (0, 1), constant_values=True)
    below = jnp.pad(converged, (1, 0), constant_values=True)
    shell = above & below
    known = {
        "moved": shell[:, None] & shell[None, :],
        "flux": converged,
        "density": converged,
    }

    def error(name: str) -> jax.Array:
        full, floor = getattr(found, name), getattr(floors, name)
        changes = (jnp.abs(full - getattr(other, name)) for other in others)
        total = sum(changes, jnp.broadcast_to(floor, full.shape))
        reached = jnp.broadcast_to(known.get(name, shell), full.shape)
        return jnp.where(reached, total, jnp.inf)

    return _Errors(**{name: error(name) for name in _Errors._fields})


def _unseen(pairing: Pairing, change: jax.Array, shells: SoftShells) -> _Errors:
    r"""Returns what is quadratic in ``delta`` at most, beyond what the spectra know.

    With ``delta = s + u``, s in the span of the pairs, and a function of M from 0 to 1,
    ``delta^T f delta`` is that of s up to ``|u|^2 + 2 |s| |u|``. Flux and transfers are
    differences of two such, and slopes of the steps are ``1 / 4w`` at most.
    """
    ends = [pairing.before, pairing.after]
    seen = jnp.stack([norm(end.coefficients[:, 1]) for end in ends])
    rest = jnp.sqrt(jnp.maximum(jnp.square(change) - jnp.square(seen), 0))
    bound = jnp.max(jnp.square(rest) + 2 * seen * rest) / 4
    nothing = jnp.zeros_like(bound)
    return _Errors(
        energies=bound,
        lost=nothing,
        moved=2 * bound,
        flux=2 * bound,
        density=bound / 4 / (shells.width or 1.0),
    )


def _converged(
    found: _Amounts, coarser: Sequence[_Amounts], floors: _Errors, agreement: float
) -> jax.Array:
    """Returns whether fewer steps agree, at each edge and at every one above, [q]."""
    number = len(found.flux)
    shell = jnp.arange(number + 1, dtype=jnp.int32)
    above = (shell[None, :] > shell[:-1, None]).astype(found.moved.dtype)
    # Over each edge in both directions, which does not vanish where the flux turns.
    sizes = matmul(above, jnp.abs(found.moved)) * (1 - above)
    passed = jnp.maximum(jnp.sum(sizes, axis=1), jnp.abs(found.flux))
    agrees = jnp.isfinite(found.flux)
    for other in coarser:
        apart = jnp.abs(other.flux - found.flux)
        agrees &= apart <= agreement * passed + floors.flux
        apart = jnp.abs(other.density - found.density)
        agrees &= apart <= agreement * found.density + floors.density
    return jnp.flip(jnp.cumprod(jnp.flip(agrees).astype(jnp.int32))) > 0
