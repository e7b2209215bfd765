"""The energy balance of the shells, its velocities, flows, and the probe."""

from grsd_jax.dynamics.balance import (
    BasisRotation,
    ShellDynamics,
    basis_rotation,
    eigenvalue_drift,
    shell_dynamics,
)
from grsd_jax.dynamics.between_ends import KrylovSteps, exact_balance
from grsd_jax.dynamics.closure import (
    ClosureError,
    EdgeCrossings,
    closure_error,
    edge_crossings,
)
from grsd_jax.dynamics.elapsed_time import MeasuredTime, measured_time
from grsd_jax.dynamics.flow import (
    CovarianceCheck,
    covariance_check,
    effective_time,
    flow_step,
    integrate_flow,
)
from grsd_jax.dynamics.instantaneous import Instantaneous, InstantRecord
from grsd_jax.dynamics.law import VelocityLaw, velocity_law
from grsd_jax.dynamics.midpoint import MidpointFlux, midpoint_flux
from grsd_jax.dynamics.probe import Probe, make_probe
from grsd_jax.dynamics.record import ProbeRecord, ProbeState
from grsd_jax.dynamics.sharp_bounds import SharpFlux, sharp_flux_bounds
from grsd_jax.dynamics.spectra import SpectralSnapshot, spectral_snapshot
from grsd_jax.dynamics.transport import Counting, ExactBalance
from grsd_jax.dynamics.velocity import VelocityFit, velocity_fit

__all__ = [
    "BasisRotation",
    "ClosureError",
    "Counting",
    "CovarianceCheck",
    "EdgeCrossings",
    "ExactBalance",
    "InstantRecord",
    "Instantaneous",
    "KrylovSteps",
    "MeasuredTime",
    "MidpointFlux",
    "Probe",
    "ProbeRecord",
    "ProbeState",
    "SharpFlux",
    "ShellDynamics",
    "SpectralSnapshot",
    "VelocityFit",
    "VelocityLaw",
    "basis_rotation",
    "closure_error",
    "covariance_check",
    "edge_crossings",
    "effective_time",
    "eigenvalue_drift",
    "exact_balance",
    "flow_step",
    "integrate_flow",
    "make_probe",
    "measured_time",
    "midpoint_flux",
    "sharp_flux_bounds",
    "shell_dynamics",
    "spectral_snapshot",
    "velocity_fit",
    "velocity_law",
]
