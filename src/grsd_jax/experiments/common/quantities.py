"""The quantities in the tables, each defined once, under one name."""

import math
from collections.abc import Sequence

import numpy as np

from grsd_jax.shells import (
    CouplingMeasurement,
    ToeplitzDiagnostics,
    toeplitz_degrees_of_freedom,
)

#: Position from 0 (small lambda) to 1 and Toeplitz residual of each window, in order
#: of position; the residual is NaN where it is undefined.
Windows = Sequence[tuple[float, float]]


def coupling_quantities(measured: CouplingMeasurement) -> dict[str, float]:
    """Returns the named numbers of a measurement; NaN where undefined.

    Args:
        measured: The measurement, on the host.

    Returns:
        ``num_resolved``; ``slope``, ``slope_stderr`` and ``r_squared`` of the diagonal
        against the eigenvalues, mode by mode; ``toeplitz_literal``, the Toeplitz
        residual of the literal coupling; ``toeplitz_residual``, that of the
        renormalised one, and its parts ``toeplitz_edge``, ``toeplitz_centre`` and
        ``toeplitz_middle_third``.
    """
    fit, windows = measured.diagonal_fit, windows_of(measured.renormalized)
    return {
        "num_resolved": int(np.sum(measured.resolved)),
        "slope": float(fit.exponent),
        "slope_stderr": float(fit.exponent_stderr),
        "r_squared": float(fit.r_squared),
        "toeplitz_literal": _whole_residual(measured.literal),
        "toeplitz_residual": _whole_residual(measured.renormalized),
        "toeplitz_edge": edge_residual(windows),
        "toeplitz_centre": centre_residual(windows),
        "toeplitz_middle_third": middle_third_residual(windows),
    }


def _whole_residual(diagnostics: ToeplitzDiagnostics) -> float:
    """Returns the residual of the whole coupling, NaN where zero by construction."""
    free = toeplitz_degrees_of_freedom(diagnostics.coupling.mask) > 0
    return float(diagnostics.residual) if free else math.nan


def windows_of(diagnostics: ToeplitzDiagnostics) -> Windows:
    """Returns the windows of a coupling.

    Args:
        diagnostics: Of the literal or the renormalised coupling.

    Returns:
        Position and residual of each; a residual that is zero by construction, without
        a degree of freedom, is undefined.
    """
    freedom = np.asarray(diagnostics.degrees_of_freedom)
    residuals = np.where(freedom > 0, diagnostics.windows, np.nan)
    positions = np.linspace(0, 1, len(residuals)) if len(residuals) > 1 else [0.5]
    return list(zip(map(float, positions), map(float, residuals), strict=True))


def edge_residual(windows: Windows) -> float:
    """Returns the *edge* of the tables: the mean residual of the two outermost windows.

    Args:
        windows: The windows.

    Returns:
        The mean over the first and the last window that are defined; NaN with fewer
        than three of them.
    """
    defined = _defined(windows)
    if len(defined) < 3:
        return math.nan
    return (defined[0][1] + defined[-1][1]) / 2


def centre_residual(windows: Windows) -> float:
    """Returns the *centre* of the tables: the mean residual nearest to the centre.

    Args:
        windows: The windows.

    Returns:
        The mean over the defined windows whose position is nearest to 1/2, one or two;
        NaN with fewer than three defined windows.
    """
    defined = _defined(windows)
    if len(defined) < 3:
        return math.nan
    nearest = min(abs(position - 0.5) for position, _ in defined)
    return float(np.mean([r for p, r in defined if abs(p - 0.5) <= nearest + 1e-9]))


def middle_third_residual(windows: Windows) -> float:
    """Returns the *middle third* of the tables: the mean residual over that third.

    Args:
        windows: The windows.

    Returns:
        The mean over the defined windows among those that are left without the first
        and the last third; NaN if none of them is defined.
    """
    third = len(windows) // 3
    defined = _defined(windows[third : len(windows) - third])
    return float(np.mean([r for _, r in defined])) if defined else math.nan


def _defined(windows: Windows) -> Windows:
    return [window for window in windows if not math.isnan(window[1])]
