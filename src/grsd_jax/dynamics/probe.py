"""A probe of the shell dynamics for any training loop.

The probe is built once, from a problem and static options. `Probe.init` makes its
state, a pytree of arrays of constant size that belongs in the checkpoint.
`Probe.update` takes the parameters and returns a record at the steps asked for. It
never raises because of what training does, never changes the parameters, and compiles
its programs once for the whole run.
"""

import dataclasses
import operator
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import all_finite
from grsd_jax._checks import (
    check_at_least,
    check_batches,
    check_choice,
    check_not_negative,
    check_positive,
    check_type,
)
from grsd_jax._typing import PyTree
from grsd_jax.dynamics.flow import effective_time
from grsd_jax.dynamics.record import (
    ProbeRecord,
    ProbeState,
    empty_record,
    first_edges,
    order_energies,
    straight_step,
    transport_record,
)
from grsd_jax.dynamics.snapshot import Finder, take_snapshot
from grsd_jax.jacobian.plan import check_independent, verdict_of
from grsd_jax.kernel.dense import check_dense_fits
from grsd_jax.kernel.derivative import central_difference, gradient_flow_direction
from grsd_jax.kernel.solver import Lanczos, solver_at
from grsd_jax.problem import Point, Problem, check_digits
from grsd_jax.shells.options import Binning, Window

Schedule = Callable[[Any], Any]

#: Largest residual at which Lanczos stops, relative to the value. The measured change
#: is a difference, which enlarges errors.
_CONVERGENCE = 1e-5

#: The factor between the first record's largest eigenvalue and the last edge: spectra
#: grow in training.
_HEADROOM = 10.0

#: Leading eigenvalues that a record holds.
_NUM_VALUES = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """What `make_probe` returns: `init`, then `update` in the loop.

    Attributes:
        problem: The problem that is measured.
        finder: How the pairs are found.

    The other attributes are the arguments of `make_probe`.
    """

    problem: Problem
    every: int
    solver: Literal["auto", "dense", "lanczos"]
    finder: Finder
    shells: Binning
    edges: tuple[float, ...] | None
    schedule: Schedule
    closure_step: float | None

    def init(
        self, key: jax.Array, params: PyTree, *, problem: Problem | None = None
    ) -> ProbeState:
        """Returns the state before the first record.

        Args:
            key: Consumed for start blocks and resamples.
            params: Parameters, for shapes and for the choice of the solver.
            problem: As for `update`.

        Returns:
            The state.

        Raises:
            ValueError: If a shape, dtype, leading axis, target or choice does not fit,
                or the examples are coupled and the solver is dense.
        """
        point = (problem or self.problem).at(params)
        check_digits(point.error.dtype)
        size, dtype = point.dimension, point.error.dtype
        num_pairs = size
        if self.finder.window.num_pairs is not None:
            num_pairs = min(self.finder.window.num_pairs, size)
        solver = self.solver
        if solver == "dense":
            check_dense_fits(point, extra=3)  # Mdot, V, and Mdot in its terms
            check_independent(point)
        if solver == "auto":
            # Leading pairs converge within about four times as many columns.
            solver = solver_at(point, min(4 * num_pairs, size))
        basis, num_values = {}, size
        if solver == "lanczos":
            num_values = num_pairs
            basis = {"vectors": jnp.zeros((size, num_pairs), dtype)}
        num_edges = self._num_shells + 1
        edges = np.zeros(num_edges) if self.edges is None else self.edges
        return ProbeState(
            last_step=jnp.int32(-1),
            active=jnp.bool_(True),
            effective_time=jnp.zeros((), dtype),
            edges=jnp.asarray(edges, dtype),
            values=jnp.zeros(num_values, dtype),
            resolved=jnp.zeros(num_values, bool),
            basis=basis,
            key_data=jax.random.bits(key, (2,), jnp.uint32),
        )

    def update(
        self,
        state: ProbeState,
        params: PyTree,
        step: int,
        *,
        direction: PyTree | None = None,
        problem: Problem | None = None,
        step_seconds: float = float("nan"),
    ) -> tuple[ProbeState, ProbeRecord | None]:
        """Returns a record of the shell dynamics if one is due.

        A record is due if ``step`` is a multiple of ``every`` and lies after the last
        record's. If its numbers are not finite, ``finite`` is False and it is the last;
        later calls do nothing.

        Args:
            state: The state.
            params: Parameters. They are only read.
            step: The steps done, an integer whose value is at hand.
            direction: The tangent d, a tree like ``params``; minus the gradient of the
                problem's loss if None. Pass an optimiser's update over its learning
                rate for the motion that it causes.
            problem: In place of the probe's, for a network whose other state
                (BatchNorm statistics) changes; make it by ``probe.problem.replace``, so
                that nothing is traced again.
            step_seconds: Seconds of a training step, for the record's cost in steps;
                NaN if it is not known.

        Returns:
            The new state, and the record; the old state and None if none is due.

        Raises:
            ValueError: If a shape, tree, dtype, leading axis or target does not fit,
                there is neither a direction nor a loss, or a number is out of range.
        """
        step = _concrete_step(step)
        if not np.isnan(step_seconds):
            check_positive("step_seconds", step_seconds)
        if step % self.every or step <= int(state.last_step) or not bool(state.active):
            return state, None
        started = time.perf_counter()
        problem = problem or self.problem
        gradient_seconds = float("nan")
        if direction is None:
            direction = gradient_flow_direction(problem, params)
            jax.block_until_ready(direction)
            gradient_seconds = time.perf_counter() - started
        point = problem.at(params, direction)
        state = state._replace(effective_time=self._effective_time(state, step))
        if bool(all_finite((point.params, point.direction))):
            moved, record = self._measure(state, point, step)
            state = moved if record.finite else state
        else:
            num_values = len(state.values)
            with jax.debug_nans(False):
                record = empty_record(
                    state.edges,
                    state.effective_time,
                    num_pairs=num_values,
                    num_values=min(_NUM_VALUES, num_values),
                    num_bootstrap=self.shells.num_bootstrap,
                )
        record = jax.device_get(record)
        state = state._replace(
            last_step=jnp.int32(step), active=jnp.bool_(record.finite)
        )
        seconds = time.perf_counter() - started
        return state, record._replace(
            step=step,
            num_columns=int(record.num_columns),
            seconds=seconds,
            gradient_seconds=gradient_seconds,
            cost=seconds / gradient_seconds,
            cost_in_steps=seconds / step_seconds,
            coupled=verdict_of(point).coupled,
        )

    @property
    def _num_shells(self) -> int:
        return self.shells.num_shells if self.edges is None else len(self.edges) - 1

    def _measure(
        self, state: ProbeState, point: Point, step: int
    ) -> tuple[ProbeState, ProbeRecord]:
        """Takes the snapshots and puts the record together."""
        key = jax.random.wrap_key_data(state.key_data, impl="threefry2x32")
        keys = jax.random.split(jax.random.fold_in(key, step), 3)
        again = state.last_step >= 0
        snapshot = take_snapshot(
            point, state.basis, self.finder, warm=again, key=keys[0]
        )
        known = again if self.edges is None else True
        fresh = first_edges(
            snapshot.pairs, num_shells=self._num_shells, headroom=_HEADROOM
        )
        edges = jnp.where(known, state.edges, fresh)
        size, basis = len(state.values), {}
        if state.basis:
            basis = {"vectors": snapshot.pairs.vectors[:, :size]}
        num_columns = snapshot.num_columns

        def energies(p: PyTree) -> jax.Array:
            nonlocal num_columns
            still = dataclasses.replace(point, params=p, direction=None)
            moved = take_snapshot(still, basis, self.finder, warm=True, key=keys[1])
            num_columns += moved.num_columns
            return order_energies(moved, snapshot, edges)

        small = self.closure_step
        if small is None:
            small = float(straight_step(snapshot, point.params, point.direction))
        measured = central_difference(
            energies, point.params, point.direction, step=small
        )
        with jax.debug_nans(False):  # what is undefined is NaN by contract
            record = transport_record(
                snapshot,
                edges,
                state.effective_time,
                (state.values, state.resolved),
                measured,
                keys[2],
                num_values=min(_NUM_VALUES, size),
                num_bootstrap=self.shells.num_bootstrap,
            )
        state = state._replace(
            edges=edges,
            values=snapshot.pairs.values[:size],
            resolved=snapshot.pairs.resolved[:size],
            basis=basis,
        )
        return state, record._replace(num_columns=num_columns)

    def _effective_time(self, state: ProbeState, step: int) -> jax.Array:
        """Returns tau at the step, from that of the last record."""
        first = max(int(state.last_step), 0)
        # The first record asks for as many steps as the others: one program for all.
        num_steps = max(step - first, self.every)
        passed = effective_time(self.schedule, num_steps, first_step=first)
        more = np.asarray(passed)[step - first]
        return state.effective_time + more.astype(state.effective_time.dtype)


def make_probe(
    problem: Problem,
    *,
    every: int,
    solver: Literal["auto", "dense", "lanczos"] = "auto",
    window: Window = Window(num_pairs=64, tolerance=0.01),
    shells: Binning = Binning(num_bootstrap=200),
    edges: Sequence[float] | None = None,
    schedule: Schedule | float = 1.0,
    closure_step: float | None = None,
) -> Probe:
    """Makes a probe of the shell dynamics for a training loop.

    With the dense solver a record costs one kernel with its derivative and two more
    kernels for the measured change; with Lanczos, about three times its products. A few
    matrices of ``[n, r]`` are held during a measurement, and at most one between
    records.

    Args:
        problem: The problem to measure, the same batches for the whole run: one
            evaluation set of ``n = K N C`` errors, whose reduction must be ``"stack"``.
            Examples must be independent for the dense solver. Without a loss every
            `Probe.update` needs a direction.
        every: Steps between two records.
        solver: ``"dense"`` for all n pairs, ``"lanczos"`` for the leading
            ``window.num_pairs``, ``"auto"`` for the cheaper.
        window: Which pairs are used. The default tolerance is tighter than that of
            other measurements: in float32 the smallest pairs' vectors turn to noise
            before their values do.
        shells: Shells S, and resamples behind the interval of the exponent.
        edges: ``[S + 1]`` increasing edges of the shells, in place of
            ``shells.num_shells``. If None, S shells of equal width in the logarithm,
            from the smallest resolved eigenvalue of the first record to ten times its
            largest; they stay for the run.
        schedule: The learning rate, a number or ``schedule(step)`` as optax makes it;
            the effective time is its sum over the steps done.
        closure_step: Relative step ``h |d| / |theta|`` of the measured change; if None,
            one over which neither the parameters, the error nor M change much: by at
            most a thousandth, a tenth and a tenth in float32.

    Returns:
        The probe.

    Raises:
        ValueError: If an option is out of range, the reduction is not ``"stack"``, or
            the batches do not share leading axes.

    References:
        Paper 2.2, 3.3 and A.2; the probe is ours.
    """
    check_batches(problem.batches)
    check_choice("problem.reduction", problem.reduction, ("stack",))
    check_choice("solver", solver, ("auto", "dense", "lanczos"))
    check_at_least("every", every, 1)
    check_type("window", window, Window)
    check_type("shells", shells, Binning)
    check_at_least("num_shells", shells.num_shells, 2)
    if closure_step is not None:
        check_positive("closure_step", closure_step)
    if not callable(schedule):
        rate = np.asarray(schedule).tolist()
        check_not_negative("schedule", rate)
        schedule = partial(_constant, float(rate))
    return Probe(
        problem=problem,
        every=every,
        solver=solver,
        finder=Finder(window, Lanczos().block_size, _CONVERGENCE),
        shells=shells,
        edges=None if edges is None else _checked_edges(edges),
        schedule=schedule,
        closure_step=closure_step,
    )


def _constant(rate: float, step: Any) -> jax.Array:
    return jnp.full(jnp.shape(step), rate)


def _concrete_step(step: Any) -> int:
    """Returns the step as an integer, after checking that it is one."""
    try:
        return operator.index(step)
    except TypeError:
        raise ValueError(
            f"step: expected an integer whose value is at hand, got {step!r}."
        ) from None


def _checked_edges(edges: Sequence[float]) -> tuple[float, ...]:
    """Returns the edges, after checking that they are positive and increase."""
    try:
        array = np.asarray(edges, np.float64)
    except (TypeError, ValueError):
        array = np.zeros(0)
    if array.ndim != 1 or len(array) < 3 or not np.all(np.diff(array) > 0):
        raise ValueError(
            f"edges: expected at least 3 increasing numbers, got {edges!r}."
        )
    check_positive("edges[0]", float(array[0]))
    check_positive("edges[-1]", float(array[-1]))
    return tuple(float(edge) for edge in array)
