"""Random small programs: the dense kernel against `jax.jacrev` in float64."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings

import grsd_jax as grsd
from grsd_jax.jacobian import plan
from oracles import relative_error
from random_programs import AROUND, SIMPLE, names, network, programs, used

QUICK = settings(max_examples=8, derandomize=True, deadline=None, database=None)
LONG = settings(QUICK, max_examples=250)


def check(program):
    """Compares M of a program with the Gram matrix of its dense Jacobian."""
    outputs_fn, params, batch = network(program)
    one_hot = jax.nn.one_hot(batch["label"], 2, dtype=float)

    @jax.jit
    def expected(params):
        def error(params):
            return (jax.nn.softmax(outputs_fn(params, batch)) - one_hot).reshape(-1)

        leaves = jax.tree.leaves(jax.jacrev(error)(params))
        rows = jnp.concatenate([leaf.reshape(6, -1) for leaf in leaves], 1)
        return rows @ rows.T

    batches = jax.tree.map(lambda leaf: leaf[None], batch)
    kernel = grsd.kernel_dense(grsd.Problem(outputs_fn, batches), params)
    assert kernel.dtype == jnp.float64
    assert relative_error(kernel, expected(params)) < 1e-11


def check_as_users_run_it(program):
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        check(program)


@pytest.mark.slow
@QUICK
@given(programs)
def test_random_programs_agree_with_jacrev(program):
    check_as_users_run_it(program)


@pytest.mark.scheduled
@LONG
@given(programs)
def test_many_random_programs_agree_with_jacrev(program):
    check_as_users_run_it(program)


@settings(QUICK, max_examples=40)
@given(programs)
def test_random_programs_are_known_to_keep_their_examples_apart(program):
    outputs_fn, params, batch = network(program)
    batches = jax.tree.map(lambda leaf: leaf[None], batch)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        point = grsd.Problem(outputs_fn, batches).at(params)
        assert plan._what_may_mix(point) == ""


@pytest.mark.parametrize("name", AROUND)
def test_steps_inside_each_other_agree_with_jacrev(name):
    """One program for each, so that none depends on the luck of the draw."""
    body = (("dense", 0, "ed,nd->en"), ("lookup", 0), ("activation", "softplus"))
    check_as_users_run_it(((name, body), ("dense", 0, "nd,de->ne")))


def test_every_step_is_drawn():
    found = set()

    @settings(QUICK, max_examples=300)
    @given(programs)
    def draw(program):
        found.update(names(program))

    draw()
    assert found == {"lookup", *SIMPLE, *AROUND}


def test_parameters_are_found_inside_steps():
    inner = (("columns", 0, 1), ("loop", (("slice", 1, 2),)))
    found = used((("residual", inner), ("activation", "tanh")))
    assert found == {("matrix", 0), ("vector", 1), ("flat", 1)}
