"""The probe: what a record says, when it is taken, and what a run cannot do to it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from block_problems import batches_of
from grsd_jax import Binning, Problem, Window, gradient_flow_direction, make_probe
from grsd_jax.dynamics import probe as module
from oracles import dense_kernel, network_problem

KEY = jax.random.key(0)
SMALL = {"shells": Binning(num_shells=5, num_bootstrap=20)}
WINDOW = Window(num_pairs=12, tolerance=0.01)
SOLVERS = [{"solver": "dense"}, {"solver": "lanczos", "window": WINDOW}]


@pytest.fixture(scope="module")
def mlp():
    """Returns ``(problem, params)`` in float32."""
    return network_problem("mlp", jnp.float32)


@pytest.fixture
def mlp64(x64):
    """Returns ``(problem, params)`` in float64."""
    return network_problem("mlp", jnp.float64)


def descend(problem, params, rate=0.3):
    direction = gradient_flow_direction(problem, params)
    move = lambda p, d: p + jnp.asarray(rate, p.dtype) * d  # noqa: E731
    return jax.tree.map(move, params, direction)


def first_record(problem, params, **options):
    probe = make_probe(problem, every=1, **SMALL, **options)
    return probe.update(probe.init(KEY, params), params, 0)[1]


@jax.jit
def moved_spectrum(problem, params, direction, step):
    """Returns eigenvalues (descending) and energies at ``params + step d``, densely."""
    params = jax.tree.map(lambda p, d: p + step * d, params, direction)
    values, vectors = jnp.linalg.eigh(dense_kernel(problem, params))
    error = jnp.concatenate(
        [jnp.ravel(problem.error(params, batch)) for batch in batches_of(problem)]
    )
    return values[::-1], ((vectors.T @ error) ** 2)[::-1]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("loss", ["softmax_cross_entropy", "squared"])
def test_record_is_what_the_flow_does(loss):
    problem, params = network_problem("mlp", jnp.float64, loss=loss)
    if loss == "squared":
        targets = jax.nn.one_hot(problem.batches["label"], 3, dtype=jnp.float64)
        problem = problem.replace(batches=problem.batches | {"label": targets})
    record = first_record(problem, params, solver="dense")
    direction = gradient_flow_direction(problem, params)
    h = 1e-5
    (values, energies), ahead, behind = jax.device_get(
        [moved_spectrum(problem, params, direction, by) for by in (0.0, h, -h)]
    )
    np.testing.assert_allclose(record.values[:6], values[:6], rtol=1e-9)
    drift = (ahead[0] - behind[0])[:6] / (2 * h)
    np.testing.assert_allclose(record.drift[:6], drift, rtol=1e-6, atol=1e-7)
    index, dynamics = record.shells.index, record.dynamics
    for shell in range(5):
        inside = index == shell
        assert dynamics.energies[shell] == pytest.approx(energies[inside].sum())
        rate = (ahead[1] - behind[1])[inside].sum() / (2 * h)
        assert dynamics.energy_rate[shell] == pytest.approx(rate, rel=1e-5, abs=1e-7)
    assert record.closure.total_error < 1e-6
    assert record.total_energy == pytest.approx(energies.sum())
    assert record.num_resolved == np.sum(index >= 0)
    assert record.finite


def test_closure_error_falls_with_the_square_of_the_step(mlp64):
    errors = [
        first_record(*mlp64, solver="dense", closure_step=step).closure.total_error
        for step in (2e-3, 1e-3)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


@pytest.mark.usefixtures("x64")
def test_relu_balance_closes_within_one_activation_pattern():
    given = network_problem("mlp", jnp.float64, activation="relu")
    inside, beyond = (
        first_record(*given, solver="dense", closure_step=step).closure.total_error
        for step in (1e-9, 3e-2)
    )
    assert inside < 1e-5
    assert beyond > 1e-2  # patterns flip on the way


@pytest.mark.slow
def test_lanczos_knows_what_leaks_out_of_its_pairs(mlp64):
    problem, params = mlp64
    probe = make_probe(problem, every=1, solver="lanczos", window=WINDOW, **SMALL)
    finder = probe.finder._replace(block_size=3, convergence=1e-11)
    probe = dataclasses.replace(probe, finder=finder)
    state, record = probe.update(probe.init(KEY, params), params, 0)
    exact = first_record(problem, params, solver="dense")
    np.testing.assert_allclose(record.values[:6], exact.values[:6], rtol=1e-10)
    np.testing.assert_allclose(record.drift[:6], exact.drift[:6], rtol=1e-7)
    assert record.num_resolved == 12
    assert record.dynamics.unresolved_energy > 0.01 * record.total_energy
    assert (
        np.abs(record.dynamics.leak).max()
        > 0.01 * np.abs(record.dynamics.energy_rate).max()
    )
    assert record.closure.total_error < 1e-5
    # Another record at the same weights starts from the pairs it is to find.
    _, again = probe.update(state, params, 1)
    np.testing.assert_allclose(again.values, record.values, rtol=1e-10)
    assert again.num_columns <= record.num_columns


@pytest.mark.parametrize("options", SOLVERS)
def test_cadence_constant_state_and_one_compilation(mlp, options):
    problem, params = mlp
    outputs_fn, traces = problem.objective.outputs_fn, []

    def counted(params, batch):
        traces.append(None)
        return outputs_fn(params, batch)

    probe = make_probe(problem.replace(outputs_fn=counted), every=3, **options, **SMALL)
    state = probe.init(KEY, params)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    steps, counts = [], []
    for step in range(13):
        before = state
        state, record = probe.update(state, params, step)
        if record is None:
            assert state is before
        else:
            steps.append(record.step)
            counts.append(len(traces))
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == shapes
        params = descend(problem, params)
    assert steps == [0, 3, 6, 9, 12]
    assert counts[1:] == [counts[1]] * 4
    assert probe.update(state, params, 12)[1] is None  # no step is recorded twice


def test_nothing_compiles_after_the_first_record(mlp, caplog):
    problem, params = mlp
    probe = make_probe(problem, every=3, schedule=0.1, **SMALL)
    state = probe.init(KEY, params)
    state, _ = probe.update(state, params, 0)
    moved = [descend(problem, params)]
    moved.append(descend(problem, moved[0]))
    with jax.log_compiles():
        for step, there in zip((3, 6), moved, strict=True):
            state, record = probe.update(state, there, step, step_seconds=0.5)
            assert record.cost_in_steps == pytest.approx(2 * record.seconds)
    assert not [r.message for r in caplog.records if "Compiling" in r.message]


@pytest.mark.not_in_mode("debug_nans")
@pytest.mark.parametrize("options", SOLVERS)
@pytest.mark.parametrize("value", [np.nan, 1e30])
def test_a_broken_run_is_told_once_and_then_left_alone(mlp, options, value):
    problem, params = mlp
    probe = make_probe(problem, every=1, **options, **SMALL)
    state, record = probe.update(probe.init(KEY, params), params, 0)
    assert record.finite
    broken = jax.tree.map(lambda p: p * value, params)
    state, told = probe.update(state, broken, 1)
    assert not told.finite
    assert jax.tree.map(np.shape, told) == jax.tree.map(np.shape, record)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))
    assert not state.active
    assert probe.update(state, params, 2) == (state, None)


def test_a_standstill_divides_by_nothing(mlp):
    problem, params = mlp
    probe = make_probe(problem, every=5, schedule=0.0, **SMALL)
    nowhere = jax.tree.map(jnp.zeros_like, params)
    state = probe.init(KEY, params)
    for step in (0, 5):
        state, record = probe.update(state, params, step, direction=nowhere)
        assert record.finite
        assert record.effective_time == 0
        assert record.closure.total_error == 0
        assert not record.drift.any()
        assert np.all(np.isfinite(record.dynamics.velocity))
        assert not record.crossings.up.any()
        assert np.isnan(record.cost)


def test_effective_time_is_the_sum_of_the_schedule(mlp):
    problem, params = mlp

    def schedule(step):
        return 0.1 * jnp.where(step < 4, jnp.float32(1), jnp.float32(0.5))

    probe = make_probe(problem, every=3, schedule=schedule, **SMALL)
    state, times = probe.init(KEY, params), []
    for step in (0, 3, 9):
        state, record = probe.update(state, params, step)
        times.append(record.effective_time)
    np.testing.assert_allclose(times, [0, 0.3, 0.4 + 5 * 0.05], rtol=1e-6)


def test_shells_stay_and_crossings_are_counted(mlp):
    problem, params = mlp
    probe = make_probe(problem, every=1, solver="dense", **SMALL)
    state, first = probe.update(probe.init(KEY, params), params, 0)
    assert first.shells.edges[-1] == pytest.approx(10 * first.values[0], rel=1e-5)
    assert not first.crossings.up.any()
    larger = jax.tree.map(lambda p: 1.3 * p, params)
    _, second = probe.update(state, larger, 1)
    np.testing.assert_array_equal(second.shells.edges, first.shells.edges)
    both = (first.shells.index >= 0) & (second.shells.index >= 0)
    up = np.maximum(second.shells.index - first.shells.index, 0)[both].sum()
    assert second.crossings.up.sum() == up > 0


def test_given_edges_and_the_number_of_values_are_kept(mlp, monkeypatch):
    monkeypatch.setattr(module, "_NUM_VALUES", 2)
    edges = (0.01, 0.1, 1.0)
    record = first_record(*mlp, edges=edges)
    np.testing.assert_allclose(record.shells.edges, edges, rtol=1e-6)
    assert record.shells.counts.sum() == record.num_resolved
    assert record.values.shape == record.drift.shape == (2,)


def test_new_state_of_the_outputs_retraces_nothing(mlp):
    problem, params = mlp
    outputs_fn, traces = problem.objective.outputs_fn, []

    def scaled(scale, params, batch):
        traces.append(None)
        return scale * outputs_fn(params, batch)

    probe = make_probe(
        problem.replace(outputs_fn=jax.tree_util.Partial(scaled, jnp.float32(1))),
        every=1,
        solver="dense",
        **SMALL,
    )
    doubled = jax.tree_util.Partial(scaled, jnp.float32(2))
    there = probe.problem.replace(outputs_fn=doubled)
    state, first = probe.update(probe.init(KEY, params), params, 0)
    before = len(traces)
    _, second = probe.update(state, params, 1, problem=there)
    assert len(traces) == before
    assert second.values[0] > 2 * first.values[0]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("every", 0),
        ("solver", "exact"),
        ("edges", (1.0, 0.5, 2.0)),
        ("edges", (-1.0, 0.5, 2.0)),
        ("closure_step", 0.0),
    ],
)
def test_options_out_of_range_are_named(mlp, option, value):
    problem, _ = mlp
    with pytest.raises(ValueError, match=rf"^{option}.*expected"):
        make_probe(problem, **{"every": 1, option: value})


def test_problems_and_shells_that_do_not_fit_are_named(mlp):
    problem, _ = mlp
    with pytest.raises(ValueError, match=r"^num_shells: expected an integer >= 2"):
        make_probe(problem, every=1, shells=Binning(num_shells=1, window=1))
    mean = problem.replace(reduction="mean")
    with pytest.raises(ValueError, match=r"^problem\.reduction: expected .* 'stack'"):
        make_probe(mean, every=1)
    with pytest.raises(ValueError, match=r"^batches: expected arrays"):
        make_probe(problem.replace(batches={}), every=1)


def test_a_direction_or_a_loss_is_needed(mlp):
    problem, params = mlp
    without = Problem.from_error(problem.error, problem.batches)
    probe = make_probe(without, every=1)
    with pytest.raises(ValueError, match=r"^loss_fn: expected one .* a direction"):
        probe.update(probe.init(KEY, params), params, 0)


def test_a_learning_rate_of_zero_stands_still_in_effective_time(mlp):
    problem, params = mlp
    probe = make_probe(problem, every=2, schedule=0.0, **SMALL)
    state = probe.init(KEY, params)
    found = []
    for step in (0, 2, 4):
        state, record = probe.update(state, params, step)
        found.append(record)
    assert all(record.finite for record in found)
    assert [float(record.effective_time) for record in found] == [0.0, 0.0, 0.0]
    np.testing.assert_allclose(
        found[2].dynamics.flux, found[0].dynamics.flux, rtol=1e-5
    )
    assert float(np.max(np.abs(found[0].dynamics.flux))) > 0
    assert int(np.sum(found[2].crossings.up + found[2].crossings.down)) == 0
