"""Healthy arguments of every function, in the modes of `modes`: finite results.

The rows are those of `test_hostile_values`, which runs them without a mode.
"""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from grsd_jax import Problem, kernel_dense, models
from grsd_jax.linalg import default_floor
from oracles import dense_kernel, random_batches, relative_error
from test_hostile_values import ROWS, SLOW, leaves, outcome


@pytest.fixture(autouse=True)
def _only_in_a_mode(request):
    if request.config.getoption("--mode") is None:
        pytest.skip("without a mode test_hostile_values does the same and more")


#: Cross-checks that were not asked for, and the R^2 of a law that planted nothing, are
#: NaN.
NOT_MADE = {"coupling_exponent", "measure_coupling", "measure_layers", "velocity_law"}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", sorted(ROWS.keys() - (SLOW - {"measure_layers"})))
def test_healthy_arguments_have_finite_results(name):
    result = outcome(name, ROWS[name][1])
    assert not isinstance(result, str), result
    for leaf in leaves(result):
        known = leaf.dtype.kind in "biu" or np.isfinite(leaf).all()
        assert known or name in NOT_MADE, result


def test_the_default_floor_is_that_of_the_dtype():
    for dtype in (jnp.float32, jnp.float64):
        assert default_floor(dtype) == 10 * np.finfo(dtype).eps


def of_equinox(x):
    return models.equinox_outputs(eqx.nn.MLP(5, 3, 4, 1, key=jax.random.key(1)))


def of_haiku(x):
    network = hk.without_apply_rng(
        hk.transform_with_state(lambda x: hk.Linear(3)(jnp.tanh(hk.Linear(4)(x))))
    )
    params, state = network.init(jax.random.key(1), x)
    return models.haiku_outputs(network, state), params


def of_nnx(x):
    layers = nnx.Linear(5, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 3, rngs=nnx.Rngs(1))
    return models.nnx_outputs(nnx.Sequential(layers[0], jnp.tanh, layers[1]))


@pytest.mark.parametrize("network", [of_equinox, of_haiku, of_nnx])
def test_a_network_of_every_framework_has_the_kernel_of_jacrev(network):
    batches = random_batches(1, 4, (5,), 3)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        outputs_fn, params = network(batches["image"][0])
        problem = Problem(outputs_fn, batches)
        kernel, expected = kernel_dense(problem, params), dense_kernel(problem, params)
    assert relative_error(kernel, expected) < 1e-5
