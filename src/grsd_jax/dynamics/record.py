"""What a probe remembers between its records, and what a record says."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import all_finite, blank_like
from grsd_jax._typing import PyTree
from grsd_jax.dynamics.elapsed_time import MeasuredTime
from grsd_jax.dynamics.instantaneous import InstantRecord
from grsd_jax.dynamics.transport import ExactBalance
from grsd_jax.results import NamedResult, headline, number, result


@result()
class ProbeState(NamedResult):
    """What a probe remembers, of constant size: plain arrays for any checkpoint.

    Attributes:
        last_step: [] int32, the last step that was looked at, -1 before the first.
        start_step: [] int32, the last of them that is a multiple of ``every``, where
            the next balances begin; -1 before the first.
        active: [] bool, whether the probe still measures.
        effective_time: [], tau at ``start_step``, of no meaning unless ``timed``.
        timed: [] bool, whether all times so far have a meaning.
        edges: [q], the edges of the shells; ones until they are known.
        fingerprint: [2] uint32, of the examples and targets, in their order, and of the
            name of the loss.
        start: Copies of the parameters at ``start_step``, and of what else the problem
            held then, as lists of arrays.
        snapshot: With the dense solver, the `SpectralSnapshot` at ``start_step``, which
            saves its kernel; else ``{}``.
        instant: What one instantaneous record leaves to the next; ``{}`` without them.
        key_data: [2] uint32, the key, as plain numbers.
    """

    last_step: jax.Array
    start_step: jax.Array
    active: jax.Array
    effective_time: jax.Array
    timed: jax.Array
    edges: jax.Array
    fingerprint: jax.Array
    start: dict[str, list[jax.Array]]
    snapshot: PyTree
    instant: PyTree
    key_data: jax.Array


@result(
    masks={
        "balance": "measured",
        "effective_time": "timed",
        "values": "measured",
        "measured_time": "measured",
    },
    units={"values": "units of M", "seconds": "s", "gradient_seconds": "s"},
)
class ProbeRecord(NamedResult):
    """What happened to the shells between two steps of a training.

    `Probe.record`, inside of `jit`, makes no NaN: what is undefined is 0 there, and
    `measured` and ``timed`` say so. Text, tables and `Probe.update` have NaN.

    Attributes:
        balance: The exact balance between both steps; None before there are two.
        start_step: [] int32, the step at which it begins.
        step: [] int32, the step at which it ends.
        effective_time: [], tau at its end: the sum of the times between records; NaN
            after a measured time without a meaning.
        timed: [] bool, whether it is known.
        finite: [] bool, whether the parameters and all amounts are finite. If not, the
            rest is of no use, and the probe has stopped.
        num_resolved: [] int32, the edges whose flux exceeds its error.
        values: ``[num_values]``, the leading eigenvalues at the end; from Krylov steps
            the leading Ritz values, which are those that the errors see.
        measured_time: The time between both ends by two gradients, with the field that
            says whether it has a meaning; None with a schedule, or without a loss.
        due: [] bool, whether there is a record; always so from `Probe.update`. If not,
            no number means anything.
        instantaneous: The rates at the end, if they were asked for.
        num_columns: Columns that were multiplied by M; 0 with the dense solver.
        seconds: Wall time of the record. The first one of a process compiles.
        gradient_seconds: The part of it spent on one gradient of the loss on the
            probe's batches; NaN without a loss.
        cost: ``seconds / gradient_seconds``.
        cost_in_steps: ``seconds`` in units of a training step; NaN if ``step_seconds``
            was not given.
        coupled: Whether the examples are coupled, so that products are taken plainly;
            None if that was not checked (many outputs).

    What follows ``instantaneous`` comes from `Probe.update` alone, else None.
    """

    balance: ExactBalance | None
    start_step: jax.Array | int
    step: jax.Array | int
    effective_time: jax.Array
    timed: jax.Array
    finite: jax.Array
    num_resolved: jax.Array
    values: jax.Array
    measured_time: MeasuredTime | None
    due: jax.Array | bool
    instantaneous: InstantRecord | None = None
    num_columns: int | None = None
    seconds: float | None = None
    gradient_seconds: float | None = None
    cost: float | None = None
    cost_in_steps: float | None = None
    coupled: bool | None = None

    @property
    def measured(self) -> jax.Array:
        """Whether there is a record whose numbers mean something, [] bool."""
        return jnp.logical_and(self.due, self.finite)

    def _headline(self) -> list[tuple[str, str]]:
        rows = [
            ("training steps", f"{int(self.start_step)} to {int(self.step)}"),
            ("effective time at the end", number(self.effective_time)),
            ("finite", str(bool(self.finite))),
        ]
        if self.balance is not None:
            rows += headline(self.balance)
        if self.seconds is not None:
            known = {"gradients": self.cost, "training steps": self.cost_in_steps}
            costs = [
                f"{number(cost, 3)} {unit}"
                for unit, cost in known.items()
                if cost is not None and np.isfinite(cost)
            ]
            rows.append(("cost", ", ".join([f"{number(self.seconds, 3)} s", *costs])))
        return rows


class Found(NamedTuple):
    """What was found at a step.

    Attributes:
        balance: The balance since the start; None of a first look by itself.
        snapshot: Of the kernel now with the dense solver, else ``{}``.
        edges: [q], of the shells.
        values: Leading eigenvalues.
    """

    balance: ExactBalance | None
    snapshot: PyTree
    edges: jax.Array
    values: jax.Array


class Elapsed(NamedTuple):
    """The time since a start.

    Attributes:
        time: [], 0 if it is not known.
        known: [] bool.
        measured: How it was measured, if it was.
    """

    time: jax.Array
    known: jax.Array
    measured: MeasuredTime | None


@partial(jax.jit, static_argnames="every")
def concluded(
    state: ProbeState,
    contents: dict[str, list[jax.Array]],
    found: Found,
    elapsed: Elapsed,
    step: jax.Array,
    *,
    every: int,
) -> tuple[ProbeState, ProbeRecord]:
    """Returns the state after a record, and the record.

    Args:
        state: The state before.
        contents: Those of the problem and its parameters now.
        found: What was found.
        elapsed: The time since the start of the balance.
        step: [] int32, the step.
        every: Steps between records.

    Returns:
        The state and the record, as `Probe.record` gives them.
    """
    first = state.start_step < 0
    balance = found.balance
    finite = all_finite((contents["params"], found.values, found.snapshot))
    resolved = jnp.zeros((), bool)
    if balance is not None:
        finite &= balance.finite
        resolved = jnp.abs(balance.flux) > balance.flux_error
        resolved &= balance.converged & balance.known
    time, known, measured = elapsed
    if measured is not None:  # by a motion that there was not
        time, known = jnp.where(first, 0, time), known | first
    timed = state.timed & known
    record = ProbeRecord(
        # Where there was no start, what was compared with is of no meaning.
        balance=_where(first, blank_like(balance), balance),
        start_step=state.start_step,
        step=step,
        effective_time=state.effective_time + time,
        timed=timed,
        finite=finite,
        num_resolved=jnp.sum(resolved & ~first, dtype=jnp.int32),
        values=found.values,
        measured_time=_where(first, blank_like(measured), measured),
        due=~(first & finite),
    )
    whole = finite & (step % every == 0)
    begun = state._replace(
        start_step=step,
        effective_time=record.effective_time,
        timed=timed,
        edges=found.edges,
        start=contents,
        snapshot=found.snapshot,
    )
    later = _where(whole, begun, state)
    return later._replace(last_step=step, active=finite), record


@jax.jit
def stopped(state: ProbeState, step: jax.Array) -> ProbeState:
    """Returns the state of a probe that measures no more."""
    return state._replace(last_step=step, active=jnp.bool_(False))


def _where(chosen: jax.Array, one: Any, other: Any) -> Any:
    """Chooses between two trees of arrays, each leaf a new array."""
    return jax.tree.map(lambda a, b: jnp.where(chosen, a, b), one, other)
