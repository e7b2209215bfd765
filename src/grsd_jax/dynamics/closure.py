"""The balance of the shells against a small step: rates, and edges passed.

The rates of `grsd_jax.dynamics.balance` are predictions at one instant. A small
training step tests them, and shows the pairs whose eigenvalue moved over a fixed edge,
which the balance leaves out.
"""

import jax
import jax.numpy as jnp

from grsd_jax._arrays import as_floating, as_mask, as_scalar, norm, ratio
from grsd_jax._checks import check_at_least
from grsd_jax.results import NamedResult, result


@result()
class EdgeCrossings(NamedResult):
    """What passes fixed edges because eigenvalues move over them.

    Attributes:
        up: [S+1] int32, pairs that passed each edge upward.
        down: [S+1] int32, pairs that passed it downward.
        energy_up: [S+1], the energy they carried up.
        energy_down: [S+1], the energy they carried down.
    """

    up: jax.Array
    down: jax.Array
    energy_up: jax.Array
    energy_down: jax.Array


@result(
    masks=dict.fromkeys(("measured_rate", "shell_errors", "total_error"), "defined"),
    units={"measured_rate": "|e|^2 per time"},
)
class ClosureError(NamedResult):
    """The predicted energy rates beside the measured ones.

    Attributes:
        measured_rate: [S], the change of the energies over the step; 0, as a
            placeholder, where the step is zero or not finite.
        shell_errors: [S], ``|predicted - measured|`` over the larger of both by
            absolute value: between 0 and 2, and 0 where both are 0.
        total_error: [], the norm of the differences over that of the measured rates; 0
            where both vanish, infinity where only the latter does.
        defined: [] bool, whether the step and all rates are finite and the step is not
            zero. If not, the errors are 0 as placeholders.
    """

    measured_rate: jax.Array
    shell_errors: jax.Array
    total_error: jax.Array
    defined: jax.Array


def closure_error(
    energy_rate: jax.typing.ArrayLike,
    energies_before: jax.typing.ArrayLike,
    energies_after: jax.typing.ArrayLike,
    elapsed: jax.typing.ArrayLike,
) -> ClosureError:
    """Compares the predicted energy rates with the change over a small step.

    A prediction made at the middle of the step agrees to second order in the step, one
    made at its start to first order.

    Args:
        energy_rate: [S], the predicted ``dE_a/dt``.
        energies_before: [S], the energies at the start of the step.
        energies_after: [S], at its end, of the same pairs as before.
        elapsed: [], the time between: effective time for a training run.

    Returns:
        Measured rates and relative errors.

    Raises:
        ValueError: If the shapes do not fit together or an array is not floating.

    References:
        Ours.
    """
    predicted = as_floating("energy_rate", energy_rate, [None])
    before = as_floating("energies_before", energies_before, predicted.shape)
    after = as_floating("energies_after", energies_after, predicted.shape)
    elapsed = as_scalar("elapsed", elapsed, predicted.dtype)
    moves = jnp.isfinite(elapsed) & (elapsed != 0)
    change = (after - before) / jnp.where(moves, elapsed, 1).astype(after.dtype)
    known = moves & jnp.all(jnp.isfinite(change))
    defined = known & jnp.all(jnp.isfinite(predicted))
    measured = jnp.where(known, change, 0)
    difference = jnp.where(defined, predicted - measured, 0)
    larger = jnp.maximum(jnp.abs(predicted), jnp.abs(measured))
    size, scale = norm(difference), norm(measured)
    beyond = jnp.where(size > 0, jnp.inf, 0).astype(size.dtype)
    return ClosureError(
        measured_rate=measured,
        shell_errors=ratio(jnp.abs(difference), jnp.where(defined, larger, 0)),
        total_error=jnp.where(scale > 0, ratio(size, scale), beyond),
        defined=defined,
    )


def edge_crossings(
    values_before: jax.typing.ArrayLike,
    values_after: jax.typing.ArrayLike,
    projections_after: jax.typing.ArrayLike,
    edges: jax.typing.ArrayLike,
    *,
    mask: jax.typing.ArrayLike | None = None,
) -> EdgeCrossings:
    r"""Counts the pairs that moved over fixed edges, and the energy they carried.

    With ``E_a`` the energy of the pairs inside the shell at each moment, and the change
    of ``g_i^2`` summed over the pairs that were in it before,

    .. math:: \Delta E_a = \sum_{i \in S_a} \Delta(g_i^2) + C_a - C_{a+1}, \qquad
              C = \texttt{energy\_up} - \texttt{energy\_down}

    exactly, with ``C_a`` that of the lower edge of shell a; a pair that passed several
    edges counts at each. As in `assign_shells`, a pair at an edge lies above it, at the
    last edge below it. If the ends are open, ignore the two outer edges.

    Args:
        values_before: [r], the eigenvalues before.
        values_after: [r], those of the same pairs after. On a generic path eigenvalues
            do not cross, so that descending order identifies the pairs.
        projections_after: [r], ``g_i`` after.
        edges: [S+1], the edges of the shells.
        mask: [r] bool, the pairs to follow. Default: all. Pairs with anything that is
            not finite are left out.

    Returns:
        Counts and energies, [S+1] each; NaN at an edge that is not finite.

    Raises:
        ValueError: If the shapes do not fit together or an array is not floating.

    References:
        Ours.
    """
    before = as_floating("values_before", values_before, [None])
    after = as_floating("values_after", values_after, before.shape)
    projections = as_floating("projections_after", projections_after, before.shape)
    edges = as_floating("edges", edges, [None])
    followed = as_mask("mask", mask, before.shape)
    for array in (before, after, projections):
        followed &= jnp.isfinite(array)
    check_at_least("len(edges)", edges.shape[0], 2)
    was_above, is_above = _above(before, edges), _above(after, edges)
    up = ~was_above & is_above & followed[None, :]
    down = was_above & ~is_above & followed[None, :]
    energies = jnp.square(jnp.where(followed, projections, 0))[None, :]
    known = jnp.isfinite(edges)
    return EdgeCrossings(
        up=jnp.sum(up, axis=1, dtype=jnp.int32),
        down=jnp.sum(down, axis=1, dtype=jnp.int32),
        energy_up=_where_known(known, jnp.sum(jnp.where(up, energies, 0), axis=1)),
        energy_down=_where_known(known, jnp.sum(jnp.where(down, energies, 0), axis=1)),
    )


def _where_known(known: jax.Array, energies: jax.Array) -> jax.Array:
    return jnp.where(known, energies, jnp.nan)


def _above(values: jax.Array, edges: jax.Array) -> jax.Array:
    """Returns [S+1, r], which values lie above which edge; the last shell is closed."""
    edges = edges.astype(values.dtype)
    return jnp.concatenate(
        [
            values[None, :] >= edges[:-1, None],
            values[None, :] > edges[-1:, None],
        ]
    )
