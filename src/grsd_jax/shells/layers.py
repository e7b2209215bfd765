"""The additive structure over depth: every layer's own spectrum and coupling.

``M = sum_l M_l`` with ``M_l = J_l J_l^T`` (paper 4.1, A.4). One dense pass yields every
``M_l`` and ``Mdot_l``; each layer gets the diagnostics that M gets, in its own
eigenvectors, and the average over depth is taken in those of M, where the projected
derivatives ``v_i^T Mdot_l v_j`` add up.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import all_finite, divisor, is_traced, matmul, norm
from grsd_jax._checks import check_key
from grsd_jax._memory import waits_for_memory
from grsd_jax._typing import PyTree
from grsd_jax.jacobian.plan import plan_of, stray_rows
from grsd_jax.kernel.dense import layer_kernels
from grsd_jax.kernel.derivative import gradient_flow_direction, project_kernel
from grsd_jax.problem import Problem, misfits, point_at
from grsd_jax.results import NamedResult, result
from grsd_jax.shells.binning import Shells, root_mean_squares
from grsd_jax.shells.diagnostics import (
    CouplingMeasurement,
    CrossChecks,
    Labels,
    ToeplitzDiagnostics,
    diagnose,
    toeplitz_diagnostics,
    without_infinity,
)
from grsd_jax.shells.measurement import diagonalize, leading_pairs, missing_pairs
from grsd_jax.shells.options import Binning, Window


@result()
class LayerMeasurements(NamedResult):
    """The diagnostics of every layer, of their sum, and of the average over depth.

    Attributes:
        layers: The measurement of each ``M_l``, in its own eigenvectors and shells.
        total: That of ``M = sum_l M_l``.
        average: The renormalized coupling ``(1/L) sum_l Khat^(l)_ab`` of the ``Mdot_l``
            between the shells of M, and its Toeplitz residuals.
    """

    layers: dict[str, CouplingMeasurement]
    total: CouplingMeasurement
    average: ToeplitzDiagnostics


@waits_for_memory("batches")
def measure_layers(
    problem: Problem,
    params: PyTree,
    direction: PyTree | None = None,
    *,
    key: jax.Array,
    layer_of: Callable[[tuple[str, ...]], str] | None = None,
    window: Window = Window(),
    shells: Binning = Binning(),
) -> LayerMeasurements:
    """Measures the shell coupling of every layer from one dense pass.

    Args:
        problem: The problem, examples independent.
        params: Parameters.
        direction: The tangent d, a tree like ``params``; all parameters move. The
            gradient flow of the problem's loss if None.
        key: Consumed for the bootstrap.
        layer_of: As for `layer_kernels`; ``blocks.block_of`` of a partition fits.
        window: Which pairs are used.
        shells: The shells, and what is computed from them.

    Returns:
        `LayerMeasurements`. Of the cross-checks of `measure_coupling` only the total's
        ``operator_disagreement`` is made, with its leading eigenvector; the other
        disagreements, and the unresolved energies, are NaN; inside `jit`, infinite.

    Raises:
        ValueError: If a shape, tree, dtype, leading axis or choice does not fit.
        MemoryError: If the matrices are larger than all memory, before any work, or the
            device runs out of it; it names what to lower.

    References:
        Paper 4.1, Theorem 2 and Proposition 1 (A.3, A.4).
    """
    check_key(key)
    if direction is None:
        direction = gradient_flow_direction(problem, params)
    point = point_at(problem, params, direction)
    form = "plain" if plan_of(point) is None else "factored"
    matrices = layer_kernels(problem, params, direction, layer_of=layer_of)

    num_misfits = misfits(point) + stray_rows(point)

    def measure(
        key: jax.Array, kernel: jax.Array, moved: jax.Array
    ) -> CouplingMeasurement:
        pairs, coupling = diagonalize(
            kernel, moved, tolerance=window.tolerance, floor=window.floor
        )
        pairs = leading_pairs(pairs, window)
        unmade = jnp.zeros((), kernel.dtype)
        measured = diagnose(
            pairs,
            coupling,
            CrossChecks(
                unmade,
                unmade,
                unmade,
                missing_pairs(pairs, point.dimension, window),
                num_misfits,
                all_finite((kernel, moved)),
                complete=jnp.bool_(True),
            ),
            key,
            labels=Labels("dense", form, "exact", point.reduction, False, window),
            binning=shells,
        )
        # A NaN that a program returns would stop it under `jax_debug_nans`.
        unmade = np.inf if is_traced(kernel) else np.nan
        unknown = jax.device_put(np.full((), unmade, kernel.dtype))
        return dataclasses.replace(
            measured,
            secant_disagreement=unknown,
            operator_disagreement=unknown,
            unresolved_share=unknown,
        )

    kernels, moved = (list(part) for part in zip(*matrices.values(), strict=True))
    keys = jax.random.split(key, 1 + len(kernels))
    whole = sum(kernels[1:], kernels[0]), sum(moved[1:], moved[0])
    total = measure(keys[0], *whole)
    leading = total.vectors[:, :1]
    apart = jnp.abs(project_kernel(point, leading)[0, 0] - total.values[0])
    disagreement = apart / divisor(total.values[0])
    total = dataclasses.replace(total, operator_disagreement=disagreement)
    average = _average(moved, total.vectors, total.values, total.shells, binning=shells)
    each = enumerate(matrices.items(), 1)
    layers = {name: measure(keys[k], *pair) for k, (name, pair) in each}
    return LayerMeasurements(layers, total, without_infinity(average))


@partial(jax.jit, static_argnames="binning")
def _average(
    moved: list[jax.Array],
    vectors: jax.Array,
    values: jax.Array,
    shells: Shells,
    *,
    binning: Binning,
) -> ToeplitzDiagnostics:
    """Averages the layers' couplings between the shells of M."""
    found = [
        root_mean_squares(
            matmul(vectors.T, matmul(matrix, vectors)),
            values,
            shells,
            renormalize=True,
            min_count=binning.min_count,
        )
        for matrix in moved
    ]
    roots, masks = zip(*found, strict=True)
    root = norm(jnp.stack(roots), 0) / len(roots) ** 0.5
    return toeplitz_diagnostics(root, masks[0], binning.window)
