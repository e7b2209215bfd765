"""An estimated coupling of shells: its errors, and how far it is from Toeplitz.

One sign vector at a time is left out: errors come from the scatter of what is found
then.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from grsd_jax._arrays import where_defined
from grsd_jax._checks import check_share
from grsd_jax.results import NamedResult, number, result, span, with_undefined
from grsd_jax.shells.diagnostics import windows_text
from grsd_jax.shells.toeplitz import (
    toeplitz_residual,
    windowed_toeplitz_degrees_of_freedom,
    windowed_toeplitz_residual,
)


@result(
    masks={
        name: name
        for name in (
            "residual",
            "residual_error",
            "residual_of_signs",
            "windows",
            "windows_error",
        )
    }
)
class ToeplitzEstimate(NamedResult):
    """How far an estimated coupling is from depending on ``a - b`` alone.

    Each number is corrected for what the scatter of the signs adds to it, and has a
    standard error, both by a jackknife over the signs.

    Attributes:
        residual: [], ``|A - Toep(A)|_F / |A|_F`` over the valid cells.
        residual_error: [], its standard error.
        residual_of_signs: [], what was taken off for the scatter of the signs.
        windows: ``[S - w + 1]``, the residual of every run of w shells, from the
            smallest lambda to the largest.
        windows_error: ``[S - w + 1]``, their standard errors.
        degrees_of_freedom: ``[S - w + 1]`` int32, those of each window's residual; with
            0 the residual is zero by construction, or undefined.

    Inside `jit` no NaN is made: what is undefined is infinite there.
    """

    residual: jax.Array
    residual_error: jax.Array
    residual_of_signs: jax.Array
    windows: jax.Array
    windows_error: jax.Array
    degrees_of_freedom: jax.Array

    def _headline(self) -> list[tuple[str, str]]:
        residual, error, signs = (
            number(value, 3)
            for value in (self.residual, self.residual_error, self.residual_of_signs)
        )
        return [
            ("residual", f"{residual} ± {error}, {signs} taken off for the signs"),
            ("windows", windows_text(self.windows, self.degrees_of_freedom)),
        ]


@result(
    axes={"q": "sign"},
    units={"edges": "units of M"},
    masks={
        **dict.fromkeys(("matrix", "replicates", "log_error", "lanczos_error"), "mask"),
        "edges": "finite",
    },
)
class StochasticCoupling(NamedResult):
    r"""The coupling between the soft shells above the lowest edge, S of them.

    The shell below all edges, which holds the null space, is left out.

    Attributes:
        matrix: ``[S, S]``, ``C_ab / (n_a n_b)``: the mean of
            ``(K_ij - delta_ij g_i)^2``, or of that over ``lambda_i lambda_j``; zero
            where masked.
        mask: ``[S, S]`` bool, cells of shells that are not empty, whose edges lie above
            the rounding of M, with a coupling that the dtype can hold.
        replicates: ``[q, S, S]``, the matrix without one sign vector each. Errors of
            what is fitted to the matrix come from a jackknife over them, since cells
            share the signs.
        log_error: ``[S, S]``, the standard error of the logarithm, by that jackknife.
        lanczos_error: ``[S, S]``, the relative change of the first sample when every
            run takes three quarters of its steps.
        edges: ``[S]``, the lower edge of each shell.
        counts: ``[S]``, ``n_a = tr f_a``, by the same signs. They have no error of
            their own: a bulk shell of about one eigenvalue can be far off.
        relative_drift: ``[S]``, ``tr(f_a Mdot) / tr(f_a M)``. ``g(lambda)`` is lambda
            times this, interpolated in log lambda between the middles of the shells.
            Below the rounding of M that of the lowest shell above.
        finite: [] bool, whether all products were finite and, where leading pairs were
            searched for, all converged and could place the shells.
    """

    matrix: jax.Array
    mask: jax.Array
    replicates: jax.Array
    log_error: jax.Array
    lanczos_error: jax.Array
    edges: jax.Array
    counts: jax.Array
    relative_drift: jax.Array
    finite: jax.Array

    def interval(self, confidence: float = 0.95) -> tuple[jax.Array, jax.Array]:
        """Returns an interval for every cell, by Student t on the logarithm.

        Args:
            confidence: Its level, between 0 and 1.

        Returns:
            Lower and upper ends, ``[S, S]``, NaN where there is no coupling (infinity
            inside `jit`). The Lanczos error is not in them.

        Raises:
            ValueError: If the level is not between 0 and 1.
        """
        confidence = check_share("confidence", confidence)
        freedom = self.replicates.shape[0] - 1
        quantile = float(scipy.special.stdtrit(freedom, (1 + confidence) / 2))
        spread = jnp.exp(quantile * self.log_error)
        ends = self.matrix / spread, self.matrix * spread
        low, high = (where_defined(self.mask, end) for end in ends)
        return low, high

    def toeplitz(self, window: int = 5) -> ToeplitzEstimate:
        """Returns how far the coupling is from depending on ``a - b`` alone.

        Args:
            window: w, the number of shells of a window, at most S.

        Returns:
            A `ToeplitzEstimate`; NaN where no cell has a coupling.

        Raises:
            ValueError: If ``window`` is not an integer from 1 to S.

        References:
            Paper 7.4 and 7.5; the jackknife is ours.
        """
        return with_undefined(
            _toeplitz(self.matrix, self.mask, self.replicates, window=window)
        )

    def _headline(self) -> list[tuple[str, str]]:
        filled = np.asarray(self.mask)
        spread = np.asarray(self.log_error)[filled]
        lanczos = np.asarray(self.lanczos_error)[filled]
        typical = number(np.median(spread), 2) if filled.any() else "n/a"
        largest = number(lanczos.max(), 2) if filled.any() else "n/a"
        return [
            ("cells with a coupling", f"{filled.sum()} of {filled.size}"),
            ("coupling", span(np.asarray(self.matrix)[filled])),
            ("error of its logarithm", f"{typical}, the median over the cells"),
            ("largest Lanczos error", f"{largest}, relative"),
            ("sign vectors", str(len(self.replicates))),
            ("finite", str(bool(self.finite))),
        ]

    def _tables(self) -> dict[str, dict[str, Any]]:
        undefined = ~np.diagonal(self.mask)
        diagonal, low, high = (
            np.where(undefined, np.nan, np.diagonal(part))
            for part in (self.matrix, *self.interval())
        )
        columns = {
            "shell": np.arange(len(self.counts)),
            "eigenvalues": np.asarray(self.counts),
            "relative drift": np.asarray(self.relative_drift),
            "C_aa": diagonal,
            "low": low,
            "high": high,
        }
        return {"shells, from small to large lambda (95% intervals)": columns}


@partial(jax.jit, static_argnames="window")
def _toeplitz(
    matrix: jax.Array, mask: jax.Array, replicates: jax.Array, *, window: int
) -> ToeplitzEstimate:
    def residuals(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (
            toeplitz_residual(matrix, mask),
            windowed_toeplitz_residual(matrix, window, mask),
        )

    (whole, bias, error), (windows, _, windows_error) = map(
        _jackknife, residuals(matrix), jax.vmap(residuals)(replicates)
    )
    free = windowed_toeplitz_degrees_of_freedom(mask, window)
    return ToeplitzEstimate(whole, error, bias, windows, windows_error, free)


def _jackknife(
    value: jax.Array, replicates: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns a value without its bias, the bias, and the standard error.

    Infinities where the value, or one of the replicates, is not finite.
    """
    number = len(replicates)
    known = jnp.isfinite(value) & jnp.all(jnp.isfinite(replicates), 0)
    value, replicates = (jnp.where(known, x, 0) for x in (value, replicates))
    bias = (number - 1) * (jnp.mean(replicates, 0) - value)
    error = jackknife_error(replicates)

    def where_known(found: jax.Array) -> jax.Array:
        return jnp.where(known, found, jnp.inf)

    return where_known(value - bias), where_known(bias), where_known(error)


def jackknife_error(replicates: jax.Array) -> jax.Array:
    """Returns the standard error of what was found without each sign vector."""
    return jnp.std(replicates, 0) * (len(replicates) - 1) ** 0.5
