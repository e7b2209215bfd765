"""Products with M and Mdot in the form that fits: a held Jacobian, or a fresh one."""

from functools import partial

import jax

from grsd_jax._memory import default_bytes, tree_bytes
from grsd_jax._typing import Matmat, PyTree
from grsd_jax.jacobian.autodiff import Jacobian, linearize
from grsd_jax.jacobian.factored import output_blocks
from grsd_jax.jacobian.factors import Factor, for_products
from grsd_jax.jacobian.plan import Plan, plan_of
from grsd_jax.kernel.derivative import Derivative, project_derivative
from grsd_jax.kernel.mesh import layout_of
from grsd_jax.kernel.operator import linearize_point, multiply_at
from grsd_jax.objective import Objective
from grsd_jax.problem import Point


def held_products(point: Point) -> Matmat:
    """Returns the products with M: of held factors or residuals if they fit.

    Args:
        point: The problem at its parameters.

    Returns:
        ``matmat([n, b]) -> [n, b]``.
    """
    plan = held_factors(point)
    if plan is not None or held_bytes(point, plan=None) <= default_bytes():
        return linearize_point(point, plan=plan).matmat
    return partial(multiply_at, point)


def held_factors(point: Point) -> Plan | None:
    """Returns how `held_products` holds factors, None where it goes plainly.

    Args:
        point: The problem at its parameters.

    Returns:
        The plan, if there is one whose factors fit in memory.
    """
    plan = plan_of(point)
    fits = plan is not None and held_bytes(point, plan=plan) <= default_bytes()
    return plan if fits else None


def projected_derivative(
    point: Point, vectors: jax.Array, derivative: Derivative, column_chunk: int
) -> jax.Array:
    """Computes ``V^T Mdot V``, by factors if J and Jdot fit in memory.

    Args:
        point: The problem, with its direction.
        vectors: Columns V, ``[n, r]``.
        derivative: How it is taken.
        column_chunk: Columns taken at a time.

    Returns:
        The symmetric matrix ``[r, r]``.
    """
    plan = plan_of(point)
    if plan is not None:
        # The mean holds one batch at a time; Jdot is twice as large as J.
        held = 3 * held_bytes(point, plan=plan)
        spaces = point.num_batches // point.copies
        plan = plan if held <= default_bytes() * spaces else None
    return project_derivative(
        point, vectors, derivative, plan=plan, column_chunk=column_chunk
    )


def held_bytes(point: Point, *, plan: Plan | None) -> int:
    """Returns the bytes that a device holds of J of all batches, ready for products.

    Args:
        point: The problem at its parameters.
        plan: Its factors, or None for the residuals of a linearization.

    Returns:
        Bytes, from shapes alone.
    """
    # A jitted function's own `eval_shape` traces once, `jax.eval_shape` every time.
    form = _linearized if plan is None else _factors
    shapes = form.eval_shape(point.error_fn, point.params, point.parts[0], plan=plan)
    layout = layout_of(point)
    devices = 1 if layout is None else layout.mesh.shape[layout.axis]
    return point.num_batches * tree_bytes(shapes) // devices


@partial(jax.jit, static_argnames="plan")
def _linearized(
    error_fn: Objective, params: PyTree, batch: PyTree, *, plan: None
) -> Jacobian:
    del plan
    return linearize(error_fn, params, batch)


@partial(jax.jit, static_argnames="plan")
def _factors(
    error_fn: Objective, params: PyTree, batch: PyTree, *, plan: Plan
) -> list[Factor]:
    blocks, _ = output_blocks(error_fn, params, batch, plan=plan)
    return [for_products(block) for block in blocks if block is not None]
