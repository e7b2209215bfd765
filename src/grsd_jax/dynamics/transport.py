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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import all_finite, matmul, ratio, where_defined
from grsd_jax.dynamics.amount_errors import (
    AmountErrors,
    amount_errors,
    converged_edges,
    rounding_floors,
    unseen_errors,
)
from grsd_jax.dynamics.amounts import (
    Pairing,
    amounts_of,
    growth_of,
    in_dtype,
    restored,
    scaled,
    size_of,
    weights_of,
)
from grsd_jax.results import NamedResult, Result, number, result, span
from grsd_jax.shells.soft_shells import SoftShells

#: The fields of a balance that are errors.
ERRORS = ("energy_error", "lost_error", "moved_error", "flux_error", "density_error")

#: The fields of a balance that mean nothing if one of them leaves the dtype.
_NUMBERS = (
    "energies",
    "lost",
    "moved",
    "flux",
    "rotation",
    "density",
    "floor",
    *ERRORS,
)


@result()
class Counting(NamedResult):
    """How many eigenvalues lie above the edges, and at them.

    Attributes:
        moved: ``[q]``, ``tr up_k(M_1) - tr up_k(M_0)``.
        density: ``[q]``, ``tr (d up_k / d log lambda)``, the mean of both kernels.
        stderr: ``[q]``, the standard error of the ratio of both; 0 from all pairs,
            infinite from a single random vector.
        error: ``[q]``, the error of the ratio: the standard error, and what fewer steps
            of Lanczos change.
        converged: ``[q]`` bool, whether three quarters and half of the Lanczos steps
            change the ratio by no more than its standard error. True from all pairs.
    """

    moved: jax.Array
    density: jax.Array
    stderr: jax.Array
    error: jax.Array
    converged: jax.Array


@result(
    masks={
        **dict.fromkeys(_NUMBERS, "known"),
        "rounding": "finite",
        "effective_edges": "has_energy",
        "growth": "grows",
        "growth_error": "grows",
        "elapsed": "timed",
    },
    units=dict.fromkeys(("energies", "lost", "moved", "flux"), "|e|^2"),
    derived=(
        "drift",
        "velocity",
        "velocity_error",
        "shift_velocity",
        "shift_velocity_error",
        "counting_velocity",
        "counting_velocity_error",
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
        "growth_error",
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
        "in_range",
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
            matched by rank, each kept in its old shell. None from `KrylovSteps`, or if
            the ends differ in the number of their pairs.
        density: [q], ``eps_k``, energy per unit of log lambda at each edge.
        effective_edges: [q], ``lambda_eff``, where the energy at each edge lies; NaN
            where there is none.
        growth: [q], the shift ``u_k`` in log lambda by which the old kernel would have
            to grow to hold as much of both errors above the edge as the new one; NaN
            where it is not known.
        growth_error: [q], how far ``growth`` moves if the flux is off by its error;
            infinite where no growth at all may put as much energy above the edge.
        grows: [q] bool, where it is: not for sharp shells, nor if no growth does it.
        counting: The same of the number of eigenvalues; None from leading pairs, and
            from `KrylovSteps` without probes.
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
        in_range: [] bool, whether the dtype holds the amounts, down to their rounding.
            If not, the error is too small or too large for its square: in float32 below
            some 1e-16 or above 1e19. Amounts are then NaN; the growth is right all the
            same.

    Inside `jit` no NaN is made: what is undefined is 0 or infinite there, where
    `has_energy`, ``grows``, `timed` or `known` is False (the edge in place of its
    effective one), and a velocity or share is infinite.
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
    growth_error: jax.Array
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
    in_range: jax.Array

    @property
    def known(self) -> jax.Array:
        """Whether the amounts are finite and in the range of the dtype, [] bool."""
        return self.finite & self.in_range

    @property
    def drift(self) -> jax.Array | None:
        """The rest of the flux, [q]: eigenvalues that grew past the edges."""
        return None if self.rotation is None else self.flux - self.rotation

    @property
    def has_energy(self) -> jax.Array:
        """Whether there is energy at each edge, [q] bool."""
        return self.density > 0

    @property
    def timed(self) -> jax.Array:
        """Whether the time that passed is known, [] bool."""
        return self.elapsed > 0

    @property
    def velocity(self) -> jax.Array:
        """``v_k = F_k / (Delta tau eps_k)``, [q], in log lambda per time."""
        return _over(self.flux, self.density, self._time, where=self._all_known)

    @property
    def velocity_error(self) -> jax.Array:
        """The error of `velocity`, [q], from those of flux and density."""
        known = self._all_known  # infinities have no ratio
        shift = jnp.abs(ratio(jnp.where(known, self.flux, 0), self.density))
        # Both errors are infinite where an edge has not converged.
        error = self.flux_error + shift * jnp.where(shift > 0, self.density_error, 0)
        return _over(error, self.density, self._time, where=known)

    @property
    def shift_velocity(self) -> jax.Array:
        """``u_k / Delta tau``, [q], for large intervals, where `velocity` is coarse."""
        return _over(self.growth, self._time, where=self.grows)

    @property
    def shift_velocity_error(self) -> jax.Array:
        """The error of `shift_velocity`, [q]."""
        return _over(self.growth_error, self._time, where=self.grows)

    @property
    def counting_velocity(self) -> jax.Array | None:
        """``v^N_k``, [q], by the number of eigenvalues in place of energy."""
        if self.counting is None:
            return None
        return _over(self.counting.moved, self.counting.density, self._time)

    @property
    def counting_velocity_error(self) -> jax.Array | None:
        """The error of `counting_velocity`, [q]."""
        if self.counting is None:
            return None
        counted = self.counting.density != 0
        return _over(self.counting.error, self._time, where=counted)

    @property
    def excess_velocity(self) -> jax.Array | None:
        """``v_k - v^N_k``, [q]: zero for a kernel that only grows."""
        if self.counting is None:
            return None
        shift = ratio(jnp.where(self._all_known, self.flux, 0), self.density)
        counted = ratio(self.counting.moved, self.counting.density)
        both = self._all_known & self.has_energy & (self.counting.density != 0)
        return _over(shift - counted, self._time, where=both)

    @property
    def velocity_mask(self) -> jax.Array:
        """The edges whose velocity can be used, [q] bool.

        Those that have converged and have more energy than its error, which lies within
        w of the edge in log lambda; none if the balance is not finite, not comparable
        or not timed. The velocity itself may be smaller than its error.
        """
        places = jnp.where(self.has_energy, self.effective_edges, self.shells.edges)
        near = jnp.abs(jnp.log(places / self.shells.edges)) <= self.shells.reach()
        usable = self.converged & near & (self.density > self.density_error)
        sound = self.known & self.comparable & self.timed
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
        return _over(far, whole, where=self.shells.are_wide() & self.known)

    @property
    def _all_known(self) -> jax.Array:
        return self.known[..., None]

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
        if self.finite and not self.in_range:
            finite = f"OUT OF THE RANGE of squares in {self.flux.dtype}"
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


def balance_spectra(
    pairings: Sequence[Pairing],
    shells: SoftShells,
    *,
    matched: bool,
    square: bool = True,
    change: jax.typing.ArrayLike | None = None,
    rounding: jax.typing.ArrayLike | None = None,
    closest: int = 0,
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
        closest: Which of the spectra has the gaps at which rounding turns vectors.
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
    size = size_of(pairings[0])
    pairings = [scaled(pairing, size) for pairing in pairings]
    found, *coarser = (amounts_of(pairing, shells, square) for pairing in pairings)
    own = floors = rounding_floors(pairings[0], shells, rounding)
    if closest:
        near = _placed(pairings[0], pairings[closest])
        floors = rounding_floors(near, shells, rounding)
    others = [*coarser]
    if not square:  # four times what was left out, as far as the spectra know it
        others += 4 * [amounts_of(pairings[0], shells, square=True)]
    converged = converged_edges(found, coarser, own, agreement)
    errors = amount_errors(floors, found, others, converged)
    if change is not None:
        unseen = unseen_errors(pairings[0], jnp.asarray(change, dtype) / size, shells)
        errors = jax.tree.map(jnp.add, errors, unseen)
    rotation = None
    if matched:
        before, after = pairings[0].before, pairings[0].after
        turned = weights_of(after, square) - weights_of(before, square)
        rotation = matmul(shells.above(before.values).T, turned)
    growth, growth_error, grows = growth_of(pairings, shells, errors.flux, square)
    names = AmountErrors._fields
    fits = [in_dtype(getattr(found, x), getattr(floors, x), size) for x in names]
    finite = all_finite([getattr(found, x) for x in names])
    amounts = {x: restored(getattr(found, x), size) for x in names}
    errors = AmountErrors(*(restored(error, size) for error in errors))
    return ExactBalance(
        shells=shells,
        **amounts,
        rotation=None if rotation is None else restored(rotation, size),
        effective_edges=found.effective_edges,
        growth=growth,
        growth_error=growth_error,
        grows=grows,
        counting=None,
        elapsed=jnp.zeros((), dtype),
        floor=restored(floors.flux, size),
        flux_error=errors.flux,
        energy_error=errors.energies,
        lost_error=errors.lost,
        moved_error=errors.moved,
        density_error=errors.density,
        converged=converged,
        rounding=rounding,
        comparable=jnp.bool_(True),
        finite=finite,
        in_range=jnp.all(jnp.stack([jnp.all(fit) for fit in fits])) | ~finite,
    )


def _placed(lowest: Pairing, closest: Pairing) -> Pairing:
    """Returns the closest pairing; the lowest where no pair was found.

    There the rest lies at infinity.
    """
    return jax.tree.map(
        lambda low, high: jnp.where(jnp.isinf(high), low, high), lowest, closest
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
    density = jnp.sum(shells.windows(both), axis=0) / 2
    exact, converged = jnp.zeros_like(moved), jnp.ones(moved.shape, bool)
    return Counting(moved, density, stderr=exact, error=exact, converged=converged)


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
