"""The gradient flow: order of the integrator, effective time, and Lemma 1."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grsd_jax import Problem, gradient_flow_direction, kernel_dense
from grsd_jax.dynamics import (
    covariance_check,
    effective_time,
    eigenvalue_drift,
    flow_step,
    integrate_flow,
)
from oracles import network_problem


def oscillator(state):
    return {"x": state["v"], "v": -state["x"]}


@pytest.mark.usefixtures("x64")
def test_integrator_is_of_fourth_order():
    start = {"x": jnp.asarray([1.0]), "v": jnp.asarray([0.0])}
    errors = []
    for substeps in (2, 4, 8):
        path = integrate_flow(
            oscillator, start, step=0.5, num_steps=4, substeps=substeps
        )
        assert path["x"].shape == (5, 1)
        exact = np.cos(0.5 * np.arange(5))
        errors.append(np.max(np.abs(path["x"][:, 0] - exact)))
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), 4, atol=0.2)


def test_integrator_keeps_the_dtype_of_the_parameters():
    start = {"x": jnp.ones(1, jnp.float32), "v": jnp.zeros(1, jnp.float32)}
    path = integrate_flow(oscillator, start, step=0.1, num_steps=2)
    assert path["x"].dtype == jnp.float32
    with pytest.raises(ValueError, match="num_steps: expected an integer >= 1"):
        integrate_flow(oscillator, start, step=0.1, num_steps=0)
    with pytest.raises(ValueError, match="substeps: expected an integer >= 1"):
        integrate_flow(oscillator, start, step=0.1, num_steps=1, substeps=0)


def test_parameters_that_small_steps_do_not_move_are_refused():
    step = {"step": 1e-3, "num_steps": 1, "substeps": 500}
    field = lambda x: -x  # noqa: E731
    end = integrate_flow(field, jnp.ones(1, jnp.float32), **step)[-1]
    np.testing.assert_allclose(end, np.exp(-1e-3), rtol=1e-4)
    for dtype in (jnp.bfloat16, jnp.float16):
        with pytest.raises(ValueError, match="params: expected dtype float32 or float"):
            integrate_flow(field, jnp.ones(1, dtype), **step)


@pytest.mark.usefixtures("x64")
def test_gradients_pass_through_the_flow():
    def end(rate):
        path = integrate_flow(
            lambda x: -rate * x, jnp.asarray(2.0), step=0.1, num_steps=5
        )
        return path[-1]

    gradient = jax.grad(end)(jnp.asarray(1.5))
    np.testing.assert_allclose(gradient, -0.5 * 2 * np.exp(-0.75), rtol=1e-4)


SCHEDULES = {
    "constant": optax.constant_schedule(0.1),
    "cosine": optax.cosine_decay_schedule(0.3, 40),
    "warmup": optax.warmup_cosine_decay_schedule(0.0, 0.2, 10, 40),
    "steps": optax.piecewise_constant_schedule(0.4, {15: 0.1, 30: 0.1}),
    "joined": optax.join_schedules(
        [optax.linear_schedule(0.0, 1.0, 10), optax.exponential_decay(1.0, 5, 0.5)],
        [10],
    ),
    "plain": lambda step: 1 / (1.0 + step),
    "integer": lambda step: 1,
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_effective_time_sums_any_schedule(name):
    schedule = SCHEDULES[name]
    times = effective_time(schedule, 50)
    with jax.numpy_dtype_promotion("standard"):
        rates = [float(schedule(step)) for step in range(50)]
    np.testing.assert_allclose(times, np.cumsum([0, *rates]), rtol=1e-5)
    assert times.dtype == jnp.float32
    later = effective_time(schedule, 20, first_step=30)
    np.testing.assert_allclose(times[30] + later, times[30:], rtol=1e-4)


def test_effective_time_stands_still_at_rate_zero_and_may_be_empty():
    times = effective_time(optax.constant_schedule(0.0), 5)
    np.testing.assert_array_equal(times, np.zeros(6))
    assert effective_time(optax.constant_schedule(0.1), 0).shape == (1,)


def test_effective_time_of_many_steps_keeps_its_precision():
    times = effective_time(optax.constant_schedule(0.1), 100_000)
    np.testing.assert_allclose(times[-1], 1e4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_effective_time_of_half_precision_does_not_stand_still(dtype):
    rate = jnp.asarray(64.25, dtype)
    times = effective_time(lambda step: rate, 3000)
    assert times.dtype == jnp.float32
    np.testing.assert_allclose(times[-1], 3000 * float(rate), rtol=1e-6)


def test_a_step_or_a_field_of_another_shape_is_refused():
    start = jnp.ones(3, jnp.float32)
    with pytest.raises(ValueError, match=r"step: expected shape \[\], got \[3\]"):
        flow_step(jnp.negative, start, start)
    with pytest.raises(ValueError, match="step: expected real numbers"):
        flow_step(jnp.negative, start, 0.1j)
    for follow in (
        lambda step: flow_step(jnp.negative, start, step),
        lambda step: integrate_flow(jnp.negative, start, step=step, num_steps=2),
    ):
        with pytest.raises(ValueError, match="step: expected a finite number, got nan"):
            follow(jnp.nan)
    with pytest.raises(ValueError, match=r"field\(params\): expected shape \[3\]"):
        flow_step(jnp.sum, start, 0.1)


def test_effective_time_names_what_does_not_fit():
    with pytest.raises(ValueError, match="num_steps: expected an integer >= 0"):
        effective_time(optax.constant_schedule(0.1), -1)
    for rate in (jnp.ones(2), 0.1 + 1j):
        with pytest.raises(ValueError, match="schedule: expected one real number"):
            effective_time(lambda step, rate=rate: rate * step, 4)
    with pytest.raises(ValueError, match="first_step: expected first_step"):
        effective_time(optax.constant_schedule(0.1), 4, first_step=2**31 - 2)


@pytest.mark.usefixtures("x64")
def test_gradient_descent_follows_the_flow_in_effective_time():
    problem, params = network_problem("mlp", jnp.float64, loss="squared")

    def field(p):
        return gradient_flow_direction(problem, p)

    def gap(refinement):
        steps = 16 * refinement
        schedule = optax.cosine_decay_schedule(0.4 / refinement, steps)
        end = effective_time(schedule, steps)[-1]
        flow = integrate_flow(field, params, step=end, num_steps=1, substeps=32)

        def descend(p, step):
            with jax.numpy_dtype_promotion("standard"):
                rate = schedule(step)
            return jax.tree.map(lambda x, d: x + rate * d, p, field(p)), None

        descent, _ = jax.lax.scan(descend, params, jnp.arange(steps))
        gaps = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a[-1] - b)), flow, descent)
        return max(map(float, jax.tree.leaves(gaps)))

    coarse, fine = gap(8), gap(32)
    np.testing.assert_allclose(coarse / fine, 4, rtol=0.25)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scale", [2, 4])
def test_scaled_loss_scales_eigenvalues_and_time(scale):
    problem, params = network_problem("mlp", jnp.float64, loss="squared")
    errors = []
    for num_steps in (16, 32):
        found = covariance_check(
            problem, params, scale=scale, time=1.6 / scale, num_steps=num_steps
        )
        errors.append(float(found.error))
        assert found.scaled.shape == found.expected.shape == (num_steps + 1, 30)
    # The eigenvalues move by far more than the two flows differ.
    moved = np.max(np.abs(found.scaled[-1] - found.scaled[0])) / np.max(found.scaled)
    assert moved > 0.02
    assert errors[-1] < 1e-5 * moved
    np.testing.assert_allclose(np.log2(errors[0] / errors[1]), 4, atol=0.8)
    np.testing.assert_allclose(found.times[-1], 1.6 / scale)


@pytest.mark.usefixtures("x64")
def test_drift_of_the_scaled_flow_is_the_square_of_the_scale():
    # v(a lambda, t) = a^2 v(lambda, a t): by differences along both trajectories.
    problem, params = network_problem("mlp", jnp.float64, loss="squared")
    found = covariance_check(problem, params, scale=3, time=0.003, num_steps=2)
    step = float(found.times[1])
    scaled = (found.scaled[2] - found.scaled[0]) / (2 * step)
    middle = jax.tree.map(
        lambda leaf: leaf[1],
        integrate_flow(
            lambda p: gradient_flow_direction(problem, p),
            params,
            step=3 * step,
            num_steps=1,
            substeps=4,
        ),
    )
    direction = gradient_flow_direction(problem, middle)
    kernel, moved = kernel_dense(problem, middle, direction)
    _, vectors = jnp.linalg.eigh(kernel)
    drift = eigenvalue_drift(vectors.T @ moved @ vectors)
    np.testing.assert_allclose(
        scaled, 9 * drift, atol=1e-3 * float(jnp.max(jnp.abs(9 * drift)))
    )


def test_flows_that_run_off_are_told_though_their_kernels_vanish():
    """Steps far too long drive a tanh into saturation, where M is 0 or nearly so."""
    rng = np.random.default_rng(0)
    batches = {
        name: jnp.asarray(rng.normal(size=(1, 6, size)), jnp.float32)
        for name, size in (("x", 3), ("label", 1))
    }
    params = jnp.asarray(rng.normal(size=(3, 1)), jnp.float32)
    problem = Problem(lambda p, b: jnp.tanh(b["x"] @ p), batches, loss="squared")
    found = covariance_check(problem, params, scale=2.0, time=200.0, num_steps=1)
    assert not found.error < 0.5
    sizes = np.abs(found.expected).max(axis=1)
    assert sizes[-1] < 1e-6 * sizes[0]


def test_covariance_check_names_what_does_not_fit():
    params = jnp.ones(2)
    problem = Problem.from_error(
        lambda p, batch: batch["x"] * p, {"x": jnp.ones((1, 3, 2))}
    )
    with pytest.raises(ValueError, match="scale: expected a finite number > 0"):
        covariance_check(problem, params, scale=0, time=1.0, num_steps=1)
    with pytest.raises(ValueError, match="time: expected a finite number > 0"):
        covariance_check(problem, params, scale=2, time=-1.0, num_steps=1)
    with pytest.raises(ValueError, match="num_steps: expected an integer >= 1"):
        covariance_check(problem, params, scale=2, time=1.0, num_steps=0)
