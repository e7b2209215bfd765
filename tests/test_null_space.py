import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax import Problem
from grsd_jax.kernel.null_space import class_sums_vanish, free_start
from oracles import network_problem

losses = pytest.mark.parametrize(
    ("loss", "softmax"), [("softmax_cross_entropy", True), ("squared", False)]
)


def at_parameters(loss, layers_known):
    problem, params = network_problem("mlp", jnp.float32, loss=loss)
    if not layers_known:
        problem = Problem.from_error(problem.error, problem.batches)
    return problem.at(params)


@losses
@pytest.mark.parametrize("layers_known", [True, False])
def test_null_space_of_the_softmax_error_is_found(loss, softmax, layers_known):
    point = at_parameters(loss, layers_known)
    assert bool(class_sums_vanish(point, jax.random.key(0))) is softmax


@losses
@pytest.mark.parametrize("layers_known", [True, False])
def test_the_start_is_free_of_it_and_of_nothing_else(loss, softmax, layers_known):
    point = at_parameters(loss, layers_known)
    block = jax.random.normal(jax.random.key(1), (30, 4))
    start = free_start(point, block, jax.random.key(0))
    examples = np.asarray(block).reshape(10, 3, 4)
    if softmax:
        examples = examples - examples.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(start, examples.reshape(30, 4), atol=1e-6)


def test_every_position_of_a_sequence_has_its_own():
    def outputs_fn(params, batch):
        return jnp.einsum("ntd,dv->ntv", batch["x"], params["w"])

    batches = {
        "label": jnp.zeros((1, 3, 2), jnp.int32),
        "x": jax.random.normal(jax.random.key(0), (1, 3, 2, 5)),
    }
    params = {"w": jax.random.normal(jax.random.key(1), (5, 4))}
    point = Problem(outputs_fn, batches).at(params)
    block = jax.random.normal(jax.random.key(2), (24, 2))
    start = free_start(point, block, jax.random.key(3))
    positions = np.asarray(block).reshape(6, 4, 2)
    positions = positions - positions.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(start, positions.reshape(24, 2), atol=1e-6)
