"""What a block Lanczos run says of the spectrum: Ritz pairs and the density."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from grsd_jax._checks import check_at_least, check_positive
from grsd_jax.linalg.lanczos import LanczosResult

#: Rounding of the run, in eps of ``|M|`` times the root of r, added to residuals.
_ROUNDING_EPS = 2.0

#: That of the smallest pairs, in eps of ``|M|``: up to 4.6 in float32 on hard spectra.
#: Rounding grows with theta, so the bound above would cost them a decade for nothing.
_SMALL_ROUNDING_EPS = 5.0


class RitzPairs(NamedTuple):
    """Approximate eigenpairs ``M v = theta v``.

    Attributes:
        values: theta, ``[r]``, descending.
        vectors: V, ``[n, r]``, orthonormal columns.
        residuals: ``[r]``, bounds of ``|M v - theta v|``, rounding included; each
            bounds the distance of theta to the spectrum.
        resolved: ``[r]`` bool, pairs fit to be used: the residual, with the rounding to
            which small pairs are subject, is at most ``tolerance theta``, and
            ``theta > floor theta_max``.
    """

    values: jax.Array
    vectors: jax.Array
    residuals: jax.Array
    resolved: jax.Array


class SpectralDensity(NamedTuple):
    """A smoothed density of eigenvalues in ``s = log lambda``.

    Attributes:
        grid: lambda, ``[num_points]``, ascending, equally spaced in log lambda.
        density: ``[num_points]``, eigenvalues per unit of log lambda.
        mass_below: [], the eigenvalues below the floor, zero ones included.

    The sum of ``density`` times the spacing of log lambda, plus ``mass_below``, is the
    ``dimension`` that was asked for.
    """

    grid: jax.Array
    density: jax.Array
    mass_below: jax.Array


def ritz_pairs(
    result: LanczosResult, *, tolerance: float = 0.05, floor: float | None = None
) -> RitzPairs:
    """Computes Ritz pairs: ``T = S Theta S^T``, ``V = Q S``.

    The residual ``|M v_i - theta_i v_i| = |B_m S[last block rows, i]|`` is exact and
    free, but for the rounding of the run. That is at most ``2 eps sqrt(r) |M|``, which
    is added to the bounds, and ``5 eps |M|`` where theta is small, which counts against
    a pair: in float32 and at the default tolerance, values below ``1e-5 |M|`` are not
    resolved. Once all n dimensions are used up, the pairs that are left repeat the
    smallest value with a zero vector, and are not resolved.

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
    check_positive("tolerance", tolerance)
    # Columns beyond the n dimensions are set apart, lest they mix with a null space.
    empty = jnp.all(result.basis == 0, axis=0)
    apart = -2 * jnp.where(result.scale > 0, result.scale, 1)
    shifted = result.tridiagonal + jnp.diag(jnp.where(empty, apart, 0))
    values, rotation = jnp.linalg.eigh(shifted)
    values, rotation = values[::-1], rotation[:, ::-1]
    real = values > apart / 2
    values = jnp.where(real, values, jnp.min(values, where=real, initial=jnp.inf))
    precision = jax.lax.Precision.HIGHEST
    last_rows = rotation[-result.block_size :]
    left_over = jnp.matmul(result.residual_block, last_rows, precision=precision)
    residuals = jnp.linalg.norm(left_over, axis=0)
    eps = float(jnp.finfo(values.dtype).eps)
    vectors = jnp.matmul(result.basis, rotation, precision=precision)
    bounds = residuals + rounding_bound(len(values), values.dtype) * result.scale
    small = residuals + _SMALL_ROUNDING_EPS * eps * result.scale
    resolved = resolved_pairs(values, small, tolerance=tolerance, floor=floor)
    return RitzPairs(values, vectors, bounds, resolved & real & result.finite)


def resolved_pairs(
    values: jax.Array,
    residuals: jax.Array,
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
        ``[r]`` bool.

    Raises:
        ValueError: If ``tolerance`` or ``floor`` is not a finite number above zero.
    """
    check_positive("tolerance", tolerance)
    floor = default_floor(values.dtype) if floor is None else floor
    check_positive("floor", floor)
    accurate = residuals <= tolerance * values
    return accurate & (values > floor * jnp.max(values))


def rounding_bound(num_pairs: int, dtype: jax.typing.DTypeLike) -> float:
    """Returns ``2 eps sqrt(r)``, what rounding adds to a residual, over ``|M|``."""
    return _ROUNDING_EPS * float(jnp.finfo(dtype).eps) * num_pairs**0.5


def default_floor(dtype: jax.typing.DTypeLike) -> float:
    """Returns ten eps of the dtype: below it eigenvalues are rounding noise."""
    return 10 * float(jnp.finfo(dtype).eps)


def spectral_density(
    results: LanczosResult | Sequence[LanczosResult],
    dimension: float,
    *,
    num_points: int = 256,
    width: float = 0.1,
    floor: float | None = None,
) -> SpectralDensity:
    """Estimates the density of eigenvalues by stochastic Lanczos quadrature.

    Each run is a Gauss rule: node theta_i has the weight ``|S[first block rows, i]|^2``
    over b, and with an orthonormalised Gaussian start block the weights estimate
    ``(1/n) tr f(M)``. Weights are averaged over runs and spread by Gaussians in log
    lambda, each with its exact mass on the grid.

    Args:
        results: One run, or several with independent Gaussian start blocks.
        dimension: The dimension of the space that the start blocks were drawn from: n,
            or n less the null vectors that were projected out of them.
        num_points: Points of the grid.
        width: Standard deviation of the Gaussians in log lambda.
        floor: Nodes below ``floor theta_max`` count as ``mass_below``; ten eps of the
            dtype if None.

    Returns:
        A `SpectralDensity` whose total mass is ``dimension``.

    Raises:
        ValueError: If there is no run, or an option is out of range.

    References:
        Paper 7.2; Ubaru, Chen and Saad (2017), "Fast estimation of tr(f(A)) via
        stochastic Lanczos quadrature".
    """
    runs = [results] if isinstance(results, LanczosResult) else list(results)
    check_at_least("len(results)", len(runs), 1)
    check_at_least("num_points", num_points, 2)
    for name, value in (("dimension", dimension), ("width", width)):
        check_positive(name, value)
    dtype = runs[0].tridiagonal.dtype
    floor = default_floor(dtype) if floor is None else floor
    check_positive("floor", floor)

    nodes, weights = zip(*(_gauss_rule(run) for run in runs), strict=True)
    nodes, weights = jnp.concatenate(nodes), jnp.concatenate(weights)
    weights = weights * (dimension / len(runs))
    top = jnp.max(nodes)
    top = jnp.where(top > 0, top, 1)
    above = nodes > floor * top
    logs = jnp.log(jnp.where(above, nodes, top))
    low = jnp.min(jnp.where(above, logs, jnp.log(top)))
    grid = jnp.linspace(low - 4 * width, jnp.log(top) + 4 * width, num_points)
    spacing = grid[1] - grid[0]
    bumps = jax.nn.softmax(-(((grid[:, None] - logs[None]) / width) ** 2) / 2, axis=0)
    density = jnp.matmul(
        bumps, jnp.where(above, weights, 0), precision=jax.lax.Precision.HIGHEST
    )
    mass_below = jnp.sum(jnp.where(above, 0, weights))
    return SpectralDensity(jnp.exp(grid), density / spacing, mass_below)


def _gauss_rule(run: LanczosResult) -> tuple[jax.Array, jax.Array]:
    """Returns nodes ``[r]`` and weights ``[r]`` that sum to one."""
    values, rotation = jnp.linalg.eigh(run.tridiagonal)
    first_rows = rotation[: run.block_size]
    weights = jnp.sum(first_rows**2, axis=0)
    return values, weights / jnp.sum(weights)
