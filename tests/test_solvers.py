"""The rule that chooses a solver: what it counts, in orders and directions."""

import jax
import jax.numpy as jnp
import pytest
from jax import extend

from grsd_jax import Problem, models
from grsd_jax.kernel import choose_solver, solver
from grsd_jax.kernel.solver import count_operations
from oracles import random_batches


def linear(params, batch):
    return batch["x"] @ params["w"]


def sized(num_examples, num_inputs, num_outputs, *, num_batches=1, **options):
    params = {"w": jnp.ones((num_inputs, num_outputs))}
    batches = {"x": jnp.ones((num_batches, num_examples, num_inputs))}
    return Problem.from_error(linear, batches, **options), params


def counted(problem, params, num_columns):
    return count_operations(problem.at(params), num_columns)


def test_choice_follows_size_columns_and_memory(monkeypatch):
    large, small = sized(2000, 5, 10), sized(20, 5, 10)
    assert choose_solver(*large, num_columns=100) == "lanczos"
    assert choose_solver(*small, num_columns=200) == "dense"
    monkeypatch.setattr(solver, "default_bytes", lambda: 10)
    assert choose_solver(*small, num_columns=200) == "lanczos"


def test_matrices_that_do_not_fit_leave_lanczos(monkeypatch):
    problem, params = sized(20, 5, 10)
    matrix = 4 * problem.dimension(params) ** 2
    for room, chosen in ((1000 * matrix, "dense"), (matrix, "lanczos")):
        monkeypatch.setattr(solver, "default_bytes", lambda room=room: room)
        assert choose_solver(problem, params, num_columns=200) == chosen


def test_matrices_are_formed_where_many_columns_ask_for_them(monkeypatch):
    problem, params = sized(20, 500, 10)
    point = problem.at(params)
    assert solver.matrices_are_cheaper(point, 2_000, 100)
    assert solver.matrices_are_cheaper(point, 100, 2_000)
    assert not solver.matrices_are_cheaper(point, 2, 1)
    monkeypatch.setattr(solver, "default_bytes", lambda: 4 * point.dimension**2)
    assert not solver.matrices_are_cheaper(point, 2_000, 100)


def test_matrices_of_coupled_examples_are_not_formed():
    def centered(params, batch):
        errors = linear(params, batch)
        return errors - jnp.mean(errors, 0, keepdims=True)

    problem, params = sized(20, 500, 10)
    coupled = Problem.from_error(centered, problem.batches)
    with pytest.warns(RuntimeWarning, match="examples of the error are coupled"):
        assert not solver.matrices_are_cheaper(coupled.at(params), 2_000, 100)


def test_a_krylov_space_that_is_the_whole_is_dense(monkeypatch):
    problem, params = sized(2000, 5, 10)
    monkeypatch.setattr(solver, "default_bytes", lambda: 2**60)
    monkeypatch.setattr(solver, "count_operations", lambda *_: (2.0, 1.0))
    assert choose_solver(problem, params, num_columns=2_000) == "lanczos"
    assert choose_solver(problem, params, num_columns=20_000) == "dense"


def test_plain_lanczos_takes_two_forward_and_backward_passes_a_column_at_least():
    # Inputs are many, so that passes outweigh the basis of the Krylov space.
    problem, params = sized(8, 50_000, 4)
    forward = 2 * 8 * 50_000 * 4
    _, few = counted(problem, params, 4)
    _, many = counted(problem, params, 24)
    passes = (many - few) / (20 * forward)
    assert 4 < passes < 20  # M takes 4, Mdot as many again or more


def test_the_dense_kernel_does_not_know_the_columns_and_grows_with_the_outputs():
    problem, params = sized(8, 50_000, 4)
    assert counted(problem, params, 4)[0] == counted(problem, params, 24)[0]
    # A pass for each output, and Gram products of n rows of J and of Jdot.
    n, num_params = 32, 50_000 * 4
    passes, gram = 4 * 2 * 8 * num_params, 2 * n**2 * num_params
    assert passes + gram < counted(problem, params, 4)[0] < 10 * (passes + gram)
    wider = sized(8, 50_000, 8)
    assert 4 < counted(*wider, 4)[0] / counted(problem, params, 4)[0] < 16


def test_eigenvectors_and_the_basis_count_for_many_rows():
    problem, params = sized(20_000, 1, 1)
    dense, lanczos = counted(problem, params, 100)
    assert 4 * 20_000**3 < dense < 100 * 20_000**3
    assert 2 * 20_000 * 100**2 < lanczos < 1e-3 * dense


def test_the_mean_has_less_to_multiply_than_the_stack():
    mean, stack = (
        counted(*sized(8, 5000, 4, num_batches=3, reduction=reduction), 8)
        for reduction in ("mean", "stack")
    )
    one = counted(*sized(8, 5000, 4), 8)
    assert one[0] < mean[0] < stack[0] < 12 * one[0]
    assert 2 < mean[1] / one[1] < 4
    assert 2 < stack[1] / one[1] < 6


def test_a_pass_counts_what_it_computes():
    problem, params = sized(20, 5, 10)
    found = solver._forward_operations(problem.at(params))
    assert found == pytest.approx(2 * 20 * 5 * 10, rel=0.2)


def test_what_no_cpu_can_lower_costs_its_parameters():
    only_elsewhere = extend.core.Primitive("only_elsewhere")
    only_elsewhere.def_abstract_eval(lambda x: x)
    problem, params = sized(20, 5, 10)

    def error_fn(params, batch):
        return only_elsewhere.bind(batch["x"] @ params["w"])

    problem = problem.replace(error_fn=error_fn)
    assert solver._forward_operations(problem.at(params)) == 2 * 50 * 20


def test_networks_with_few_examples_are_dense():
    model, batches = (
        models.ResNet(3, 4, stage_sizes=(1,)),
        random_batches(1, 3, (8, 8, 3), 3),
    )
    variables = dict(jax.jit(model.init)(jax.random.key(0), batches["image"][0]))
    params = variables.pop("params")
    problem = Problem(models.linen_outputs(model, variables), batches)
    assert choose_solver(problem, params, num_columns=8) == "dense"


def test_bad_input_is_named():
    problem, params = sized(4, 3, 2)
    with pytest.raises(ValueError, match="num_columns: expected an integer >= 1"):
        choose_solver(problem, params, num_columns=0)
    with pytest.raises(ValueError, match=r"error_fn: expected an array \[N, C\]"):
        choose_solver(
            problem.replace(error_fn=lambda p, b: p["w"]), params, num_columns=1
        )
