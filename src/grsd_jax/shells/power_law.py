"""Power laws ``y = c x^p``, fitted in log-log coordinates (paper 7.3).

Figure 1 fits ``|Mdot_ii|`` against ``lambda_i``, mode by mode, and ``sqrt(K_aa)``
against the shell centers; Condition 4 of the paper predicts the exponent 1 for both.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import as_floating, as_mask, magnitude
from grsd_jax._checks import check_at_least, check_key, check_share
from grsd_jax.results import (
    NamedResult,
    number,
    result,
    with_interval,
    with_undefined,
)

_DEFINED = ("exponent", "r_squared", "exponent_stderr", "interval")


@result(
    axes={"2": "bound"},
    masks={**{name: name for name in _DEFINED}, "prefactor": "exponent"},
)
class PowerLawFit(NamedResult):
    """A least-squares fit of ``log y = log c + p log x``.

    Attributes:
        exponent: [], the slope p; NaN with fewer than 2 points or a single distinct x.
        prefactor: [], c; NaN with the exponent, 0 or infinite if it leaves the dtype.
        r_squared: [], the share of the variance of ``log y`` that the line explains;
            NaN with the exponent, with fewer than 3 points, which any line explains, or
            if ``log y`` has no variance.
        exponent_stderr: [], the standard error of the exponent for independent errors
            of equal variance in ``log y``; NaN with the exponent, or with fewer than 3
            points.
        num_points: [] int32, the points used.
        interval: [2], the bootstrap interval of the exponent, NaN where the standard
            error is; None unless asked for.

    Inside `jit` no NaN is made: what is undefined is infinite there.
    """

    exponent: jax.Array
    prefactor: jax.Array
    r_squared: jax.Array
    exponent_stderr: jax.Array
    num_points: jax.Array
    interval: jax.Array | None = None

    def _headline(self) -> list[tuple[str, str]]:
        text = with_interval(self.exponent, self.interval, self.exponent_stderr)
        if not np.isfinite(self.exponent):
            text += " (fewer than 2 points, or a single x)"
        return [
            ("exponent", text),
            ("R^2", number(self.r_squared, 3)),
            ("points", str(int(self.num_points))),
            ("prefactor", number(self.prefactor)),
        ]


class _Line(NamedTuple):
    """A weighted least-squares line; finite even where ``defined`` is False."""

    slope: jax.Array
    intercept: jax.Array
    square_x: jax.Array
    square_y: jax.Array
    square_rest: jax.Array
    defined: jax.Array


def fit_power_law(
    x: jax.typing.ArrayLike,
    y: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike | None = None,
    *,
    num_bootstrap: int = 0,
    key: jax.Array | None = None,
    confidence: float = 0.95,
) -> PowerLawFit:
    r"""Fits ``y = c x^p`` by ordinary least squares of ``log y`` on ``log x``.

    .. math:: p = \frac{\sum_i (u_i - \bar u)(v_i - \bar v)}{\sum_i (u_i - \bar u)^2},
              \qquad
              \mathrm{stderr}(p)^2 = \frac{\sum_i (v_i - \log c - p u_i)^2}
              {(q - 2) \sum_i (u_i - \bar u)^2},

    with ``u = log x``, ``v = log y`` and q points. A point whose x or y is not finite
    and positive (subnormal ones included) is left out. The bootstrap draws q of the q
    points with replacement and takes percentiles of the exponent; draws with a single
    distinct x have no exponent and are left out.

    Args:
        x: [r], such as eigenvalues.
        y: [r], such as the diagonal of the coupling.
        mask: [r] bool, the points to use. Default: all.
        num_bootstrap: The number of resamples behind ``interval``; 0 for none.
        key: The PRNG key of the bootstrap, which is consumed. Needed if
            ``num_bootstrap > 0``.
        confidence: The nominal coverage of ``interval``, between 0 and 1.

    Returns:
        The fit; ``num_points`` explains what is undefined in it.

    Raises:
        ValueError: If the shapes differ or are not [r], ``x`` or ``y`` is not floating,
            ``num_bootstrap`` is not an integer of at least 0, ``key`` is missing, or
            ``confidence`` is not between 0 and 1.

    References:
        Paper 7.3.
    """
    x = as_floating("x", x, [None])
    y = as_floating("y", y, x.shape)
    _check_bootstrap(num_bootstrap, key, confidence)
    dtype = jnp.promote_types(x.dtype, y.dtype)
    x, y = x.astype(dtype), y.astype(dtype)
    tiny = jnp.finfo(dtype).tiny
    used = as_mask("mask", mask, x.shape) & (x >= tiny) & (y >= tiny)
    used &= jnp.isfinite(x) & jnp.isfinite(y)
    log_x, unit_x = logs_and_unit(x, used)
    log_y, unit_y = logs_and_unit(y, used)

    line = _fit_line(log_x, log_y, used)
    intercept = line.intercept + unit_y - line.slope * unit_x
    num_points = jnp.sum(used, dtype=jnp.int32)
    enough = line.defined & (num_points >= 3)
    freedom = jnp.maximum(num_points - 2, 1).astype(dtype)
    varies = line.defined & (line.square_y > 0)
    rest = line.square_rest / jnp.where(varies, line.square_y, 1)
    variance = line.square_rest / freedom / line.square_x
    scattered = variance > 0  # the root has no derivative at a perfect fit
    stderr = jnp.where(scattered, jnp.sqrt(jnp.where(scattered, variance, 1)), 0)
    interval = None
    if num_bootstrap and key is not None:
        interval = _bootstrap(log_x, log_y, used, num_bootstrap, key, confidence)
        interval = jnp.where(enough, interval, jnp.inf)
    fit = PowerLawFit(
        exponent=jnp.where(line.defined, line.slope, jnp.inf),
        prefactor=jnp.where(line.defined, jnp.exp(intercept), jnp.inf),
        # A line explains two points whatever they are.
        r_squared=jnp.where(varies & enough, jnp.maximum(1 - rest, 0), jnp.inf),
        exponent_stderr=jnp.where(enough, stderr, jnp.inf),
        num_points=num_points,
        interval=interval,
    )
    return with_undefined(fit)


def logs_and_unit(values: jax.Array, used: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns logarithms in a unit of the size of the largest value, and that of it.

    Those of large and small numbers would lose the digits before the point; so the
    result does not depend on units. Values not in use count as the unit.
    """
    unit = magnitude(jnp.where(used, values, 0))
    return jnp.log(jnp.where(used, values / unit, 1)), jnp.log(unit)


def _check_bootstrap(
    num_bootstrap: int, key: jax.Array | None, confidence: float
) -> None:
    """Raises ValueError unless the bootstrap's arguments make sense together."""
    num_bootstrap = check_at_least("num_bootstrap", num_bootstrap, 0)
    if num_bootstrap:
        check_key(key, f"num_bootstrap = {num_bootstrap}")
    confidence = check_share("confidence", confidence)


def _fit_line(log_x: jax.Array, log_y: jax.Array, used: jax.Array) -> _Line:
    """Fits a line through the points in use, without ever dividing by zero."""
    origin_x, spread_x = _origin_and_spread(log_x, used)
    origin_y, _ = _origin_and_spread(log_y, used)
    weights = used.astype(log_x.dtype)
    total = jnp.maximum(jnp.sum(weights), 1)
    # Measured from a point of the data, then from the mean: logarithms of small numbers
    # are large, and equal points come out as exactly equal.
    mean_x = jnp.sum(weights * (log_x - origin_x)) / total
    mean_y = jnp.sum(weights * (log_y - origin_y)) / total
    centered_x = weights * (log_x - origin_x - mean_x)
    centered_y = weights * (log_y - origin_y - mean_y)

    square_x = jnp.sum(jnp.square(centered_x))
    defined = (spread_x > 0) & (square_x > 0)
    square_x = jnp.where(defined, square_x, 1)
    slope = jnp.sum(centered_x * centered_y) / square_x
    return _Line(
        slope=slope,
        intercept=(origin_y + mean_y) - slope * (origin_x + mean_x),
        square_x=square_x,
        square_y=jnp.sum(jnp.square(centered_y)),
        square_rest=jnp.sum(jnp.square(centered_y - slope * centered_x)),
        defined=defined,
    )


def _origin_and_spread(logs: jax.Array, used: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the smallest value in use, and how far the largest lies above it."""
    largest = float(jnp.finfo(logs.dtype).max)
    low = jnp.min(logs, where=used, initial=largest)
    high = jnp.max(logs, where=used, initial=-largest)
    any_used = jnp.any(used)
    low, high = jnp.where(any_used, low, 0), jnp.where(any_used, high, 0)
    return low, high - low


def _bootstrap(
    log_x: jax.Array,
    log_y: jax.Array,
    used: jax.Array,
    num_bootstrap: int,
    key: jax.Array,
    confidence: float,
) -> jax.Array:
    """Returns the [2] percentiles of the slope over resamples of the points in use."""
    # Points in use come first, so that a draw below their number picks one of them.
    order = jnp.argsort(~used, stable=True)
    num_points = jnp.sum(used, dtype=jnp.int32)
    drawn = jnp.arange(used.shape[0], dtype=jnp.int32) < num_points

    # One uniform draw: random integers compile to a program several times as large.
    uniform = jax.random.uniform(key, (num_bootstrap, used.shape[0]), log_x.dtype)
    last = jnp.maximum(num_points - 1, 0)
    draws = (uniform * num_points.astype(log_x.dtype)).astype(jnp.int32)

    def slope(draws: jax.Array) -> tuple[jax.Array, jax.Array]:
        chosen = order[jnp.minimum(draws, last)]  # the product can round up
        line = _fit_line(log_x[chosen], log_y[chosen], drawn)
        return line.slope, line.defined

    slopes, defined = jax.vmap(slope)(draws)
    tail = (1 - confidence) / 2
    levels = jnp.asarray([tail, 1 - tail], slopes.dtype)
    return jnp.where(jnp.any(defined), _quantiles(slopes, defined, levels), jnp.inf)


def _quantiles(samples: jax.Array, defined: jax.Array, levels: jax.Array) -> jax.Array:
    """Returns the quantiles of the defined samples, by linear interpolation."""
    ordered = jnp.sort(jnp.where(defined, samples, jnp.finfo(samples.dtype).max))
    last = jnp.maximum(jnp.sum(defined, dtype=jnp.int32) - 1, 0)
    position = levels * last.astype(samples.dtype)
    below = jnp.clip(jnp.floor(position).astype(jnp.int32), 0, last)
    above = jnp.minimum(below + 1, last)
    share = position - below.astype(samples.dtype)
    return ordered[below] * (1 - share) + ordered[above] * share
