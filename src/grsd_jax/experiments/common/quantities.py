"""The quantities in the tables, each defined once, under one name."""

import math

import numpy as np

from grsd_jax.shells import (
    CouplingMeasurement,
    ToeplitzDiagnostics,
    centre_toeplitz_residual,
    toeplitz_degrees_of_freedom,
)


def coupling_quantities(measured: CouplingMeasurement) -> dict[str, float]:
    """Returns the named numbers of a measurement; NaN where undefined.

    Args:
        measured: The measurement, on the host.

    Returns:
        ``num_resolved``; ``slope``, ``slope_stderr`` and ``r_squared`` of the diagonal
        against the eigenvalues, mode by mode; ``toeplitz_literal``, the Toeplitz
        residual of the literal coupling; ``toeplitz_residual``, that of the
        renormalized one, and its parts ``toeplitz_edge``, ``toeplitz_centre`` and
        ``toeplitz_middle_third``.
    """
    fit, windows = measured.diagonal_fit, window_residuals(measured.renormalized)
    return {
        "num_resolved": int(np.sum(measured.resolved)),
        "slope": float(fit.exponent),
        "slope_stderr": float(fit.exponent_stderr),
        "r_squared": float(fit.r_squared),
        "toeplitz_literal": whole_residual(measured.literal),
        "toeplitz_residual": whole_residual(measured.renormalized),
        "toeplitz_edge": edge_residual(windows),
        "toeplitz_centre": centre_toeplitz_residual(windows),
        "toeplitz_middle_third": middle_third_residual(windows),
    }


def whole_residual(diagnostics: ToeplitzDiagnostics) -> float:
    """Returns the Toeplitz residual of the whole coupling.

    Args:
        diagnostics: Of the literal or the renormalized coupling.

    Returns:
        The residual; NaN where it is zero by construction, without a degree of freedom.
    """
    free = toeplitz_degrees_of_freedom(diagnostics.coupling.mask) > 0
    return float(diagnostics.residual) if free else math.nan


def window_residuals(diagnostics: ToeplitzDiagnostics) -> np.ndarray:
    """Returns the Toeplitz residual of each window of a coupling.

    Args:
        diagnostics: Of the literal or the renormalized coupling.

    Returns:
        ``[W]``, from small to large lambda; one that is zero by construction, without a
        degree of freedom, is undefined, NaN.
    """
    freedom = np.asarray(diagnostics.degrees_of_freedom)
    return np.where(freedom > 0, diagnostics.windows, np.nan)


def edge_residual(residuals: np.ndarray) -> float:
    """Returns the *edge* of the tables: the mean residual of the two outermost windows.

    The *center* is the `centre_toeplitz_residual` of the same windows.

    Args:
        residuals: One for each window, from small to large lambda; NaN where undefined.

    Returns:
        The mean over the first and the last window that are defined; NaN with fewer
        than three of them.
    """
    defined = _defined(residuals)
    return (defined[0] + defined[-1]) / 2 if len(defined) >= 3 else math.nan


def middle_third_residual(residuals: np.ndarray) -> float:
    """Returns the *middle third* of the tables: the mean residual over that third.

    Args:
        residuals: One for each window, from small to large lambda; NaN where undefined.

    Returns:
        The mean over the defined windows among those that are left without the first
        and the last third; NaN if none of them is defined.
    """
    third = len(residuals) // 3
    defined = _defined(residuals[third : len(residuals) - third])
    return float(np.mean(defined)) if defined else math.nan


def _defined(residuals: np.ndarray) -> list[float]:
    return [float(residual) for residual in residuals if not math.isnan(residual)]
