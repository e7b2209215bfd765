"""Random small programs: the dense kernel against `jax.jacrev` in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import grsd_jax as grsd
from grsd_jax.jacobian import plan
from oracles import cast
from random_programs import AROUND, SIMPLE, names, network, programs, used

QUICK = settings(max_examples=8, derandomize=True, deadline=None, database=None)
LONG = settings(QUICK, max_examples=250)


#: What M may be off by, relative to its largest entry, and the least that this counts
#: as: a saturated program leaves an M of rounding.
TOLERANCES = {"float32": 2e-4, "float64": 1e-11}
LEAST = {"float32": 1e-2, "float64": 1e-30}

#: Powers of two by which the error is multiplied; 0 for the package's own error.
SCALES = st.sampled_from((0, -40, 40))


def stated(outputs_fn, batch, exponent):
    """Returns the problem of a batch, by its outputs or by an error in other units."""
    batches = jax.tree.map(lambda leaf: leaf[None], batch)
    if exponent == 0:
        return grsd.Problem(outputs_fn, batches)

    def error_fn(params, batch):
        outputs = outputs_fn(params, batch)
        one_hot = jax.nn.one_hot(batch["label"], 2, dtype=outputs.dtype)
        return 2.0**exponent * (jax.nn.softmax(outputs) - one_hot)

    return grsd.Problem.from_error(error_fn, batches)


def check(program, dtype="float64", exponent=0):
    """Compares M of a program with the Gram matrix of its dense Jacobian in float64."""
    outputs_fn, params, batch = network(program)
    params = cast(params, dtype)
    narrow = {**batch, "x": batch["x"].astype(dtype)}
    kernel = grsd.kernel_dense(stated(outputs_fn, narrow, exponent), params)
    assert kernel.dtype == dtype
    params, batch = cast(params, float), {**narrow, "x": narrow["x"].astype(float)}
    one_hot = jax.nn.one_hot(batch["label"], 2, dtype=float)

    @jax.jit
    def expected(params):
        def error(params):
            return (jax.nn.softmax(outputs_fn(params, batch)) - one_hot).reshape(-1)

        leaves = jax.tree.leaves(jax.jacrev(error)(params))
        rows = jnp.concatenate([leaf.reshape(6, -1) for leaf in leaves], 1)
        return rows @ rows.T

    scaled, oracle = np.asarray(kernel, float) / 4.0**exponent, expected(params)
    size = max(np.max(np.abs(oracle)), LEAST[dtype])
    assert np.max(np.abs(scaled - oracle)) < TOLERANCES[dtype] * size


def check_as_users_run_it(*drawn):
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        check(*drawn)


@pytest.mark.slow
@QUICK
@given(programs, st.sampled_from(sorted(TOLERANCES)), SCALES)
def test_random_programs_agree_with_jacrev(program, dtype, exponent):
    check_as_users_run_it(program, dtype, exponent)


@pytest.mark.scheduled
@LONG
@given(programs, st.sampled_from(sorted(TOLERANCES)), SCALES)
def test_many_random_programs_agree_with_jacrev(program, dtype, exponent):
    check_as_users_run_it(program, dtype, exponent)


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
