"""A probe of the shell dynamics for anyone's training loop.

The probe is built once, from static choices and the batches to measure on; `Probe.init`
makes its state, a pytree of arrays of constant size that belongs into the checkpoint,
and `Probe.update` takes the parameters at the steps asked for and returns a record. It
never raises for what training does, never changes the parameters, and compiles its
programs once for the whole run.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._checks import (
    check_at_least,
    check_batches,
    check_choice,
    check_positive,
    check_same_tree,
)
from grsd_jax._typing import ErrorFn, LossFn, PyTree
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
from grsd_jax.dynamics.snapshot import Finder, Problem, take_snapshot
from grsd_jax.jacobian.autodiff import check_problem
from grsd_jax.jacobian.factored import JacobianForm, uses_factors
from grsd_jax.kernel.derivative import central_difference, gradient_flow_direction
from grsd_jax.kernel.operator import error_dimension
from grsd_jax.kernel.solver import SOLVERS, choose_solver

Schedule = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """What `make_probe` returns: `init`, then `update` in the loop.

    Attributes:
        problem: The error function, the batches and the form of the Jacobian.
        finder: How the pairs are found.

    The other attributes are the arguments of `make_probe`.
    """

    problem: Problem
    loss_fn: LossFn | None
    every: int
    solver: Literal["auto", "dense", "lanczos"]
    finder: Finder
    num_shells: int
    edges: tuple[float, ...] | None
    headroom: float
    schedule: Schedule
    closure_step: float | None
    num_values: int
    num_bootstrap: int

    def init(
        self, key: jax.Array, params: PyTree, *, error_fn: ErrorFn | None = None
    ) -> ProbeState:
        """Returns the state before the first record.

        Args:
            key: Consumed for start blocks and resamples.
            params: Parameters, for shapes and for the choice of the solver.
            error_fn: As for `update`.

        Returns:
            The state.

        Raises:
            ValueError: If a shape, dtype, leading axis or choice does not fit.
        """
        problem = self._problem(error_fn)
        fn, batches, jacobian = problem
        error = check_problem(fn, params, batches)
        size = error_dimension(fn, params, batches, reduction="stack")
        solver, num_pairs = self.solver, min(self.finder.num_pairs, size)
        if solver == "auto":
            solver = choose_solver(
                fn,
                params,
                batches,
                reduction="stack",
                num_columns=min(4 * num_pairs, size),
                block_size=min(self.finder.block_size, size),
                jacobian="factored" if uses_factors(fn, jacobian) else "plain",
            )
        basis, num_values = {}, size
        if solver == "lanczos":
            num_values = num_pairs
            basis = {"vectors": jnp.zeros((size, num_pairs), error.dtype)}
        edges = np.zeros(self.num_shells + 1) if self.edges is None else self.edges
        return ProbeState(
            last_step=jnp.int32(-1),
            active=jnp.bool_(True),
            effective_time=jnp.zeros((), error.dtype),
            edges=jnp.asarray(edges, error.dtype),
            values=jnp.zeros(num_values, error.dtype),
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
        error_fn: ErrorFn | None = None,
        loss_fn: LossFn | None = None,
        step_seconds: float = float("nan"),
    ) -> tuple[ProbeState, ProbeRecord | None]:
        """Measures the shell dynamics if a record is due, and does nothing if not.

        A record is due if ``step`` is a multiple of ``every`` and lies after the last
        record's. One whose numbers are not finite is the last: it says so in
        ``finite``, and later calls do nothing.

        Args:
            state: The state.
            params: Parameters, a pytree of floating arrays. They are only read.
            step: The steps done, a concrete integer.
            direction: The tangent d, a tree like ``params``; minus the gradient of the
                loss on the probe's batches if None. An optimiser's update over its
                learning rate shows the motion that it causes.
            error_fn: In place of the probe's, for a model whose other state (BatchNorm
                statistics) changes: a pytree of the same structure, so that nothing is
                traced again, as `grsd_jax.models.resnet.linen_error_fn` makes it.
            loss_fn: In place of the probe's, likewise.
            step_seconds: What a training step takes, for the record's cost in steps.

        Returns:
            The new state, and the record; the old state and None if none is due.

        Raises:
            ValueError: If a shape, tree, dtype or leading axis does not fit, or there
                is neither a direction nor a loss.
        """
        step = int(step)
        if step % self.every or step <= int(state.last_step) or not bool(state.active):
            return state, None
        started = time.perf_counter()
        problem = self._problem(error_fn)
        gradient_seconds = float("nan")
        if direction is None:
            loss_fn = self.loss_fn if loss_fn is None else loss_fn
            if loss_fn is None:
                raise ValueError("direction: expected one, or a loss_fn, got neither.")
            direction = gradient_flow_direction(loss_fn, params, problem.batches)
            jax.block_until_ready(direction)
            gradient_seconds = time.perf_counter() - started
        check_same_tree("direction", direction, params, "params")
        state = state._replace(effective_time=self._effective_time(state, step))
        if bool(_all_finite((params, direction))):
            moved, record = self._measure(state, problem, params, direction, step)
            state = moved if record.finite else state
        else:
            num_values = len(state.values)
            record = empty_record(
                state.edges,
                state.effective_time,
                num_pairs=num_values,
                num_values=min(self.num_values, num_values),
                num_bootstrap=self.num_bootstrap,
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
        )

    def _measure(
        self,
        state: ProbeState,
        problem: Problem,
        params: PyTree,
        direction: PyTree,
        step: int,
    ) -> tuple[ProbeState, ProbeRecord]:
        """Takes the snapshots and puts the record together."""
        key = jax.random.wrap_key_data(state.key_data, impl="threefry2x32")
        keys = jax.random.split(jax.random.fold_in(key, step), 3)
        again = state.last_step >= 0
        snapshot = take_snapshot(
            problem,
            params,
            direction,
            state.basis,
            self.finder,
            warm=again,
            key=keys[0],
        )
        known = again if self.edges is None else True
        fresh = first_edges(
            snapshot.pairs, num_shells=self.num_shells, headroom=self.headroom
        )
        edges = jnp.where(known, state.edges, fresh)
        size, basis = len(state.values), {}
        if state.basis:
            basis = {"vectors": snapshot.pairs.vectors[:, :size]}
        num_columns = snapshot.num_columns

        def energies(p: PyTree) -> jax.Array:
            nonlocal num_columns
            moved = take_snapshot(
                problem, p, None, basis, self.finder, warm=True, key=keys[1]
            )
            num_columns += moved.num_columns
            return order_energies(moved, snapshot, edges)

        small = self.closure_step
        if small is None:
            small = float(straight_step(snapshot, params, direction))
        measured = central_difference(energies, params, direction, step=small)
        record = transport_record(
            snapshot,
            edges,
            state.effective_time,
            (state.values, state.resolved),
            measured,
            keys[2],
            num_values=min(self.num_values, size),
            num_bootstrap=self.num_bootstrap,
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

    def _problem(self, error_fn: ErrorFn | None) -> Problem:
        if error_fn is None:
            return self.problem
        return self.problem._replace(error_fn=error_fn)


def make_probe(
    error_fn: ErrorFn,
    loss_fn: LossFn | None,
    batches: PyTree,
    *,
    every: int,
    solver: Literal["auto", "dense", "lanczos"] = "auto",
    jacobian: JacobianForm = "auto",
    num_shells: int = 12,
    edges: Sequence[float] | None = None,
    headroom: float = 10.0,
    schedule: Schedule | float = 1.0,
    closure_step: float | None = None,
    num_values: int = 32,
    num_bootstrap: int = 200,
    num_pairs: int = 64,
    block_size: int = 8,
    convergence: float = 1e-5,
    tolerance: float = 0.01,
    floor: float | None = None,
) -> Probe:
    """Makes a probe of the shell dynamics for a training loop.

    A record costs, with the dense solver, one kernel with its derivative and two more
    kernels for the measured change; Lanczos costs about three times its products. It
    holds a few matrices of ``[n, r]`` while it measures, and keeps one between
    records at most.

    Args:
        error_fn: ``error_fn(params, batch) -> [N, C]``; examples must be independent
            for the dense solver.
        loss_fn: ``loss_fn(params, batch) -> []``, the mean loss of one batch; None if
            every `Probe.update` is given a direction.
        batches: The batches to measure on, leading axes ``[K, N]``: one evaluation set
            of ``n = K N C`` errors, the same for the whole run.
        every: Steps between two records.
        solver: ``"dense"`` for all n pairs, ``"lanczos"`` for the leading
            ``num_pairs``, ``"auto"`` for the cheaper.
        jacobian: ``"auto"``, ``"plain"`` or ``"factored"``; see `linearize_kernel`.
        num_shells: S.
        edges: ``[S + 1]`` increasing edges of the shells. If None, the first record's
            resolved eigenvalues, and ``headroom`` above them, are cut in S shells of
            equal width in the logarithm, which then stay for the run.
        headroom: The factor between the first record's largest eigenvalue and the last
            edge, at least 1: spectra grow in training.
        schedule: The learning rate, a number or ``schedule(step)`` as optax makes it;
            the effective time is its sum over the steps done.
        closure_step: Relative step ``h |d| / |theta|`` of the measured change; if None,
            one over which neither the parameters, the error nor M change much: by at
            most a thousandth, a tenth and a tenth in float32.
        num_values: Leading eigenvalues that a record holds.
        num_bootstrap: Resamples behind the interval of the exponent.
        num_pairs: Leading pairs that Lanczos finds, n at most.
        block_size: Columns b of a Lanczos block.
        convergence: Largest residual at which Lanczos stops, relative to the value. The
            measured change is a difference, which enlarges it.
        tolerance: Largest residual of a resolved pair, relative to its value. Tighter
            than where values alone are wanted: in float32 the vectors of the smallest
            are noise first.
        floor: Smallest resolved value, relative to the largest; ten eps if None.

    Returns:
        The probe.

    Raises:
        ValueError: If an option is out of range, or the batches do not share leading
            axes.

    References:
        Paper 2.2, 3.3 and A.2; the probe is ours.
    """
    check_batches(batches)
    check_choice("solver", solver, SOLVERS)
    uses_factors(error_fn, jacobian)
    for name, count in (
        ("every", every),
        ("num_pairs", num_pairs),
        ("block_size", block_size),
        ("num_values", num_values),
    ):
        check_at_least(name, count, 1)
    check_at_least("num_bootstrap", num_bootstrap, 0)
    check_at_least("num_shells", num_shells, 2)
    check_positive("convergence", convergence)
    check_positive("tolerance", tolerance)
    if not headroom >= 1:
        raise ValueError(f"headroom: expected a number >= 1, got {headroom!r}.")
    if edges is not None:
        num_shells = _checked_edges(edges)
    if not callable(schedule):
        schedule = partial(_constant, float(schedule))
    return Probe(
        problem=Problem(error_fn, batches, jacobian),
        loss_fn=loss_fn,
        every=every,
        solver=solver,
        finder=Finder(num_pairs, block_size, convergence, tolerance, floor),
        num_shells=num_shells,
        edges=None if edges is None else tuple(float(edge) for edge in edges),
        headroom=headroom,
        schedule=schedule,
        closure_step=closure_step,
        num_values=num_values,
        num_bootstrap=num_bootstrap,
    )


def _constant(rate: float, step: Any) -> jax.Array:
    return jnp.full(jnp.shape(step), rate)


def _checked_edges(edges: Sequence[float]) -> int:
    """Returns S, after checking that the edges are positive and increase."""
    array = np.asarray(edges, np.float64)
    if array.ndim != 1 or len(array) < 3 or not np.all(np.diff(array) > 0):
        raise ValueError(
            f"edges: expected at least 3 increasing numbers, got {edges!r}."
        )
    check_positive("edges[0]", float(array[0]))
    check_positive("edges[-1]", float(array[-1]))
    return len(array) - 1


@jax.jit
def _all_finite(tree: PyTree) -> jax.Array:
    checks = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(checks))
