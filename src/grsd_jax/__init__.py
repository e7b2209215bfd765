"""Spectral dynamics of learning in JAX.

The kernel ``M = J J^T`` of any error function, its derivative along training, its
spectrum by a float32-safe block Lanczos or exactly, and the couplings between
logarithmic shells of that spectrum. Importing this package needs jax, numpy and scipy
alone; the bundled Flax models are in `grsd_jax.models.resnet`.
"""

from importlib.metadata import version

from grsd_jax.conditions.depth import (
    IncrementStatistics,
    StateIncrements,
    correlation_time,
    direction_memory,
    increment_statistics,
    state_increments,
)
from grsd_jax.conditions.incoherence import BlockCoherence, block_coherence
from grsd_jax.conditions.locality import (
    InfluenceProfile,
    distance_maxima,
    distance_totals,
    influence_profile,
    smallest_band,
)
from grsd_jax.conditions.propagation import (
    PropagationReport,
    interaction_range,
    propagation_report,
)
from grsd_jax.conditions.report import (
    ConditionReport,
    Incoherence,
    Locality,
    PathPoint,
    ShiftInvariance,
    Stability,
    condition_report,
)
from grsd_jax.conditions.stability import (
    OperatorNorms,
    ProjectorDrift,
    ShellDrift,
    coupling_exponent,
    log_lipschitz,
    operator_norms,
    projector_drift,
    shell_drift,
)
from grsd_jax.conditions.verdicts import Check, Thresholds, Verdict
from grsd_jax.dynamics.balance import (
    BasisRotation,
    ShellDynamics,
    basis_rotation,
    eigenvalue_drift,
    shell_dynamics,
)
from grsd_jax.dynamics.closure import (
    ClosureError,
    EdgeCrossings,
    closure_error,
    edge_crossings,
)
from grsd_jax.dynamics.flow import (
    CovarianceCheck,
    covariance_check,
    effective_time,
    flow_step,
    integrate_flow,
)
from grsd_jax.dynamics.probe import Probe, make_probe
from grsd_jax.dynamics.record import ProbeRecord, ProbeState
from grsd_jax.dynamics.velocity import VelocityFit, velocity_fit
from grsd_jax.errors import (
    half_squared_loss,
    softmax_cross_entropy,
    softmax_error,
    squared_error,
)
from grsd_jax.kernel.dense import (
    kernel_dense,
    kernel_derivative_dense,
    kernel_with_derivative_dense,
    layer_kernels,
    layer_kernels_with_derivative,
)
from grsd_jax.kernel.derivative import (
    central_difference,
    gradient_flow_direction,
    kernel_derivative,
)
from grsd_jax.kernel.null_space import class_sums_vanish
from grsd_jax.kernel.operator import (
    LinearizedKernel,
    error_dimension,
    kernel_matmat,
    linearize_block_kernels,
    linearize_derivative,
    linearize_kernel,
)
from grsd_jax.kernel.sharded import (
    ShardedKernel,
    shard_batches,
    sharded_kernel,
    sharded_kernel_derivative,
)
from grsd_jax.kernel.solver import choose_solver
from grsd_jax.linalg.eigenpairs import LeadingEigenpairs, leading_eigenpairs
from grsd_jax.linalg.lanczos import (
    LanczosResult,
    LanczosState,
    block_lanczos,
    lanczos_block,
    lanczos_finish,
    lanczos_init,
    lanczos_step,
)
from grsd_jax.linalg.ritz import (
    RitzPairs,
    SpectralDensity,
    resolved_pairs,
    ritz_pairs,
    spectral_density,
)
from grsd_jax.parameter_blocks import (
    ParameterBlocks,
    partition,
    partition_by_prefix,
    restrict_to_block,
)
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
from grsd_jax.shells.power_law import PowerLawFit, fit_power_law
from grsd_jax.shells.toeplitz import (
    toeplitz_approximation,
    toeplitz_degrees_of_freedom,
    toeplitz_residual,
    windowed_toeplitz_degrees_of_freedom,
    windowed_toeplitz_residual,
)

__version__ = version("grsd-jax")

__all__ = [
    "BasisRotation",
    "BlockCoherence",
    "Check",
    "ClosureError",
    "ConditionReport",
    "CouplingMeasurement",
    "CovarianceCheck",
    "EdgeCrossings",
    "Incoherence",
    "IncrementStatistics",
    "InfluenceProfile",
    "LanczosResult",
    "LanczosState",
    "LayerMeasurements",
    "LeadingEigenpairs",
    "LinearizedKernel",
    "Locality",
    "OperatorNorms",
    "ParameterBlocks",
    "PathPoint",
    "PowerLawFit",
    "Probe",
    "ProbeRecord",
    "ProbeState",
    "ProjectorDrift",
    "PropagationReport",
    "RitzPairs",
    "ShardedKernel",
    "ShellCoupling",
    "ShellDrift",
    "ShellDynamics",
    "Shells",
    "ShiftInvariance",
    "SpectralDensity",
    "Stability",
    "StateIncrements",
    "Thresholds",
    "ToeplitzDiagnostics",
    "VelocityFit",
    "Verdict",
    "assign_shells",
    "basis_rotation",
    "block_coherence",
    "block_lanczos",
    "central_difference",
    "choose_solver",
    "class_sums_vanish",
    "closure_error",
    "condition_report",
    "correlation_time",
    "coupling_exponent",
    "covariance_check",
    "direction_memory",
    "distance_maxima",
    "distance_totals",
    "edge_crossings",
    "effective_time",
    "eigenvalue_drift",
    "error_dimension",
    "fit_power_law",
    "flow_step",
    "gradient_flow_direction",
    "half_squared_loss",
    "increment_statistics",
    "influence_profile",
    "integrate_flow",
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
    "layer_kernels_with_derivative",
    "leading_eigenpairs",
    "linearize_block_kernels",
    "linearize_derivative",
    "linearize_kernel",
    "log_lipschitz",
    "log_shells",
    "make_probe",
    "measure_coupling",
    "measure_layers",
    "operator_norms",
    "partition",
    "partition_by_prefix",
    "projector_drift",
    "propagation_report",
    "resolved_pairs",
    "restrict_to_block",
    "ritz_pairs",
    "shard_batches",
    "sharded_kernel",
    "sharded_kernel_derivative",
    "shell_coupling",
    "shell_drift",
    "shell_dynamics",
    "smallest_band",
    "softmax_cross_entropy",
    "softmax_error",
    "spectral_density",
    "squared_error",
    "state_increments",
    "toeplitz_approximation",
    "toeplitz_degrees_of_freedom",
    "toeplitz_residual",
    "velocity_fit",
    "windowed_toeplitz_degrees_of_freedom",
    "windowed_toeplitz_residual",
]
