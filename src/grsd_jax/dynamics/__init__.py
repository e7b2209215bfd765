"""The energy balance of the shells, its velocities, flows, and the probe."""

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

__all__ = [
    "BasisRotation",
    "ClosureError",
    "CovarianceCheck",
    "EdgeCrossings",
    "Probe",
    "ProbeRecord",
    "ProbeState",
    "ShellDynamics",
    "VelocityFit",
    "basis_rotation",
    "closure_error",
    "covariance_check",
    "edge_crossings",
    "effective_time",
    "eigenvalue_drift",
    "flow_step",
    "integrate_flow",
    "make_probe",
    "shell_dynamics",
    "velocity_fit",
]
