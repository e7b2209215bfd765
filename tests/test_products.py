"""The form of the products: what is held of J, and that all forms give the same."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from grsd_jax._memory import tree_bytes
from grsd_jax.jacobian.plan import plan_of
from grsd_jax.kernel import Derivative, kernel_dense, products, shard_batches
from grsd_jax.kernel.derivative import project_derivative
from grsd_jax.kernel.operator import linearize_point
from grsd_jax.kernel.products import (
    held_bytes,
    held_products,
    projected_derivative,
)
from oracles import dense_kernel, network_problem, plain, relative_error

reductions = pytest.mark.parametrize("reduction", ["mean", "stack"])


@pytest.fixture(scope="module")
def mlp():
    return network_problem("mlp", jnp.float32)


@pytest.mark.parametrize(
    ("room", "held"), [(200, "factors"), (199, "residuals"), (99, "nothing")]
)
@reductions
def test_the_first_form_that_fits_is_held(mlp, monkeypatch, reduction, room, held):
    problem, params = mlp
    problem = problem.replace(reduction=reduction)
    taken = []

    def spy(point, *, plan):
        taken.append("residuals" if plan is None else "factors")
        return linearize_point(point, plan=plan)

    def sizes(_, *, plan):
        return 100 if plan is None else 200

    monkeypatch.setattr(products, "linearize_point", spy)
    monkeypatch.setattr(products, "held_bytes", sizes)
    monkeypatch.setattr(products, "default_bytes", lambda: room)
    matmat = held_products(problem.at(params))
    assert taken == ([] if held == "nothing" else [held])
    expected = dense_kernel(problem, params)
    units = jnp.eye(len(expected), dtype=jnp.float32)
    assert relative_error(matmat(units), expected) < 1e-5


@pytest.mark.parametrize(
    ("reduction", "room", "factored"),
    [
        ("stack", 300, True),
        ("stack", 299, False),
        ("mean", 150, True),  # which holds one batch of the two at a time
        ("mean", 149, False),
    ],
)
def test_factors_of_the_derivative_are_held_if_they_fit(
    mlp, monkeypatch, reduction, room, factored
):
    problem, params = mlp
    problem = problem.replace(reduction=reduction)
    point = problem.at(params, params)
    _, moved = kernel_dense(problem, params, params)
    taken = []

    def spy(*arguments, plan, **options):
        taken.append(plan is not None)
        return project_derivative(*arguments, plan=plan, **options)

    monkeypatch.setattr(products, "project_derivative", spy)
    monkeypatch.setattr(products, "held_bytes", lambda *_, **__: 100)
    monkeypatch.setattr(products, "default_bytes", lambda: room)
    units = jnp.eye(len(moved), dtype=jnp.float32)
    got = projected_derivative(point, units, Derivative(), 8)
    assert taken == [factored]
    assert relative_error(got, moved) < 1e-5


def test_what_is_held_is_counted_from_shapes(mlp):
    problem, params = mlp
    factored, own = problem.at(params), plain(problem).at(params)
    plan = plan_of(factored)
    held = linearize_point(factored, plan=plan).jacobians
    blocks = tree_bytes([jacobian.blocks for jacobian in held])
    assert held_bytes(factored, plan=plan) == blocks
    residuals = tree_bytes(linearize_point(own, plan=None).jacobians)
    assert held_bytes(own, plan=None) == residuals
    # Spread over the devices of a mesh, each holds its share.
    mesh = jax.make_mesh(
        (5,), ("examples",), axis_types=(AxisType.Auto,), devices=jax.devices()[:5]
    )
    spread = problem.replace(batches=shard_batches(problem.batches, mesh)).at(params)
    assert held_bytes(spread, plan=plan) == blocks // 5
