"""The additive structure over depth: every layer's own spectrum and coupling.

``M = sum_l M_l`` with ``M_l = J_l J_l^T`` (paper 4.1, A.4). One dense pass yields every
``M_l`` and ``Mdot_l``; each layer gets the diagnostics that M gets, in its own
eigenvectors, and the average over depth is taken in those of M, where the projected
derivatives ``v_i^T Mdot_l v_j`` add up.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from grsd_jax._typing import ErrorFn, PyTree, Reduction
from grsd_jax.jacobian.factored import JacobianForm, uses_factors
from grsd_jax.kernel.dense import layer_kernels_with_derivative
from grsd_jax.kernel.operator import kernel_matmat
from grsd_jax.shells.binning import Shells, shell_coupling
from grsd_jax.shells.diagnostics import (
    CouplingMeasurement,
    ToeplitzDiagnostics,
    diagnose,
    toeplitz_diagnostics,
)
from grsd_jax.shells.measurement import diagonalize


class LayerMeasurements(NamedTuple):
    """The diagnostics of every layer, of their sum, and of the average over depth.

    Attributes:
        layers: The measurement of each ``M_l``, in its own eigenvectors and shells.
        total: That of ``M = sum_l M_l``.
        average: The renormalised coupling ``(1/L) sum_l Khat^(l)_ab`` of the ``Mdot_l``
            between the shells of M, and its Toeplitz residuals.
    """

    layers: dict[str, CouplingMeasurement]
    total: CouplingMeasurement
    average: ToeplitzDiagnostics


def measure_layers(
    error_fn: ErrorFn,
    params: PyTree,
    batches: PyTree,
    direction: PyTree,
    *,
    key: jax.Array,
    layer_of: Callable[[tuple[str, ...]], str] | None = None,
    reduction: Reduction = "mean",
    jacobian: JacobianForm = "auto",
    tolerance: float = 0.05,
    floor: float | None = None,
    num_shells: int = 12,
    window: int = 5,
    min_count: int = 1,
    num_bootstrap: int = 1000,
) -> LayerMeasurements:
    """Measures the shell coupling of every layer from one dense pass.

    Args:
        error_fn: ``error_fn(params, batch) -> [N, C]``, examples independent.
        params: Parameters, a pytree of floating arrays.
        batches: A pytree with leading axes ``[K, N]``.
        direction: The tangent d, a tree like ``params``; all parameters move.
        key: Consumed for the bootstrap.
        layer_of: As for `layer_kernels`; ``blocks.block_of`` of a partition fits.
        reduction: ``"mean"`` or ``"stack"``.
        jacobian: ``"factored"``, ``"plain"`` or ``"auto"``.
        tolerance: Largest residual of a resolved pair, relative to its value.
        floor: Smallest resolved value, relative to the largest; ten eps if None.
        num_shells: S.
        window: Shells w in one sliding window.
        min_count: Pairs that a shell needs, lest it be masked.
        num_bootstrap: Resamples behind the intervals of the fits; 0 for none.

    Returns:
        `LayerMeasurements`. Of the cross-checks of `measure_coupling` one is made: the
        total's ``operator_disagreement``, by one matrix-free product with its leading
        eigenvector. The other disagreements are NaN.

    Raises:
        ValueError: If a shape, tree, dtype, leading axis or choice does not fit.

    References:
        Paper 4.1, Theorem 2 and Proposition 1 (A.3, A.4).
    """
    form = "factored" if uses_factors(error_fn, jacobian) else "plain"
    matrices = layer_kernels_with_derivative(
        error_fn,
        params,
        batches,
        direction,
        layer_of=layer_of,
        reduction=reduction,
        jacobian=jacobian,
    )

    def measure(kernel: jax.Array, moved: jax.Array) -> CouplingMeasurement:
        pairs, coupling = diagonalize(kernel, moved, tolerance=tolerance, floor=floor)
        unknown = jnp.full((), jnp.nan, kernel.dtype)
        finite = jnp.all(jnp.isfinite(kernel)) & jnp.all(jnp.isfinite(moved))
        return diagnose(
            pairs,
            coupling,
            (unknown, unknown, finite),
            key,
            labels=("dense", form, "exact", reduction),
            num_shells=num_shells,
            window=window,
            min_count=min_count,
            num_bootstrap=num_bootstrap,
        )

    kernels, moved = (list(part) for part in zip(*matrices.values(), strict=True))
    total = measure(sum(kernels[1:], kernels[0]), sum(moved[1:], moved[0]))
    leading = total.vectors[:, :1]
    product = kernel_matmat(error_fn, params, batches, leading, reduction=reduction)
    disagreement = _disagreement(product, leading, total.values[0])
    total = dataclasses.replace(total, operator_disagreement=disagreement)
    average = _average(
        moved, total.vectors, total.values, total.shells,
        window=window, min_count=min_count,
    )  # fmt: skip
    layers = {name: measure(*pair) for name, pair in matrices.items()}
    return LayerMeasurements(layers, total, average)


@jax.jit
def _disagreement(product: jax.Array, vector: jax.Array, value: jax.Array) -> jax.Array:
    return jnp.linalg.norm(product - value * vector) / jnp.where(value > 0, value, 1)


@partial(jax.jit, static_argnames=("window", "min_count"))
def _average(
    moved: list[jax.Array],
    vectors: jax.Array,
    values: jax.Array,
    shells: Shells,
    *,
    window: int,
    min_count: int,
) -> ToeplitzDiagnostics:
    """Averages the layers' couplings between the shells of M."""
    precision = jax.lax.Precision.HIGHEST
    found = []
    for matrix in moved:
        columns = jnp.matmul(matrix, vectors, precision=precision)
        found.append(
            shell_coupling(
                jnp.matmul(vectors.T, columns, precision=precision),
                values,
                shells,
                renormalize=True,
                min_count=min_count,
            )
        )
    mean = jnp.mean(jnp.stack([part.matrix for part in found]), axis=0)
    return toeplitz_diagnostics(found[0]._replace(matrix=mean), window)
