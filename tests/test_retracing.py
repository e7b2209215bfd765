"""Eager calls at shapes that were seen before do not pass through the network again."""

import flax.linen as nn
import jax
import pytest

import grsd_jax as grsd
from grsd_jax.models import linen_outputs
from oracles import plain, random_batches

CALLS = []
KEY = jax.random.key(0)


class Counting(nn.Module):
    """A small network that notes every time Python runs it."""

    @nn.compact
    def __call__(self, x):
        CALLS.append(x.shape)
        return nn.Dense(3)(jax.nn.gelu(nn.Dense(4)(x)))


def matmat(problem, params, direction):
    kernel = grsd.linearize_kernel(problem, params)
    return kernel.matmat(jax.numpy.ones((kernel.dimension, 2)))


def derivative(problem, params, direction):
    block = jax.numpy.ones((problem.dimension(params), 6))
    return grsd.kernel_derivative(problem, params, direction, block)


def measured(problem, params, direction):
    return grsd.measure_coupling(
        problem,
        params,
        key=KEY,
        solver=grsd.Lanczos(2, 3),
        shells=grsd.Binning(num_shells=2, window=2, num_bootstrap=2),
    )


@pytest.mark.parametrize(
    ("operation", "hidden"),
    [
        (grsd.kernel_dense, False),
        (matmat, False),
        (derivative, False),
        (measured, False),
        (measured, True),
    ],
)
def test_a_second_call_traces_nothing(operation, hidden):
    model, batches = Counting(), random_batches(1, 4, (5,), 3)
    params = jax.jit(model.init)(KEY, batches["image"][0])["params"]

    def run(scale):
        problem = grsd.Problem(linen_outputs(model, {}), batches)
        moved = jax.tree.map(lambda p: scale * p, params)
        problem = plain(problem) if hidden else problem
        jax.block_until_ready(operation(problem, moved, params))

    run(1.0)
    CALLS.clear()
    run(1.1)
    assert not CALLS
