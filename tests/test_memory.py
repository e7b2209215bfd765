"""What bounds memory: streaming, chunks, estimates, and the error that names them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax import Problem, measure_coupling
from grsd_jax import _memory as memory
from grsd_jax._memory import (
    default_bytes,
    free_bytes,
    naming_what_to_lower,
    tree_bytes,
)
from grsd_jax.shells import measurement

HERE = Path(__file__).parent


def peak(num_batches, max_bytes):
    done = subprocess.run(
        [sys.executable, HERE / "stack_memory.py", str(num_batches), str(max_bytes)],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=True,
    )
    return json.loads(done.stdout)


def test_the_peak_of_a_process_leaves_out_the_one_that_started_it():
    here = np.ones(2**27)
    code = "from grsd_jax import _memory as memory; print(memory.peak_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert 2**24 < int(done.stdout) < here.nbytes < memory.peak_bytes()


@pytest.mark.scheduled
def test_a_stack_of_many_batches_runs_in_the_memory_of_one():
    one = peak(1, 1)
    streamed, held = peak(40, 1), peak(40, 2**40)
    assert (one["n"], streamed["n"]) == (500, 20_000)
    # Images, basis, vectors and the allocator's reserves grow with n; residuals do not.
    growth = streamed["peak_mib"] - one["peak_mib"]
    assert growth < (held["peak_mib"] - one["peak_mib"]) / 2
    residuals = 39 * 50 * 16 * 16 * 8 * 3 * 4 / 2**20
    assert held["peak_mib"] - streamed["peak_mib"] > residuals / 2


def test_running_out_of_memory_names_what_to_lower():
    with (
        pytest.raises(MemoryError, match=r"lower one of: block_size, batches\."),
        naming_what_to_lower("block_size", "batches"),
    ):
        jax.block_until_ready(jnp.zeros((2**24, 2**24)))


def test_memory_that_ends_after_the_call_returned_is_named_too(monkeypatch):
    """Devices compute asynchronously: the error comes where the result is read."""

    def fail(_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    def diagnose(pairs, *_, **__):
        lost = jax.pure_callback(fail, jax.ShapeDtypeStruct((), jnp.float32), 1.0)
        return pairs._replace(values=lost)

    monkeypatch.setattr(measurement, "diagnose", diagnose)
    batches = {"x": jnp.ones((1, 3, 2)), "y": jnp.ones((1, 3, 1))}
    problem = Problem.from_error(lambda p, b: b["x"] @ p - b["y"], batches)
    weights = jnp.ones((2, 1))
    with pytest.raises(MemoryError, match=r"lower one of: solver\.block_size"):
        measure_coupling(problem, weights, weights, key=jax.random.key(0))


def test_other_errors_pass_as_they_are():
    def fail(_):
        raise TypeError("not memory")

    shape = jax.ShapeDtypeStruct((), jnp.float32)
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="not memory"),
        naming_what_to_lower("batches"),
    ):
        jax.block_until_ready(jax.pure_callback(fail, shape, 1.0))


def test_bytes_are_counted_and_rounded_to_a_power_of_two():
    tree = {"a": jnp.zeros((3, 4)), "b": jax.ShapeDtypeStruct((5,), jnp.int8)}
    assert tree_bytes(tree) == 3 * 4 * 4 + 5
    assert default_bytes() <= free_bytes()
    assert default_bytes().bit_count() == 1
