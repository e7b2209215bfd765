"""Logarithmic shells of a spectrum, their couplings, residuals and fits."""

from grsd_jax.shells.binning import (
    ShellCoupling,
    Shells,
    assign_shells,
    log_shells,
    shell_coupling,
)
from grsd_jax.shells.diagnostics import CouplingMeasurement, ToeplitzDiagnostics
from grsd_jax.shells.layers import LayerMeasurements, measure_layers
from grsd_jax.shells.measurement import measure_coupling
from grsd_jax.shells.options import Binning, Window
from grsd_jax.shells.power_law import PowerLawFit, fit_power_law
from grsd_jax.shells.soft_shells import SoftShells
from grsd_jax.shells.stochastic import (
    Signs,
    measure_stochastic_coupling,
    stochastic_shell_coupling,
)
from grsd_jax.shells.stochastic_coupling import StochasticCoupling, ToeplitzEstimate
from grsd_jax.shells.toeplitz import (
    centre_toeplitz_residual,
    toeplitz_approximation,
    toeplitz_degrees_of_freedom,
    toeplitz_residual,
    windowed_toeplitz_degrees_of_freedom,
    windowed_toeplitz_residual,
)

__all__ = [
    "Binning",
    "CouplingMeasurement",
    "LayerMeasurements",
    "PowerLawFit",
    "ShellCoupling",
    "Shells",
    "Signs",
    "SoftShells",
    "StochasticCoupling",
    "ToeplitzDiagnostics",
    "ToeplitzEstimate",
    "Window",
    "assign_shells",
    "centre_toeplitz_residual",
    "fit_power_law",
    "log_shells",
    "measure_coupling",
    "measure_layers",
    "measure_stochastic_coupling",
    "shell_coupling",
    "stochastic_shell_coupling",
    "toeplitz_approximation",
    "toeplitz_degrees_of_freedom",
    "toeplitz_residual",
    "windowed_toeplitz_degrees_of_freedom",
    "windowed_toeplitz_residual",
]
