"""A measurement as files hold it: scalars for ``results.json``, named arrays."""

import dataclasses
from typing import Any

import jax
import numpy as np

from grsd_jax.experiments.common.config import Config
from grsd_jax.kernel.derivative import default_step
from grsd_jax.linalg.ritz import default_floor
from grsd_jax.shells.diagnostics import CouplingMeasurement, ToeplitzDiagnostics
from grsd_jax.shells.power_law import PowerLawFit
from grsd_jax.shells.toeplitz import toeplitz_degrees_of_freedom

#: What decides which pairs count, and the step of a difference; part of every result.
THRESHOLDS = {
    "tolerance": 0.05,
    "floor": default_floor(np.float32),
    "step": default_step(np.float32),
}

Arrays = dict[str, np.ndarray]


def fetched(measured: CouplingMeasurement) -> CouplingMeasurement:
    """Brings a measurement to the host, except the vectors, which no file holds.

    They may lie on the devices of several processes; all the rest is on each.

    Args:
        measured: The measurement.

    Returns:
        The same, in NumPy arrays.
    """
    rest = dataclasses.replace(measured, vectors=measured.values)
    return dataclasses.replace(jax.device_get(rest), vectors=measured.vectors)


def measurement_entry(measured: CouplingMeasurement, config: Config) -> dict[str, Any]:
    """Returns the scalars of a measurement, as ``results.json`` holds them.

    Args:
        measured: The measurement.
        config: The settings, for the seed and the window.

    Returns:
        Its entry.
    """
    shells, window = measured.shells, config.window
    return {
        "n": measured.vectors.shape[0],
        "num_pairs": len(measured.values),
        "num_resolved": int(np.sum(measured.resolved)),
        "solver": measured.solver,
        "jacobian": measured.jacobian,
        "derivative": measured.derivative,
        "reduction": measured.reduction,
        "seed": config.seed,
        **THRESHOLDS,
        "diagonal_fit": _fit(measured.diagonal_fit),
        "shell_fit": _fit(measured.shell_fit),
        "toeplitz": {
            "literal": _toeplitz(measured.literal, shells.edges, window),
            "renormalized": _toeplitz(measured.renormalized, shells.edges, window),
        },
        "secant_disagreement": float(measured.secant_disagreement),
        "operator_disagreement": float(measured.operator_disagreement),
        "lambda_max": float(measured.values[0]),
    }


def measurement_arrays(measured: CouplingMeasurement) -> Arrays:
    """Returns the arrays of a measurement, as ``arrays.npz`` holds them.

    Args:
        measured: The measurement.

    Returns:
        Its arrays by name.
    """
    literal, renormalized = measured.literal, measured.renormalized
    arrays = {
        "values": measured.values,
        "residuals": measured.residuals,
        "resolved": measured.resolved,
        "coupling": measured.coupling,
        "coupling_diagonal": np.abs(np.diag(measured.coupling)),
        "shell_edges": measured.shells.edges,
        "shell_centers": measured.shells.centers,
        "shell_counts": measured.shells.counts,
        "literal": literal.coupling.matrix,
        "literal_mask": literal.coupling.mask,
        "renormalized": renormalized.coupling.matrix,
        "renormalized_mask": renormalized.coupling.mask,
    }
    return {name: np.asarray(array) for name, array in arrays.items()}


def _fit(fit: PowerLawFit) -> dict[str, Any]:
    interval = fit.interval if fit.interval is not None else np.full(2, np.nan)
    return {
        "exponent": float(fit.exponent),
        "prefactor": float(fit.prefactor),
        "r_squared": float(fit.r_squared),
        "exponent_stderr": float(fit.exponent_stderr),
        "interval": [float(end) for end in interval],
        "num_points": int(fit.num_points),
    }


def _toeplitz(
    diagnostics: ToeplitzDiagnostics, edges: jax.typing.ArrayLike, window: int
) -> dict[str, Any]:
    """Returns the residuals; one that is zero by construction becomes null."""
    last, edges = len(diagnostics.windows) - 1, np.asarray(edges)
    windows = [
        {
            "start": start,
            "stop": start + window,
            "lambda_center": float(np.sqrt(edges[start] * edges[start + window])),
            "position": start / last if last else 0.5,
            "residual": float(residual) if freedom > 0 else None,
            "degrees_of_freedom": int(freedom),
        }
        for start, (residual, freedom) in enumerate(
            zip(diagnostics.windows, diagnostics.degrees_of_freedom, strict=True)
        )
    ]
    freedom = int(toeplitz_degrees_of_freedom(diagnostics.coupling.mask))
    residual = float(diagnostics.residual) if freedom > 0 else None
    return {"residual": residual, "degrees_of_freedom": freedom, "windows": windows}
