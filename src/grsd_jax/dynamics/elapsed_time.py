"""The effective time that passed between two parameters, whatever the optimizer."""

import jax
import jax.numpy as jnp

from grsd_jax._arrays import divisor, norm, ratio, where_defined
from grsd_jax._checks import check_same_tree
from grsd_jax._typing import PyTree
from grsd_jax.kernel.derivative import gradient_flow_direction
from grsd_jax.problem import Problem, point_at
from grsd_jax.results import NamedResult, result

#: The factor up to which the times of both ends agree, and up to which the motion is
#: longer than the way of the flow in that time.
_AGREEMENT = 2.0


@result(derived=("elapsed",))
class MeasuredTime(NamedResult):
    """The time that the gradient flow would have taken for a motion.

    Attributes:
        start: [], by the gradient of the first end; infinite if that vanishes.
        end: [], by that of the second; likewise.
        alignment: [], the cosine of the angle between the motion and the flow, the
            smaller one of both ends; the share of the motion's length that the flow
            covers in the time of that end. 0 for a flow that stands still.
        meaningful: [] bool, whether both times are above 0 and agree within a factor 2,
            and the alignment is at least 1/2. Otherwise the motion did not follow the
            flow of this loss.
    """

    start: jax.Array
    end: jax.Array
    alignment: jax.Array
    meaningful: jax.Array

    @property
    def elapsed(self) -> jax.Array:
        """The mean of both ends, []; NaN without a meaning."""
        return where_defined(self.meaningful, time_or_zero(self))


@jax.jit
def time_or_zero(measured: MeasuredTime) -> jax.Array:
    """Returns the time, [], 0 without a meaning: compiled functions make no NaN."""
    return jnp.where(measured.meaningful, (measured.start + measured.end) / 2, 0)


def measured_time(problem: Problem, before: PyTree, after: PyTree) -> MeasuredTime:
    r"""Returns the effective time between two parameters of a training.

    .. math:: \Delta\tau = -\frac{\langle \Delta\theta, \nabla L \rangle}
              {|\nabla L|^2}

    at both ends. It is ``eta`` for a step of plain gradient descent, and
    ``eta / (1 - mu)`` for one of settled momentum. See `effective_time` for the time of
    a schedule.

    Args:
        problem: The problem of the training loss, which need not be the one whose
            kernel is measured.
        before: Parameters.
        after: Parameters later.

    Returns:
        The time in units of parameter squared over loss.

    Raises:
        ValueError: If the problem has no loss, or the trees do not fit.

    References:
        Ours; ``docs/what_moved.md``.
    """
    check_same_tree("after", after, before, "before")
    points = [
        point_at(problem, params, gradient_flow_direction(problem, params))
        for params in (before, after)
    ]
    ends, flows = [p.params for p in points], [p.direction for p in points]
    return time_between(ends, flows)


@jax.jit
def time_between(ends: list[PyTree], flows: list[PyTree]) -> MeasuredTime:
    """Returns the time between two parameters, by the gradient flows at both.

    Args:
        ends: The parameters before and after.
        flows: The gradient flow at each, trees like the parameters.

    Returns:
        The time, as `measured_time` has it.
    """
    before, after = (_flat(end) for end in ends)
    found = [_along(after - before, _flat(flow)) for flow in flows]
    (start, end), cosines = zip(*found, strict=True)
    alignment = jnp.minimum(*cosines)
    positive = (start > 0) & (end > 0)
    longer = jnp.maximum(start, end)
    agree = jnp.isfinite(longer) & (longer <= _AGREEMENT * jnp.minimum(start, end))
    follows = positive & agree & (alignment * _AGREEMENT >= 1)
    return MeasuredTime(start, end, alignment, follows)


def _flat(tree: PyTree) -> jax.Array:
    """Returns all floating leaves as one vector, of single precision at least."""
    leaves = jax.tree.leaves(tree)
    with jax.numpy_dtype_promotion("standard"):  # of dtypes alone
        dtype = jnp.result_type(jnp.float32, *(leaf.dtype for leaf in leaves))
    return jnp.concatenate([jnp.ravel(leaf).astype(dtype) for leaf in leaves])


def _along(motion: jax.Array, flow: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns ``<motion, flow> / |flow|^2``, and the cosine of their angle.

    The first is infinite for a flow that stands still.
    """
    size = jnp.max(jnp.abs(flow), initial=0)
    unit = flow / divisor(size)  # squares of small gradients underflow
    inner, square = jnp.sum(motion * unit), jnp.sum(jnp.square(unit))
    time = inner / divisor(square) / divisor(size)
    cosine = ratio(inner, norm(motion) * jnp.sqrt(divisor(square)))
    return jnp.where(size > 0, time, jnp.inf), jnp.where(size > 0, cosine, 0)
