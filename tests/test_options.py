"""The options of a measurement: what each refuses, and what a window leaves out."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax import (
    Binning,
    Derivative,
    Lanczos,
    Problem,
    Window,
    kernel_dense,
    layer_kernels,
    make_probe,
    measure_coupling,
)
from grsd_jax.conditions import smallest_band
from grsd_jax.dynamics import covariance_check, effective_time, integrate_flow
from grsd_jax.linalg import (
    RitzPairs,
    block_lanczos,
    leading_eigenpairs,
    resolved_pairs,
    spectral_density,
)
from grsd_jax.shells import SoftShells, log_shells
from grsd_jax.shells.measurement import leading_pairs


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Window, {"num_pairs": 0}, "num_pairs: expected an integer >= 1, got 0"),
        (Window, {"num_pairs": 2.0}, "num_pairs: expected an integer >= 1, got 2.0"),
        (Window, {"floor": 0.0}, "floor: expected a finite number > 0, got 0.0"),
        (Window, {"floor": True}, "floor: expected a finite number > 0, got True"),
        (Window, {"floor": np.nan}, "floor: expected a finite number > 0, got nan"),
        (Window, {"floor": 1.5}, "floor: expected at most 1, got 1.5"),
        (Window, {"num_pairs": True}, "num_pairs: expected an integer >= 1, got True"),
        (Window, {"tolerance": np.inf}, "tolerance: expected a finite number > 0, got"),
        (Window, {"tolerance": True}, "tolerance: expected a finite number > 0, got T"),
        (Window, {"tolerance": -1.0}, "tolerance: expected a finite number > 0"),
        (Window, {"tolerance": None}, "tolerance: expected a finite number > 0"),
        (Binning, {"num_shells": 0}, "num_shells: expected an integer >= 1, got 0"),
        (Binning, {"window": 0}, "window: expected an integer >= 1, got 0"),
        (Binning, {"num_shells": 4}, "window: expected at most num_shells = 4, got 5"),
        (Binning, {"min_count": 0}, "min_count: expected an integer >= 1, got 0"),
        (Binning, {"num_bootstrap": -1}, "num_bootstrap: expected an integer >= 0"),
        (Binning, {"num_bootstrap": 1e3}, "num_bootstrap: expected an integer >= 0"),
        (
            Binning,
            {"num_shells": np.nan},
            "num_shells: expected an integer >= 1, got",
        ),
        (Derivative, {"step": np.nan}, "step: expected a finite number > 0, got nan"),
        (Derivative, {"step": -0.1}, "step: expected a finite number > 0, got -0.1"),
        (Derivative, {"step": True}, "step: expected a finite number > 0, got True"),
        (Derivative, {"step": "1"}, "step: expected a finite number > 0, got '1'"),
        (Lanczos, {"num_steps": 2.0}, "num_steps: expected an integer >= 1, got 2.0"),
        (Derivative, {"method": "secant"}, "method: expected one of 'exact', 'finite_"),
        (Derivative, {"step": 0.0}, "step: expected a finite number > 0, got 0.0"),
        (Lanczos, {"block_size": 0}, "block_size: expected an integer >= 1, got 0"),
        (Lanczos, {"num_steps": True}, "num_steps: expected an integer >= 1, got True"),
    ],
)
def test_a_value_out_of_range_is_named(make, options, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        make(**options)


def test_the_defaults_are_in_range_and_hashable():
    for option in (Window(), Binning(), Derivative(), Lanczos()):
        hash(option)
    assert Window(floor=1e-3, num_pairs=1, tolerance=1) != Window()


def stated():
    x = jax.random.normal(jax.random.key(0), (1, 4, 3))
    problem = Problem.from_error(lambda p, b: jnp.tanh(b["x"] @ p), {"x": x})
    return problem, jax.random.normal(jax.random.key(1), (3, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 5}, "window: expected a Window, got 5"),
        ({"shells": Window()}, "shells: expected a Binning, got Window("),
        ({"derivative": "exact"}, "derivative: expected a Derivative, got 'exact'"),
        ({"solver": "qr"}, "solver: expected one of 'auto', 'dense', 'lanczos'"),
        ({"solver": 8}, "solver: expected one of 'auto', 'dense', 'lanczos'"),
        ({"solver": Lanczos(9, 1)}, "block_size: expected at most the error dim"),
    ],
)
def test_options_of_another_kind_are_named(options, message):
    problem, params = stated()
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        measure_coupling(problem, params, params, key=jax.random.key(0), **options)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("every", True, "every: expected an integer >= 1, got True"),
        ("every", 2.0, "every: expected an integer >= 1, got 2.0"),
        ("every", np.nan, "every: expected an integer >= 1, got nan"),
        ("every", -1, "every: expected an integer >= 1, got -1"),
        ("schedule", np.nan, "schedule: expected a finite number >= 0, got nan"),
        ("schedule", -0.1, "schedule: expected a finite number >= 0, got -0.1"),
        ("schedule", [0.1], "schedule: expected a finite number >= 0, got [0.1]"),
        ("schedule", "fast", "schedule: expected a finite number >= 0, got 'fast'"),
        ("over", (3,), "over: expected a list of integers from 1 to every - 1 = 0"),
        ("shells", 1, "shells: expected an integer >= 2, got 1"),
        ("shells", (0.1, 1.0), "shells: expected an integer >= 2, got (0.1, 1.0)"),
        ("solver", "lanczos", "solver: expected one of 'auto', 'dense', got 'lanczos'"),
    ],
)
def test_an_option_of_a_probe_out_of_range_is_named(option, value, message):
    problem, _ = stated()
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        make_probe(problem, **{"every": 1, option: value})


def test_numbers_of_an_update_out_of_range_are_named():
    problem, params = stated()
    probe = make_probe(problem, every=2, schedule=jnp.float32(0.1))
    state = probe.init(jax.random.key(0), params)
    for step in (0.5, 2.0, "2", None, np.nan):
        with pytest.raises(ValueError, match=r"^step: expected an integer whose value"):
            probe.update(state, params, step)
    for step in (1, np.int64(3), jnp.int32(5)):  # none is due
        assert probe.update(state, params, step) == (state, None)
    for seconds in (0.0, -1.0, np.inf):
        with pytest.raises(ValueError, match=r"^step_seconds: expected a finite"):
            probe.update(state, params, 1, step_seconds=seconds)


def large():
    """Returns a problem of n = 4 million by shapes; its arrays are never made."""
    x = np.broadcast_to(np.float32(1), (1, 2_000_000, 3))
    problem = Problem.from_error(lambda p, b: jnp.tanh(b["x"] @ p), {"x": x})
    return problem, np.ones((3, 2), np.float32)


KEY = jax.random.key(0)
TOO_LARGE = [
    ("dense", "^problem: 1 dense matrices of n = 4000000 .* use kernel_matmat"),
    ("derivative", "^problem: 2 dense matrices of n = 4000000 .* use kernel_matmat"),
    ("layers", "^problem: 1 dense matrices .* measure fewer batches or examples"),
    ("solver", r"^problem: 4 dense matrices .* solver=Lanczos\(...\) in a measurement"),
    (
        "steps",
        r"^solver: a basis .* of 800000 columns .* lower num_steps or",
    ),
    ("bootstrap", "^shells: 1000000000000 resamples of 160 pairs .* num_bootstrap"),
    ("probe", r"^problem: 4 dense matrices of n = 4000000 .* solver=Lanczos"),
]


@pytest.mark.parametrize(("name", "message"), TOO_LARGE)
def test_what_cannot_fit_is_said_before_the_work(name, message):
    small, (problem, params) = stated(), large()
    calls = {
        "dense": lambda: kernel_dense(problem, params),
        "derivative": lambda: kernel_dense(problem, params, params),
        "layers": lambda: layer_kernels(problem, params),
        "solver": lambda: measure_coupling(
            problem, params, params, key=KEY, solver="dense"
        ),
        "steps": lambda: measure_coupling(
            problem, params, params, key=KEY, solver=Lanczos(8, 100_000)
        ),
        "bootstrap": lambda: measure_coupling(
            *small,
            small[1],
            key=KEY,
            solver=Lanczos(8, 20),
            shells=Binning(num_bootstrap=10**12),
        ),
        "probe": lambda: make_probe(problem, every=1, solver="dense").init(KEY, params),
    }
    with pytest.raises(MemoryError, match=message):
        calls[name]()


def test_a_window_keeps_the_leading_pairs_that_were_resolved_before():
    resolved = jnp.asarray([True, False, True, True])
    pairs = RitzPairs(jnp.arange(4.0)[::-1], jnp.eye(4), jnp.zeros(4), resolved)
    assert leading_pairs(pairs, Window(num_pairs=None)) is pairs
    for num_pairs, kept in [(1, [1, 0, 0, 0]), (3, [1, 0, 1, 0]), (9, resolved)]:
        got = leading_pairs(pairs, Window(num_pairs=num_pairs))
        np.testing.assert_array_equal(got.resolved, np.asarray(kept, bool))
        assert got.values is pairs.values


@pytest.mark.parametrize("solver", ["dense", Lanczos(block_size=2, num_steps=4)])
def test_a_measurement_uses_the_leading_pairs_of_its_window(solver):
    x = jax.random.normal(jax.random.key(0), (1, 4, 3))
    problem = Problem.from_error(lambda p, b: jnp.tanh(b["x"] @ p), {"x": x})
    params = jax.random.normal(jax.random.key(1), (3, 2))
    shells = Binning(num_shells=2, window=2, num_bootstrap=0)

    def measure(window):
        return measure_coupling(
            problem,
            params,
            params,
            key=jax.random.key(2),
            solver=solver,
            window=window,
            shells=shells,
        )

    whole, part = measure(Window()), measure(Window(num_pairs=3))
    assert whole.values.shape == part.values.shape == (8,)
    assert np.sum(whole.resolved) > 3
    np.testing.assert_array_equal(part.resolved, np.arange(8) < 3)
    np.testing.assert_array_equal(part.values, whole.values)
    np.testing.assert_allclose(part.shells.edges[0], whole.values[2], rtol=1e-6)
    assert int(np.sum(part.shells.counts)) == int(part.diagonal_fit.num_points) == 3


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int64])
def test_integers_of_numpy_count_as_those_of_python(kind):
    values = jnp.asarray(np.geomspace(1, 1e-3, 8), jnp.float32)
    edges = log_shells(values, kind(3)).edges
    np.testing.assert_allclose(edges, np.geomspace(1e-3, 1, 4), rtol=1e-5)
    assert edges.dtype == jnp.float32
    # Sums of steps leave 8 bits, as does -2, by which blocks are counted.
    time = effective_time(lambda step: step * 1.0, kind(7), first_step=kind(122))
    np.testing.assert_allclose(time[-1], sum(range(122, 129)), rtol=1e-6)
    found = leading_eigenpairs(
        jax.jit(lambda block: values[:, None] * block),
        jax.random.normal(jax.random.key(0), (8, 1), jnp.float32),
        kind(2),
        key=jax.random.key(1),
        check_every=kind(1),
    )
    np.testing.assert_allclose(found.values, values[:2], rtol=1e-3)
    flow = integrate_flow(
        lambda p: -p, jnp.ones(1), step=kind(1), num_steps=kind(2), substeps=kind(20)
    )
    np.testing.assert_allclose(flow[:, 0], np.exp([0, -1, -2]), rtol=1e-4)
    assert type(Binning(num_shells=kind(6)).num_shells) is int


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_numbers_of_numpy_do_not_change_the_dtype(kind, x64):
    values = jnp.asarray(np.geomspace(1, 1e-3, 8), jnp.float32)
    run = block_lanczos(
        jax.jit(lambda block: values[:, None] * block),
        jax.random.normal(jax.random.key(0), (8, 2), jnp.float32),
        3,
        key=jax.random.key(1),
    )
    density = spectral_density(run, np.int64(8), width=kind(0.1))
    assert {leaf.dtype for leaf in jax.tree.leaves(density)} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(
        resolved_pairs(values, 0.01 * values, tolerance=kind(0.5)), True
    )
    assert type(Window(tolerance=kind(0.5)).tolerance) is float


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Window(tolerance=10**400), "tolerance: expected a finite number > 0"),
        (lambda: Binning(num_shells=2**31), "num_shells: expected an integer <= 2147"),
        (lambda: SoftShells(jnp.ones(1), True), "width: expected a finite number >= 0"),
        (lambda: Derivative(cross_checked="no"), "cross_checked: expected a bool, got"),
        (lambda: Derivative(method=np.ones(2)), "method: expected one of 'exact', "),
        (
            lambda: smallest_band(jnp.ones(2), "x"),
            "share: expected a number in (0, 1], got",
        ),
        (
            lambda: integrate_flow(lambda p: p, jnp.ones(1), step="x", num_steps=1),
            "step: expected an array of numbers, got str",
        ),
        (
            lambda: covariance_check(None, None, scale=1e308, time=1.0, num_steps=1),
            "scale: expected less than 2147483647, got 1e+308",
        ),
    ],
)
def test_what_jax_cannot_count_or_compare_is_one_sentence(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_integers_beyond_32_bits_are_numbers_where_any_is():
    values = jnp.asarray([1.0, 0.5], jnp.float32)
    assert resolved_pairs(values, values, tolerance=2**40).all()
