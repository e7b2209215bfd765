"""neural-tangents: the kernel of the logits, turned into that of the softmax error.

With ``S_i = diag(p_i) - p_i p_i^T`` of example i, ``M_ij = S_i Theta_ij S_j``. The
library imports TensorFlow for a submodule that is not used here; an empty module of
that name takes its place, and nothing of the library is changed.
"""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from comparison.grid import NUM_CLASSES
from comparison.harness import Case, Job, subtree
from peers.jax_network import Arrays, make_logits
from peers.jax_tools import counters

sys.modules["neural_tangents.experimental"] = ModuleType("neural_tangents.experimental")

import neural_tangents as nt  # noqa: E402

Logits = Callable[[Arrays, jax.Array], jax.Array]

_IMPLEMENTATIONS = {
    "Jacobian contraction": nt.NtkImplementation.JACOBIAN_CONTRACTION,
    "NTK-vector products": nt.NtkImplementation.NTK_VECTOR_PRODUCTS,
    "structured derivatives": nt.NtkImplementation.STRUCTURED_DERIVATIVES,
}


def make_case(job: Job) -> Case:
    """Returns the case of a task, compiled ahead of its first call."""
    params, statistics = (
        {k: jnp.asarray(v) for k, v in subtree(job.inputs, name).items()}
        for name in ("params", "batch_stats")
    )
    logits = make_logits(job.spec, statistics)
    arguments = [params, jnp.asarray(job.inputs["images"])]
    if job.kind == "dense":
        compute = _dense(logits, job.variant)
    else:
        compute = _product(logits)
        arguments.append(jnp.asarray(job.block))
    programs: list[Any] = []

    def compile_ahead() -> None:
        programs.append(jax.jit(compute).lower(*arguments).compile())

    return Case(
        run=lambda _: jax.block_until_ready(programs[0](*arguments)),
        compile=compile_ahead,
        **counters(job.device),
    )


def _dense(logits: Logits, variant: str) -> Callable[..., jax.Array]:
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
        size = len(images) * NUM_CLASSES
        return kernel.reshape(size, size)

    return compute


def _product(logits: Logits) -> Callable[..., jax.Array]:
    def compute(params: Arrays, images: jax.Array, block: jax.Array) -> jax.Array:
        product = nt.empirical_ntk_vp_fn(logits, images, None, params)
        s = _softmax_derivative(logits(params, images))

        def column(vector: jax.Array) -> jax.Array:
            by_class = vector.reshape(-1, NUM_CLASSES)
            moved = product(jnp.einsum("iac,ic->ia", s, by_class))
            return jnp.einsum("iac,ic->ia", s, moved).reshape(-1)

        return jax.vmap(column, in_axes=1, out_axes=1)(block)

    return compute


def _softmax_derivative(logits: jax.Array) -> jax.Array:
    """Returns S, ``[N, C, C]``."""
    p = jax.nn.softmax(logits)
    return jnp.eye(NUM_CLASSES) * p[:, :, None] - p[:, :, None] * p[:, None, :]
