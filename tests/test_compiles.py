"""A training run compiles each program once, at its first step."""

import contextlib

import jax
import jax.numpy as jnp
import pytest

from grsd_jax import (
    Binning,
    Lanczos,
    gradient_flow_direction,
    linearize_kernel,
    measure_coupling,
)
from grsd_jax.kernel import dense, products
from oracles import network_problem, plain, random_batches


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
    ("solver", "layers_known", "reduction"),
    [
        pytest.param("dense", False, "mean", marks=pytest.mark.slow),
        pytest.param("dense", True, "stack", marks=pytest.mark.slow),
        pytest.param("lanczos", False, "stack", marks=pytest.mark.slow),
        ("lanczos", True, "mean"),
    ],
)
def test_nothing_compiles_after_the_first_training_step(
    monkeypatch, solver, layers_known, reduction
):
    # What is free moves with the machine's other work, and programs follow it.
    monkeypatch.setattr(products, "default_bytes", lambda: 2**28)
    monkeypatch.setattr(dense, "default_bytes", lambda: 2**28)
    problem, params = network_problem("mlp", jnp.float32, reduction=reduction)
    problem = problem.replace(batches=random_batches(2, 6, (4,), 3))
    problem = problem if layers_known else plain(problem)
    counts = []
    for step in range(3):
        with compilations() as compiled:
            direction = gradient_flow_direction(problem, params)
            measured = measure_coupling(
                problem,
                params,
                direction,
                key=jax.random.key(step),
                solver="dense" if solver == "dense" else Lanczos(2, 3),
                shells=Binning(num_shells=4, window=2, num_bootstrap=2),
            )
            kernel = linearize_kernel(problem, params)
            kernel.matmat(measured.vectors)
            params = descend(params, direction)
        assert measured.jacobian == ("factored" if layers_known else "plain")
        counts.append(len(compiled))
    assert counts[0] > 0
    assert counts[1:] == [0, 0]
