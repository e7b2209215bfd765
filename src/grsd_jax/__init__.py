"""Spectral dynamics of learning in JAX.

The kernel ``M = J J^T`` of any error function, its derivative along training, its
spectrum by a float32-safe block Lanczos or exactly, and the couplings between
logarithmic shells of that spectrum. Importing this package needs jax and numpy alone;
the bundled Flax models are in `grsd_jax.models`.
"""

from importlib.metadata import version

from grsd_jax.blocks import (
    ParameterBlocks,
    partition,
    partition_by_prefix,
    restrict_to_block,
)
from grsd_jax.dense import (
    kernel_dense,
    kernel_derivative_dense,
    kernel_with_derivative_dense,
    layer_kernels,
)
from grsd_jax.depth import (
    IncrementStatistics,
    StateIncrements,
    correlation_time,
    direction_memory,
    increment_statistics,
    state_increments,
)
from grsd_jax.derivative import (
    central_difference,
    gradient_flow_direction,
    kernel_derivative,
)
from grsd_jax.diagnostics import CouplingMeasurement, ToeplitzDiagnostics
from grsd_jax.eigenpairs import LeadingEigenpairs, leading_eigenpairs
from grsd_jax.errors import (
    half_squared_loss,
    softmax_cross_entropy,
    softmax_error,
    squared_error,
)
from grsd_jax.kernel import (
    LinearizedKernel,
    error_dimension,
    kernel_matmat,
    linearize_kernel,
)
from grsd_jax.lanczos import (
    LanczosResult,
    LanczosState,
    block_lanczos,
    lanczos_block,
    lanczos_finish,
    lanczos_init,
    lanczos_step,
)
from grsd_jax.measurement import measure_coupling
from grsd_jax.power_law import PowerLawFit, fit_power_law
from grsd_jax.propagation import (
    PropagationReport,
    interaction_range,
    propagation_report,
)
from grsd_jax.shells import ShellCoupling, Shells, log_shells, shell_coupling
from grsd_jax.solvers import choose_solver, class_sums_vanish
from grsd_jax.spectrum import (
    RitzPairs,
    SpectralDensity,
    resolved_pairs,
    ritz_pairs,
    spectral_density,
)
from grsd_jax.toeplitz import (
    toeplitz_approximation,
    toeplitz_degrees_of_freedom,
    toeplitz_residual,
    windowed_toeplitz_degrees_of_freedom,
    windowed_toeplitz_residual,
)

__version__ = version("grsd-jax")

__all__ = [
    "CouplingMeasurement",
    "IncrementStatistics",
    "LanczosResult",
    "LanczosState",
    "LeadingEigenpairs",
    "LinearizedKernel",
    "ParameterBlocks",
    "PowerLawFit",
    "PropagationReport",
    "RitzPairs",
    "ShellCoupling",
    "Shells",
    "SpectralDensity",
    "StateIncrements",
    "ToeplitzDiagnostics",
    "block_lanczos",
    "central_difference",
    "choose_solver",
    "class_sums_vanish",
    "correlation_time",
    "direction_memory",
    "error_dimension",
    "fit_power_law",
    "gradient_flow_direction",
    "half_squared_loss",
    "increment_statistics",
    "interaction_range",
    "kernel_dense",
    "kernel_derivative",
    "kernel_derivative_dense",
    "kernel_matmat",
    "kernel_with_derivative_dense",
    "lanczos_block",
    "lanczos_finish",
    "lanczos_init",
    "lanczos_step",
    "layer_kernels",
    "leading_eigenpairs",
    "linearize_kernel",
    "log_shells",
    "measure_coupling",
    "partition",
    "partition_by_prefix",
    "propagation_report",
    "resolved_pairs",
    "restrict_to_block",
    "ritz_pairs",
    "shell_coupling",
    "softmax_cross_entropy",
    "softmax_error",
    "spectral_density",
    "squared_error",
    "state_increments",
    "toeplitz_approximation",
    "toeplitz_degrees_of_freedom",
    "toeplitz_residual",
    "windowed_toeplitz_degrees_of_freedom",
    "windowed_toeplitz_residual",
]
