import jax
import jax.numpy as jnp
import pytest

import grsd_jax
from grsd_jax import class_sums_vanish
from oracles import problem


@pytest.mark.parametrize("layers_known", [True, False])
@pytest.mark.parametrize(
    ("error", "expected"),
    [(grsd_jax.softmax_error, True), (grsd_jax.squared_error, False)],
)
def test_null_space_of_the_softmax_error_is_found(error, expected, layers_known):
    error_fn, params, batches, _ = problem("mlp", jnp.float32, error=error)

    def hidden(params, batch):
        return error_fn(params, batch)

    fn = error_fn if layers_known else hidden
    got = class_sums_vanish(fn, params, batches, jax.random.key(0))
    assert bool(got) is expected
