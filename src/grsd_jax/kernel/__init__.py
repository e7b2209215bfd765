"""The kernel ``M = J J^T`` and its derivative: products, dense matrices, solvers."""

from grsd_jax.jacobian.explain import Explanation, LeafForm
from grsd_jax.kernel.dense import kernel_dense, layer_kernels
from grsd_jax.kernel.derivative import (
    Derivative,
    central_difference,
    default_step,
    gradient_flow_direction,
    kernel_derivative,
    kernel_derivative_matmat,
)
from grsd_jax.kernel.mesh import shard_batches
from grsd_jax.kernel.operator import (
    LinearizedKernel,
    kernel_matmat,
    linearize_block_kernels,
    linearize_derivative,
    linearize_kernel,
)
from grsd_jax.kernel.sharded import ShardedKernel
from grsd_jax.kernel.solver import Lanczos, choose_solver

__all__ = [
    "Derivative",
    "Explanation",
    "Lanczos",
    "LeafForm",
    "LinearizedKernel",
    "ShardedKernel",
    "central_difference",
    "choose_solver",
    "default_step",
    "gradient_flow_direction",
    "kernel_dense",
    "kernel_derivative",
    "kernel_derivative_matmat",
    "kernel_matmat",
    "layer_kernels",
    "linearize_block_kernels",
    "linearize_derivative",
    "linearize_kernel",
    "shard_batches",
]
