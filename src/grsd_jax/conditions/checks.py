"""The checks of each condition: measured numbers against thresholds.

Every check states the error of its number, where that is known, and whether the
iterations behind it converged.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax.conditions.incoherence import BlockCoherence
from grsd_jax.conditions.locality import (
    InfluenceProfile,
    distance_maxima,
    distance_totals,
    smallest_band,
)
from grsd_jax.conditions.stability import OperatorNorms, ProjectorDrift
from grsd_jax.conditions.verdicts import Check, Thresholds
from grsd_jax.results import percent
from grsd_jax.shells.diagnostics import CouplingMeasurement

#: Draws behind the error of an estimated band.
_NUM_DRAWS = 200

_UNTRUSTED = "not finite, zero, or examples that are coupled"

#: Largest disagreement of M with matrix-free products at which M is trusted. An error
#: function that couples its examples exceeds it.
_MOST_DISAGREEMENT = 0.01


def trusted(measured: CouplingMeasurement) -> bool:
    """Returns whether a measurement is finite and agrees with matrix-free products.

    Args:
        measured: The measurement.

    Returns:
        False for an error function whose examples are not independent, since J taken
        example by example is then wrong; and for a kernel that is zero.
    """
    agrees = measured.operator_disagreement <= _MOST_DISAGREEMENT
    return bool(measured.finite) and bool(agrees)


def locality_checks(
    profiles: Sequence[InfluenceProfile], bands: Sequence[int], thresholds: Thresholds
) -> tuple[Check, ...]:
    """Holds the widest band of the influence against its threshold.

    Args:
        profiles: The influence at each point.
        bands: The band of each.
        thresholds: The thresholds.

    Returns:
        One check; undefined if an influence is not finite, if none differs from zero,
        or for a single block.
    """
    share, widest = thresholds.influence_share, thresholds.max_band
    if widest is None:
        widest = (profiles[0].influence.shape[0] - 1) // 2
    name = f"band with {percent(share)} of the influence"
    influences = [np.asarray(found.influence) for found in profiles]
    reason = _no_band(influences)
    if reason:
        return (Check(name, math.nan, float(widest), reason=reason),)
    band = max(bands)
    error = _band_error(profiles[list(bands).index(band)], share)
    count = sum(int(np.count_nonzero(one)) for one in influences)
    return (Check(name, float(band), float(widest), error=error, count=count),)


def _no_band(influences: Sequence[np.ndarray]) -> str:
    """Returns why no band can be told from these influences, empty if one can."""
    if not all(np.isfinite(one).all() for one in influences):
        return "an influence is not finite"
    if not all(one.any() for one in influences):
        return "no block influences any"
    return "one block has no distances" if len(influences[0]) < 2 else ""


def _band_error(profile: InfluenceProfile, share: float) -> float:
    """Returns the spread of the band when the influence varies by its errors.

    Entries vary independently, although they share probes; 0 if they are exact.
    """
    if profile.num_probes == 0:
        return 0.0
    mean, stderr = np.asarray(profile.influence), np.asarray(profile.stderr)
    drawn = np.random.default_rng(0).normal(size=(_NUM_DRAWS, *mean.shape))
    largest = mean.max() or 1.0  # squared below
    varied = jnp.asarray((mean + drawn * stderr) / largest, mean.dtype)
    bands = jax.vmap(lambda one: smallest_band(distance_totals(one), share))(varied**2)
    return float(jnp.std(bands.astype(varied.dtype)))


def incoherence_checks(
    coherence: BlockCoherence, thresholds: Thresholds, *, known: bool
) -> tuple[Check, ...]:
    """Holds the tail sum and the largest distant coherence against their thresholds.

    Args:
        coherence: The overlap of every two blocks.
        thresholds: The thresholds.
        known: Whether the network is finite there and its examples are independent; if
            not, the checks are undefined.

    Returns:
        Two checks.
    """
    distant = thresholds.distant
    # Residuals are those of the squares: G is off by half of its own, and each norm,
    # the root of a G, by a quarter.
    own = jnp.diagonal(coherence.residuals) / 4
    relative = coherence.residuals / 2 + own[:, None] + own[None, :]
    errors = np.asarray(distance_maxima(coherence.coherence * relative), np.float64)
    profile = np.asarray(coherence.profile, np.float64)
    converged = bool(jnp.all(coherence.converged))

    def check(
        name: str, least: int, number: float, bound: float, error: float
    ) -> Check:
        # Pairs of blocks whose Jacobians both differ from zero.
        count = int(np.sum(np.triu(np.asarray(coherence.defined), least)))
        if known and count:
            return Check(
                name, number, bound, error=error, converged=converged, count=count
            )
        reason = "no two blocks so far apart have a Jacobian" if known else _UNTRUSTED
        return Check(name, math.nan, bound, reason=reason)

    return (
        check(
            "tail sum of the coherence",
            1,
            float(coherence.tail_sum),
            thresholds.max_tail_sum,
            float(errors[1:].sum()),
        ),
        check(
            f"largest coherence at distance >= {distant}",
            distant,
            float(profile[distant:].max(initial=0.0)),
            thresholds.max_distant_coherence,
            float(errors[distant:].max(initial=0.0)),
        ),
    )


def growth_checks(
    norms: Sequence[OperatorNorms], thresholds: Thresholds
) -> tuple[Check, ...]:
    """Holds the growth of both operator norms along the path against its threshold.

    Args:
        norms: The norms at each point.
        thresholds: The thresholds.

    Returns:
        Two checks; the growth of a norm that begins at zero is undefined, as is that
        at a single point.
    """
    values = {
        "J": [float(found.jacobian) for found in norms],
        "Jdot": [float(found.derivative) for found in norms],
    }
    return tuple(
        _growth(
            f"growth of the norm of {name}",
            np.array(values[name]),
            np.array([float(found.residuals[which]) for found in norms]),
            all(bool(found.converged[which]) for found in norms),
            thresholds.max_growth,
        )
        for which, name in enumerate(values)
    )


def _growth(
    name: str,
    values: np.ndarray,
    residuals: np.ndarray,
    converged: bool,
    threshold: float,
) -> Check:
    if len(values) < 2 or not np.isfinite(values).all() or values[0] == 0:
        reason = "a norm is not finite"
        if np.isfinite(values).all():
            reason = "one point" if len(values) < 2 else "the first norm is zero"
        return Check(name, math.nan, threshold, reason=reason)
    largest = int(np.argmax(values))
    growth = float(values[largest] / values[0])
    # The residuals are those of the squares; the growth of the first is 1 exactly.
    relative = (residuals[0] + residuals[largest]) / 2 if largest else 0.0
    error = float(growth * relative)
    return Check(
        name, growth, threshold, error=error, converged=converged, count=len(values)
    )


def drift_check(
    drifts: Sequence[ProjectorDrift],
    measurements: Sequence[CouplingMeasurement],
    num_leading: int,
    thresholds: Thresholds,
) -> Check:
    """Holds the largest drift of the leading projector against its threshold.

    Args:
        drifts: The drift from each point to the next.
        measurements: The measurement at each point.
        num_leading: Eigenvectors of the projector.
        thresholds: The thresholds.

    Returns:
        The check; undefined without two points, or if one is not `trusted`, and not
        converged if a leading pair is not resolved.
    """
    known = all(map(trusted, measurements))
    largest = math.nan
    if drifts and known:
        largest = float(np.max([float(d.frobenius) for d in drifts]))
    reason = "a drift is undefined" if drifts else "one point"
    resolved = [jnp.all(found.resolved[:num_leading]) for found in measurements]
    return Check(
        f"drift of the leading {num_leading}",
        largest,
        thresholds.max_drift,
        converged=all(bool(x) for x in resolved),
        count=len(drifts),
        reason=(reason if known else _UNTRUSTED) if math.isnan(largest) else "",
    )


def lipschitz_check(
    constants: Sequence[float],
    measurements: Sequence[CouplingMeasurement],
    thresholds: Thresholds,
) -> Check:
    """Holds the largest Lipschitz constant along the path against its threshold.

    Args:
        constants: The constant at each point.
        measurements: The measurement at each point.
        thresholds: The thresholds.

    Returns:
        The check; undefined if a measurement is not `trusted`.
    """
    known = all(map(trusted, measurements))
    largest = float(np.max(constants)) if known else math.nan
    reason = "no two neighboring shells are coupled" if known else _UNTRUSTED
    return Check(
        "Lipschitz constant in log lambda",
        largest,
        thresholds.max_lipschitz,
        count=len(constants),
        reason=reason if math.isnan(largest) else "",
    )


def invariance_checks(
    residual: float, measured: CouplingMeasurement, thresholds: Thresholds
) -> tuple[Check, ...]:
    """Holds the last point's residual, slope and R^2 against their thresholds.

    Args:
        residual: The renormalized coupling's Toeplitz residual at the center.
        measured: The measurement.
        thresholds: The thresholds.

    Returns:
        Three checks; undefined if the measurement is not `trusted`.
    """
    fit = measured.diagonal_fit
    slope_error, r_squared = abs(float(fit.exponent) - 1), float(fit.r_squared)
    if not trusted(measured):
        residual = slope_error = r_squared = math.nan
    windows = int(jnp.sum(measured.renormalized.degrees_of_freedom > 0))
    points = int(fit.num_points)
    checks = (
        Check(
            "Toeplitz residual at the center",
            residual,
            thresholds.max_residual,
            count=windows,
            reason=f"{windows} windows hold a coupling with degrees of freedom",
        ),
        Check(
            "distance of the slope to 1",
            slope_error,
            thresholds.max_slope_error,
            error=float(fit.exponent_stderr),
            count=points,
            reason=f"{points} pairs are resolved and move",
        ),
        Check(
            "R^2 of the diagonal",
            r_squared,
            thresholds.min_r_squared,
            ">=",
            count=points,
            reason=f"{points} pairs are resolved and move",
        ),
    )
    return tuple(_with_reason(check, measured) for check in checks)


def _with_reason(check: Check, measured: CouplingMeasurement) -> Check:
    """Returns a check with its reason if its number is undefined, else without."""
    if not math.isnan(check.number):
        return check._replace(reason="")
    return check if trusted(measured) else check._replace(reason=_UNTRUSTED)
