"""Every diagnostic of a projected derivative that is binned into shells.

Shell couplings, Toeplitz residuals and power-law fits of one measurement, computed by
one jitted function (paper 7.3 to 7.5).
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import magnitude
from grsd_jax.linalg.ritz import RitzPairs
from grsd_jax.results import (
    NamedResult,
    Result,
    headline,
    number,
    percent,
    result,
    span,
    with_undefined,
)
from grsd_jax.results.text import counted
from grsd_jax.shells.binning import (
    ShellCoupling,
    Shells,
    log_shells,
    mean_squares,
    root_mean_squares,
)
from grsd_jax.shells.options import Binning, Window
from grsd_jax.shells.power_law import PowerLawFit, fit_power_law
from grsd_jax.shells.toeplitz import (
    toeplitz_degrees_of_freedom,
    toeplitz_residual,
    windowed_toeplitz_degrees_of_freedom,
    windowed_toeplitz_residual,
)

#: The share of the error beyond which the pairs do not stand for it.
_MOST = 0.5


@result(masks={"residual": "residual", "windows": "windows"})
class ToeplitzDiagnostics(NamedResult):
    """How far a coupling between shells is from depending on ``a - b`` alone.

    Attributes:
        coupling: The shell coupling, matrix and mask ``[S, S]``.
        residual: [], ``|A - Toep(A)|_F / |A|_F`` over the shells with enough pairs; NaN
            if there is no coupling between them.
        windows: ``[S - w + 1]``, the residual of every run of w shells, from the
            smallest lambda to the largest; NaN where a window holds no coupling.
        degrees_of_freedom: ``[S - w + 1]`` int32, those of each window's residual; with
            0 the residual is zero by construction, or undefined.

    Residuals do not depend on units: they are right for means that leave the range of
    the dtype and are masked in ``coupling``. Inside `jit` no NaN is made: a residual
    that is undefined is infinite there.
    """

    coupling: ShellCoupling
    residual: jax.Array
    windows: jax.Array
    degrees_of_freedom: jax.Array

    def _headline(self) -> list[tuple[str, str]]:
        return [
            ("residual", self._residual_text()),
            ("windows", windows_text(self.windows, self.degrees_of_freedom)),
        ]

    def _residual_text(self) -> str:
        """Returns the residual; one without a degree of freedom says nothing."""
        if int(toeplitz_degrees_of_freedom(self.coupling.mask)):
            return number(self.residual, 3)
        return "n/a (no degree of freedom)"


@result(
    masks={"values": "any_resolved", "shells": "any_resolved"},
    units={"values": "units of M", "coupling": "units of M per time"},
)
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
        "unresolved_share",
        "num_missing",
        "num_misfits",
        "finite",
        "complete",
    ],
    meta_fields=["solver", "jacobian", "derivative", "reduction", "coupled", "window"],
)
@dataclasses.dataclass(frozen=True)
class CouplingMeasurement(Result):
    """The result of `measure_coupling`; a pytree whose last six fields are static.

    Attributes:
        values: lambda, ``[r]``, descending; ``r = n`` for the dense solver, those of
            the window for Lanczos, ``m b`` after a given number of steps.
        vectors: V, ``[n, r]``.
        residuals: ``[r]``, bounds of ``|M v - lambda v|``.
        resolved: ``[r]`` bool, pairs of the window that are accurate enough; only they
            enter the fields below.
        coupling: ``V^T Mdot V``, ``[r, r]``, in units of M per unit of s.
        shells: Equal widths in log lambda, between the resolved edges.
        literal: Diagnostics of ``K_ab = mean |coupling_ij|^2``.
        renormalized: Of ``mean |coupling_ij|^2 / (lambda_i lambda_j)``.
        diagonal_fit: ``|coupling_ii|`` against ``lambda_i``, mode by mode (Figure 1).
        shell_fit: ``sqrt(K_aa)`` against the shell centers.
        secant_disagreement: [], ``|F - X|_F / |F|_F`` for the finite difference F and
            the exact derivative X, projected on the leading b pairs: for
            piecewise-linear activations it measures the effect of patterns that flip.
            NaN if both vanish, or if no cross-check was asked for; then infinite
            inside `jit`.
        operator_disagreement: [], the largest entry of ``|V^T M V - Lambda|`` over
            ``lambda_max`` for the leading b pairs, with M by plain differentiation. A
            value far above the precision means that the M that was measured is another.
            NaN for a kernel that is zero, or if no cross-check was asked for; then
            infinite inside `jit`.
        unresolved_share: [], the share of ``|e|^2`` that lies outside the resolved
            pairs, ``1 - |V^T e|^2 / |e|^2``, of all batches together. Where it is near
            1, the pairs say little about this error. NaN for an error that is zero.
        num_missing: [] int32, pairs of the window that are not resolved.
        num_misfits: [] int32, targets that fit no output: classes out of range, integer
            rows that are not one-hot. Only inside `jit` are there any, where they are
            not refused; their errors are NaN. Also reads of whole rows that a table of
            the network does not have, where its J comes as factors.
        finite: [] bool, whether errors, direction and products were finite. If not,
            nothing is resolved.
        complete: [] bool, whether no copy of a repeated eigenvalue can be missing among
            the pairs, as in `LeadingEigenpairs`; True for the dense solver. None after
            a number of Lanczos steps, where that is not checked.
        solver: ``"dense"`` or ``"lanczos"``, the one that ran.
        jacobian: ``"factored"`` or ``"plain"``, the path that was taken.
        derivative: ``"exact"`` or ``"finite_difference"``, behind ``coupling``.
        reduction: ``"mean"`` or ``"stack"``.
        coupled: Whether the examples are coupled, so that products are taken plainly;
            None if that was not checked (many outputs, or a traced problem).
        window: The pairs that were asked for.
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
    unresolved_share: jax.Array
    num_missing: jax.Array
    num_misfits: jax.Array
    finite: jax.Array
    complete: jax.Array | None
    solver: str
    jacobian: str
    derivative: str
    reduction: str
    coupled: bool | None
    window: Window

    @property
    def any_resolved(self) -> jax.Array:
        """Whether any pair is resolved, [] bool."""
        return jnp.any(jnp.atleast_1d(self.resolved), axis=-1)

    @property
    def caveats(self) -> tuple[str, ...]:
        """What a reader of the exponents must know, a sentence each; see `caveats`."""
        return caveats(
            num_missing=int(self.num_missing),
            num_misfits=int(self.num_misfits),
            unresolved_share=float(self.unresolved_share),
            finite=bool(self.finite),
            complete=self.complete is None or bool(self.complete),
        )

    def _headline(self) -> list[tuple[str, str]]:
        values = np.asarray(self.values)[np.asarray(self.resolved)]
        wanted = min(self.window.num_pairs or len(self.vectors), len(self.vectors))
        sizes = f"{values.size} of the leading {wanted}, n = {len(self.vectors)}"
        literal, renormalized = (
            part._residual_text() for part in (self.literal, self.renormalized)
        )
        coupled = {True: "yes", False: "no", None: "not checked"}[self.coupled]
        return [
            ("resolved pairs", sizes),
            ("resolved eigenvalues", span(values, "units of M")),
            ("|e|^2 outside these pairs", number(self.unresolved_share, 2)),
            ("slope, mode by mode", _slope_text(self.diagonal_fit, "mode")),
            ("slope, shell by shell", _slope_text(self.shell_fit, "shell")),
            ("Toeplitz residual, literal", literal),
            ("Toeplitz residual, renormalized", renormalized),
            ("secant disagreement", _compared(self.secant_disagreement)),
            ("operator disagreement", _compared(self.operator_disagreement)),
            ("examples coupled", coupled),
            ("finite", str(bool(self.finite))),
            *(("caveat", sentence) for sentence in self.caveats),
        ]

    def _tables(self) -> dict[str, dict[str, Any]]:
        literal, renormalized = (
            np.where(
                np.diagonal(part.coupling.mask),
                np.diagonal(part.coupling.matrix),
                np.nan,
            )
            for part in (self.literal, self.renormalized)
        )
        shells = {
            "shell": np.arange(len(literal)),
            "center": np.asarray(self.shells.centers),
            "pairs": np.asarray(self.shells.counts),
            "sqrt(K_aa)": np.sqrt(np.maximum(literal, 0)),
            "renormalized": renormalized,
        }
        windows = {
            "first shell": np.arange(len(self.literal.windows)),
            **{
                name: np.where(part.degrees_of_freedom > 0, part.windows, np.nan)
                for name, part in (
                    ("literal", self.literal),
                    ("renormalized", self.renormalized),
                )
            },
        }
        return {
            "shells, from small to large lambda": shells,
            "Toeplitz residual of the windows": windows,
        }


def caveats(
    *,
    num_missing: int,
    unresolved_share: float,
    num_misfits: int = 0,
    finite: bool = True,
    complete: bool = True,
) -> tuple[str, ...]:
    """Returns what a reader of a measurement's exponents must know.

    Args:
        num_missing: As in `CouplingMeasurement`.
        unresolved_share: As there; NaN if it is not known.
        num_misfits: As there.
        finite: As there.
        complete: As there, True if it is not known.

    Returns:
        Sentences, none if all targets fit, all numbers are finite, no copies can be
        missing, and all pairs of the window are resolved and hold most of the error.
    """
    found = []
    if num_misfits:
        found.append(
            "Reads outside a table of the network, or targets that fit no output, such "
            f"as classes out of range: {num_misfits}."
        )
    if not finite:
        found.append(
            "Nothing was measured: the error, the direction or a product is not finite."
        )
    if num_missing:
        missing = counted(num_missing, "pair")
        are = "is" if num_missing == 1 else "are"
        found.append(f"At least {missing} of the spectral window {are} not resolved.")
    if finite and not complete:
        found.append(
            "Copies of a repeated eigenvalue may be missing: ask for a wider block, "
            "Lanczos(block_size=...)."
        )
    if mostly_unresolved(unresolved_share):
        found.append(
            f"Ask for more pairs: {percent(unresolved_share)} of the error's energy "
            "lies outside the measured ones, and exponents and residuals describe only "
            "the rest; if more take too long, "
            "grsd_jax.shells.measure_stochastic_coupling(...).toeplitz() gives "
            "residuals without them."
        )
    return tuple(found)


def mostly_unresolved(share: float) -> bool:
    """Returns whether exponents describe a small part of the error, given the rest."""
    return share > _MOST


def windows_text(windows: jax.Array, degrees_of_freedom: jax.Array) -> str:
    """Returns the span of the residuals that have a degree of freedom."""
    free = np.asarray(degrees_of_freedom) > 0
    return f"{span(np.asarray(windows)[free])}, {free.sum()} of {free.size} defined"


def _compared(disagreement: jax.Array) -> str:
    """Returns the number, or why there is none."""
    if not np.isfinite(disagreement):
        return "n/a: undefined, or not cross-checked"
    return number(disagreement, 2)


def _slope_text(fit: PowerLawFit, point: str) -> str:
    (_, exponent), (_, r_squared), *_ = headline(fit)
    return f"{exponent}, R^2 {r_squared}, {counted(int(fit.num_points), point)}"


class CrossChecks(NamedTuple):
    """The cross-checks of a measurement, see `CouplingMeasurement`."""

    secant_disagreement: jax.Array
    operator_disagreement: jax.Array
    unresolved_share: jax.Array
    num_missing: jax.Array
    num_misfits: jax.Array
    finite: jax.Array
    complete: jax.Array | None


class Labels(NamedTuple):
    """How a measurement was made, see `CouplingMeasurement`."""

    solver: str
    jacobian: str
    derivative: str
    reduction: str
    coupled: bool | None
    window: Window


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
    # The labels stay outside, so that one program serves every solver and window.
    fields = _fields(pairs, coupling, checks.finite, key, binning=binning)
    for name in ("literal", "renormalized"):
        fields[name] = without_infinity(fields[name])
    for name in ("diagonal_fit", "shell_fit"):
        fields[name] = with_undefined(fields[name])
    return CouplingMeasurement(
        values=pairs.values,
        vectors=pairs.vectors,
        residuals=pairs.residuals,
        **fields,
        **checks._asdict(),
        **labels._asdict(),
    )


@partial(jax.jit, static_argnames="binning")
def _fields(
    pairs: RitzPairs,
    coupling: jax.Array,
    finite: jax.Array,
    key: jax.Array,
    *,
    binning: Binning,
) -> dict[str, Any]:
    """Returns the fields of a `CouplingMeasurement` that are computed here."""
    resolved = pairs.resolved & finite
    coupling = jnp.where(finite, coupling, 0)
    shells = log_shells(pairs.values, binning.num_shells, mask=resolved)
    literal, renormalized = (
        root_mean_squares(
            coupling,
            pairs.values,
            shells,
            renormalize=renormalize,
            min_count=binning.min_count,
        )
        for renormalize in (False, True)
    )
    root, enough = literal
    mode_key, shell_key = jax.random.split(key)
    fit = partial(fit_power_law, num_bootstrap=binning.num_bootstrap)
    return {
        "resolved": resolved,
        "coupling": coupling,
        "shells": shells,
        "literal": toeplitz_diagnostics(*literal, binning.window),
        "renormalized": toeplitz_diagnostics(*renormalized, binning.window),
        "diagonal_fit": fit(
            pairs.values, jnp.abs(jnp.diag(coupling)), resolved, key=mode_key
        ),
        "shell_fit": fit(
            shells.centers, jnp.diag(root), jnp.diag(enough), key=shell_key
        ),
    }


def toeplitz_diagnostics(
    root: jax.Array, mask: jax.Array, window: int
) -> ToeplitzDiagnostics:
    """Returns the Toeplitz residuals of a coupling, whole and in sliding windows.

    Args:
        root: ``[S, S]``, of `root_mean_squares`.
        mask: ``[S, S]`` bool, where both shells hold enough pairs.
        window: The shells w of a window.
    """
    squares = jnp.square(root / magnitude(root))
    windows = windowed_toeplitz_residual(squares, window, mask)
    freedom = windowed_toeplitz_degrees_of_freedom(mask, window)
    return ToeplitzDiagnostics(
        coupling=mean_squares(root, mask),
        residual=toeplitz_residual(squares, mask),
        windows=windows,
        degrees_of_freedom=jnp.where(jnp.isfinite(windows), freedom, 0),
    )


def without_infinity(diagnostics: ToeplitzDiagnostics) -> ToeplitzDiagnostics:
    """Returns diagnostics with NaN for residuals that are undefined, outside `jit`."""
    # Masked entries of the coupling keep their zeros.
    return with_undefined(diagnostics)._replace(coupling=diagnostics.coupling)
