r"""The mechanism behind residual nets: increments of the log-norm over depth.

A chain ``h_{l+1} = F_l(h_l)``, residual where ``F_l(h) = h + s G_l(h)``, carries a
direction ``u_0`` of its first state along, ``u_{l+1} = F_l'(h_l) u_l``. Theorem 2 rests
on two of its properties: the increments of ``log|u_l|`` average themselves out over
depth, and the direction ``u_l / |u_l|`` forgets where it began (paper 4.2 and A.3).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr, ndtri

from grsd_jax._arrays import (
    at_least_single,
    divisor,
    matmul,
    norm,
    unit_vectors,
    where_defined,
)
from grsd_jax._checks import check_at_least, check_floating, check_key
from grsd_jax.results import NamedResult, result

#: Rounding over eps: of the mean of a path, relative to the largest increment or, as of
#: any logarithm of a norm, to 1; and of the mean cosine of neighbors.
_MEAN_ROUNDING, _COSINE_ROUNDING = 2.0, 8.0


@result()
class StateIncrements(NamedResult):
    r"""What the state Jacobians of a chain do to random directions.

    Attributes:
        increments: ``[L, R, N]``, ``log(|u_{l+1}| / |u_l|)`` for R directions of each
            of N examples.
        overlap: ``[L + 1, L + 1]``, the cosine between ``u_l`` and ``u_m``, in the mean
            over directions and examples; 1 on the diagonal.
    """

    increments: jax.Array
    overlap: jax.Array


@result()
class IncrementStatistics(NamedResult):
    """How the increments of a chain add up over its depth.

    Attributes:
        mean: [], of the increments.
        variance: [], of the increments, over blocks and paths.
        variance_of_mean: [], over paths, of each path's mean over the L blocks. It
            falls as ``1 / L`` where the increments average themselves out.
        variance_ratio: [], ``L variance_of_mean`` over the mean variance of one block's
            increments: 1 for uncorrelated ones, L for those that repeat; NaN where no
            block's increments vary over the paths.
        normal_distance: [], the Kolmogorov-Smirnov distance of each path's sum to the
            normal law of the same mean and variance; about ``0.6 / sqrt(paths)`` for
            independent normal sums, and NaN where the sums do not vary.
        wasserstein: [], the 1-Wasserstein distance of the standardized sums to the
            standard normal law; NaN likewise.
        num_paths: Directions times examples.

    What varies by its rounding alone does not vary. Inside `jit` no NaN is made: what
    is undefined is infinite there.
    """

    mean: jax.Array
    variance: jax.Array
    variance_of_mean: jax.Array
    variance_ratio: jax.Array
    normal_distance: jax.Array
    wasserstein: jax.Array
    num_paths: int


def state_increments(
    maps: Sequence[Callable[[jax.Array], jax.Array]],
    state: jax.Array,
    *,
    key: jax.Array,
    num_directions: int = 16,
) -> StateIncrements:
    r"""Follows random directions through the state Jacobians of a chain.

    .. math:: u_{l+1} = F_l'(h_l)\, u_l, \qquad
              x_l = \log \frac{|u_{l+1}|}{|u_l|}
                  = \log \frac{|(I + s\,G_l'(h_l))\, u_l|}{|u_l|}

    along the forward trajectory ``h_l``, by forward differentiation; norms are taken in
    each example. Directions begin isotropic, and are normalized after every block.

    Args:
        maps: The L maps from ``h_l`` to ``h_{l+1}``, of one shape and in which examples
            are independent; `grsd_jax.models.linen_chain` gives those of a
            network.
        state: ``h_0``, with leading axis N.
        key: Consumed for the directions.
        num_directions: R.

    Returns:
        The increments, ``-inf`` where a block maps a direction to zero, and the overlap
        of the directions at every two depths.

    Raises:
        ValueError: If there is no map, a shape changes, or R is below 1.

    References:
        Paper A.3.2, "Markov-additive structure of log-spectral increments".
    """
    check_floating("state", state)
    num_directions = check_at_least("num_directions", num_directions, 1)
    check_key(key)
    if not maps:
        raise ValueError("maps: expected at least one map, got none.")
    shape = (num_directions, *state.shape)
    direction, _ = _unit_directions(jax.random.normal(key, shape, state.dtype))
    directions, increments = [direction], []
    for advance in maps:
        new, push = jax.linearize(advance, state)
        if new.shape != state.shape:
            raise ValueError(
                f"maps: expected states of shape {list(state.shape)} throughout, "
                f"got {list(new.shape)}."
            )
        direction, norm = _unit_directions(jax.vmap(push)(direction))
        directions.append(direction)
        increments.append(jnp.log(norm))
        state = new
    flat = jnp.stack(directions).reshape(len(directions), -1)
    paths = num_directions * state.shape[0]
    return StateIncrements(jnp.stack(increments), matmul(flat, flat.T) / paths)


def increment_statistics(increments: jax.typing.ArrayLike) -> IncrementStatistics:
    r"""Summarizes increments: do they average themselves out, and become normal?

    With the sums :math:`S = \sum_l x_l` of every path, standardized as z, the distances
    to the normal law :math:`\Phi` are

    .. math:: D = \sup_t |\hat F_z(t) - \Phi(t)|, \qquad
              W_1 = \int |\hat F_z^{-1}(q) - \Phi^{-1}(q)|\, dq

    Args:
        increments: ``[L, ...]``; further axes are paths. Paths through one network
            share its weights: only over several networks are they independent.

    Returns:
        The statistics.

    Raises:
        ValueError: If there is no block, or there are fewer than two paths.

    References:
        Paper A.3.3, "Self-averaging"; the statistics are ours.
    """
    check_floating("increments", increments)
    increments = at_least_single(jnp.asarray(increments))
    depth = increments.shape[0] if increments.ndim else 0
    check_at_least("increments: blocks", depth, 1)
    increments = increments.reshape(depth, -1)
    num_paths = increments.shape[1]
    check_at_least("increments: paths", num_paths, 2)
    # From one path, so that equal ones come out as exactly equal.
    apart = increments - increments[:, :1]
    means = jnp.mean(apart, axis=0)
    variance_of_mean = jnp.var(means)
    single = jnp.mean(jnp.var(apart, axis=1))
    centered = means - jnp.mean(means)
    spread = norm(centered) / num_paths**0.5
    eps = float(jnp.finfo(increments.dtype).eps)
    rounding = _MEAN_ROUNDING * eps * jnp.maximum(jnp.max(jnp.abs(increments)), 1)
    varies, moves = spread > rounding, single > jnp.square(rounding)
    ordered = jnp.sort(centered / divisor(spread))
    ranks = jnp.arange(num_paths, dtype=jnp.int32).astype(ordered.dtype)
    lower, upper = ranks / num_paths, (ranks + 1) / num_paths
    normal = ndtr(ordered)
    gaps = jnp.maximum(jnp.abs(upper - normal), jnp.abs(lower - normal))
    quantiles = ndtri((lower + upper) / 2)
    return IncrementStatistics(
        mean=jnp.mean(increments),
        variance=jnp.var(increments),
        variance_of_mean=variance_of_mean,
        variance_ratio=where_defined(moves, depth * variance_of_mean / divisor(single)),
        normal_distance=where_defined(varies, jnp.max(gaps)),
        wasserstein=where_defined(varies, jnp.mean(jnp.abs(ordered - quantiles))),
        num_paths=num_paths,
    )


def correlation_time(overlap: jax.typing.ArrayLike) -> jax.Array:
    r"""Returns the number of blocks over which directions keep their memory.

    .. math:: \tau = -1 / \log \bar c, \qquad
              \bar c = \operatorname{mean}_l \langle \hat u_l, \hat u_{l+1} \rangle

    so that the memory after k blocks is ``exp(-k / tau)`` for a Markov chain of
    directions. Independent isotropic branches ``s G`` of unit gain have
    ``c = (1 + s^2)^{-1/2}``, ``tau = 2 / log(1 + s^2)``: about ``2 / s^2`` blocks.

    Args:
        overlap: ``[L + 1, L + 1]``, of `StateIncrements`.

    Returns:
        [], in blocks: infinite if no direction moves by more than rounding, 0 if the
        mean cosine of neighbors is zero or less.

    Raises:
        ValueError: If it is not a square matrix of at least two rows.

    References:
        Paper A.3.4, "Directional mixing".
    """
    overlap = _overlap(overlap)
    cosine = jnp.mean(jnp.diagonal(overlap, offset=1))
    most = 1 - _COSINE_ROUNDING * float(jnp.finfo(cosine.dtype).eps)
    moves = (cosine > 0) & (cosine < most)
    time = -1 / jnp.log(jnp.where(moves, cosine, 0.5))
    still = jnp.where(cosine >= most, jnp.inf, 0 * cosine)  # NaN stays NaN
    return jnp.where(moves, time, jnp.where(cosine <= 0, 0, still))


def direction_memory(overlap: jax.typing.ArrayLike) -> jax.Array:
    """Returns the mean cosine between directions k blocks apart, for every k.

    Args:
        overlap: ``[L + 1, L + 1]``, of `StateIncrements`.

    Returns:
        ``[L + 1]``, 1 at ``k = 0``.

    Raises:
        ValueError: As for `correlation_time`.

    References:
        Paper A.3.4.
    """
    overlap = _overlap(overlap)
    means = [jnp.mean(jnp.diagonal(overlap, offset=k)) for k in range(len(overlap))]
    return jnp.stack(means)


def _overlap(overlap: jax.typing.ArrayLike) -> jax.Array:
    check_floating("overlap", overlap)
    overlap = at_least_single(jnp.asarray(overlap))
    if overlap.ndim != 2 or overlap.shape[0] != overlap.shape[1] or len(overlap) < 2:
        raise ValueError(
            "overlap: expected a square matrix of at least two rows, got shape "
            f"{list(overlap.shape)}."
        )
    return overlap


def _unit_directions(directions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns unit directions ``[R, N, ...]``, example by example, and the norms."""
    unit, norms = unit_vectors(directions, tuple(range(2, directions.ndim)))
    return unit, norms.reshape(directions.shape[:2])
