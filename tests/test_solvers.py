import jax
import jax.numpy as jnp
import pytest

import grsd_jax
from grsd_jax import choose_solver, class_sums_vanish
from grsd_jax.solvers import estimate_measurement
from oracles import problem


def linear(params, batch):
    return batch["x"] @ params["w"]


def sized(num_examples, num_inputs, num_outputs):
    params = {"w": jnp.ones((num_inputs, num_outputs))}
    return params, {"x": jnp.ones((1, num_examples, num_inputs))}


def test_choice_follows_size_columns_and_memory():
    large, small = sized(2000, 5, 10), sized(20, 5, 10)
    assert choose_solver(linear, *large, num_columns=100) == "lanczos"
    assert choose_solver(linear, *small, num_columns=200) == "dense"
    assert choose_solver(linear, *small, num_columns=200, max_bytes=10) == ("lanczos")


def test_narrow_blocks_read_the_factors_more_often():
    error_fn, params, batches, _ = problem("resnet18", jnp.float32)

    def cost(block_size, jacobian):
        found = estimate_measurement(
            error_fn,
            params,
            batches,
            num_columns=8,
            block_size=block_size,
            jacobian=jacobian,
        )
        return found["lanczos"].operations

    assert cost(1, "factored") > 2 * cost(8, "factored")
    assert cost(1, "plain") == cost(8, "plain")


def test_networks_with_few_examples_are_dense():
    error_fn, params, batches, _ = problem("resnet18", jnp.float32)
    assert choose_solver(error_fn, params, batches, num_columns=8) == "dense"


@pytest.mark.parametrize(
    ("error", "expected"),
    [(grsd_jax.softmax_error, True), (grsd_jax.squared_error, False)],
)
def test_null_space_of_the_softmax_error_is_found(error, expected):
    error_fn, params, batches, _ = problem("mlp", jnp.float32, error=error)
    got = class_sums_vanish(error_fn, params, batches, jax.random.key(0))
    assert bool(got) is expected


def test_bad_input_is_named():
    params, batches = sized(4, 3, 2)
    with pytest.raises(ValueError, match="num_columns: expected an integer >= 1"):
        choose_solver(linear, params, batches, num_columns=0)
    with pytest.raises(ValueError, match="reduction: expected one of"):
        choose_solver(linear, params, batches, reduction="sum", num_columns=1)
