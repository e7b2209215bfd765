"""The probe: what a record says, when it is taken, and what a run cannot do to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grsd_jax as grsd
import oracles
from grsd_jax.dynamics.probe import make_probe

KEY = jax.random.key(0)
SMALL = {"num_shells": 5, "num_values": 6, "num_bootstrap": 20}
LANCZOS = {"solver": "lanczos", "num_pairs": 12, "block_size": 3}


def descend(loss_fn, params, batches, rate=0.3):
    direction = grsd.gradient_flow_direction(loss_fn, params, batches)
    move = lambda p, d: p + jnp.asarray(rate, p.dtype) * d  # noqa: E731
    return jax.tree.map(move, params, direction)


def run(probe, params, num_steps, *, loss_fn, batches):
    """Runs gradient descent with the probe on; returns state, records and params."""
    state, found = probe.init(KEY, params), []
    for step in range(num_steps + 1):
        state, record = probe.update(state, params, step)
        found += [record] if record is not None else []
        params = descend(loss_fn, params, batches)
    return state, found, params


def moved_spectrum(error_fn, params, batches, direction, step):
    """Returns eigenvalues (descending) and energies at ``params + step d``, densely."""
    params = jax.tree.map(lambda p, d: p + step * d, params, direction)
    kernel = oracles.dense_kernel(error_fn, params, batches, "stack")
    values, vectors = np.linalg.eigh(np.asarray(kernel))
    error = np.concatenate(
        [
            np.ravel(error_fn(params, jax.tree.map(lambda x, k=k: x[k], batches)))
            for k in range(2)
        ]
    )
    return values[::-1], ((vectors.T @ error) ** 2)[::-1]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "error",
    [grsd.softmax_error, pytest.param(grsd.squared_error, marks=pytest.mark.slow)],
)
def test_record_is_what_the_flow_does(error):
    fn, params, batches, loss_fn = oracles.problem("mlp", jnp.float64, error=error)
    if error is grsd.squared_error:
        targets = jax.nn.one_hot(batches["label"], 3, dtype=jnp.float64)
        batches = batches | {"label": targets}
    probe = make_probe(fn, loss_fn, batches, every=1, solver="dense", **SMALL)
    _, (record,), _ = run(probe, params, 0, loss_fn=loss_fn, batches=batches)
    direction = grsd.gradient_flow_direction(loss_fn, params, batches)
    values, energies = moved_spectrum(fn, params, batches, direction, 0.0)
    h = 1e-5
    ahead, behind = (moved_spectrum(fn, params, batches, direction, s) for s in (h, -h))
    np.testing.assert_allclose(record.values, values[:6], rtol=1e-9)
    drift = (ahead[0] - behind[0])[:6] / (2 * h)
    np.testing.assert_allclose(record.drift, drift, rtol=1e-6, atol=1e-7)
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


@pytest.mark.usefixtures("x64")
def test_closure_error_falls_with_the_square_of_the_step():
    fn, params, batches, loss_fn = oracles.problem("mlp", jnp.float64)
    errors = []
    for step in (2e-3, 1e-3):
        probe = make_probe(
            fn, loss_fn, batches, every=1, solver="dense", closure_step=step, **SMALL
        )
        _, record = probe.update(probe.init(KEY, params), params, 0)
        errors.append(record.closure.total_error)
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


@pytest.mark.usefixtures("x64")
def test_relu_balance_closes_within_one_activation_pattern():
    fn, params, batches, loss_fn = oracles.problem(
        "mlp", jnp.float64, activation="relu"
    )
    errors = {}
    for step in (1e-9, 3e-2):
        probe = make_probe(
            fn, loss_fn, batches, every=1, solver="dense", closure_step=step, **SMALL
        )
        _, record = probe.update(probe.init(KEY, params), params, 0)
        errors[step] = record.closure.total_error
    assert errors[1e-9] < 1e-5
    assert errors[3e-2] > 1e-2  # patterns flip on the way


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_lanczos_knows_what_leaks_out_of_its_pairs():
    fn, params, batches, loss_fn = oracles.problem("mlp", jnp.float64)
    probe = make_probe(
        fn, loss_fn, batches, every=1, convergence=1e-11, **LANCZOS, **SMALL
    )
    state, record = probe.update(probe.init(KEY, params), params, 0)
    dense = make_probe(fn, loss_fn, batches, every=1, solver="dense", **SMALL)
    _, exact = dense.update(dense.init(KEY, params), params, 0)
    np.testing.assert_allclose(record.values, exact.values, rtol=1e-10)
    np.testing.assert_allclose(record.drift, exact.drift, rtol=1e-7)
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


@pytest.mark.parametrize("options", [{"solver": "dense"}, LANCZOS])
def test_cadence_constant_state_and_one_compilation(options):
    fn, params, batches, loss_fn = oracles.problem("mlp", jnp.float32)
    traces = []

    def counted(params, batch):
        traces.append(None)
        return fn(params, batch)

    probe = make_probe(counted, loss_fn, batches, every=3, **options, **SMALL)
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
        params = descend(loss_fn, params, batches)
    assert steps == [0, 3, 6, 9, 12]
    assert counts[1:] == [counts[1]] * 4
    assert probe.update(state, params, 12)[1] is None  # no step is recorded twice


def test_nothing_compiles_after_the_first_record(caplog):
    fn, params, batches, loss_fn = oracles.problem("mlp", jnp.float32)
    probe = make_probe(fn, loss_fn, batches, every=3, schedule=0.1, **SMALL)
    state = probe.init(KEY, params)
    state, _ = probe.update(state, params, 0)
    moved = [descend(loss_fn, params, batches)]
    moved.append(descend(loss_fn, moved[0], batches))
    with jax.log_compiles():
        for step, there in zip((3, 6), moved, strict=True):
            state, record = probe.update(state, there, step, step_seconds=0.5)
            assert record.cost_in_steps == pytest.approx(2 * record.seconds)
    assert not [r.message for r in caplog.records if "Compiling" in r.message]


@pytest.mark.parametrize("options", [{"solver": "dense"}, LANCZOS])
@pytest.mark.parametrize("value", [np.nan, 1e30])
def test_a_broken_run_is_said_once_and_then_left_alone(options, value):
    fn, params, batches, loss_fn = oracles.problem("mlp", jnp.float32)
    probe = make_probe(fn, loss_fn, batches, every=1, **options, **SMALL)
    state, record = probe.update(probe.init(KEY, params), params, 0)
    assert record.finite
    broken = jax.tree.map(lambda p: p * value, params)
    state, told = probe.update(state, broken, 1)
    assert not told.finite
    assert jax.tree.map(np.shape, told) == jax.tree.map(np.shape, record)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))
    assert not state.active
    assert probe.update(state, params, 2) == (state, None)


def test_a_standstill_divides_by_nothing():
    fn, params, batches, loss_fn = oracles.problem("mlp", jnp.float32)
    probe = make_probe(fn, loss_fn, batches, every=5, schedule=0.0, **SMALL)
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


def test_effective_time_is_the_sum_of_the_schedule():
    fn, params, batches, loss_fn = oracles.problem("mlp", jnp.float32)

    def schedule(step):
        return 0.1 * jnp.where(step < 4, jnp.float32(1), jnp.float32(0.5))

    probe = make_probe(fn, loss_fn, batches, every=3, schedule=schedule, **SMALL)
    state, times = probe.init(KEY, params), []
    for step in (0, 3, 9):
        state, record = probe.update(state, params, step)
        times.append(record.effective_time)
    np.testing.assert_allclose(times, [0, 0.3, 0.4 + 5 * 0.05], rtol=1e-6)


def test_shells_stay_and_crossings_are_counted():
    fn, params, batches, loss_fn = oracles.problem("mlp", jnp.float32)
    probe = make_probe(fn, loss_fn, batches, every=1, solver="dense", **SMALL)
    state, first = probe.update(probe.init(KEY, params), params, 0)
    assert first.shells.edges[-1] == pytest.approx(10 * first.values[0], rel=1e-5)
    assert not first.crossings.up.any()
    larger = jax.tree.map(lambda p: 1.3 * p, params)
    _, second = probe.update(state, larger, 1)
    np.testing.assert_array_equal(second.shells.edges, first.shells.edges)
    both = (first.shells.index >= 0) & (second.shells.index >= 0)
    up = np.maximum(second.shells.index - first.shells.index, 0)[both].sum()
    assert second.crossings.up.sum() == up > 0

    edges = (0.01, 0.1, 1.0)
    probe = make_probe(fn, loss_fn, batches, every=1, edges=edges, num_values=2)
    _, record = probe.update(probe.init(KEY, params), params, 0)
    np.testing.assert_allclose(record.shells.edges, edges, rtol=1e-6)
    assert record.shells.counts.sum() == record.num_resolved


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("every", 0),
        ("solver", "exact"),
        ("num_shells", 1),
        ("edges", (1.0, 0.5, 2.0)),
        ("edges", (-1.0, 0.5, 2.0)),
        ("headroom", 0.5),
        ("num_pairs", 0),
        ("tolerance", 0.0),
        ("convergence", 0.0),
        ("jacobian", "factors"),
    ],
)
def test_options_out_of_range_are_named(option, value):
    fn, _, batches, loss_fn = oracles.problem("mlp", jnp.float32)
    with pytest.raises(ValueError, match=rf"^{option}.*expected"):
        make_probe(fn, loss_fn, batches, **{"every": 1, option: value})


def test_a_direction_or_a_loss_is_needed():
    fn, params, batches, _ = oracles.problem("mlp", jnp.float32)
    probe = make_probe(fn, None, batches, every=1)
    with pytest.raises(ValueError, match=r"^direction: expected"):
        probe.update(probe.init(KEY, params), params, 0)


def test_a_learning_rate_of_zero_stands_still_in_effective_time():
    fn, params, batches, loss_fn = oracles.problem("mlp", jnp.float32)
    probe = make_probe(fn, loss_fn, batches, every=2, schedule=0.0, **SMALL)
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
