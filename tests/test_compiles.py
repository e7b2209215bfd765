"""A training run compiles each program once, at its first step."""

import contextlib

import jax
import jax.numpy as jnp
import pytest

from grsd_jax import gradient_flow_direction, linearize_kernel, measure_coupling
from oracles import problem, random_batches


@contextlib.contextmanager
def compilations():
    """Yields a list that grows by one entry with every program compiled."""
    found = []

    def listen(event, duration, **details):
        if event.endswith("backend_compile_duration"):
            found.append(details)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@jax.jit
def descend(params, direction):
    return jax.tree.map(lambda p, d: p + 0.1 * d, params, direction)


@pytest.mark.parametrize(
    ("solver", "jacobian", "reduction"),
    [
        pytest.param("dense", "plain", "mean", marks=pytest.mark.slow),
        pytest.param("dense", "factored", "stack", marks=pytest.mark.slow),
        pytest.param("lanczos", "plain", "stack", marks=pytest.mark.slow),
        ("lanczos", "factored", "mean"),
    ],
)
def test_nothing_compiles_after_the_first_training_step(solver, jacobian, reduction):
    error_fn, params, _, loss_fn = problem("mlp", jnp.float32)
    batches = random_batches(2, 6, (4,), 3)
    options = {"jacobian": jacobian, "reduction": reduction}
    counts = []
    for step in range(3):
        with compilations() as compiled:
            direction = gradient_flow_direction(loss_fn, params, batches)
            measured = measure_coupling(
                error_fn,
                params,
                batches,
                direction,
                key=jax.random.key(step),
                solver=solver,
                block_size=2,
                num_steps=3,
                num_shells=4,
                window=2,
                num_bootstrap=2,
                max_bytes=2**28,
                **options,
            )
            kernel = linearize_kernel(error_fn, params, batches, **options)
            kernel.matmat(measured.vectors)
            params = descend(params, direction)
        counts.append(len(compiled))
    assert counts[0] > 0
    assert counts[1:] == [0, 0]
