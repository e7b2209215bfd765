"""The density of eigenvalues, by stochastic Lanczos quadrature."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from grsd_jax._arrays import divisor, magnitude, matmul
from grsd_jax._checks import check_at_least, check_positive
from grsd_jax.linalg.lanczos import LanczosResult
from grsd_jax.linalg.ritz import default_floor
from grsd_jax.results import NamedResult, result


@result(units={"grid": "units of M", "density": "per unit of log lambda"})
class SpectralDensity(NamedResult):
    """A smoothed density of eigenvalues in ``s = log lambda``.

    Attributes:
        grid: lambda, ``[num_points]``, ascending, equally spaced in log lambda.
        density: ``[num_points]``, eigenvalues per unit of log lambda.
        mass_below: [], the eigenvalues below the floor, zero ones included.

    The sum of ``density`` times the spacing of log lambda, plus ``mass_below``, is the
    ``dimension`` that was asked for. Both are NaN if a product of a run was not finite.
    """

    grid: jax.Array
    density: jax.Array
    mass_below: jax.Array


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
    over b, and with an orthonormalized Gaussian start block the weights estimate
    ``(1/n) tr f(M)``. Weights are averaged over runs and spread by Gaussians in log
    lambda, each with its exact mass on the grid.

    Args:
        results: One run, or several with independent Gaussian start blocks.
        dimension: The dimension of the space that the start blocks were drawn from: n,
            or n less the null vectors that were projected out of them.
        num_points: Points of the grid.
        width: Standard deviation of the Gaussians in log lambda. One far below the
            spacing of the grid puts a node's weight on the nearest point.
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
    num_points = check_at_least("num_points", num_points, 2)
    dimension = check_positive("dimension", dimension)
    width = check_positive("width", width)
    dtype = runs[0].tridiagonal.dtype
    floor = default_floor(dtype) if floor is None else floor
    floor = check_positive("floor", floor)

    nodes, weights = zip(*(_gauss_rule(run) for run in runs), strict=True)
    nodes, weights = jnp.concatenate(nodes), jnp.concatenate(weights)
    weights = weights * (dimension / len(runs))
    unit = magnitude(jnp.max(nodes))  # logarithms of large numbers lose digits
    nodes = nodes / unit
    top = divisor(jnp.max(nodes))
    above = nodes > floor * top
    logs = jnp.log(jnp.where(above, nodes, top))
    low = jnp.min(jnp.where(above, logs, jnp.log(top)))
    width = max(width, float(jnp.finfo(dtype).eps))  # whose square is not 0
    grid = jnp.linspace(low - 4 * width, jnp.log(top) + 4 * width, num_points)
    spacing = (jnp.log(top) - low + 8 * width) / (num_points - 1)
    distances = jnp.abs(grid[:, None] - logs[None])
    nearest = jnp.min(distances, 0, keepdims=True)  # here no Gaussian may vanish
    excess = (distances - nearest) * (distances + nearest)
    bumps = jax.nn.softmax(-excess / (2 * width**2), axis=0)
    density = matmul(bumps, jnp.where(above, weights, 0)) / spacing
    mass_below = jnp.sum(jnp.where(above, 0, weights))
    finite = jnp.all(jnp.stack([run.finite for run in runs]))
    density, mass_below = (jnp.where(finite, x, jnp.nan) for x in (density, mass_below))
    return SpectralDensity(jnp.exp(grid) * unit, density, mass_below)


def _gauss_rule(run: LanczosResult) -> tuple[jax.Array, jax.Array]:
    """Returns nodes ``[r]`` and weights ``[r]`` that sum to one."""
    unit = magnitude(run.tridiagonal)
    values, rotation = jnp.linalg.eigh(run.tridiagonal / unit)
    first_rows = rotation[: run.block_size]
    weights = jnp.sum(first_rows**2, axis=0)
    return values * unit, weights / jnp.sum(weights)
