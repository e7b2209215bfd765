"""The velocity of the energy along the spectrum, as a power law (paper 3.3).

Theorem 1 constrains it to ``v = c(t) lambda^p``. Whether measured velocities follow one
is an empirical question, so the fit comes with a test that can reject it.
"""

import jax
import jax.numpy as jnp

from grsd_jax._arrays import as_floating, as_mask, divisor
from grsd_jax.results import NamedResult, headline, number, result, with_undefined
from grsd_jax.shells.power_law import PowerLawFit, fit_power_law, logs_and_unit


@result(masks=dict.fromkeys(("curvature", "curvature_stderr", "p_value"), "curvature"))
class VelocityFit(NamedResult):
    """A power law of the velocity, and the evidence against it.

    Attributes:
        fit: The fit of ``sign * v = c lambda^p`` over the points of that sign, with its
            interval if asked for.
        sign: [], 1 or -1, the direction of the flow that most points have: upward or
            downward in lambda. With equally many of each, the sign of their sum; 0
            without any point.
        sign_share: [], the fraction of the usable points with that sign. Below 1, no
            single power law holds over the whole range.
        curvature: [], q in ``log |v| = log c + p u + q u^2``, ``u`` the distance from
            the middle in ``log lambda``; NaN with fewer than 4 points or 3 distinct
            edges.
        curvature_stderr: [], its standard error; NaN with the curvature.
        p_value: [], the probability of a curvature this far from 0 if the law holds and
            the errors of ``log |v|`` are independent and Gaussian: Student's t with
            ``num_points - 3`` degrees of freedom. Small: not a power law. NaN with the
            curvature.

    Inside `jit` no NaN is made: what is undefined is infinite there.
    """

    fit: PowerLawFit
    sign: jax.Array
    sign_share: jax.Array
    curvature: jax.Array
    curvature_stderr: jax.Array
    p_value: jax.Array

    def _headline(self) -> list[tuple[str, str]]:
        directions = {1.0: "upward", -1.0: "downward"}
        (_, exponent), *rest = headline(self.fit)
        share = f"{number(self.sign_share)} of the points"
        return [
            ("exponent of v = c lambda^p", exponent),
            ("direction", f"{directions.get(float(self.sign), 'n/a')}, {share}"),
            ("straightness", f"p-value {number(self.p_value)}"),
            *rest,
        ]


def velocity_fit(
    edges: jax.typing.ArrayLike,
    velocity: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike | None = None,
    *,
    num_bootstrap: int = 0,
    key: jax.Array | None = None,
    confidence: float = 0.95,
) -> VelocityFit:
    r"""Fits ``v = c lambda^p`` to the velocities at the shell edges.

    A power law has one sign. The fit takes the points of the prevailing sign, with c of
    that sign, and reports what fraction of all points they are. It is `fit_power_law`
    of their absolute values, with a test of its straightness in log-log coordinates
    against a parabola. A broken law bends, which the curvature shows and a high ``R^2``
    hides.

    Args:
        edges: [q], lambda at the inner edges, ``shells.edges[1:-1]``.
        velocity: [q], v, such as ``ShellDynamics.velocity``.
        mask: [q] bool, the points to use, such as ``ShellDynamics.velocity_mask``.
            Default: all. Points that are zero or not finite are left out.
        num_bootstrap: The number of resamples behind ``fit.interval``; 0 for none.
        key: The PRNG key of the bootstrap, which is consumed. Needed if
            ``num_bootstrap > 0``.
        confidence: The nominal coverage of the interval, between 0 and 1.

    Returns:
        The fit, its sign and its diagnostics.

    Raises:
        ValueError: As for `fit_power_law`.

    References:
        Paper 3.3 (Theorem 1) and A.2; the handling of signs and the test are ours.
    """
    edges = as_floating("edges", edges, [None])
    velocity = as_floating("velocity", velocity, edges.shape)
    dtype = jnp.promote_types(edges.dtype, velocity.dtype)
    edges, velocity = edges.astype(dtype), velocity.astype(dtype)
    tiny = jnp.finfo(dtype).tiny
    usable = as_mask("mask", mask, edges.shape) & jnp.isfinite(velocity)
    usable &= jnp.isfinite(edges) & (edges >= tiny) & (jnp.abs(velocity) >= tiny)
    velocity = jnp.where(usable, velocity, 0)  # 0 times a NaN is one

    signs = jnp.sign(velocity)
    vote = jnp.sign(jnp.sum(signs))
    sign = jnp.where(vote == 0, jnp.sign(jnp.sum(signs * jnp.abs(velocity))), vote)
    used = usable & (signs == sign)
    number = jnp.sum(usable, dtype=jnp.int32)
    fit = fit_power_law(
        edges,
        jnp.where(used, sign * velocity, 1),
        used,
        num_bootstrap=num_bootstrap,
        key=key,
        confidence=confidence,
    )
    share = fit.num_points.astype(dtype) / jnp.maximum(number, 1).astype(dtype)
    curvature, stderr, p_value = _curvature(edges, jnp.abs(velocity), used)
    found = VelocityFit(fit, sign, share, curvature, stderr, p_value)
    return with_undefined(found)


def _curvature(
    x: jax.Array, y: jax.Array, used: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the quadratic term of log y over log x, its error and its p-value.

    Infinities if they are undefined.
    """
    dtype, eps = x.dtype, float(jnp.finfo(x.dtype).eps)
    weights = used.astype(dtype)
    number = jnp.sum(weights)
    total = jnp.maximum(number, 1)
    log_x, _ = logs_and_unit(x, used)
    log_y, _ = logs_and_unit(y, used)

    def center(values: jax.Array) -> jax.Array:
        return weights * (values - jnp.sum(weights * values) / total)

    def without(values: jax.Array, basis: jax.Array) -> jax.Array:
        size = jnp.sum(jnp.square(basis))
        return values - basis * jnp.sum(values * basis) / divisor(size)

    line = center(log_x)
    parabola = without(center(jnp.square(line)), line)
    rest = without(center(log_y), line)
    size = jnp.sum(jnp.square(parabola))
    spread = jnp.max(jnp.abs(line), initial=0)
    defined = (number >= 4) & (jnp.sqrt(size) > 64 * eps * jnp.square(spread))
    size = jnp.where(defined, size, 1)
    curvature = jnp.sum(parabola * rest) / size
    freedom = jnp.where(defined, number - 3, 1)
    left = jnp.sum(jnp.square(rest - curvature * parabola)) / freedom
    # Exact laws leave only rounding, which is neither independent nor Gaussian.
    rounding = 4 * eps * (1 + jnp.max(jnp.abs(log_y), initial=0))
    variance = jnp.maximum(left, jnp.square(rounding)) / size
    statistic = jnp.square(curvature) / variance
    p_value = jax.scipy.special.betainc(
        freedom / 2, jnp.full_like(freedom, 0.5), freedom / (freedom + statistic)
    )
    return (
        jnp.where(defined, curvature, jnp.inf),
        jnp.where(defined, jnp.sqrt(variance), jnp.inf),
        jnp.where(defined, p_value, jnp.inf),
    )
