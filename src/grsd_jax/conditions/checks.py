"""The checks of each condition: measured numbers against thresholds.

Every check states the error of its number, where that is known, and whether the
iterations behind it converged.
"""

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
from grsd_jax.shells.diagnostics import CouplingMeasurement

#: Draws behind the error of an estimated band.
_NUM_DRAWS = 200

#: Largest disagreement of M with matrix-free products at which M is trusted. An error
#: function that couples its examples exceeds it.
_MOST_DISAGREEMENT = 0.01


def trusted(measured: CouplingMeasurement) -> bool:
    """Returns whether a measurement is finite and agrees with matrix-free products.

    Args:
        measured: The measurement.

    Returns:
        False for an error function whose examples are not independent, since J taken
        example by example is then wrong.
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
        One check; undefined if an influence is not finite.
    """
    share, widest = thresholds.influence_share, thresholds.max_band
    if widest is None:
        widest = (profiles[0].influence.shape[0] - 1) // 2
    name = f"band with {share:.0%} of the influence"
    if not all(bool(jnp.isfinite(found.influence).all()) for found in profiles):
        return (Check(name, float("nan"), float(widest)),)
    band = max(bands)
    error = _band_error(profiles[list(bands).index(band)], share)
    return (Check(name, float(band), float(widest), error=error),)


def _band_error(profile: InfluenceProfile, share: float) -> float:
    """Returns the spread of the band when the influence varies by its errors.

    Entries vary independently, although they share probes; 0 if they are exact.
    """
    if profile.num_probes == 0:
        return 0.0
    mean, stderr = np.asarray(profile.influence), np.asarray(profile.stderr)
    drawn = np.random.default_rng(0).normal(size=(_NUM_DRAWS, *mean.shape))
    varied = jnp.asarray(mean + drawn * stderr, mean.dtype)
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
    worst = profile[distant:].max(initial=0.0) if known else np.nan
    tail = float(coherence.tail_sum) if known else np.nan
    converged = bool(jnp.all(coherence.converged))
    return (
        Check(
            "tail sum of the coherence",
            float(tail),
            thresholds.max_tail_sum,
            error=float(errors[1:].sum()),
            converged=converged,
        ),
        Check(
            f"largest coherence at distance >= {distant}",
            float(worst),
            thresholds.max_distant_coherence,
            error=float(errors[distant:].max(initial=0.0)),
            converged=converged,
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
        Two checks; the growth of a norm that begins at zero is undefined.
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
    largest = int(np.argmax(values))
    growth = float(values[largest] / values[0]) if values[0] > 0 else float("nan")
    # The residuals are those of the squares; the growth of the first is 1 exactly.
    relative = (residuals[0] + residuals[largest]) / 2 if largest else 0.0
    error = float(growth * relative)
    return Check(name, growth, threshold, error=error, converged=converged)


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
    defined = drifts and all(map(trusted, measurements))
    largest = max(float(d.frobenius) for d in drifts) if defined else float("nan")
    resolved = [jnp.all(found.resolved[:num_leading]) for found in measurements]
    return Check(
        f"drift of the leading {num_leading}",
        largest,
        thresholds.max_drift,
        converged=all(bool(x) for x in resolved),
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
    return Check(
        "Lipschitz constant in log lambda",
        float(np.max(constants)) if known else float("nan"),
        thresholds.max_lipschitz,
    )


def invariance_checks(
    residual: float, measured: CouplingMeasurement, thresholds: Thresholds
) -> tuple[Check, ...]:
    """Holds the last point's residual, slope and R^2 against their thresholds.

    Args:
        residual: The renormalised coupling's Toeplitz residual at the centre.
        measured: The measurement.
        thresholds: The thresholds.

    Returns:
        Three checks; undefined if the measurement is not `trusted`.
    """
    fit, nan = measured.diagonal_fit, float("nan")
    slope_error, r_squared = abs(float(fit.exponent) - 1), float(fit.r_squared)
    if not trusted(measured):
        residual = slope_error = r_squared = nan
    return (
        Check("Toeplitz residual at the centre", residual, thresholds.max_residual),
        Check(
            "distance of the slope to 1",
            slope_error,
            thresholds.max_slope_error,
            error=float(fit.exponent_stderr),
        ),
        Check("R^2 of the diagonal", r_squared, thresholds.min_r_squared, ">="),
    )
