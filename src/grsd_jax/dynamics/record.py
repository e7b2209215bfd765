"""One record of the shell dynamics, computed from a snapshot.

Every derivative is taken along the snapshot's direction. If the direction is the
gradient flow, time is that of the flow: the effective time of a training run with small
steps.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from grsd_jax._arrays import all_finite, matmul, ratio
from grsd_jax._typing import PyTree
from grsd_jax.dynamics.balance import ShellDynamics, eigenvalue_drift, shell_dynamics
from grsd_jax.dynamics.closure import (
    ClosureError,
    EdgeCrossings,
    closure_error,
    edge_crossings,
)
from grsd_jax.dynamics.snapshot import Snapshot
from grsd_jax.dynamics.velocity import VelocityFit, velocity_fit
from grsd_jax.linalg.ritz import RitzPairs
from grsd_jax.results import result
from grsd_jax.shells.binning import Shells, assign_shells, log_shells

#: Changes over the measured step, over the cube root of eps: of theta, and of e and M.
_BEND_PARAMS, _BEND_ERROR = 0.2, 20.0


@result()
class ProbeState(NamedTuple):
    """What a probe remembers from one record to the next, of constant size.

    Attributes:
        last_step: [] int32, the step of the last record, -1 before the first.
        active: [] bool, whether the probe still measures.
        effective_time: [], tau at ``last_step``.
        edges: ``[S + 1]``, the edges of the shells; zeros until they are known.
        values: ``[r]``, the eigenvalues of the last record.
        resolved: ``[r]`` bool, which of them were resolved.
        basis: The last eigenvectors ``[n, r]``, which save Lanczos products; ``{}``
            with the dense solver.
        key_data: The key, as plain numbers that any checkpoint can hold.
    """

    last_step: jax.Array
    active: jax.Array
    effective_time: jax.Array
    edges: jax.Array
    values: jax.Array
    resolved: jax.Array
    basis: PyTree
    key_data: jax.Array


@result()
class ProbeRecord(NamedTuple):
    """The shell dynamics at one step of a training.

    Index 0 is the shell of the smallest values. The shells at both ends are open: they
    also hold what lies beyond their outer edge. Only resolved pairs are in shells.

    Attributes:
        effective_time: [], tau.
        finite: [] bool, whether everything that was measured is finite. If not, the
            rest is of no use, and the probe has stopped.
        num_resolved: [] int32, resolved pairs.
        total_energy: [], ``|e|^2``.
        shells: The shells, with the pairs in each.
        dynamics: Energies, dissipation, transfers, flux, velocity, and what is left
            unresolved.
        velocity_fit: The fit of ``v = c lambda^p``, with the interval of p.
        closure: The predicted rates of the energies beside those measured over a small
            step of the flow, of the same pairs in order.
        crossings: Resolved pairs that passed the inner edges since the last record.
        values: ``[num_values]``, the leading eigenvalues.
        drift: ``[num_values]``, ``d lambda_i / dt``.
        step: The step.
        num_columns: Columns that were multiplied by M, those of the small step
            included; 0 with the dense solver.
        seconds: Wall time of the record. The first one of a process compiles.
        gradient_seconds: The part of it spent on the gradient of the loss on the
            probe's batches; NaN if the caller gave the direction.
        cost: ``seconds / gradient_seconds``.
        cost_in_steps: ``seconds`` in units of a training step; NaN if ``step_seconds``
            was not given.
        coupled: Whether the examples are coupled, so that products are taken plainly;
            None if that was not checked (many outputs).
    """

    effective_time: jax.Array
    finite: jax.Array
    num_resolved: jax.Array
    total_energy: jax.Array
    shells: Shells
    dynamics: ShellDynamics
    velocity_fit: VelocityFit
    closure: ClosureError
    crossings: EdgeCrossings
    values: jax.Array
    drift: jax.Array
    step: int = 0
    num_columns: int = 0
    seconds: float = 0.0
    gradient_seconds: float = 0.0
    cost: float = 0.0
    cost_in_steps: float = 0.0
    coupled: bool | None = None


@partial(jax.jit, static_argnames=("num_shells", "headroom"))
def first_edges(pairs: RitzPairs, *, num_shells: int, headroom: float) -> jax.Array:
    """Cuts the resolved values, and the room above them, into shells.

    Args:
        pairs: The pairs.
        num_shells: S.
        headroom: The factor between the largest value and the last edge.

    Returns:
        ``[S + 1]`` edges.
    """
    values = jnp.append(pairs.values, headroom * pairs.values[0])
    mask = jnp.append(pairs.resolved, jnp.any(pairs.resolved))
    return log_shells(values, num_shells, mask=mask).edges


@jax.jit
def order_energies(moved: Snapshot, snapshot: Snapshot, edges: jax.Array) -> jax.Array:
    """Sums the energies of ``moved`` over the shells that ``snapshot`` has.

    Eigenvalues of a generic path do not cross, so the i-th of a point nearby continues
    the i-th, whichever side of an edge it has come to lie on.

    Args:
        moved: The snapshot at a point nearby.
        snapshot: The snapshot whose pairs lie in the shells.
        edges: ``[S + 1]``, the edges of the shells.

    Returns:
        ``[S]`` energies.
    """
    energies = _project(moved, moved.error) ** 2
    index = _shells(snapshot.pairs, edges).index[: len(energies)]
    shells = jnp.arange(len(edges) - 1, dtype=jnp.int32)
    return jnp.sum(jnp.where(shells[:, None] == index[None], energies[None], 0), axis=1)


@jax.jit
def straight_step(snapshot: Snapshot, params: PyTree, direction: PyTree) -> jax.Array:
    """Returns a relative step ``h |d| / |theta|`` within which the flow is straight.

    Over a smaller step the change drowns in the rounding of the eigenvectors; over a
    larger one the flow bends, the sooner the faster the error and M move.

    Args:
        snapshot: Pairs, errors and their motion.
        params: Parameters theta.
        direction: The tangent d.

    Returns:
        [], positive and finite.
    """
    pairs, norm = snapshot.pairs, jnp.linalg.norm
    small = float(jnp.finfo(pairs.values.dtype).eps) ** (1 / 3)
    size, speed = (
        jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))
        for tree in (params, direction)
    )
    rates = (
        ratio(speed, size) * (_BEND_ERROR / _BEND_PARAMS),
        ratio(norm(snapshot.error_rate), norm(snapshot.error)),
        ratio(norm(snapshot.coupling), norm(pairs.values)),
    )
    fastest = jnp.max(jnp.stack([rate.astype(pairs.values.dtype) for rate in rates]))
    relative = _BEND_ERROR * small * ratio(ratio(speed, size), fastest)
    usable = jnp.isfinite(relative) & (relative > 0)
    return jnp.where(usable, relative, _BEND_PARAMS * small)


@partial(jax.jit, static_argnames=("num_values", "num_bootstrap"))
def transport_record(
    snapshot: Snapshot,
    edges: jax.Array,
    effective_time: jax.Array,
    earlier: tuple[jax.Array, jax.Array],
    measured_rate: jax.Array,
    key: jax.Array,
    *,
    num_values: int,
    num_bootstrap: int,
) -> ProbeRecord:
    """Returns the record of a snapshot.

    Args:
        snapshot: Pairs, errors and their motion.
        edges: ``[S + 1]``, the edges of the shells.
        effective_time: [], tau.
        earlier: Values and resolved mask of the record before, ``[r]`` each.
        measured_rate: ``[S]``, the measured ``dE_a/dt``.
        key: Consumed for the bootstrap of the exponent.
        num_values: Leading eigenvalues to keep.
        num_bootstrap: Resamples of the bootstrap.

    Returns:
        The record, without its step and its cost.
    """
    pairs, error, error_rate = snapshot.pairs, snapshot.error, snapshot.error_rate
    shells = _shells(pairs, edges)
    projections = _project(snapshot, error)
    total_energy = matmul(error, error)
    dynamics = shell_dynamics(
        pairs.values,
        projections,
        snapshot.coupling,
        shells,
        rate_projections=_project(snapshot, error_rate),
        total_energy=total_energy,
        total_dissipation=-2 * matmul(error, error_rate),
    )
    fit = velocity_fit(
        edges[1:-1],
        dynamics.velocity,
        dynamics.velocity_mask,
        num_bootstrap=num_bootstrap,
        key=key,
    )
    # Both are rates: a step of length one that starts from zero energy.
    closure = closure_error(
        dynamics.energy_rate, jnp.zeros_like(measured_rate), measured_rate, 1.0
    )
    before, was_resolved = earlier
    followed = slice(0, len(before))
    crossings = edge_crossings(
        before,
        pairs.values[followed],
        projections[followed],
        edges.at[0].set(-jnp.inf).at[-1].set(jnp.inf),  # the shells' ends are open
        mask=was_resolved & pairs.resolved[followed],
    )
    crossings = jax.tree.map(lambda counted: counted[1:-1], crossings)
    return ProbeRecord(
        effective_time=effective_time,
        finite=dynamics.finite & closure.defined & all_finite((error, error_rate)),
        num_resolved=jnp.sum(pairs.resolved, dtype=jnp.int32),
        total_energy=total_energy,
        shells=shells._replace(index=shells.index[followed]),
        dynamics=dynamics,
        velocity_fit=fit,
        closure=closure,
        crossings=crossings,
        values=pairs.values[:num_values],
        drift=eigenvalue_drift(snapshot.coupling)[:num_values],
    )


def empty_record(
    edges: jax.Array,
    effective_time: jax.Array,
    *,
    num_pairs: int,
    num_values: int,
    num_bootstrap: int,
) -> ProbeRecord:
    """Returns the record of parameters that cannot be measured: NaN, and not finite.

    Args:
        edges: ``[S + 1]``, the edges of the shells.
        effective_time: [], tau.
        num_pairs: r.
        num_values: Leading eigenvalues that a record holds.
        num_bootstrap: As in the other records.

    Returns:
        The record, of the shapes and dtypes of any other.
    """
    square = jnp.full((num_pairs, num_pairs), jnp.nan, edges.dtype)
    column, mask = square[0], jnp.zeros(num_pairs, bool)
    record = transport_record(
        Snapshot(RitzPairs(column, square, column, mask), square, column, column, 0),
        edges,
        effective_time,
        (column, mask),
        jnp.full(len(edges) - 1, jnp.nan, edges.dtype),
        jax.random.key(0),
        num_values=num_values,
        num_bootstrap=num_bootstrap,
    )

    def blank_out(leaf: jax.Array) -> jax.Array:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.full_like(leaf, jnp.nan) if floating else leaf

    blank = jax.tree.map(blank_out, record)
    shells = blank.shells._replace(edges=edges)
    return blank._replace(shells=shells, effective_time=effective_time)


def _shells(pairs: RitzPairs, edges: jax.Array) -> Shells:
    return assign_shells(pairs.values, edges, mask=pairs.resolved, open_ends=True)


def _project(snapshot: Snapshot, vector: jax.Array) -> jax.Array:
    return matmul(snapshot.pairs.vectors.T, vector)
