"""A probe for any training loop, which records the exact balance of the shells.

The probe is built once, from a problem and static options. `Probe.init` makes its
state, a pytree of arrays of constant size that belongs in the checkpoint.
`Probe.update` takes the parameters and returns a record at the steps asked for;
`Probe.record` does the same inside of `jit`. Neither raises because of what training
does, changes the parameters, or compiles after the first records.
"""

import dataclasses
import operator
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import all_finite, blank_like
from grsd_jax._checks import (
    check_at_least,
    check_batches,
    check_choice,
    check_key,
    check_not_negative,
    check_positive,
    check_shape,
    check_type,
)
from grsd_jax._typing import PyTree
from grsd_jax.dynamics.between_ends import (
    KrylovSteps,
    balance_snapshots,
    balance_spaces,
    cheaper_solver,
    check_rational,
    krylov_space,
    krylov_spaces,
    leading_ritz_values,
)
from grsd_jax.dynamics.contents import (
    check_same_shapes,
    check_same_sizes,
    contents_of,
    point_of,
)
from grsd_jax.dynamics.elapsed_time import time_between, time_or_zero
from grsd_jax.dynamics.fingerprint import fingerprint
from grsd_jax.dynamics.flow import rate_at
from grsd_jax.dynamics.instantaneous import (
    Instantaneous,
    empty_record,
    first_state,
    measure_instant,
)
from grsd_jax.dynamics.record import (
    Elapsed,
    Found,
    ProbeRecord,
    ProbeState,
    concluded,
    stopped,
)
from grsd_jax.dynamics.spectra import (
    SpectralSnapshot,
    dense_snapshot,
    errors_at,
    stacked_point,
)
from grsd_jax.jacobian.plan import check_independent, verdict_of
from grsd_jax.kernel.dense import check_dense_fits
from grsd_jax.kernel.derivative import flow_at, usable_step
from grsd_jax.kernel.solver import solver_at
from grsd_jax.objective import moving_part
from grsd_jax.problem import Point, Problem, check_problem, point_at
from grsd_jax.results import with_undefined
from grsd_jax.shells.soft_shells import SoftShells

Schedule = Callable[[Any], Any]

#: Where the outer edges lie that are not given, over the first record's largest
#: eigenvalue: spectra grow in training, and float32 resolves some four decades.
_LOWEST, _HEADROOM = 1e-4, 10.0

#: How Lanczos runs if it is chosen: a velocity says little without its null.
_STEPS = KrylovSteps(num_probes=4)

#: The width of shells that are given by their number.
_WIDTH = 1 / 2

#: Leading eigenvalues that a record holds.
_NUM_VALUES = 32


class _Look(NamedTuple):
    """What a probe sees at a step.

    Attributes:
        state: What it remembers.
        point: The problem at the parameters.
        flow: The direction of the gradient flow there, None if time is not measured.
        data: The fingerprint of the batches.
        step: [] int32, the training step.
    """

    state: ProbeState
    point: Point
    flow: PyTree | None
    data: jax.Array
    step: jax.Array

    @property
    def key(self) -> jax.Array:
        """The key of all that is random at this step."""
        key = jax.random.wrap_key_data(self.state.key_data, impl="threefry2x32")
        return jax.random.split(jax.random.fold_in(key, self.step))[0]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """What `make_probe` returns: `init`, then `update` or `record` in the loop.

    Attributes:
        problem: The problem that is measured.

    The other attributes are the arguments of `make_probe`.
    """

    problem: Problem
    every: int
    over: tuple[int, ...]
    solver: Literal["auto", "dense"] | KrylovSteps
    shells: SoftShells | int
    schedule: Schedule | None
    instantaneous: Instantaneous | None

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
                the examples are coupled and the solver is dense, or records are
                instantaneous, which takes a small step, and a parameter is of less
                than single precision.
        """
        check_key(key)
        problem = problem or self.problem
        point = stacked_point(problem, params)
        size, dtype = point.dimension, point.error.dtype
        solver = self.solver
        if solver == "auto":
            solver = cheaper_solver(point, self._width, self._steps)
        snapshot: PyTree = {}
        data = fingerprint(problem)
        if solver == "dense":
            check_dense_fits(point, extra=3)  # V of both ends, and their overlap
            check_independent(point)
            vectors = jnp.zeros((size, size), dtype)
            zeros = [jnp.zeros(shape, dtype) for shape in (size, size, ())]
            own = jnp.array(data, copy=True)  # no buffer can be donated twice
            rest = zeros[1], own, zeros[2], jnp.bool_(True)
            snapshot = SpectralSnapshot(zeros[0], vectors, *rest)
        if isinstance(self.shells, SoftShells):
            edges = self.shells.checked(dtype).edges
        else:
            edges = jnp.ones(self._num_edges, dtype)
        return ProbeState(
            last_step=jnp.int32(-1),
            start_step=jnp.int32(-1),
            active=jnp.bool_(True),
            effective_time=jnp.zeros((), dtype),
            timed=jnp.bool_(True),
            edges=jnp.array(edges, copy=True),
            fingerprint=data,
            start=jax.tree.map(partial(jnp.array, copy=True), contents_of(point)),
            snapshot=snapshot,
            instant=self._first_instant(point),
            key_data=jax.random.bits(key, (2,), jnp.uint32),
        )

    def record(
        self,
        state: ProbeState,
        params: PyTree,
        step: jax.typing.ArrayLike,
        *,
        problem: Problem | None = None,
    ) -> tuple[ProbeState, ProbeRecord]:
        """Returns what `update` does, as a pure function for jitted loops.

        Nothing is read from the device and all shapes are fixed, so that it may stand
        in `jit`, in a `scan`, or in a branch. Where no record is due it costs nothing,
        and the record's ``due`` is False. On CPU convolutions are slow in it.

        Args:
            state: The state, of a probe with as many shells and the same solver.
            params: Parameters. They are only read.
            step: [] integer, the steps done.
            problem: As for `update`. Other examples are not refused: the balance's
                ``comparable`` is False.

        Returns:
            The new state, and the record.

        Raises:
            ValueError: If a shape, tree, dtype, leading axis or target does not fit,
                the state is that of other options, or the probe has instantaneous
                records, which read from the device.
        """
        if self.instantaneous is not None:
            raise ValueError(
                "record: expected a probe without instantaneous records, which only "
                "update takes, got one with them."
            )
        point = stacked_point(problem or self.problem, params)
        self._check_state(state, point)
        data = fingerprint(problem or self.problem)
        step = _traced_step(step)

        def taken(look: _Look) -> tuple[ProbeState, ProbeRecord]:
            measures = self.schedule is None and _has_loss(self.problem)
            flow = flow_at(look.point) if measures else None
            return self._measure(look._replace(flow=flow))

        def passed(look: _Look) -> tuple[ProbeState, ProbeRecord]:
            return look.state, blank_like(shapes)

        look = _Look(state, point, None, data, step)
        _, shapes = jax.eval_shape(taken, look)
        due = self._is_due(state.last_step, state.start_step, step) & state.active
        return jax.lax.cond(due, taken, passed, look)

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
        """Returns the record of what happened since an earlier step, if one is due.

        A record is due if ``step`` is a multiple of ``every``, and begins at the last
        multiple that the probe saw; or if it lies h steps after that, for an h of
        ``over``. The first multiple has no earlier one: it is remembered, and gives a
        record only if records are instantaneous too, or the parameters are not finite.
        After a record whose numbers are not finite, later calls do nothing.

        Args:
            state: The state, of a probe with as many shells and the same solver.
            params: Parameters. They are only read, and copied.
            step: The steps done, an integer whose value is at hand.
            direction: The tangent d of the instantaneous record, a tree like
                ``params``; minus the gradient of the problem's loss if None. Pass an
                optimizer's update over its learning rate for the motion that it causes.
            problem: In place of the probe's, for a network whose other state
                (BatchNorm statistics) changes; make it by ``probe.problem.replace``, so
                that nothing is traced again. Its batches must be the probe's.
            step_seconds: Seconds of a training step, for the record's cost in steps;
                NaN if it is not known.

        Returns:
            The new state, and the record; the old state and None if none is due.

        Raises:
            ValueError: If a shape, tree, dtype, leading axis or target does not fit,
                the state is that of other options, the examples or the loss are others
                than before, a direction is given or missing against the options, or a
                number is out of range.
        """
        step = _concrete_step(step)
        if not np.isnan(step_seconds):
            step_seconds = check_positive("step_seconds", step_seconds)
        if direction is not None and self.instantaneous is None:
            raise ValueError(
                "direction: expected None without instantaneous records, got one."
            )
        check_same_shapes("params", state.start["params"], moving_part(params))
        steps = int(state.last_step), int(state.start_step)
        if not (self._is_due(*steps, step) and bool(state.active)):
            return state, None
        # Training steps that are still under way are no part of what a record costs.
        jax.block_until_ready((params, problem))
        started = time.perf_counter()
        problem = problem or self.problem
        point, data = stacked_point(problem, params), fingerprint(problem)
        _check_same_examples(state, data)
        self._check_state(state, point)
        needs_flow = self.instantaneous is not None and direction is None
        flow, gradient_seconds = _timed_flow(problem, point, needs_flow)
        first = steps[1] < 0
        look = _Look(state, point, flow, data, jnp.int32(step))
        later, record = self._measure_on_host(look)
        if self.instantaneous is not None:
            moving = point_at(problem, params, flow if direction is None else direction)
            later, record = self._with_instant(state, later, record, moving)
        record = jax.device_get(record)
        if first:
            if record.finite and self.instantaneous is None:
                return later, None
            record = record._replace(balance=None, measured_time=None)
        seconds = time.perf_counter() - started
        record = record._replace(
            start_step=int(record.start_step),
            step=step,
            due=True,
            num_columns=self._num_columns(state, record),
            seconds=seconds,
            gradient_seconds=gradient_seconds,
            cost=seconds / gradient_seconds,
            cost_in_steps=seconds / step_seconds,
            coupled=verdict_of(point).coupled,
        )
        return later, with_undefined(record)

    @property
    def _width(self) -> float:
        return self.shells.width if isinstance(self.shells, SoftShells) else _WIDTH

    @property
    def _num_edges(self) -> int:
        given = self.shells
        return len(given.edges) if isinstance(given, SoftShells) else given - 1

    @property
    def _steps(self) -> KrylovSteps:
        """How Lanczos runs where the solver is not dense."""
        return self.solver if isinstance(self.solver, KrylovSteps) else _STEPS

    def _is_due(self, last: Any, start: Any, step: Any) -> Any:
        """Whether an active probe looks at a step; of integers or arrays."""
        due = step % self.every == 0
        for length in self.over:
            due = due | ((step - start == length) & (start >= 0))
        return due & (step > last)

    def _check_state(self, state: ProbeState, point: Point) -> None:
        """Raises ValueError unless sizes and options are those of the state."""
        check_same_sizes(state.start, point)
        own, found = self._num_edges, len(state.edges)
        if own != found:
            raise ValueError(
                f"shells: expected {found + 1} of them as at init, got {own + 1}."
            )
        began = "dense" if state.snapshot else "KrylovSteps"
        asked = "dense" if self.solver == "dense" else "KrylovSteps"
        if self.solver != "auto" and asked != began:
            raise ValueError(f"solver: expected {began} as at init, got {asked}.")
        if bool(state.instant) != (self.instantaneous is not None):
            began, asked = ("options", "None") if state.instant else ("None", "options")
            raise ValueError(
                f"instantaneous: expected {began} as at init, got {asked}."
            )
        if state.snapshot and len(state.snapshot.error) != point.dimension:
            wanted = len(state.snapshot.error)
            raise ValueError(
                f"problem: expected n = {wanted} as at init, got {point.dimension}."
            )

    def _first_instant(self, point: Point) -> PyTree:
        """Returns what the first instantaneous record finds; ``{}`` without them."""
        if self.instantaneous is None:
            return {}
        usable_step(point.params, self.instantaneous.closure_step)
        size, solver = point.dimension, self.solver
        num_pairs = self.instantaneous.num_pairs(size)
        if solver == "auto":
            # Leading pairs converge within about four times as many columns.
            solver = solver_at(point, min(4 * num_pairs, size))
        kept = None if solver == "dense" else num_pairs
        return first_state(size, point.error.dtype, kept)

    def _measure_on_host(self, look: _Look) -> tuple[ProbeState, ProbeRecord]:
        """Takes a record in the form that suits the backend, or says why it cannot."""
        if not bool(all_finite(look.point.params)):
            _, shapes = jax.eval_shape(self._measure, look)
            record = blank_like(shapes)._replace(start_step=look.state.start_step)
            return stopped(look.state, look.step), record
        if _scans_are_fast():
            return _measured(self, look)
        if int(look.state.start_step) < 0:
            return self._begin(look)
        return self._measure(look)

    def _begin(self, look: _Look) -> tuple[ProbeState, ProbeRecord]:
        """Takes the first look, from the host, where nothing lies before it.

        A program that is compiled as a whole takes the balance of the point with itself
        in its place: a second form of it would take longer to compile.
        """
        state, point = look.state, look.point
        elapsed = self._elapsed(look, point)
        if look.flow is not None and not self.schedule:  # there was no motion
            elapsed = Elapsed(jnp.zeros_like(elapsed.time), jnp.bool_(True), None)
        number = min(_NUM_VALUES, point.dimension)
        snapshot: PyTree = {}
        if state.snapshot:
            snapshot = dense_snapshot(point, look.data)
            values = snapshot.values[:number]
        else:
            run = krylov_space(point, errors_at(point), self._steps, look.key)
            values = leading_ritz_values(run, number=number)
        edges = self._shells(state, values[0]).edges
        return self._concluded(look, Found(None, snapshot, edges, values), elapsed)

    def _measure(self, look: _Look) -> tuple[ProbeState, ProbeRecord]:
        """Takes a record, with the flow at the point if time is measured by it."""
        start = point_of(look.state.start, look.point)
        elapsed = self._elapsed(look, start)
        return self._concluded(look, self._balance(look, start, elapsed.time), elapsed)

    def _concluded(
        self, look: _Look, found: Found, elapsed: Elapsed
    ) -> tuple[ProbeState, ProbeRecord]:
        """Returns the state after a look, and its record."""
        contents = contents_of(look.point)
        return concluded(
            look.state, contents, found, elapsed, look.step, every=self.every
        )

    def _balance(self, look: _Look, start: Point, elapsed: jax.Array) -> Found:
        """Finds both kernels' spectra, and the balance between them."""
        state, points = look.state, (start, look.point)
        number = min(_NUM_VALUES, look.point.dimension)
        if state.snapshot:
            now = dense_snapshot(look.point, look.data)
            shells = self._shells(state, now.values[0])
            balance = balance_snapshots(state.snapshot, now, shells, elapsed)
            return Found(balance, now, shells.edges, now.values[:number])
        spaces = krylov_spaces(points, self._steps, look.key)
        values = leading_ritz_values(spaces.after, number=number)
        shells = self._shells(state, values[0])
        same = jnp.all(state.fingerprint == look.data)
        balance = balance_spaces(spaces, shells, elapsed, same, steps=self._steps)
        return Found(balance, {}, shells.edges, values)

    def _shells(self, state: ProbeState, largest: jax.Array) -> SoftShells:
        """Returns the shells, those made at the first record if a number was given."""
        if isinstance(self.shells, SoftShells):
            return self.shells.checked(largest.dtype)
        return SoftShells(_edges_from(state, largest), width=self._width)

    def _elapsed(self, look: _Look, start: Point) -> Elapsed:
        """Returns the time since the start."""
        dtype = look.point.error.dtype
        if self.schedule is not None:
            time = _scheduled(look.state, look.step, schedule=self.schedule)
            known = jnp.isfinite(time) & (time >= 0)
            return Elapsed(jnp.where(known, time, 0).astype(dtype), known, None)
        if look.flow is None:
            return Elapsed(jnp.zeros((), dtype), jnp.bool_(False), None)
        ends = [start.params, look.point.params]
        measured = time_between(ends, [flow_at(start), look.flow])
        time = time_or_zero(measured).astype(dtype)
        return Elapsed(time, measured.meaningful, measured)

    def _with_instant(
        self, state: ProbeState, later: ProbeState, record: ProbeRecord, point: Point
    ) -> tuple[ProbeState, ProbeRecord]:
        """Adds the instantaneous record, on the host."""
        options = self.instantaneous
        assert options is not None
        edges = _with_ends(later.edges)
        first = int(state.last_step) < 0
        if bool(record.finite & all_finite(point.direction)):
            key = jax.random.wrap_key_data(state.key_data, impl="threefry2x32")
            key = jax.random.split(jax.random.fold_in(key, record.step))[1]
            left, instant = measure_instant(
                point, state.instant, edges, options, again=not first, key=key
            )
        else:
            left = state.instant
            num_pairs = len(left["values"])
            instant = empty_record(
                edges, num_pairs=num_pairs, num_bootstrap=options.num_bootstrap
            )
        record = record._replace(
            instantaneous=instant, finite=record.finite & instant.finite
        )
        if not bool(record.finite):
            return stopped(state, later.last_step), record
        return later._replace(instant=left), record

    def _num_columns(self, state: ProbeState, record: ProbeRecord) -> int:
        """Returns how many columns a record multiplied by M."""
        number, instant = 0, record.instantaneous
        if not state.snapshot and record.balance is None:
            number = self._steps.num_steps
        elif not state.snapshot:
            steps = self._steps
            number = steps.num_steps * (2 if steps.start == "both" else 1)
            number = 2 * (number + steps.num_steps * steps.num_probes)
        return number + (0 if instant is None else int(instant.num_columns))


def make_probe(
    problem: Problem,
    *,
    every: int,
    over: Sequence[int] = (),
    solver: Literal["auto", "dense"] | KrylovSteps = "auto",
    shells: SoftShells | int = 12,
    schedule: Schedule | float | None = None,
    instantaneous: bool | Instantaneous = False,
) -> Probe:
    """Makes a probe that records the exact balance in a training loop.

    A record is the `exact_balance` between two parameters of the run: between
    consecutive multiples of ``every``, and over the first h steps after each of them
    for every h of ``over``. With the dense solver it costs one kernel and its
    eigenpairs, since those of the earlier end are kept; with `KrylovSteps` the runs of
    both ends, at any n. Between records the probe holds one copy of the parameters, and
    with the dense solver one matrix ``[n, n]``.

    Args:
        problem: The problem to measure, the same batches for the whole run: one
            evaluation set of ``n = K N C`` errors, whose reduction must be ``"stack"``.
            Examples must be independent for the dense solver.
        every: Steps between two records.
        over: Numbers of steps h, each below ``every``, over which balances are taken
            besides.
        solver: ``"dense"`` for all n pairs, with the split of the flux and the counting
            velocity; `KrylovSteps` for any n; ``"auto"`` for the cheaper, with 4 random
            vectors behind the counting velocity.
        shells: The shells, which stay for the run: `SoftShells`, or a number S of soft
            shells of width 1/2 whose edges come from the first record. They are equal
            steps of the logarithm from a ten-thousandth of its largest eigenvalue to
            ten times as much, open at both ends.
        schedule: The effective time of a step, a number or ``schedule(step)`` as optax
            makes it: the learning rate, over ``1 - mu`` with momentum. From the first
            record on over which its sum is negative or not finite, the time is not
            known. If None, time is measured by two gradients of the problem's loss, see
            `measured_time`. What counts is the training loss; the loss on the probe's
            batches stands for it. Without a loss there is no time, and there are no
            velocities.
        instantaneous: Whether records have the rates of section "shell dynamics" too,
            of a step of the flow; or how.

    Returns:
        The probe.

    Raises:
        ValueError: If an option is out of range, the reduction is not ``"stack"``, the
            shells do not suit the solver, or the batches do not share leading axes.

    References:
        Ours; ``docs/what_moved.md``. Paper 2.2, 3.3 and A.2 for the rates.
    """
    check_problem(problem)
    check_batches(problem.batches)
    check_choice("problem.reduction", problem.reduction, ("stack",))
    every = check_at_least("every", every, 1)
    if not isinstance(solver, KrylovSteps):
        check_choice("solver", solver, ("auto", "dense"))
    if not isinstance(shells, SoftShells):
        shells = check_at_least("shells", shells, 2)
    elif isinstance(solver, KrylovSteps):
        check_rational(shells)
    if instantaneous is True:
        instantaneous = Instantaneous()
    if instantaneous is not False:
        check_type("instantaneous", instantaneous, Instantaneous)
    return Probe(
        problem=problem,
        every=every,
        over=_checked_lengths(over, every),
        solver=solver,
        shells=shells,
        schedule=_checked_schedule(schedule),
        instantaneous=instantaneous or None,
    )


@partial(jax.jit, static_argnames="probe")
def _measured(probe: Probe, look: _Look) -> tuple[ProbeState, ProbeRecord]:
    return probe._measure(look)


@partial(jax.jit, static_argnames="schedule")
def _scheduled(state: ProbeState, step: jax.Array, *, schedule: Schedule) -> jax.Array:
    """Returns the sum of the schedule over the steps since the start.

    Compensated: a million rates of 0.1, added one by one in float32, come out 1% off.
    """
    first = jnp.maximum(state.start_step, 0)

    def add(at: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        total, lost = sums
        rate = rate_at(schedule, at).astype(total.dtype) - lost
        later = total + rate
        lost = (later - total) - rate  # what the sum has rounded away
        return later, jnp.where(jnp.isfinite(later), lost, 0)

    zero = jnp.zeros((), jnp.result_type(float))
    return jax.lax.fori_loop(first, step, add, (zero, zero))[0]


@jax.jit
def _edges_from(state: ProbeState, largest: jax.Array) -> jax.Array:
    """Returns the edges that are known, or equal steps of the logarithm."""
    usable = jnp.isfinite(largest) & (largest > 0)
    number = len(state.edges) + 2
    steps = np.geomspace(_LOWEST, _HEADROOM, number)[1:-1]
    fresh = jnp.where(usable, largest, 1) * jnp.asarray(steps, largest.dtype)
    return jnp.where(state.start_step < 0, fresh, state.edges)


@jax.jit
def _with_ends(edges: jax.Array) -> jax.Array:
    """Returns the edges with outer ones a step away, ``[q + 2]``, for open shells."""
    if len(edges) == 1:
        return edges[0] * jnp.asarray([1 / _HEADROOM, 1, _HEADROOM], edges.dtype)
    low, high = edges[0] / edges[1], edges[-1] / edges[-2]
    return jnp.concatenate([edges[:1] * low, edges, edges[-1:] * high])


def _scans_are_fast() -> bool:
    """Whether Lanczos may run in a scan: on CPU convolutions are slow in it."""
    return jax.default_backend() != "cpu"


def _timed_flow(
    problem: Problem, point: Point, needed: bool
) -> tuple[PyTree | None, float]:
    """Returns the gradient flow and its seconds; None and NaN without a loss."""
    if not (_has_loss(problem) or needed):
        return None, float("nan")
    started = time.perf_counter()
    flow = jax.block_until_ready(flow_at(point))
    return flow, time.perf_counter() - started


def _has_loss(problem: Problem) -> bool:
    return getattr(problem.objective, "loss_fn", problem) is not None


def _check_same_examples(state: ProbeState, data: jax.Array) -> None:
    """Raises ValueError if examples, targets or loss are not those of `Probe.init`."""
    if np.any(np.asarray(state.fingerprint) != np.asarray(data)):
        raise ValueError(
            "problem: expected the examples and targets of init, in the same order, "
            "and its loss, got others."
        )


def _checked_schedule(schedule: Schedule | float | None) -> Schedule | None:
    """Returns the schedule as a function of the step, after checking a number."""
    if schedule is None:
        return None
    if callable(schedule):
        return partial(schedule)  # hashable, whatever it is
    rate = np.asarray(schedule).tolist()
    check_not_negative("schedule", rate)
    return partial(_constant, float(rate))


def _constant(rate: float, step: Any) -> jax.Array:
    return jnp.full(jnp.shape(step), rate)


def _checked_lengths(over: Sequence[int], every: int) -> tuple[int, ...]:
    """Returns the numbers of steps, after checking that each is below ``every``."""
    given = tuple(over) if np.iterable(over) else None
    for length in (over,) if given is None else given:
        whole = isinstance(length, int | np.integer) and not isinstance(length, bool)
        if given is None or not (whole and 1 <= length < every):
            raise ValueError(
                f"over: expected a list of integers from 1 to every - 1 = {every - 1}, "
                f"got {length!r}."
            )
    return tuple(sorted(map(int, set(given or ()))))


def _traced_step(step: jax.typing.ArrayLike) -> jax.Array:
    """Returns the step as int32, after checking that it is one integer."""
    check_shape("step", step, [])
    dtype = jnp.result_type(step)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"step: expected an integer dtype, got {dtype}.")
    return jnp.asarray(step, jnp.int32)


def _concrete_step(step: Any) -> int:
    """Returns the step as an integer, after checking that it is one."""
    try:
        return operator.index(step)
    except TypeError:
        raise ValueError(
            f"step: expected an integer whose value is at hand, got {step!r}."
        ) from None
