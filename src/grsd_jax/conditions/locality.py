"""Condition 1: how the motion of one block of parameters changes another's Jacobian.

The paper asks that ``Jdot_l`` involve a bounded neighborhood of blocks alone (3.2, 5.1
and equation 11). What can be measured is the influence ``R_lm``, the part of ``Jdot_l``
that the motion of block m causes, and how it falls with the distance ``|l - m|``.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import as_floating, as_square, divisor, magnitude, norm
from grsd_jax._checks import check_at_least, check_key
from grsd_jax._typing import PyTree
from grsd_jax.jacobian.autodiff import PlainDerivative
from grsd_jax.parameter_blocks import ParameterBlocks, check_blocks, restrict_to_block
from grsd_jax.problem import Point, Problem, point_at
from grsd_jax.results import NamedResult, result


@result()
class InfluenceProfile(NamedResult):
    """How the motion of each block changes the Jacobian of every other.

    Attributes:
        influence: R, ``[L, L]``: row l changes because column m moves.
        stderr: ``[L, L]``, the standard error of each entry; zeros if exact.
        num_probes: Random probes behind an estimate; 0 if it is exact.
    """

    influence: jax.Array
    stderr: jax.Array
    num_probes: int


def influence_profile(
    problem: Problem,
    params: PyTree,
    direction: PyTree,
    blocks: ParameterBlocks,
    *,
    key: jax.Array | None = None,
    num_probes: int | None = 16,
    column_chunk: int = 8,
) -> InfluenceProfile:
    r"""Measures ``R_lm = |D_{theta_m} J_l [d_m]|_F`` for every pair of blocks.

    .. math:: R_{lm}^2 = \frac1K \sum_k \Bigl\| \frac{d}{ds}
              J_{kl}(\theta + s\, d_m) \Bigr\|_F^2
              = \mathbb{E}_u \frac1K \sum_k
              \Bigl| \Bigl( \frac{d}{ds} J_{kl} \Bigr)^{\!\top} u_k \Bigr|^2

    (for a stack the sum over k), with ``d_m`` the direction inside block m and zero
    elsewhere, and u of independent random signs (Hutchinson). One JVP of a VJP serves
    one probe and one m for every l. With ``num_probes=None`` the n unit vectors replace
    the probes, and R is exact.

    Args:
        problem: The problem.
        params: Parameters.
        direction: The tangent d, a tree like ``params``: how training moves them.
        blocks: The partition, L blocks.
        key: Consumed for the probes; not needed if exact.
        num_probes: Probes, at least 2, or None for the exact profile.
        column_chunk: Probes taken at a time, which bounds memory.

    Returns:
        An `InfluenceProfile`, in units of J per unit of s.

    Raises:
        ValueError: If a shape, tree, dtype, leading axis or choice does not fit, or a
            key is missing.

    References:
        Paper 3.2 (Condition 1) and A.2; Hutchinson (1990). The profile is ours.
    """
    column_chunk = check_at_least("column_chunk", column_chunk, 1)
    point = point_at(problem, params, direction)
    check_blocks(blocks, params)
    blocks = blocks.over(point.params)
    probes = _probes(point.error, point.num_batches, key, num_probes)
    columns = [
        _influence_of(point, blocks, block, probes, column_chunk)
        for block in range(len(blocks.names))
    ]
    influence, stderr = _estimate(columns, exact=num_probes is None)
    return InfluenceProfile(influence, stderr, num_probes or 0)


@partial(jax.jit, static_argnames="exact")
def _estimate(columns: list[jax.Array], *, exact: bool) -> tuple[jax.Array, jax.Array]:
    """Returns the influence and its errors from its columns by probes."""
    sizes = jnp.stack(columns, axis=-1)  # [probes, L, L]
    if exact:
        influence = norm(sizes, 0)
        return influence, jnp.zeros_like(influence)
    root = sizes.shape[0] ** 0.5
    influence = norm(sizes, 0) / root
    squares = jnp.square(sizes / divisor(influence)[None])  # relative: none underflows
    return influence, influence * jnp.std(squares, axis=0, ddof=1) / root / 2


def distance_totals(matrix: jax.typing.ArrayLike) -> jax.Array:
    """Returns the sum of a matrix's entries at each distance ``|l - m|``.

    Args:
        matrix: ``[L, L]``.

    Returns:
        ``[L]``, the sums at the distances 0 to ``L - 1``.

    Raises:
        ValueError: If ``matrix`` is not a floating square matrix.
    """
    matrix = as_square("matrix", matrix)
    return _by_distance(matrix, jax.ops.segment_sum)


def distance_maxima(matrix: jax.typing.ArrayLike) -> jax.Array:
    """Returns the largest entry of a matrix at each distance ``|l - m|``.

    Args:
        matrix: ``[L, L]``.

    Returns:
        ``[L]``, the maxima at the distances 0 to ``L - 1``.

    Raises:
        ValueError: If ``matrix`` is not a floating square matrix.
    """
    matrix = as_square("matrix", matrix)
    return _by_distance(matrix, jax.ops.segment_max)


def smallest_band(profile: jax.typing.ArrayLike, share: float) -> jax.Array:
    """Returns the smallest w whose distances 0 to w hold a share of the total.

    Args:
        profile: ``[L]``, non-negative amounts at the distances 0 to ``L - 1``.
        share: The share, in (0, 1].

    Returns:
        [] int32; 0 for a profile of zeros, -1 if it is not finite or an amount is
        negative.

    Raises:
        ValueError: If ``profile`` is not a floating vector or the share out of range.
    """
    profile = as_floating("profile", profile, [None])
    check_at_least("len(profile)", profile.shape[0], 1)
    real = isinstance(share, int | float | np.integer | np.floating)
    if not (real and not isinstance(share, bool) and 0 < share <= 1):
        raise ValueError(f"share: expected a number in (0, 1], got {share!r}.")
    return _smallest_band(profile, float(share))


@partial(jax.jit, static_argnames="share")
def _smallest_band(profile: jax.Array, share: float) -> jax.Array:
    held = jnp.cumsum(profile)
    # Rounding of the sums must not ask for one more distance when the share is 1.
    enough = share * (1 - profile.shape[0] * float(jnp.finfo(profile.dtype).eps))
    band = jnp.sum(held < enough * held[-1], dtype=jnp.int32)
    return jnp.where(jnp.isfinite(held[-1]) & jnp.all(profile >= 0), band, -1)


@partial(jax.jit, static_argnames="combine")
def _by_distance(matrix: jax.Array, combine: Callable[..., jax.Array]) -> jax.Array:
    """Combines the entries of a square matrix at each distance ``|l - m|``."""
    size = matrix.shape[0]
    index = np.arange(size)
    distances = np.abs(index[:, None] - index[None, :]).reshape(-1)
    return combine(matrix.reshape(-1), distances, size)


def _probes(
    error: jax.ShapeDtypeStruct,
    num_batches: int,
    key: jax.Array | None,
    num_probes: int | None,
) -> list[jax.Array]:
    """Returns ``[N, C, probes]`` for each batch: random signs, or unit vectors."""
    if num_probes is None:
        size = int(np.prod(error.shape))
        units = jnp.eye(size, dtype=error.dtype).reshape(*error.shape, size)
        return [units] * num_batches
    num_probes = check_at_least("num_probes", num_probes, 2)
    key = check_key(key, "random probes")
    shape = (*error.shape, num_probes)
    return [
        jax.random.rademacher(k, shape, error.dtype)
        for k in jax.random.split(key, num_batches)
    ]


def _influence_of(
    point: Point,
    blocks: ParameterBlocks,
    block: int,
    probes: list[jax.Array],
    column_chunk: int,
) -> jax.Array:
    """Returns a block's influence on each, ``[probes, L]``."""
    moving = restrict_to_block(point.direction, blocks, block)
    parts = [
        _block_norms(
            PlainDerivative(point.error_fn, point.params, batch, moving),
            columns,
            blocks,
            column_chunk,
        )
        for batch, columns in zip(point.parts, probes, strict=True)
    ]
    scale = 1.0 if point.reduction == "stack" else len(parts) ** 0.5
    return norm(jnp.stack(parts), 0) / scale


def _block_norms(
    derivative: PlainDerivative,
    columns: jax.Array,
    blocks: ParameterBlocks,
    column_chunk: int,
) -> jax.Array:
    """Returns ``|Jdot_l^T u|`` of every probe and block, ``[probes, L]``."""
    count = columns.shape[-1]
    chunks = [
        _norms(derivative.pull(columns[..., i : i + column_chunk]), blocks)
        for i in range(0, count, column_chunk)
    ]
    return jnp.concatenate(chunks)


@jax.jit
def _norms(tangents: PyTree, blocks: ParameterBlocks) -> jax.Array:
    """Returns the norms of each block of params trees, ``[b, L]``."""
    leaves = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(tangents)]
    sizes = jnp.stack([norm(leaf, 1) for leaf in leaves])
    owners = np.asarray(blocks.index)
    unit = magnitude(sizes)
    squares = jnp.square(sizes / unit)
    return jnp.sqrt(jax.ops.segment_sum(squares, owners, len(blocks.names))).T * unit
