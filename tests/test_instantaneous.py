"""The instantaneous record of a probe: the rates of a step of the flow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from block_problems import batches_of
from grsd_jax import Problem, Window, gradient_flow_direction, make_probe
from grsd_jax.dynamics import Instantaneous, KrylovSteps
from grsd_jax.dynamics import instantaneous as module
from grsd_jax.shells import SoftShells
from oracles import cast, dense_kernel, network_problem

SHELLS, FEW = 5, {"num_bootstrap": 20}
LANCZOS = {
    "solver": KrylovSteps(6),
    "instantaneous": Instantaneous(Window(num_pairs=12, tolerance=0.01), **FEW),
}


@pytest.fixture(scope="module")
def mlp():
    """Returns ``(problem, params)`` in float32."""
    return network_problem("mlp", jnp.float32)


@pytest.fixture
def mlp64(x64):
    """Returns ``(problem, params)`` in float64."""
    return network_problem("mlp", jnp.float64)


def probe_of(problem, *, closure_step=None, **options):
    given = {
        "every": 1,
        "shells": SHELLS,
        "solver": "dense",
        "instantaneous": Instantaneous(closure_step=closure_step, **FEW),
    }
    return make_probe(problem, **(given | options))


def first_record(problem, params, **options):
    probe = probe_of(problem, **options)
    _, record = probe.update(probe.init(jax.random.key(0), params), params, 0)
    assert record.balance is None  # there is no earlier end
    return record.instantaneous


def test_parameters_without_a_place_for_small_steps_are_refused(mlp):
    problem, params = mlp
    in_single = lambda p, b: problem.objective.outputs_fn(cast(p, jnp.float32), b)  # noqa: E731
    probe = probe_of(problem.replace(outputs_fn=in_single))
    with pytest.raises(ValueError, match=r"^params.*: expected dtype float32 or"):
        probe.init(jax.random.key(0), cast(params, jnp.bfloat16))
    with pytest.raises(ValueError, match=r"^step: expected at least 1.2e-07"):
        probe_of(problem, closure_step=1e-9).init(jax.random.key(0), params)


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
    record = first_record(problem, params)
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
        first_record(*mlp64, closure_step=step).closure.total_error
        for step in (2e-3, 1e-3)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


@pytest.mark.usefixtures("x64")
def test_relu_balance_closes_within_one_activation_pattern():
    given = network_problem("mlp", jnp.float64, activation="relu")
    inside, beyond = (
        first_record(*given, closure_step=step).closure.total_error
        for step in (1e-9, 3e-2)
    )
    assert inside < 1e-5
    assert beyond > 1e-2  # patterns flip on the way


@pytest.mark.slow
def test_lanczos_knows_what_leaks_out_of_its_pairs(mlp64, monkeypatch):
    problem, params = mlp64
    monkeypatch.setattr(module, "_CONVERGENCE", 1e-11)
    probe = probe_of(problem, **LANCZOS)
    state, record = probe.update(probe.init(jax.random.key(0), params), params, 0)
    record = record.instantaneous
    exact = first_record(problem, params)
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
    again = again.instantaneous
    np.testing.assert_allclose(again.values, record.values, rtol=1e-10)
    assert again.num_columns <= record.num_columns


def test_a_standstill_divides_by_nothing(mlp):
    problem, params = mlp
    probe = probe_of(problem, every=5, schedule=0.0)
    nowhere = jax.tree.map(jnp.zeros_like, params)
    state = probe.init(jax.random.key(0), params)
    for step in (0, 5):
        state, whole = probe.update(state, params, step, direction=nowhere)
        record = whole.instantaneous
        assert whole.finite
        assert whole.effective_time == 0
        assert record.closure.total_error == 0
        assert not record.drift.any()
        assert np.all(np.isfinite(record.dynamics.velocity))
        assert not record.crossings.up.any()
    assert not np.any(whole.balance.lost)
    assert np.all(np.abs(whole.balance.flux) <= whole.balance.flux_error)


def test_crossings_are_counted_in_the_shells_of_the_balance(mlp):
    problem, params = mlp
    probe = probe_of(problem)
    state, first = probe.update(probe.init(jax.random.key(0), params), params, 0)
    assert not first.instantaneous.crossings.up.any()
    larger = jax.tree.map(lambda p: 1.3 * p, params)
    _, second = probe.update(state, larger, 1)
    first, balance, second = first.instantaneous, second.balance, second.instantaneous
    np.testing.assert_array_equal(second.shells.edges, first.shells.edges)
    np.testing.assert_array_equal(second.shells.edges[1:-1], balance.shells.edges)
    # Beyond the inner edges are outer ones, a step of the logarithm away.
    steps = np.diff(np.log(second.shells.edges))
    np.testing.assert_allclose(steps, steps[0], rtol=1e-4)
    both = (first.shells.index >= 0) & (second.shells.index >= 0)
    up = np.maximum(second.shells.index - first.shells.index, 0)[both].sum()
    assert second.crossings.up.sum() == up > 0


def test_the_number_of_values_is_kept(mlp, monkeypatch):
    monkeypatch.setattr(module, "_NUM_VALUES", 2)
    shells = SoftShells(jnp.asarray([0.1]))
    record = first_record(*mlp, shells=shells)
    np.testing.assert_allclose(record.shells.edges, [0.01, 0.1, 1.0], rtol=1e-6)
    assert record.shells.counts.sum() == record.num_resolved
    assert record.values.shape == record.drift.shape == (2,)


@pytest.mark.not_in_mode("debug_nans")
@pytest.mark.parametrize(
    "options", [{}, pytest.param(LANCZOS, marks=pytest.mark.scheduled)]
)
def test_a_broken_run_ends_both_records(mlp, options):
    problem, params = mlp
    probe = probe_of(problem, **options)
    state, record = probe.update(probe.init(jax.random.key(0), params), params, 0)
    assert record.finite
    broken = jax.tree.map(lambda p: p * jnp.nan, params)
    state, told = probe.update(state, broken, 1)
    assert not told.finite
    assert not told.instantaneous.finite
    shapes = [jax.tree.map(np.shape, x.instantaneous) for x in (told, record)]
    assert shapes[0] == shapes[1]
    assert not state.active
    assert probe.update(state, params, 2) == (state, None)


def test_a_direction_or_a_loss_is_needed(mlp):
    problem, params = mlp
    without = Problem.from_error(problem.error, problem.batches)
    probe = probe_of(without)
    with pytest.raises(ValueError, match=r"^loss_fn: expected one .* a direction"):
        probe.update(probe.init(jax.random.key(0), params), params, 0)


def test_it_is_no_part_of_a_pure_record(mlp):
    problem, params = mlp
    probe = make_probe(problem, every=1, instantaneous=True)
    assert probe.instantaneous == Instantaneous()
    state = probe.init(jax.random.key(0), params)
    with pytest.raises(ValueError, match=r"^record: expected a probe without instant"):
        probe.record(state, params, 0)
    plain = make_probe(problem, every=1)
    with pytest.raises(ValueError, match=r"^direction: expected None without instant"):
        plain.update(plain.init(jax.random.key(0), params), params, 0, direction=params)
    with pytest.raises(ValueError, match=r"^instantaneous: expected a Instantaneous"):
        make_probe(problem, every=1, instantaneous=Window())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("window", 64, "window: expected a Window, got 64"),
        ("num_bootstrap", -1, "num_bootstrap: expected an integer >= 0, got -1"),
        ("closure_step", np.inf, "closure_step: expected a finite number > 0, got inf"),
        ("closure_step", 0.0, "closure_step: expected a finite number > 0, got 0.0"),
        ("closure_step", True, "closure_step: expected a finite number > 0, got True"),
    ],
)
def test_an_option_out_of_range_is_named(option, value, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Instantaneous(**{option: value})
