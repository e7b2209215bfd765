"""The probe: what a record says, when it is taken, and what a run cannot do to it."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grsd_jax import Problem, gradient_flow_direction, make_probe
from grsd_jax.dynamics import KrylovSteps, exact_balance, measured_time
from grsd_jax.dynamics import probe as module
from grsd_jax.results import to_xarray, with_undefined
from grsd_jax.shells import SoftShells
from oracles import dense_kernel, network_problem
from test_between_ends import (
    AMOUNTS,
    EDGES,
    PARTIAL,
    assert_converged_within_errors,
    assert_within_errors,
    in_double,
    make_problem,
    shells,
)
from test_compiles import compilations
from test_exact_balance import by_definition

SHELLS = SoftShells(jnp.asarray([0.01, 0.1, 1.0], jnp.float32))
SOLVERS = ["dense", KrylovSteps(6)]
FEWER = ["dense", pytest.param(KrylovSteps(6), marks=pytest.mark.scheduled)]


@pytest.fixture(scope="module")
def mlp():
    """Returns ``(problem, params)`` in float32."""
    return network_problem("mlp", jnp.float32)


BROKEN = [
    ("dense", np.nan),
    ("dense", 1e30),
    (SOLVERS[1], np.nan),
    pytest.param(SOLVERS[1], 1e30, marks=pytest.mark.scheduled),
]


@functools.partial(jax.jit, donate_argnums=1)
def descend(problem, params):
    direction = gradient_flow_direction(problem, params)
    move = lambda p, d: p + jnp.asarray(0.05, p.dtype) * d  # noqa: E731
    return jax.tree.map(move, params, direction)


def copied(params):
    return jax.tree.map(functools.partial(jnp.array, copy=True), params)


def path(problem, params, last):
    """Returns copies of the parameters after 0 to ``last`` steps of descent."""
    points, params = [], copied(params)
    for _ in range(last + 1):
        points.append(copied(params))
        params = descend(problem, params)
    return points


def records_along(probe, points, state=None, first=0):
    """Returns the records of `update` at every point, and the last state."""
    state = probe.init(jax.random.key(0), points[0]) if state is None else state
    found = []
    for step, params in enumerate(points[first:], start=first):
        state, record = probe.update(state, params, step)
        if record is not None:
            found.append(record)
    return found, state


def numbers(record):
    """Returns all of a record but what the clock says."""
    return record._replace(
        seconds=None, gradient_seconds=None, cost=None, cost_in_steps=None
    )


def assert_same(one, other):
    leaves = jax.tree.leaves(numbers(one)), jax.tree.leaves(numbers(other))
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("optimizer", "solver"),
    [
        (optax.sgd(0.3), "dense"),
        (optax.adamw(0.01), KrylovSteps(12)),
        pytest.param(optax.adamw(0.01), "dense", marks=pytest.mark.scheduled),
        pytest.param(optax.adamw(0.01), KrylovSteps(24), marks=pytest.mark.scheduled),
        pytest.param(optax.sgd(0.3), KrylovSteps(8), marks=pytest.mark.scheduled),
        pytest.param(optax.sgd(0.3), KrylovSteps(24), marks=pytest.mark.scheduled),
    ],
)
def test_records_are_the_balances_of_the_run_within_their_errors(optimizer, solver):
    problem, params = make_problem("relu")
    gradient = jax.jit(jax.grad(problem.loss))
    probe = make_probe(
        problem, every=8, over=(2,), solver=solver, shells=shells(), schedule=0.1
    )
    state, own = probe.init(jax.random.key(0), params), optimizer.init(params)
    ends, found = {}, []
    for step in range(17):
        state, record = probe.update(state, params, step)
        if record is not None:
            found.append(record)
        if step in (0, 2, 8, 10, 16):
            ends[step] = in_double(problem, params)
        with jax.numpy_dtype_promotion("standard"):
            updates, own = optimizer.update(gradient(params), own, params)
            params = optax.apply_updates(params, updates)
    intervals = [(0, 2), (0, 8), (8, 10), (8, 16)]
    assert [(x.start_step, x.step) for x in found] == intervals
    for record in found:
        steps = record.start_step, record.step
        expected = by_definition(*(ends[step] for step in steps), EDGES, 0.5)
        assert record.balance.elapsed == pytest.approx(0.1 * (steps[1] - steps[0]))
        if solver in PARTIAL:
            assert_converged_within_errors(record.balance, expected)
        else:
            assert_within_errors(record.balance, expected)
        reached = np.abs(record.balance.flux) > record.balance.flux_error
        resolved = np.sum(reached & record.balance.converged)
        assert record.num_resolved == resolved >= (2 if solver in PARTIAL else 3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_record_is_the_exact_balance_of_both_ends(mlp, solver):
    problem, params = mlp
    points = path(problem, params, 3)
    probe = make_probe(problem, every=3, solver=solver, shells=SHELLS)
    (record,), _ = records_along(probe, points)
    time = measured_time(problem, points[0], points[3])
    whole = exact_balance(
        (problem, points[0]),
        (problem, points[3]),
        SHELLS,
        solver="dense",
        elapsed=time,
    )
    assert record.measured_time.meaningful
    assert record.effective_time == pytest.approx(float(time.elapsed), rel=1e-6)
    assert time.elapsed == pytest.approx(0.15, rel=0.2)
    for name, error in AMOUNTS.items():
        off = np.abs(getattr(record.balance, name) - getattr(whole, name))
        assert np.all(off <= getattr(record.balance, error) + getattr(whole, error))
    if solver == "dense":
        np.testing.assert_array_equal(record.balance.rotation, whole.rotation)
        np.testing.assert_array_equal(
            record.balance.counting.moved, whole.counting.moved
        )
        assert record.num_columns == 0
    else:
        assert record.balance.rotation is None
        assert record.num_columns == 2 * 2 * 6


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_first_look_of_update_is_a_look_at_one_end(mlp, monkeypatch, solver):
    problem, params = mlp

    def never(*_, **_options):
        raise AssertionError("compared a point with itself")

    for name in ("balance_snapshots", "balance_spaces", "krylov_spaces"):
        monkeypatch.setattr(module, name, never)
    probe = make_probe(problem, every=2, solver=solver, shells=5, schedule=0.5)
    state, record = probe.update(probe.init(jax.random.key(0), params), params, 4)
    assert record is None
    assert (int(state.last_step), int(state.start_step)) == (4, 4)
    assert state.effective_time == pytest.approx(2.0)
    largest = np.linalg.eigvalsh(dense_kernel(problem, params))[-1]
    # Six steps of Lanczos see the largest eigenvalue to a few percent.
    tolerance = 1e-4 if solver == "dense" else 0.1
    expected = largest * np.geomspace(1e-4, 10, 6)[1:-1]
    np.testing.assert_allclose(state.edges, expected, rtol=tolerance)
    with pytest.raises(AssertionError, match="compared a point"):
        probe.update(state, params, 6)


def test_which_steps_have_records_and_where_they_begin(mlp):
    problem, params = mlp
    points = path(problem, params, 12)
    probe = make_probe(problem, every=4, over=(1, 3), shells=SHELLS, solver="dense")
    state, found = probe.init(jax.random.key(0), params), []
    # 7 begins nothing that 4 did not, 8 is skipped, and with it what would begin there.
    for step in (0, 0, 1, 2, 3, 3, 4, 5, 6, 7, 9, 11, 12, 12):
        before = state
        state, record = probe.update(state, points[step], step)
        if record is None and step:
            assert state is before
        if record is not None:
            found.append((record.start_step, record.step))
    assert found == [(0, 1), (0, 3), (0, 4), (4, 5), (4, 7), (4, 12)]
    assert (state.start_step, state.last_step) == (12, 12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_run_that_goes_on_from_any_step_makes_the_same_records(mlp, solver):
    problem, params = mlp
    points = path(problem, params, 8)
    probe = make_probe(problem, every=4, over=(1,), solver=solver)
    whole, _ = records_along(probe, points)
    assert [record.step for record in whole] == [1, 4, 5, 8]
    state = probe.init(jax.random.key(0), points[0])
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    for step in range(8):
        state, _ = probe.update(state, points[step], step)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == shapes
        saved = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
        loaded = jax.tree.unflatten(
            jax.tree.structure(state), [jnp.asarray(leaf) for leaf in saved]
        )
        rest, _ = records_along(probe, points, loaded, first=step + 1)
        later = [record for record in whole if record.step > step]
        assert len(rest) == len(later)
        for one, other in zip(rest, later, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_jitted_loop_makes_the_records_of_update(mlp, solver):
    problem, params = mlp
    points = path(problem, params, 4)
    probe = make_probe(problem, every=3, over=(1,), solver=solver, schedule=0.05)
    expected, last = records_along(probe, points)

    def body(state, inputs):
        return probe.record(state, *inputs)

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *points)
    inputs = stacked, jnp.arange(len(points), dtype=jnp.int32)
    state, found = jax.jit(functools.partial(jax.lax.scan, body))(
        probe.init(jax.random.key(0), params), inputs
    )
    np.testing.assert_array_equal(found.due, [False, True, False, True, True])
    for name in ("last_step", "start_step", "active", "effective_time"):
        np.testing.assert_allclose(getattr(state, name), getattr(last, name))
    np.testing.assert_allclose(state.edges, last.edges, rtol=1e-5)
    for record in expected:
        one = jax.tree.map(lambda leaf, at=record.step: leaf[at], found)
        assert (one.start_step, one.step) == (record.start_step, record.step)
        np.testing.assert_allclose(one.effective_time, record.effective_time, rtol=1e-6)
        for name, error in AMOUNTS.items():
            off = np.abs(getattr(one.balance, name) - getattr(record.balance, name))
            known = np.isfinite(getattr(record.balance, error))
            assert np.all(off[known] <= 2 * getattr(record.balance, error)[known]), name
    assert all(np.all(~np.isnan(leaf)) for leaf in jax.tree.leaves((state, found)))
    blank = jax.tree.map(lambda leaf: leaf[2], found)
    assert not blank.measured
    assert not blank.finite
    read = with_undefined(blank)
    assert all(np.all(np.isnan(x)) for x in (read.balance.flux, read.effective_time))
    assert "n/a before, n/a after" in repr(blank.balance)
    assert np.all(np.isnan(to_xarray(blank)["balance_velocity"]))


@pytest.mark.scheduled
def test_update_by_a_scan_is_update_from_the_host(mlp, monkeypatch):
    problem, params = mlp
    points = path(problem, params, 2)
    probe = make_probe(problem, every=1, solver=KrylovSteps(6), shells=SHELLS)
    from_host, _ = records_along(probe, points)
    monkeypatch.setattr(module, "_scans_are_fast", lambda: True)
    by_scan, _ = records_along(probe, points)
    assert len(by_scan) == len(from_host) == 2
    for one, other in zip(by_scan, from_host, strict=True):
        assert one.finite
        for name, error in AMOUNTS.items():
            off = np.abs(getattr(one.balance, name) - getattr(other.balance, name))
            known = np.isfinite(getattr(other.balance, error))
            assert np.all(off[known] <= 2 * getattr(other.balance, error)[known]), name


@pytest.mark.not_in_mode("debug_nans")  # which keeps what was donated
@pytest.mark.parametrize("pure", [False, True])
def test_a_loop_may_donate_its_buffers(mlp, pure):
    problem, params = mlp
    points = path(problem, params, 4)
    probe = make_probe(problem, every=2, shells=SHELLS, solver="dense")
    expected, _ = records_along(probe, points)
    params, state = copied(params), probe.init(jax.random.key(0), params)
    record, found = jax.jit(probe.record, donate_argnums=0), []
    for step in range(5):
        if pure:
            state, now = record(state, params, step)
            found += [now] if now.due else []
        else:
            state, now = probe.update(state, params, step)
            found += [] if now is None else [now]
        old, params = params, descend(problem, params)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert len(found) == len(expected) == 2
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            one.balance.flux, other.balance.flux, atol=float(other.balance.floor.max())
        )


@pytest.mark.parametrize("solver", SOLVERS)
def test_nothing_compiles_after_the_first_records(mlp, solver):
    problem, params = mlp
    points = path(problem, params, 12)
    probe = make_probe(problem, every=3, over=(1,), solver=solver)
    state, counts = probe.init(jax.random.key(0), params), []
    for step, there in enumerate(points):
        with compilations() as compiled:
            state, record = probe.update(state, there, step, step_seconds=0.5)
        counts.append(len(compiled))
        if record is not None:
            assert record.cost_in_steps == pytest.approx(2 * record.seconds)
    assert sum(counts[:2]) > 0
    assert counts[2:] == [0] * 11
    record = jax.jit(probe.record)
    state = probe.init(jax.random.key(0), params)
    for step, there in itertools.islice(enumerate(points), 5):
        state, _ = record(state, there, step)
    assert record._cache_size() == 1


def test_steps_under_way_are_no_part_of_the_cost(mlp, monkeypatch):
    """Their results are waited for before the clock starts."""
    problem, params = mlp
    probe = make_probe(problem, every=1, solver="dense")
    state = probe.init(jax.random.key(0), params)
    events, wait, clock = [], jax.block_until_ready, module.time.perf_counter

    def waiting(tree):
        events.append(jax.tree.leaves(tree))
        return wait(tree)

    def read():
        events.append("clock")
        return clock()

    monkeypatch.setattr(module.jax, "block_until_ready", waiting)
    monkeypatch.setattr(module.time, "perf_counter", read)
    probe.update(state, params, 0, problem=problem.replace(batches=problem.batches))
    first, second = events[:2]
    assert second == "clock"
    waited = {id(leaf) for leaf in first}
    assert {id(leaf) for leaf in jax.tree.leaves((params, problem))} <= waited


@pytest.mark.not_in_mode("debug_nans")
@pytest.mark.parametrize(("solver", "value"), BROKEN)
def test_a_broken_run_is_told_once_and_then_left_alone(mlp, solver, value):
    problem, params = mlp
    probe = make_probe(problem, every=1, solver=solver)
    broken = jax.tree.map(lambda p: p * value, params)
    found, state = records_along(probe, path(problem, params, 1))
    assert found[0].finite
    state, told = probe.update(state, broken, 2)
    assert not told.finite
    assert (told.start_step, told.step) == (1, 2)
    assert jax.tree.structure(told) == jax.tree.structure(found[0])
    leaves = jax.tree.leaves(told), jax.tree.leaves(found[0])
    assert [np.shape(leaf) for leaf in leaves[0]] == [np.shape(x) for x in leaves[1]]
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.start))
    assert not state.active
    assert probe.update(state, params, 3) == (state, None)
    record = jax.jit(probe.record)
    state, told = record(probe.init(jax.random.key(0), params), broken, 0)
    assert told.due
    assert not told.finite
    assert not state.active
    assert not record(state, params, 1)[1].due


def test_a_standstill_moves_nothing_in_no_time(mlp):
    problem, params = mlp
    for schedule in (0.0, None):
        probe = make_probe(problem, every=1, shells=SHELLS, schedule=schedule)
        found, _ = records_along(probe, [params] * 3)
        for record in found:
            balance = record.balance
            assert record.finite
            assert not np.any(balance.lost)
            assert np.all(np.abs(balance.flux) <= balance.flux_error)
            assert np.isnan(balance.elapsed)
            assert not balance.velocity_mask.any()
            assert record.num_resolved == 0
            assert record.effective_time == 0 or schedule is None


def test_effective_time_is_the_sum_of_the_schedule(mlp):
    problem, params = mlp

    def schedule(step):
        return 0.1 * jnp.where(step < 4, jnp.float32(1), jnp.float32(0.5))

    probe = make_probe(problem, every=3, over=(2,), shells=SHELLS, schedule=schedule)
    state, times = probe.init(jax.random.key(0), params), []
    for step in (0, 2, 3, 9):
        state, record = probe.update(state, params, step)
        if record is not None:
            times.append((record.effective_time, record.balance.elapsed))
            assert record.measured_time is None
    expected = [(0.2, 0.2), (0.3, 0.3), (0.65, 0.35)]
    np.testing.assert_allclose(times, expected, rtol=1e-6)


def test_the_time_of_a_million_steps_keeps_its_digits(mlp):
    problem, params = mlp
    probe = make_probe(problem, every=500_000, shells=SHELLS, schedule=0.1)
    state, times = probe.init(jax.random.key(0), params), []
    for step in (500_000, 1_000_000):  # the first one sums what lies before it
        state, record = probe.update(state, params, step)
        times.append(float(state.effective_time))
    np.testing.assert_allclose(times, [5e4, 1e5], rtol=1e-6)
    np.testing.assert_allclose(record.balance.elapsed, 5e4, rtol=1e-6)


def test_a_step_that_is_no_integer_is_refused_inside_jit_too(mlp):
    problem, params = mlp
    probe = make_probe(problem, every=2, solver="dense", shells=SHELLS, schedule=0.1)
    state = probe.init(jax.random.key(0), params)
    for step in (2.9, jnp.float32(2), True):
        with pytest.raises(ValueError, match="step: expected an integer dtype"):
            jax.jit(probe.record)(state, params, step)
    with pytest.raises(ValueError, match=r"step: expected shape \[\]"):
        probe.record(state, params, jnp.arange(1))


def test_a_motion_against_the_flow_has_no_time(mlp):
    problem, params = mlp
    there = path(problem, params, 1)[1]
    probe = make_probe(problem, every=1, shells=SHELLS)
    (record,), _ = records_along(probe, [there, params])
    assert not record.measured_time.meaningful
    assert np.isnan(record.balance.elapsed)
    assert np.isnan(record.effective_time)
    assert record.finite
    without = Problem.from_error(problem.error, problem.batches)
    probe = make_probe(without, every=1, shells=SHELLS)
    (record,), _ = records_along(probe, [params, there])
    assert record.measured_time is None
    assert np.isnan(record.balance.elapsed)
    assert np.isnan(record.cost)
    assert record.finite


@pytest.mark.parametrize("solver", SOLVERS)
def test_edges_come_from_the_first_record_and_stay(mlp, solver):
    problem, params = mlp
    points = path(problem, params, 2)
    probe = make_probe(problem, every=1, solver=solver, shells=6)
    found, _ = records_along(probe, points)
    largest = np.linalg.eigvalsh(np.asarray(dense_kernel(problem, params)))[-1]
    for record in found:
        edges = record.balance.shells.edges
        expected = largest * np.geomspace(1e-4, 10, 7)[1:-1]
        np.testing.assert_allclose(edges, expected, rtol=1e-4)
        np.testing.assert_array_equal(edges, found[0].balance.shells.edges)
        assert record.balance.shells.width == 0.5
    assert found[0].values.shape == (30,)
    now = np.linalg.eigvalsh(np.asarray(dense_kernel(problem, points[2])))[::-1]
    np.testing.assert_allclose(found[1].values[:2], now[:2], rtol=1e-4)


def test_a_state_goes_on_under_the_options_it_is_given_or_is_refused(mlp):
    problem, params = mlp
    points = path(problem, params, 1)
    dense = functools.partial(
        make_probe, problem, every=1, schedule=0.1, solver="dense"
    )
    state = dense(shells=SHELLS).init(jax.random.key(0), params)
    state, _ = dense(shells=SHELLS).update(state, params, 0)
    shifted = SoftShells(3 * SHELLS.edges, width=1 / 3)
    ends = [(problem, point) for point in points]
    expected = exact_balance(*ends, shifted, solver="dense")
    later, record = dense(shells=shifted).update(state, points[1], 1)
    np.testing.assert_array_equal(later.edges, shifted.edges)
    np.testing.assert_array_equal(record.balance.shells.edges, shifted.edges)
    off = np.abs(record.balance.flux - expected.flux)
    assert np.all(off <= record.balance.flux_error + expected.flux_error)
    fewer, other = SoftShells(SHELLS.edges[1:]), KrylovSteps(4)
    for sentence, changes in (
        ("shells: expected 4 of them as at init, got 3", {"shells": fewer}),
        ("shells: expected 4 of them as at init, got 7", {"shells": 7}),
        ("solver: expected dense as at init, got Kryl", {"solver": other}),
        ("instantaneous: expected None as at init, got opt", {"instantaneous": True}),
    ):
        with pytest.raises(ValueError, match=f"^{sentence}"):
            dense(**{"shells": SHELLS} | changes).update(state, points[1], 1)


def test_a_schedule_that_turns_back_has_no_time(mlp):
    problem, params = mlp
    points = path(problem, params, 3)
    for late in (-0.3, np.inf):
        rates = jnp.asarray([0.1, 0.2, late])
        probe = make_probe(
            problem, every=1, solver="dense", shells=SHELLS, schedule=rates.__getitem__
        )
        found, _ = records_along(probe, points)
        np.testing.assert_allclose([r.effective_time for r in found[:2]], [0.1, 0.3])
        assert [bool(r.timed) for r in found] == [True, True, False]
        assert np.isnan(found[2].effective_time)
        assert np.isnan(found[2].balance.elapsed)


def stateful_problem():
    """Returns ``at(step)``: a network with statistics, a number and a random key."""
    problem, params = network_problem("mlp", jnp.float32)
    outputs_fn = problem.objective.outputs_fn

    def scaled(scale, state, params, batch):
        shift = 1e-2 * jax.random.normal(state["key"], (), jnp.float32)
        return scale * state["gain"] * outputs_fn(params, batch) + shift

    def at(step):
        state = {"gain": jnp.float32(1 + step / 4), "key": jax.random.key(step)}
        fn = jax.tree_util.Partial(scaled, 1.0 + step, state)
        return problem.replace(outputs_fn=fn)

    return at, params


@pytest.mark.not_in_mode("debug_key_reuse")  # the network draws by the key it holds
@pytest.mark.parametrize("solver", FEWER)
def test_other_state_of_the_problem_is_kept_too(solver):
    at, params = stateful_problem()
    probe = make_probe(at(0), every=1, shells=SHELLS, solver=solver, schedule=1.0)
    state, pure = (
        probe.init(jax.random.key(0), params, problem=at(0)) for _ in range(2)
    )
    record_of = jax.jit(lambda s, p, n, problem: probe.record(s, p, n, problem=problem))
    for step in range(4):
        with compilations() as compiled:
            state, record = probe.update(state, params, step, problem=at(step))
        pure, one = record_of(pure, params, step, at(step))
        if record is None:
            continue
        assert step == 1 or not compiled
        assert record.balance.comparable
        ends = [(at(n), params) for n in (step - 1, step)]
        whole = exact_balance(*ends, SHELLS, solver="dense")
        for name, error in AMOUNTS.items():
            allowed = getattr(record.balance, error) + getattr(whole, error)
            for found in (record.balance, one.balance):
                off = np.abs(getattr(found, name) - getattr(whole, name))
                assert np.all(off <= 2 * allowed)
        if solver == "dense":
            resolved = np.abs(record.balance.flux) > 10 * record.balance.flux_error
            assert resolved.all()
    assert record_of._cache_size() == 1


def test_other_examples_or_sizes_are_one_sentence(mlp):
    problem, params = mlp
    points = path(problem, params, 1)
    probe = make_probe(problem, every=1, shells=SHELLS)
    state, _ = probe.update(probe.init(jax.random.key(0), params), params, 0)
    turned = jax.tree.map(lambda leaf: leaf[:, ::-1], problem.batches)
    fewer = jax.tree.map(lambda leaf: leaf[:, :2], problem.batches)
    for batches in (turned, fewer):
        other = problem.replace(batches=batches)
        with pytest.raises(ValueError, match=r"^problem: expected the examples and"):
            probe.update(state, points[1], 1, problem=other)
    squared = problem.replace(loss="squared")
    with pytest.raises(ValueError, match=r"^problem: .* and its loss, got others"):
        probe.update(state, points[1], 1, problem=squared)
    pure = jax.jit(lambda s, p, problem: probe.record(s, p, 1, problem=problem))
    for other in (problem.replace(batches=turned), squared):
        _, record = pure(state, points[1], other)
        assert not record.balance.comparable
        assert not record.balance.velocity_mask.any()
    with pytest.raises(ValueError, match=r"^problem: expected n = 30 as at init"):
        pure(state, points[1], problem.replace(batches=fewer))


def test_other_shapes_are_named_by_their_leaf_at_every_step(mlp):
    problem, params = mlp
    probe = make_probe(problem, every=2, shells=SHELLS)
    state = probe.init(jax.random.key(0), params)
    path_, leaf = jax.tree_util.tree_flatten_with_path(params)[0][-1]
    last = jax.tree_util.keystr(path_)
    wider = jax.tree_util.tree_map_with_path(
        lambda p, x: jnp.concatenate([x, x]) if p == path_ else x, params
    )
    shapes = f"{list(leaf.shape)} as at init, got {[2 * len(leaf), *leaf.shape[1:]]}."
    sentence = "^" + re.escape(f"params{last}: expected shape {shapes}") + "$"
    for step in (0, 1):  # whether a record is due or not
        with pytest.raises(ValueError, match=sentence):
            probe.update(state, wider, step)
    with pytest.raises(ValueError, match=r"^params: expected \d+ arrays as at init"):
        probe.update(state, {"more": jnp.ones(2), "rest": params}, 1)
    with pytest.raises(ValueError, match=sentence):
        probe._check_state(state, problem.at(params).moved(wider))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("every", 0),
        ("over", (4,)),
        ("over", (0,)),
        ("over", (1.0,)),
        ("over", 2),
        ("solver", "lanczos"),
        ("shells", 1),
        ("shells", (0.1, 1.0)),
        ("schedule", -1.0),
    ],
)
def test_options_out_of_range_are_named(mlp, option, value):
    problem, _ = mlp
    with pytest.raises(ValueError, match=rf"^{option}: expected"):
        make_probe(problem, **{"every": 4, option: value})


def test_problems_and_shells_that_do_not_fit_are_named(mlp):
    problem, params = mlp
    mean = problem.replace(reduction="mean")
    with pytest.raises(ValueError, match=r"^problem\.reduction: expected .* 'stack'"):
        make_probe(mean, every=1)
    with pytest.raises(ValueError, match=r"^batches: expected arrays"):
        make_probe(problem.replace(batches={}), every=1)
    sharp = SoftShells(jnp.asarray([0.1, 1.0]), width=0)
    with pytest.raises(ValueError, match=r"^shells\.width: expected 1/2 or 1/3"):
        make_probe(problem, every=1, shells=sharp, solver=KrylovSteps(6))
    falling = make_probe(problem, every=1, shells=SoftShells(jnp.asarray([1.0, 0.1])))
    with pytest.raises(ValueError, match=r"^shells\.edges: expected positive"):
        falling.init(jax.random.key(0), params)
    probe = make_probe(problem, every=1, shells=sharp)  # auto takes what can do it
    (record,), _ = records_along(probe, path(problem, params, 1))
    assert record.num_columns == 0
    assert np.isfinite(record.balance.non_adjacent_share)
