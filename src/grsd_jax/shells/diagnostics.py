"""Every diagnostic of a projected derivative that is binned into shells.

Shell couplings, Toeplitz residuals and power-law fits of one measurement, computed by
one jitted function (paper 7.3 to 7.5).
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from grsd_jax.linalg.ritz import RitzPairs
from grsd_jax.shells.binning import ShellCoupling, Shells, log_shells, shell_coupling
from grsd_jax.shells.options import Binning
from grsd_jax.shells.power_law import PowerLawFit, fit_power_law
from grsd_jax.shells.toeplitz import (
    toeplitz_residual,
    windowed_toeplitz_degrees_of_freedom,
    windowed_toeplitz_residual,
)


class ToeplitzDiagnostics(NamedTuple):
    """How far a coupling between shells is from depending on ``a - b`` alone.

    Attributes:
        coupling: The shell coupling, matrix and mask ``[S, S]``.
        residual: [], ``|A - Toep(A)|_F / |A|_F`` over all valid entries.
        windows: ``[S - w + 1]``, the residual of every run of w shells, from the
            smallest lambda to the largest; NaN where a window has no valid entry.
        degrees_of_freedom: ``[S - w + 1]`` int32, those of each window's residual; with
            0 the residual is zero by construction.
    """

    coupling: ShellCoupling
    residual: jax.Array
    windows: jax.Array
    degrees_of_freedom: jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "values",
        "vectors",
        "residuals",
        "resolved",
        "coupling",
        "shells",
        "literal",
        "renormalized",
        "diagonal_fit",
        "shell_fit",
        "secant_disagreement",
        "operator_disagreement",
        "finite",
    ],
    meta_fields=["solver", "jacobian", "derivative", "reduction", "coupled"],
)
@dataclasses.dataclass(frozen=True)
class CouplingMeasurement:
    """The result of `measure_coupling`; a pytree whose last five fields are static.

    Attributes:
        values: lambda, ``[r]``, descending; ``r = n`` for the dense solver.
        vectors: V, ``[n, r]``.
        residuals: ``[r]``, bounds of ``|M v - lambda v|``.
        resolved: ``[r]`` bool; only these pairs enter the fields below.
        coupling: ``V^T Mdot V``, ``[r, r]``, in units of M per unit of s.
        shells: Equal widths in log lambda, between the resolved edges.
        literal: Diagnostics of ``K_ab = mean |coupling_ij|^2``.
        renormalized: Of ``mean |coupling_ij|^2 / (lambda_i lambda_j)``.
        diagonal_fit: ``|coupling_ii|`` against ``lambda_i``, mode by mode (Figure 1).
        shell_fit: ``sqrt(K_aa)`` against the shell centres.
        secant_disagreement: [], ``|F - X|_F / |F|_F`` for the finite difference F and
            the exact derivative X, projected on the leading b pairs: for
            piecewise-linear activations it measures the effect of patterns that flip.
        operator_disagreement: [], the largest entry of ``|V^T M V - Lambda|`` over
            ``lambda_max`` for the leading b pairs, with M by plain differentiation. A
            value far above the precision means that the M that was measured is another.
        finite: [] bool, whether errors, direction and products were finite. If not,
            nothing is resolved.
        solver: ``"dense"`` or ``"lanczos"``, the one that ran.
        jacobian: ``"factored"`` or ``"plain"``, the path that was taken.
        derivative: ``"exact"`` or ``"finite_difference"``, behind ``coupling``.
        reduction: ``"mean"`` or ``"stack"``.
        coupled: Whether the examples are coupled, so that products are taken plainly;
            None if that was not checked (many outputs, or a traced problem).
    """

    values: jax.Array
    vectors: jax.Array
    residuals: jax.Array
    resolved: jax.Array
    coupling: jax.Array
    shells: Shells
    literal: ToeplitzDiagnostics
    renormalized: ToeplitzDiagnostics
    diagonal_fit: PowerLawFit
    shell_fit: PowerLawFit
    secant_disagreement: jax.Array
    operator_disagreement: jax.Array
    finite: jax.Array
    solver: str
    jacobian: str
    derivative: str
    reduction: str
    coupled: bool | None


class CrossChecks(NamedTuple):
    """The cross-checks of a measurement, see `CouplingMeasurement`."""

    secant_disagreement: jax.Array
    operator_disagreement: jax.Array
    finite: jax.Array


class Labels(NamedTuple):
    """How a measurement was made, see `CouplingMeasurement`."""

    solver: str
    jacobian: str
    derivative: str
    reduction: str
    coupled: bool | None


@partial(jax.jit, static_argnames=("labels", "binning"))
def diagnose(
    pairs: RitzPairs,
    coupling: jax.Array,
    checks: CrossChecks,
    key: jax.Array,
    *,
    labels: Labels,
    binning: Binning,
) -> CouplingMeasurement:
    """Returns the measurement: the coupling, binned, with every diagnostic."""
    resolved = pairs.resolved & checks.finite
    coupling = jnp.where(checks.finite, coupling, 0)
    shells = log_shells(pairs.values, binning.num_shells, mask=resolved)
    literal, renormalized = (
        toeplitz_diagnostics(
            shell_coupling(
                coupling,
                pairs.values,
                shells,
                renormalize=renormalize,
                min_count=binning.min_count,
            ),
            binning.window,
        )
        for renormalize in (False, True)
    )
    mode_key, shell_key = jax.random.split(key)
    fit = partial(fit_power_law, num_bootstrap=binning.num_bootstrap)
    return CouplingMeasurement(
        values=pairs.values,
        vectors=pairs.vectors,
        residuals=pairs.residuals,
        resolved=resolved,
        coupling=coupling,
        shells=shells,
        literal=literal,
        renormalized=renormalized,
        diagonal_fit=fit(
            pairs.values, jnp.abs(jnp.diag(coupling)), resolved, key=mode_key
        ),
        shell_fit=fit(
            shells.centers,
            jnp.sqrt(jnp.diag(literal.coupling.matrix)),
            jnp.diag(literal.coupling.mask),
            key=shell_key,
        ),
        **checks._asdict(),
        **labels._asdict(),
    )


def toeplitz_diagnostics(binned: ShellCoupling, window: int) -> ToeplitzDiagnostics:
    """Returns the Toeplitz residuals of a coupling, whole and in sliding windows."""
    matrix, mask = binned.matrix, binned.mask
    return ToeplitzDiagnostics(
        coupling=binned,
        residual=toeplitz_residual(matrix, mask),
        windows=windowed_toeplitz_residual(matrix, window, mask),
        degrees_of_freedom=windowed_toeplitz_degrees_of_freedom(mask, window),
    )
