"""The four conditions of the theory as measurements, and their report."""

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
from grsd_jax.parameter_blocks import (
    ParameterBlocks,
    partition,
    partition_by_prefix,
    restrict_to_block,
)

__all__ = [
    "BlockCoherence",
    "Check",
    "ConditionReport",
    "Incoherence",
    "IncrementStatistics",
    "InfluenceProfile",
    "Locality",
    "OperatorNorms",
    "ParameterBlocks",
    "PathPoint",
    "ProjectorDrift",
    "PropagationReport",
    "ShellDrift",
    "ShiftInvariance",
    "Stability",
    "StateIncrements",
    "Thresholds",
    "Verdict",
    "block_coherence",
    "condition_report",
    "correlation_time",
    "coupling_exponent",
    "direction_memory",
    "distance_maxima",
    "distance_totals",
    "increment_statistics",
    "influence_profile",
    "interaction_range",
    "log_lipschitz",
    "operator_norms",
    "partition",
    "partition_by_prefix",
    "projector_drift",
    "propagation_report",
    "restrict_to_block",
    "shell_drift",
    "smallest_band",
    "state_increments",
]
