"""Ritz pairs of a block Lanczos run, and which of them are resolved."""

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import as_floating, divisor, magnitude, matmul, norm
from grsd_jax._checks import check_positive
from grsd_jax.linalg.lanczos import DEAD_EPS, LanczosResult
from grsd_jax.results import NamedResult, result, span

#: Rounding of the run, in eps of ``|M|`` times the root of r, added to residuals.
_ROUNDING_EPS = 2.0

#: The same for the smallest pairs: up to 4.6 in float32 on hard spectra. The bound
#: above would needlessly cost them a decade.
_SMALL_ROUNDING_EPS = 5.0


@result(units={"values": "units of M"})
class RitzPairs(NamedResult):
    """Approximate eigenpairs ``M v = theta v``.

    Attributes:
        values: theta, ``[r]``, descending.
        vectors: V, ``[n, r]``, orthonormal columns.
        residuals: ``[r]``, bounds of ``|M v - theta v|``, rounding included; each
            bounds the distance of theta to the spectrum.
        resolved: ``[r]`` bool, pairs accurate enough to be used: the residual, with the
            rounding of small pairs, is at most ``tolerance theta``, and
            ``theta > floor theta_max``.
    """

    values: jax.Array
    vectors: jax.Array
    residuals: jax.Array
    resolved: jax.Array

    def _headline(self) -> list[tuple[str, str]]:
        found = np.asarray(self.values)[np.asarray(self.resolved)]
        return [
            ("resolved pairs", f"{found.size} of {self.values.size}"),
            ("resolved values", span(found, "units of M")),
        ]


def ritz_pairs(
    result: LanczosResult, *, tolerance: float = 0.05, floor: float | None = None
) -> RitzPairs:
    """Returns the Ritz pairs of a run: ``T = S Theta S^T``, ``V = Q S``.

    The residual ``|M v_i - theta_i v_i| = |B_m S[last block rows, i]|`` is exact and
    free, except for the rounding of the run. The rounding is at most
    ``2 eps sqrt(r) |M|``, which is added to the bounds. Where theta is small it is at
    most ``5 eps |M|``, which counts when a pair is resolved: in float32 and at the
    default tolerance, values below ``1e-5 |M|`` are not. Once all n dimensions are used
    up, the pairs that are left repeat the smallest value with a zero vector, and are
    not resolved.

    Args:
        result: A block Lanczos run.
        tolerance: Largest residual of a resolved pair, relative to its value.
        floor: Smallest value of a resolved pair, relative to the largest; ten eps of
            the dtype if None.

    Returns:
        `RitzPairs`; nothing is resolved if a product was not finite.

    Raises:
        ValueError: If ``tolerance`` or ``floor`` is not a finite number above zero.

    References:
        Paper 7.2 and B.4; Parlett (1998), "The Symmetric Eigenvalue Problem", 11.
    """
    tolerance = check_positive("tolerance", tolerance)
    # Columns beyond the n dimensions get a value of their own, so that they do not mix
    # with a null space.
    empty = jnp.all(result.basis == 0, axis=0)
    unit = magnitude(result.scale)
    scale = result.scale / unit
    apart = -2 * divisor(scale)
    shifted = result.tridiagonal / unit + jnp.diag(jnp.where(empty, apart, 0))
    values, rotation = jnp.linalg.eigh(shifted)
    values, rotation = values[::-1], rotation[:, ::-1]
    real = values > apart / 2
    values = jnp.where(real, values, jnp.min(values, where=real, initial=jnp.inf))
    last_rows = rotation[-result.block_size :]
    residuals = norm(matmul(result.residual_block / unit, last_rows), 0)
    vectors = matmul(result.basis, rotation)
    bounds = residuals + rounding_bound(len(values), values.dtype) * scale
    small = residuals + small_rounding(values.dtype) * scale
    resolved = resolved_pairs(values, small, tolerance=tolerance, floor=floor)
    resolved &= real & result.finite
    return RitzPairs(values * unit, vectors, bounds * unit, resolved)


def resolved_pairs(
    values: jax.typing.ArrayLike,
    residuals: jax.typing.ArrayLike,
    *,
    tolerance: float = 0.05,
    floor: float | None = None,
) -> jax.Array:
    """Marks ``residual <= tolerance theta`` and ``theta > floor theta_max``.

    Args:
        values: theta, ``[r]``.
        residuals: ``[r]``.
        tolerance: Largest residual, relative to theta.
        floor: Smallest value, relative to the largest; ten eps of the dtype if None.

    Returns:
        ``[r]`` bool; False where a number is NaN, everywhere if a value is infinite.

    Raises:
        ValueError: If a shape or dtype does not fit, or ``tolerance`` or ``floor`` is
            not a finite number above zero.
    """
    values = as_floating("values", values, [None])
    residuals = as_floating("residuals", residuals, values.shape)
    tolerance = check_positive("tolerance", tolerance)
    floor = default_floor(values.dtype) if floor is None else floor
    floor = check_positive("floor", floor)
    accurate = residuals <= tolerance * values
    return accurate & (values > floor * jnp.max(values, initial=0))


def descending_pairs(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns all eigenpairs of a dense symmetric matrix, the largest value first.

    Args:
        matrix: M, ``[n, n]``.

    Returns:
        Values ``[n]`` and vectors ``[n, n]``; the values are NaN if a number of the
        matrix is not finite.
    """
    finite = jnp.all(jnp.isfinite(matrix))
    matrix = jnp.where(finite, matrix, 0)
    unit = magnitude(matrix)
    values, vectors = jnp.linalg.eigh(matrix / unit)
    return jnp.where(finite, values[::-1] * unit, jnp.nan), vectors[:, ::-1]


def rounding_bound(num_pairs: int, dtype: jax.typing.DTypeLike) -> float:
    """Returns what rounding adds to a residual, over ``|M|``.

    ``2 eps sqrt(r)``, and in short runs no less than what a dead direction leaves out.
    """
    eps = float(jnp.finfo(dtype).eps)
    return eps * max(_ROUNDING_EPS * num_pairs**0.5, DEAD_EPS)


def small_rounding(dtype: jax.typing.DTypeLike) -> float:
    """Returns ``5 eps``, what rounding does to a small pair, over ``|M|``."""
    return _SMALL_ROUNDING_EPS * float(jnp.finfo(dtype).eps)


def default_floor(dtype: jax.typing.DTypeLike) -> float:
    """Returns ten eps of the dtype: below it eigenvalues are rounding noise.

    Args:
        dtype: A floating dtype.

    Returns:
        The floor where none is given, relative to the largest eigenvalue.
    """
    return 10 * float(jnp.finfo(dtype).eps)
