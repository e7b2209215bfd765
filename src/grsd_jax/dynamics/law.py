"""The law ``v = c(tau) lambda^p`` over a sequence of exact balances (paper 3.3).

Theorem 1 asks for p = 1, so that the velocity on the log axis is the same at all edges,
and for a constant ``c tau``.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from grsd_jax._arrays import as_floating
from grsd_jax._checks import check_at_least, check_choice
from grsd_jax.dynamics.transport import ExactBalance
from grsd_jax.dynamics.velocity import VelocityFit, velocity_fit
from grsd_jax.results import NamedResult, result
from grsd_jax.shells.power_law import PowerLawFit, fit_power_law

VELOCITIES = ("flux", "shift", "excess")


@result()
class VelocityLaw(NamedResult):
    """How the velocities of B balances depend on lambda and on time.

    Attributes:
        times: [B], tau of each balance, the logarithmic mean of its ends: for
            ``v = c lambda / tau`` the time at which the velocity is its mean. NaN where
            the time that passed has no meaning, or starts at 0.
        fits: [B] fits of ``lambda_eff v = c lambda_eff^p``, with their curvature.
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
    """

    times: jax.Array
    fits: VelocityFit
    exponent_error: jax.Array
    rates: jax.Array
    rate_stderr: jax.Array
    products: jax.Array
    decay: PowerLawFit
    num_edges: jax.Array


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
    with jax.debug_nans(False):  # what is undefined is NaN by contract
        forms = [_forms(balance, velocity) for balance in balances]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *forms)
        elapsed = jnp.stack([balance.elapsed for balance in balances])
        return _law(stacked, starts.astype(elapsed.dtype), elapsed)


class _Forms(NamedTuple):
    """The velocities of one balance, in the form asked for and in the other one."""

    velocity: jax.Array
    other: jax.Array
    error: jax.Array
    effective_edges: jax.Array
    edges: jax.Array
    mask: jax.Array


def _forms(balance: ExactBalance, velocity: str) -> _Forms:
    flux, shift, error = (
        balance.velocity,
        balance.shift_velocity,
        balance.velocity_error,
    )
    if velocity == "excess":
        counted = balance.counting_velocity
        if counted is None or balance.counting is None:
            raise ValueError("balances: expected counts for the excess, got none.")
        flux, shift = flux - counted, shift - counted
        error = error + balance.counting.stderr / balance.elapsed
    first, second = (shift, flux) if velocity == "shift" else (flux, shift)
    edges, mask = balance.effective_edges, balance.velocity_mask & jnp.isfinite(first)
    return _Forms(first, second, error, edges, balance.shells.edges, mask)


@jax.jit
def _law(forms: _Forms, starts: jax.Array, elapsed: jax.Array) -> VelocityLaw:
    velocities, masks = forms.velocity, forms.mask
    number = jnp.sum(masks, axis=1, dtype=jnp.int32)
    total = jnp.maximum(number, 1).astype(velocities.dtype)

    def mean(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(masks, values, 0), axis=1) / total

    def fitted(edges: jax.Array, velocities: jax.Array) -> VelocityFit:
        return jax.vmap(velocity_fit)(edges, edges * velocities, masks)

    fits = fitted(forms.effective_edges, velocities)
    at_edges = fitted(forms.edges, velocities).fit.exponent
    otherwise = fitted(forms.effective_edges, forms.other).fit.exponent
    found, stderr = fits.fit.exponent, fits.fit.exponent_stderr
    error = 2 * stderr + jnp.abs(at_edges - found)
    # Sharp shells have no shift.
    apart = jnp.abs(otherwise - found)
    error = error + 2 * jnp.where(jnp.isnan(apart), 0, apart)

    rates = jnp.where(number > 0, mean(velocities), jnp.nan)
    scatter = mean(jnp.square(velocities - rates[:, None])) / jnp.maximum(total - 1, 1)
    rate_error = jnp.sqrt(scatter + mean(jnp.square(forms.error)) / total)
    # log((start + elapsed) / start) without cancellation.
    times = elapsed / jnp.log1p(elapsed / jnp.where(starts > 0, starts, jnp.nan))
    return VelocityLaw(
        times=times,
        fits=fits,
        exponent_error=error,
        rates=rates,
        rate_stderr=jnp.where(number > 1, rate_error, jnp.nan),
        products=rates * times,
        decay=fit_power_law(times, rates, jnp.isfinite(times) & (number > 0)),
        num_edges=number,
    )
