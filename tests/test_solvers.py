import jax.numpy as jnp
import pytest

from grsd_jax import choose_solver
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

    steps_alone = cost(1, "plain") - cost(8, "plain")
    assert cost(1, "factored") - cost(8, "factored") > steps_alone > 0


def test_networks_with_few_examples_are_dense():
    error_fn, params, batches, _ = problem("resnet18", jnp.float32)
    assert choose_solver(error_fn, params, batches, num_columns=8) == "dense"


def test_bad_input_is_named():
    params, batches = sized(4, 3, 2)
    with pytest.raises(ValueError, match="num_columns: expected an integer >= 1"):
        choose_solver(linear, params, batches, num_columns=0)
    with pytest.raises(ValueError, match="reduction: expected one of"):
        choose_solver(linear, params, batches, reduction="sum", num_columns=1)
