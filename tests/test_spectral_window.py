"""Both solvers measure the same pairs, and say what lies outside them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax import (
    Binning,
    Lanczos,
    Problem,
    Window,
    gradient_flow_direction,
    measure_coupling,
)
from grsd_jax.dynamics.moving_spectrum import Finder, moving_spectrum
from grsd_jax.problem import point_at
from grsd_jax.shells import measurement
from network_parts import normals, rms_norm
from test_between_ends import repeated_top

WINDOW = Window(num_pairs=24)
SHELLS = Binning(num_shells=5, window=3, num_bootstrap=0)


def dense_layers():
    params = normals(0, first=(6, 12), second=(12, 4))
    return lambda p, batch: jnp.tanh(batch["x"] @ p["first"]) @ p["second"], params


def convolution():
    params = normals(1, kernel=(3, 1, 4), out=(4, 4))

    def outputs_fn(p, batch):
        signal = batch["x"][..., None]
        hidden = jax.lax.conv_general_dilated(
            signal, p["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return jnp.mean(jax.nn.relu(hidden), axis=1) @ p["out"]

    return outputs_fn, params


def attention():
    params = normals(2, embed=(3, 8), query=(8, 8), key=(8, 8), out=(8, 4))

    def outputs_fn(p, batch):
        tokens = rms_norm(batch["x"].reshape(-1, 2, 3) @ p["embed"], 1)
        scores = (tokens @ p["query"]) @ (tokens @ p["key"]).swapaxes(1, 2)
        mixed = jax.nn.softmax(scores) @ tokens
        return jnp.mean(mixed, axis=1) @ p["out"]

    return outputs_fn, params


def problem_of(network, reduction="stack"):
    outputs_fn, params = network()
    x_key, label_key = jax.random.split(jax.random.key(3))
    batches = {
        "x": jax.random.normal(x_key, (2, 12, 6)),
        "label": jax.random.randint(label_key, (2, 12), 0, 4),
    }
    return Problem(outputs_fn, batches, reduction=reduction), params


def measure(problem, params, solver, window=WINDOW):
    return measure_coupling(
        problem,
        params,
        key=jax.random.key(0),
        solver=solver,
        window=window,
        shells=SHELLS,
    )


@pytest.mark.parametrize(
    ("network", "reduction"),
    [
        pytest.param(dense_layers, "stack", marks=pytest.mark.scheduled),
        (convolution, "stack"),
        (attention, "mean"),
    ],
)
def test_solvers_agree_on_the_window(network, reduction):
    problem, params = problem_of(network, reduction)
    dense, lanczos = (measure(problem, params, s) for s in ("dense", "lanczos"))
    assert dense.window == lanczos.window == WINDOW
    assert dense.num_missing == lanczos.num_missing == 0
    count = int(dense.resolved.sum())
    assert count == int(lanczos.resolved.sum()) > 10
    error = dense.residuals[:count] + lanczos.residuals[:count]
    assert np.all(np.abs(dense.values[:count] - lanczos.values[:count]) <= error)
    for fit in ("diagonal_fit", "shell_fit"):
        one, other = getattr(dense, fit), getattr(lanczos, fit)
        assert abs(one.exponent - other.exponent) < 0.2 * one.exponent_stderr
        np.testing.assert_allclose(one.r_squared, other.r_squared, atol=0.02)
    for kind in ("literal", "renormalized"):
        one, other = getattr(dense, kind), getattr(lanczos, kind)
        np.testing.assert_allclose(one.residual, other.residual, atol=0.02)
        np.testing.assert_array_equal(one.degrees_of_freedom, other.degrees_of_freedom)
    np.testing.assert_allclose(
        dense.unresolved_share, lanczos.unresolved_share, atol=5e-3
    )


@pytest.mark.parametrize(
    ("solver", "reduction"), [("dense", "stack"), ("lanczos", "mean")]
)
def test_the_share_of_the_error_outside_the_pairs(solver, reduction):
    problem, params = problem_of(dense_layers, reduction)
    got = measure(problem, params, solver, window=Window(num_pairs=6))
    errors = [
        problem.error(params, jax.tree.map(lambda leaf, k=k: leaf[k], problem.batches))
        for k in (0, 1)
    ]
    rows = np.stack([np.ravel(error) for error in errors]).astype(np.float64)
    columns = rows.reshape(-1, 1) if reduction == "stack" else rows.T
    vectors = np.asarray(got.vectors, np.float64)[:, np.asarray(got.resolved)]
    assert vectors.shape[1] == 6
    outside = columns - vectors @ (vectors.T @ columns)
    share = np.sum(outside**2) / np.sum(columns**2)
    assert 0.05 < share < 0.99
    np.testing.assert_allclose(got.unresolved_share, share, rtol=1e-4)
    sentences = " ".join(got.caveats)
    assert ("error's energy lies outside" in sentences) == (share > 0.5)


@pytest.mark.parametrize("solver", ["dense", "lanczos"])
def test_a_floor_ends_the_window_of_both_solvers(solver):
    problem, params = problem_of(dense_layers)
    got = measure(problem, params, solver, window=Window(num_pairs=None, floor=1e-2))
    assert got.complete
    values = np.asarray(measure(problem, params, "dense").values)
    expected = int(np.sum(values > 1e-2 * values[0]))
    assert 3 < expected < 60
    assert int(got.resolved.sum()) == expected
    assert got.num_missing == 0


def test_values_at_their_rounding_are_not_resolved_by_lanczos_either():
    values = jnp.asarray([1, 1e-3, 2e-5, 5e-6], jnp.float32)
    start = jax.random.normal(jax.random.key(0), (4, 2), jnp.float32)
    pairs, complete = measurement._converged_pairs(
        lambda v: values[:, None] * v, start, Window(4), jax.random.key(1), None
    )
    np.testing.assert_array_equal(pairs.resolved, [True, True, True, False])
    assert measurement.missing_pairs(pairs, 4, Window(4)) == 1
    assert complete


def test_copies_that_a_narrow_block_may_miss_are_a_caveat():
    problem, size = repeated_top()
    params = jnp.zeros(size)
    options = {"window": Window(10), "shells": SHELLS, "key": jax.random.key(0)}
    narrow = measure_coupling(
        problem, params, jnp.ones(size), solver=Lanczos(block_size=4), **options
    )
    assert narrow.num_missing == 0  # ten pairs, of which twelve should be the largest
    assert np.sum(narrow.values > 4.9) < 10
    assert not narrow.complete
    assert any("Copies of a repeated eigenvalue" in said for said in narrow.caveats)
    assert "Copies of a repeated eigenvalue" in str(narrow)
    given = Lanczos(block_size=4, num_steps=8)
    steps = measure_coupling(problem, params, jnp.ones(size), solver=given, **options)
    assert steps.complete is None
    assert not any("Copies" in said for said in steps.caveats)


def test_a_moving_spectrum_says_if_copies_may_be_missing():
    problem, size = repeated_top()
    point = point_at(problem, jnp.zeros(size))
    finder = Finder(Window(10), block_size=4, convergence=1e-3)
    basis = {"vectors": jnp.zeros((size, 10))}
    for start, complete in ((basis, False), ({}, True)):
        found = moving_spectrum(point, start, finder, warm=False, key=jax.random.key(0))
        assert found.complete == complete


def test_pairs_that_too_few_steps_leave_out_are_counted():
    problem, params = problem_of(dense_layers)
    few = Lanczos(block_size=4, num_steps=4)
    got = measure(problem, params, few)
    assert got.values.shape == (16,)
    resolved = int(got.resolved.sum())
    assert got.num_missing == 24 - resolved > 8
    assert "pairs of the spectral window are not resolved" in " ".join(got.caveats)
    open_ended = measure(problem, params, few, window=Window(num_pairs=None))
    assert open_ended.num_missing >= 16 - resolved + 1


def test_pairs_below_the_floor_are_not_missing():
    problem, params = problem_of(dense_layers)
    narrow = problem.replace(
        batches=jax.tree.map(lambda leaf: leaf[:1, :2], problem.batches)
    )
    for solver in ("dense", "lanczos"):  # two examples of softmax: rank 6 of 8
        got = measure(narrow, params, solver)
        assert int(got.resolved.sum()) == 6
        assert got.num_missing == 0


def test_a_given_number_of_steps_inside_jit_is_two_columns_a_pair():
    problem, params = problem_of(dense_layers)
    direction = gradient_flow_direction(problem, params)

    @jax.jit
    def compiled(problem, params, direction):
        return measure_coupling(
            problem,
            params,
            direction,
            key=jax.random.key(0),
            solver="lanczos",
            window=WINDOW,
            shells=SHELLS,
        )

    got = compiled(problem, params, direction)
    eager = measure(problem, params, Lanczos(8, 6))
    assert got.values.shape == (48,)
    np.testing.assert_allclose(got.values[:10], eager.values[:10], rtol=1e-4)
    assert got.num_missing == eager.num_missing
