"""neural-tangents: the kernel of the logits, turned into that of the softmax error.

With ``S_i = diag(p_i) - p_i p_i^T`` of example i, ``M_ij = S_i Theta_ij S_j``. The
library imports TensorFlow for a submodule that is not used here; an empty module of
that name takes its place, and nothing of the library is changed.
"""

import sys
from argparse import Namespace
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from comparison.grid import NUM_CLASSES, Problem, block_width
from comparison.harness import Case, Inputs, subtree
from peers.jax_network import Arrays, make_logits
from peers.jax_tools import compilation_counter, peak_device_bytes

sys.modules["neural_tangents.experimental"] = ModuleType("neural_tangents.experimental")

import neural_tangents as nt  # noqa: E402

_IMPLEMENTATIONS = {
    "Jacobian contraction": nt.NtkImplementation.JACOBIAN_CONTRACTION,
    "NTK-vector products": nt.NtkImplementation.NTK_VECTOR_PRODUCTS,
    "structured derivatives": nt.NtkImplementation.STRUCTURED_DERIVATIVES,
}


def make_case(
    problem: Problem, task: str, variant: str, inputs: Inputs, options: Namespace
) -> Case:
    """Returns the case of a task, compiled ahead of its first call."""
    params = {k: jnp.asarray(v) for k, v in subtree(inputs, "params").items()}
    statistics = {k: jnp.asarray(v) for k, v in subtree(inputs, "batch_stats").items()}
    images = jnp.asarray(inputs["images"])
    logits = make_logits(problem, statistics)
    if task == "dense":
        implementation, _, without = variant.partition(", no ")
        kernel_fn = nt.empirical_ntk_fn(
            logits,
            trace_axes=(),
            vmap_axes=None if without else 0,
            implementation=_IMPLEMENTATIONS[implementation],
        )

        def compute(params: Arrays, images: jax.Array) -> jax.Array:
            theta = kernel_fn(images, None, params)  # [N, N, C, C]
            s = _softmax_derivative(logits(params, images))
            kernel = jnp.einsum("iac,ijcd,jdb->iajb", s, theta, s)
            return kernel.reshape(problem.size, problem.size)

        arguments = (params, images)
    else:
        block = jnp.asarray(inputs["block"][:, : block_width(task)])

        def compute(params: Arrays, images: jax.Array, block: jax.Array) -> jax.Array:
            product = nt.empirical_ntk_vp_fn(logits, images, None, params)
            s = _softmax_derivative(logits(params, images))

            def column(vector: jax.Array) -> jax.Array:
                by_class = vector.reshape(-1, NUM_CLASSES)
                moved = product(jnp.einsum("iac,ic->ia", s, by_class))
                return jnp.einsum("iac,ic->ia", s, moved).reshape(-1)

            return jax.vmap(column, in_axes=1, out_axes=1)(block)

        arguments = (params, images, block)

    programs: list[Any] = []

    def compile_ahead() -> None:
        programs.append(jax.jit(compute).lower(*arguments).compile())

    return Case(
        run=lambda _: jax.block_until_ready(programs[0](*arguments)),
        arrays=lambda result: {"matrix": np.asarray(result)},
        compile=compile_ahead,
        compilations=compilation_counter(),
        peak_device_bytes=peak_device_bytes(options.device),
    )


def _softmax_derivative(logits: jax.Array) -> jax.Array:
    """Returns S, ``[N, C, C]``."""
    p = jax.nn.softmax(logits)
    return jnp.eye(NUM_CLASSES) * p[:, :, None] - p[:, :, None] * p[:, None, :]
