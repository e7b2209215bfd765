"""Spectral dynamics of learning in JAX.

The kernel ``M = J J^T`` of the error of any network, its derivative along training, its
spectrum by a float32-safe block Lanczos or exactly, and the couplings between
logarithmic shells of that spectrum. A `Problem` states the network; the functions here
take it with the parameters. Everything else is found by topic: `grsd_jax.kernel`,
`grsd_jax.linalg`, `grsd_jax.shells`, `grsd_jax.dynamics`, `grsd_jax.conditions`, and
`grsd_jax.models`, which needs Flax. The rest depends only on JAX, NumPy and SciPy.
"""

from importlib.metadata import PackageNotFoundError, version

from grsd_jax import conditions, dynamics, kernel, linalg, shells
from grsd_jax.conditions import PathPoint, condition_report
from grsd_jax.dynamics import make_probe
from grsd_jax.errors import softmax_error, squared_error
from grsd_jax.kernel import (
    Derivative,
    Lanczos,
    gradient_flow_direction,
    kernel_dense,
    kernel_derivative,
    kernel_matmat,
    layer_kernels,
    linearize_kernel,
)
from grsd_jax.parameter_blocks import partition
from grsd_jax.problem import Problem
from grsd_jax.results import load
from grsd_jax.shells import Binning, Window, measure_coupling

try:
    __version__ = version("grsd-jax")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "unknown"

__all__ = [
    "Binning",
    "Derivative",
    "Lanczos",
    "PathPoint",
    "Problem",
    "Window",
    "condition_report",
    "conditions",
    "dynamics",
    "gradient_flow_direction",
    "kernel",
    "kernel_dense",
    "kernel_derivative",
    "kernel_matmat",
    "layer_kernels",
    "linalg",
    "linearize_kernel",
    "load",
    "make_probe",
    "measure_coupling",
    "partition",
    "shells",
    "softmax_error",
    "squared_error",
]
