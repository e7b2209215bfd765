"""The law ``v = c(tau) lambda^p`` over a sequence of exact balances (paper 3.3).

Theorem 1 asks for p = 1, so that the velocity on the log axis is the same at all edges,
and for a constant ``c tau``.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from grsd_jax._arrays import as_floating, divisor
from grsd_jax._checks import check_at_least, check_choice
from grsd_jax.dynamics.transport import ExactBalance
from grsd_jax.dynamics.velocity import VelocityFit, velocity_fit
from grsd_jax.results import NamedResult, result, with_undefined
from grsd_jax.shells.power_law import PowerLawFit, fit_power_law

VELOCITIES = ("flux", "shift", "excess")


@result(
    masks={
        **{name: name for name in ("times", "exponent_error", "rates", "products")},
        **{name: name for name in ("lowest_lambda", "highest_lambda")},
        "rate_stderr": "has_scatter",
    }
)
class VelocityLaw(NamedResult):
    """How the velocities of B balances depend on lambda and on time.

    Attributes:
        times: [B], tau of each balance, the logarithmic mean of its ends: for
            ``v = c lambda / tau`` the time at which the velocity is its mean. NaN where
            the time that passed has no meaning, or starts at 0.
        fits: [B] fits of ``lambda_eff v = c lambda_eff^p``, with their curvature.
        lowest_lambda: [B], the lowest ``lambda_eff`` of the edges that the fit stands
            on, the usable ones where v has its sign; NaN without any.
        highest_lambda: [B], the highest; likewise.
        exponent_error: [B], of p: twice its standard error, what p changes by with the
            edges themselves for ``lambda_eff``, and twice what it changes by between
            flux and shift, which differ where an interval is too large for a velocity.
        rates: [B], c if p = 1: the mean of v over the usable edges, NaN without any.
        rate_stderr: [B], its standard error, from the scatter over edges and the
            velocities' errors; NaN with fewer than 2 edges.
        products: [B], ``c tau``.
        decay: The fit of ``c`` against tau: an exponent of -1 if ``c tau`` is constant.
            Of the rates above 0.
        num_edges: [B] int32, the usable edges.

    Inside `jit` no NaN is made: what is undefined is infinite there.
    """

    times: jax.Array
    fits: VelocityFit
    lowest_lambda: jax.Array
    highest_lambda: jax.Array
    exponent_error: jax.Array
    rates: jax.Array
    rate_stderr: jax.Array
    products: jax.Array
    decay: PowerLawFit
    num_edges: jax.Array

    @property
    def has_scatter(self) -> jax.Array:
        """Whether there are edges enough for the error of the rate, [B] bool."""
        return self.num_edges > 1


def velocity_law(
    balances: Sequence[ExactBalance],
    starts: jax.typing.ArrayLike,
    *,
    velocity: Literal["flux", "shift", "excess"] = "flux",
) -> VelocityLaw:
    r"""Fits the velocities of a sequence of balances over lambda, and over time.

    Velocities on the log axis, ``v_k``, are per log lambda; the paper's
    ``v(lambda) = lambda v_k`` is fitted against ``lambda_eff``, where the energy at the
    edge lies, over the edges of `ExactBalance.velocity_mask`. Soft tails flatten a
    velocity that varies where energy is steep, which ``lambda_eff`` corrects in part.

    Args:
        balances: B balances with the same number of edges, and with their time.
        starts: [B], the effective time tau at which each begins.
        velocity: ``"flux"``, ``F / (Delta tau eps)``; ``"shift"``, for large intervals;
            ``"excess"``, the flux less the counting velocity, which is what speaks for
            the theory: a kernel that only grows has p = 1 too.

    Returns:
        The law.

    Raises:
        ValueError: If there is no balance, the shapes differ, or the excess is asked
            for without a count.

    References:
        Paper 3.3 (Theorem 1); ours, ``docs/what_moved.md``.
    """
    check_at_least("len(balances)", len(balances), 1)
    check_choice("velocity", velocity, VELOCITIES)
    starts = as_floating("starts", starts, [len(balances)])
    forms = [_forms(balance, velocity) for balance in balances]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *forms)
    return with_undefined(_law(stacked, starts.astype(stacked.elapsed.dtype)))


class _Forms(NamedTuple):
    """The velocities of one balance, in the form asked for and in the other one.

    Zeros where they are masked or undefined, and for a time that is unknown.
    """

    velocity: jax.Array
    other: jax.Array
    error: jax.Array
    effective_edges: jax.Array
    edges: jax.Array
    mask: jax.Array
    elapsed: jax.Array


def _forms(balance: ExactBalance, velocity: str) -> _Forms:
    elapsed = jnp.where(balance.timed, balance.elapsed, 0)
    counted = count_error = jnp.zeros_like(balance.flux)
    if velocity == "excess":
        if balance.counting is None or balance.counting_velocity is None:
            raise ValueError("balances: expected counts for the excess, got none.")
        counted = balance.counting_velocity
        count_error = balance.counting.error / divisor(elapsed)

    def form(values: jax.Array) -> tuple[jax.Array, jax.Array]:
        known = jnp.isfinite(values) & jnp.isfinite(counted) & balance.velocity_mask
        return jnp.where(known, values, 0) - jnp.where(known, counted, 0), known

    forms = form(balance.velocity), form(balance.shift_velocity)
    error = balance.velocity_error
    if velocity == "shift":
        forms, error = forms[::-1], balance.shift_velocity_error
    (first, mask), (second, _) = forms
    return _Forms(
        velocity=first,
        other=second,
        error=jnp.where(mask, error, 0) + count_error,
        effective_edges=jnp.where(mask, balance.effective_edges, 0),
        edges=balance.shells.edges,
        mask=mask,
        elapsed=elapsed,
    )


@jax.jit
def _law(forms: _Forms, starts: jax.Array) -> VelocityLaw:
    velocities, masks, elapsed = forms.velocity, forms.mask, forms.elapsed
    number = jnp.sum(masks, axis=1, dtype=jnp.int32)
    total = jnp.maximum(number, 1).astype(velocities.dtype)

    def mean(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(masks, values, 0), axis=1) / total

    def fitted(edges: jax.Array, velocities: jax.Array) -> VelocityFit:
        return jax.vmap(velocity_fit)(edges, edges * velocities, masks)

    fits = fitted(forms.effective_edges, velocities)
    lowest, highest = _range(forms.effective_edges, masks, velocities, fits.sign)
    at_edges = fitted(forms.edges, velocities).fit.exponent
    otherwise = fitted(forms.effective_edges, forms.other).fit.exponent
    found, stderr = fits.fit.exponent, fits.fit.exponent_stderr
    # Sharp shells have no shift.
    apart = _apart(otherwise, found)
    apart = jnp.where(jnp.isfinite(apart), apart, 0)

    rate = mean(velocities)
    scatter = mean(jnp.square(velocities - rate[:, None])) / jnp.maximum(total - 1, 1)
    rate_error = jnp.sqrt(scatter + mean(jnp.square(forms.error)) / total)
    moves, timed = number > 0, (elapsed > 0) & (starts > 0)
    # log((start + elapsed) / start) without cancellation.
    logs = jnp.log1p(elapsed / divisor(starts))
    times = jnp.where(timed, elapsed / jnp.where(timed, logs, 1), jnp.inf)
    rates = jnp.where(moves, rate, jnp.inf)
    return VelocityLaw(
        times=times,
        fits=fits,
        lowest_lambda=lowest,
        highest_lambda=highest,
        exponent_error=2 * stderr + _apart(at_edges, found) + 2 * apart,
        rates=rates,
        rate_stderr=jnp.where(number > 1, rate_error, jnp.inf),
        products=jnp.where(moves & timed, rate * times, jnp.inf),
        decay=fit_power_law(times, rates, moves & timed),
        num_edges=number,
    )


def _range(
    edges: jax.Array, masks: jax.Array, velocities: jax.Array, sign: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the ends of the edges whose velocity has a sign, infinite without any."""
    used = masks & (velocities != 0) & (jnp.sign(velocities) == sign[:, None])
    lowest = jnp.min(edges, axis=1, where=used, initial=jnp.inf)
    highest = jnp.max(edges, axis=1, where=used, initial=0)
    return lowest, jnp.where(jnp.isfinite(lowest), highest, jnp.inf)


def _apart(first: jax.Array, second: jax.Array) -> jax.Array:
    """Returns how far exponents lie apart, infinity where one is undefined."""
    known = jnp.isfinite(first) & jnp.isfinite(second)
    distance = jnp.abs(jnp.where(known, first, 0) - jnp.where(known, second, 0))
    return jnp.where(known, distance, jnp.inf)
