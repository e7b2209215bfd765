"""Gradient flow: a small integrator, its effective time, and its covariance (Lemma 1).

The identities of the shell dynamics hold for the flow ``theta_dot = -grad L``. This
module integrates the flow for small problems, accurately enough to test them, and gives
the time in which a training run with a learning-rate schedule follows it (paper 3.3,
Remark 1, and A.2).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import as_scalar, at_least_single, is_traced
from grsd_jax._checks import (
    check_at_least,
    check_positive,
    check_same_tree,
    check_tree_single_or_double,
)
from grsd_jax._typing import PyTree
from grsd_jax.kernel.dense import kernel_dense
from grsd_jax.kernel.derivative import gradient_flow_direction
from grsd_jax.problem import Problem
from grsd_jax.results import NamedResult, result

#: ``field(params) -> tangent``, an autonomous vector field.
Field = Callable[[PyTree], PyTree]

#: Steps are counted in int32.
_MOST_STEPS = 2**31 - 1


@result()
class CovarianceCheck(NamedResult):
    """The eigenvalues along two flows, of the loss and of the scaled loss.

    Attributes:
        times: [T], t of the scaled flow.
        scaled: [T, n], ``lambda^(a)(t)``, ascending: of ``a M`` along the flow of
            ``a L``.
        expected: [T, n], ``a lambda(a t)``, ascending, of the flow of L.
        error: [], the largest difference over the largest expected value at the same
            time, the largest of all times; NaN if all values of a time are zero, where
            nothing is compared.
    """

    times: jax.Array
    scaled: jax.Array
    expected: jax.Array
    error: jax.Array


def flow_step(field: Field, params: PyTree, step: jax.typing.ArrayLike) -> PyTree:
    """Takes one step of the classical Runge-Kutta method of fourth order.

    Args:
        field: ``field(params) -> tangent``, a tree like ``params``.
        params: Parameters, a pytree of arrays in float32 or float64.
        step: [], the time step h.

    Returns:
        The parameters h later, with an error of order ``h^5``.

    Raises:
        ValueError: If a parameter is of another dtype, where small steps may vanish,
            the step is not a single real number or is known not to be finite, or the
            field does not give a tree like ``params``.

    References:
        Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, II.1.
    """
    check_tree_single_or_double("params", params)
    step = _as_step(step)

    def ahead(tangent: PyTree, share: float) -> PyTree:
        def move(p: jax.Array, t: jax.Array) -> jax.Array:
            return p + (share * step).astype(p.dtype) * t

        return jax.tree.map(move, params, tangent)

    first = field(params)
    check_same_tree("field(params)", first, params, "params")
    second = field(ahead(first, 0.5))
    third = field(ahead(second, 0.5))
    fourth = field(ahead(third, 1.0))
    mean = jax.tree.map(
        lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6, first, second, third, fourth
    )
    return ahead(mean, 1.0)


def _as_step(step: jax.typing.ArrayLike) -> jax.Array:
    """Returns a step as a number, finite if it is known."""
    number = as_scalar("step", step, jnp.result_type(float))
    if not is_traced(number) and not np.isfinite(number):
        raise ValueError(f"step: expected a finite number, got {number}.")
    return number


def integrate_flow(
    field: Field,
    params: PyTree,
    *,
    step: jax.typing.ArrayLike,
    num_steps: int,
    substeps: int = 1,
) -> PyTree:
    """Follows ``theta_dot = field(theta)`` by `flow_step`, in one ``lax.scan``.

    Args:
        field: ``field(params) -> tangent``, a tree like ``params``.
        params: Parameters at time 0, a pytree of arrays in float32 or float64.
        step: [], the time between the points that are returned.
        num_steps: How many points after the first.
        substeps: Steps of the integrator from one point to the next.

    Returns:
        A tree like ``params`` with a leading axis ``[num_steps + 1]``, times 0,
        ``step``, 2 ``step`` and so on.

    Raises:
        ValueError: If ``num_steps`` or ``substeps`` is not an integer >= 1, or as for
            `flow_step`.
    """
    num_steps = check_at_least("num_steps", num_steps, 1)
    substeps = check_at_least("substeps", substeps, 1)
    step = _as_step(step)

    def point(current: PyTree, _: None) -> tuple[PyTree, PyTree]:
        def inner(state: PyTree, _: None) -> tuple[PyTree, None]:
            return flow_step(field, state, step / substeps), None

        following, _ = jax.lax.scan(inner, current, length=substeps)
        return following, following

    params = jax.tree.map(jnp.asarray, params)
    _, later = jax.lax.scan(point, params, length=num_steps)
    return jax.tree.map(
        lambda first, rest: jnp.concatenate([first[None], rest]), params, later
    )


def effective_time(
    schedule: Callable[[jax.Array], jax.typing.ArrayLike],
    num_steps: int,
    *,
    first_step: int = 0,
) -> jax.Array:
    r"""Returns the time of the flow that each step of a training run has reached.

    .. math:: \tau(t) = \sum_{s = 0}^{t - 1} \eta(s)

    so that a step of plain gradient descent with rate ``eta`` moves the parameters by
    ``eta`` times the flow's velocity. Momentum without dampening, once
    settled, goes ``1 / (1 - momentum)`` times as far; an adaptive optimizer does not
    follow the flow.

    Args:
        schedule: ``schedule(step) -> learning rate``, such as any optax schedule. It
            must be traceable in its integer argument.
        num_steps: T, the steps taken.
        first_step: The first step, for a run that is resumed.

    Returns:
        [T+1], starting with 0, in the schedule's dtype, at least float32. Where the
        rate is 0 the time stands still.

    Raises:
        ValueError: If ``num_steps`` or ``first_step`` is not an integer >= 0, a step
            exceeds the range of int32, or the schedule does not give a single real
            number.

    References:
        Paper 3.3, Remark 1.
    """
    num_steps = check_at_least("num_steps", num_steps, 0)
    first_step = check_at_least("first_step", first_step, 0)
    if first_step + num_steps > _MOST_STEPS:
        raise ValueError(
            f"first_step: expected first_step + num_steps <= {_MOST_STEPS}, got "
            f"{first_step + num_steps}."
        )
    steps = first_step + jnp.arange(num_steps, dtype=jnp.int32)
    rates = jax.vmap(lambda step: rate_at(schedule, step))(steps)
    return jnp.concatenate([jnp.zeros(1, rates.dtype), jnp.cumsum(rates)])


def rate_at(
    schedule: Callable[[jax.Array], jax.typing.ArrayLike], step: jax.Array
) -> jax.Array:
    """Returns the learning rate of a step, [], in float32 or float64.

    Rates of half precision are raised: their sums would stand still at 256 of them.

    Args:
        schedule: ``schedule(step) -> learning rate``.
        step: [] int32.

    Raises:
        ValueError: If the schedule does not give a single real number.
    """
    # Schedules are the caller's code, and those of optax mix dtypes.
    with jax.numpy_dtype_promotion("standard"):
        rate = jnp.asarray(schedule(step))
    if rate.ndim or jnp.issubdtype(rate.dtype, jnp.complexfloating):
        raise ValueError(
            "schedule: expected one real number for each step, got shape "
            f"{list(rate.shape)} of {rate.dtype}."
        )
    if not jnp.issubdtype(rate.dtype, jnp.floating):
        rate = rate.astype(jnp.result_type(float))
    return at_least_single(rate)


def covariance_check(
    problem: Problem,
    params: PyTree,
    *,
    scale: float,
    time: float,
    num_steps: int,
) -> CovarianceCheck:
    r"""Runs the flows of L and of ``a L`` and compares their eigenvalues: Lemma 1.

    .. math:: \lambda^{(a)}(t) = a \, \lambda(a t)

    with ``lambda^(a)`` of the operator ``a M`` that drives the error under ``a L``: a
    change of variables, true for every network, and so a check of the integration. The
    two flows are integrated with steps of different length, so that agreement is not by
    construction. For small problems only: ``M`` is formed at every point of time.

    Args:
        problem: The problem, with a loss; examples independent.
        params: Parameters at time 0, a pytree of arrays in float32 or float64.
        scale: a, above 0.
        time: How far the scaled flow runs; the other one runs to ``a`` times that.
        num_steps: Points of time, and steps of the scaled flow's integrator.

    Returns:
        Both trajectories and their largest relative difference.

    Raises:
        ValueError: If ``scale`` or ``time`` is not a finite number above zero,
            ``num_steps`` is not an integer >= 1, or the problem does not fit together.

    References:
        Paper A.2, Lemma 1 and equation (33).
    """
    scale = check_positive("scale", scale)
    if scale >= _MOST_STEPS:  # it takes as many steps
        raise ValueError(f"scale: expected less than {_MOST_STEPS}, got {scale}.")
    time = check_positive("time", time)
    num_steps = check_at_least("num_steps", num_steps, 1)

    def field(p: PyTree) -> PyTree:
        return gradient_flow_direction(problem, p)

    def scaled_field(p: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: scale * leaf, field(p))

    def spectrum(p: PyTree) -> jax.Array:
        return jnp.linalg.eigvalsh(kernel_dense(problem, p))

    step = time / num_steps
    along = integrate_flow(scaled_field, params, step=step, num_steps=num_steps)
    reference = integrate_flow(
        field,
        params,
        step=scale * step,
        num_steps=num_steps,
        substeps=math.ceil(scale) + 1,
    )
    scaled = scale * jax.lax.map(spectrum, along)
    expected = scale * jax.lax.map(spectrum, reference)
    apart, sizes = (jnp.max(jnp.abs(x), 1) for x in (scaled - expected, expected))
    return CovarianceCheck(
        times=step * jnp.arange(num_steps + 1).astype(scaled.dtype),
        scaled=scaled,
        expected=expected,
        error=jnp.max(apart / sizes),
    )
