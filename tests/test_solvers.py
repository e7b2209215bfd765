import jax.numpy as jnp
import pytest
from jax import extend

from grsd_jax import choose_solver
from grsd_jax.kernel import solver as solvers
from grsd_jax.kernel.solver import estimate_measurement
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
    assert choose_solver(linear, *small, num_columns=200, max_bytes=10) == "lanczos"


@pytest.mark.parametrize(("reduction", "copies"), [("mean", 1), ("stack", 2)])
def test_the_plain_path_costs_what_the_module_says(monkeypatch, reduction, copies):
    batches, examples, inputs, outputs, columns = 2, 7, 5, 3, 10
    params = {"w": jnp.ones((inputs, outputs))}
    data = {"x": jnp.ones((batches, examples, inputs))}
    monkeypatch.setattr(solvers, "_counted", lambda *_: (1000.0, 10.0))
    found = estimate_measurement(
        linear, params, data, reduction=reduction, num_columns=columns, block_size=4
    )
    g, rows, n = 1070.0, examples * outputs, copies * examples * outputs
    num_params = inputs * outputs
    dense = (
        6 * outputs * g + 3 * n * rows * num_params + 3 * 150 * rows * 4 * num_params
    )
    assert found["dense"].operations == pytest.approx(batches * dense + 20 * n**3)
    basis = 6 * n * columns**2 + 5000 * n * columns + 3 * 1.5e8
    lanczos = batches * 10 * g * columns + basis
    assert found["lanczos"].operations == pytest.approx(lanczos, rel=1e-12)


def test_a_pass_counts_what_it_accesses():
    params, batches = sized(20, 5, 10)
    flops, accessed = 2 * 20 * 5 * 10, 4 * (20 * 5 + 5 * 10 + 20 * 10)
    cost = solvers._pass_cost(linear, params, batches)
    assert cost == pytest.approx(flops + 7 * accessed, rel=0.1)


def test_what_no_cpu_can_lower_costs_its_parameters():
    only_elsewhere = extend.core.Primitive("only_elsewhere")
    only_elsewhere.def_abstract_eval(lambda x: x)

    def error_fn(params, batch):
        return only_elsewhere.bind(batch["x"] @ params["w"])

    params, batches = sized(20, 5, 10)
    assert solvers._pass_cost(error_fn, params, batches) == 2 * 50 * 20


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
