"""Condition 2: how far the Jacobians of two blocks of parameters overlap.

The paper asks for ``|J_l^T J_m|_op <= c(|l - m|)`` at initialization, with a summable
tail of c (3.2, 5.2 and equation 12). ``J_l^T J_m`` has the size of two blocks of
parameters and is never formed: its singular values squared are the eigenvalues of
``M_l M_m``, an operator on the error space.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import divisor, magnitude, matmul, ratio, unit_vectors
from grsd_jax._checks import check_at_least, check_choice, check_key, check_positive
from grsd_jax._typing import PyTree
from grsd_jax.conditions.locality import distance_maxima
from grsd_jax.kernel.dense import layer_kernels
from grsd_jax.kernel.operator import LinearizedKernel, linearize_block_kernels
from grsd_jax.parameter_blocks import ParameterBlocks, check_blocks
from grsd_jax.problem import Problem, point_at
from grsd_jax.results import NamedResult, result

METHODS = ("auto", "dense", "power_iteration")

#: Error dimension up to which "auto" forms the blocks' kernels.
_DENSE_LIMIT = 640

#: Values of ``G^2`` below this many eps of ``|J_l|^2 |J_m|^2`` are rounding.
_NOISE_EPS = 10.0


@result(masks={"coherence": "defined"}, derived=("profile", "tail_sum"))
class BlockCoherence(NamedResult):
    """How far the Jacobians of every two blocks overlap.

    Attributes:
        products: G, ``[L, L]`` symmetric, ``|J_l^T J_m|_op``.
        norms: ``[L]``, ``|J_l|_op``.
        coherence: ``[L, L]``, ``G_lm / (|J_l| |J_m|)``, in [0, 1]; 0 where a block's
            Jacobian is zero. Below the root of the dtype's epsilon it is rounding.
        residuals: ``[L, L]``, the relative residual of ``G_lm^2`` as an eigenvalue; an
            eigenvalue lies that close. Zeros for the dense method.
        converged: ``[L, L]`` bool, residuals within the tolerance.
        num_iterations: Of the power iteration; 0 for the dense method.
    """

    products: jax.Array
    norms: jax.Array
    coherence: jax.Array
    residuals: jax.Array
    converged: jax.Array
    num_iterations: int

    @property
    def defined(self) -> jax.Array:
        """``[L, L]`` bool, where neither block's Jacobian is zero."""
        return (self.norms != 0)[:, None] & (self.norms != 0)[None, :]

    @property
    def profile(self) -> jax.Array:
        """``[L]``, the largest coherence at each distance ``|l - m|``."""
        return distance_maxima(self.coherence)

    @property
    def tail_sum(self) -> jax.Array:
        """[], the sum of the profile over the distances above 0."""
        return jnp.sum(self.profile[1:])

    @property
    def product_profile(self) -> jax.Array:
        """``[L]``, the largest G at each distance, ``c_d`` of equation 12."""
        return distance_maxima(self.products)

    @property
    def product_tail_sum(self) -> jax.Array:
        """[], the sum of ``c_d`` over the distances above 0."""
        return jnp.sum(self.product_profile[1:])


def block_coherence(
    problem: Problem,
    params: PyTree,
    blocks: ParameterBlocks,
    *,
    key: jax.Array,
    method: Literal["auto", "dense", "power_iteration"] = "auto",
    tolerance: float = 0.01,
    max_iterations: int = 200,
) -> BlockCoherence:
    r"""Measures ``G_lm = |J_l^T J_m|_op`` for every pair of blocks.

    .. math:: G_{lm}^2 = \lambda_{\max}(J_m^\top J_l J_l^\top J_m)
              = \lambda_{\max}(M_l M_m)

    The power iteration runs all pairs side by side: ``x <- M_l M_m x``, with the
    Rayleigh quotient ``|J_l^T J_m g|^2 / |g|^2`` of ``g = J_m^T x``, which never
    exceeds ``G_lm^2``. Under ``mean`` ``J = K^{-1/2} [J_1 .. J_K]``,
    the matrix with ``J J^T = M``. Call it eagerly.

    Args:
        problem: The problem.
        params: Parameters.
        blocks: The partition, L blocks.
        key: Consumed for the start vectors of the power iteration.
        method: ``"dense"`` forms every ``M_l`` (examples must be independent),
            ``"power_iteration"`` none; ``"auto"`` is dense up to ``n = 640``.
        tolerance: Relative residual at which a pair has converged.
        max_iterations: Iterations at most; what has not converged by then is returned
            as it is, and marked.

    Returns:
        A `BlockCoherence`, products in the squared units of ``de/dtheta``.

    Raises:
        ValueError: If a shape, dtype, leading axis, partition or option does not fit.

    References:
        Paper 3.2 (Condition 2) and A.2; Parlett (1998), "The Symmetric Eigenvalue
        Problem", 4. The form on the error space is ours.
    """
    check_choice("method", method, METHODS)
    tolerance = check_positive("tolerance", tolerance)
    max_iterations = check_at_least("max_iterations", max_iterations, 1)
    check_key(key)
    size = point_at(problem, params).dimension
    check_blocks(blocks, params)
    if method == "dense" or (method == "auto" and size <= _DENSE_LIMIT):
        kernels = layer_kernels(problem, params, layer_of=blocks.block_of)
        # A block whose leaves are all held constant has no kernel.
        zero = jnp.zeros_like(next(iter(kernels.values())))
        products = _dense_products([kernels.get(name, zero) for name in blocks.names])
        zeros = jnp.zeros_like(products)
        return _coherence(products, zeros, jnp.isfinite(products), 0)
    linearized = linearize_block_kernels(problem, params, blocks)
    return _power_iteration(linearized, key, tolerance, max_iterations)


def _coherence(
    products: jax.Array, residuals: jax.Array, converged: jax.Array, iterations: int
) -> BlockCoherence:
    norms, coherence = _normalized(products)
    return BlockCoherence(products, norms, coherence, residuals, converged, iterations)


@jax.jit
def _normalized(products: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the norms of the blocks, and the products over those of each pair."""
    norms = jnp.sqrt(jnp.diag(products))
    scale = norms[:, None] * norms[None, :]
    # Zero over zero is zero; what is not finite stays not finite.
    return norms, jnp.where(scale == 0, 0, products / jnp.where(scale == 0, 1, scale))


def _dense_products(kernels: list[jax.Array]) -> jax.Array:
    """Returns ``|F_l^T F_m|_op`` of the symmetric roots' factors, ``M = F F^T``."""
    factors = [_factor(kernel) for kernel in kernels]
    lower = [
        [_norm_of_product(left, right) for right in factors[: i + 1]]
        for i, left in enumerate(factors)
    ]
    return _symmetric(lower)


@jax.jit
def _symmetric(lower: list[list[jax.Array]]) -> jax.Array:
    """Returns the symmetric matrix with the given entries up to the diagonal."""
    size = len(lower)
    rows = [[lower[max(i, j)][min(i, j)] for j in range(size)] for i in range(size)]
    return jnp.array(rows)


@jax.jit
def _factor(kernel: jax.Array) -> jax.Array:
    unit = magnitude(kernel)
    values, vectors = jnp.linalg.eigh(kernel / unit)
    return vectors * jnp.sqrt(jnp.maximum(values, 0))[None] * jnp.sqrt(unit)


@jax.jit
def _norm_of_product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.linalg.norm(matmul(left.T, right), 2)


class _Pairs(NamedTuple):
    """Every unordered pair of blocks, equally many for each: ``(m, m + j mod L)``.

    Attributes:
        width: Pairs of each block, ``L // 2 + 1``.
        partner: ``[L, width]``, the block l of the pair's first block m.
    """

    width: int
    partner: np.ndarray


def _pairs(num_blocks: int) -> _Pairs:
    width = num_blocks // 2 + 1
    block, offset = np.arange(num_blocks)[:, None], np.arange(width)[None, :]
    return _Pairs(width, (block + offset) % num_blocks)


def _power_iteration(
    kernels: tuple[LinearizedKernel, ...],
    key: jax.Array,
    tolerance: float,
    max_iterations: int,
) -> BlockCoherence:
    """Runs ``x <- M_l M_m x`` for all pairs at once."""
    size, dtype = kernels[0].dimension, kernels[0].dtype
    pairs = _pairs(len(kernels))
    start = jax.random.normal(key, (len(kernels), size, pairs.width), dtype)
    x = _unit_columns(start)
    # In units of each block, since values are squares of products of two.
    units = magnitude(_by_block(kernels, x), (1, 2))
    roots = jnp.sqrt(units[:, 0, 0])

    def by_block(columns: jax.Array) -> jax.Array:
        return _by_block(kernels, columns) / units

    inner = by_block(x)  # M_m x of each pair (m, l)
    residuals = values = jnp.full((len(kernels), pairs.width), jnp.inf, dtype)
    done = 0
    while done < max_iterations and not bool(jnp.all(residuals <= tolerance)):
        outer = _swap(by_block(_swap(inner, pairs)), pairs, back=True)
        next_x = _unit_columns(outer)
        next_inner = by_block(next_x)
        values, residuals = _quotients(
            x, inner, outer, next_x, next_inner, pairs.partner
        )
        x, inner, done = next_x, next_inner, done + 1
    return _coherence(
        _matrix(jnp.sqrt(values) * roots[:, None] * roots[pairs.partner], pairs),
        _matrix(residuals, pairs),
        _matrix(residuals, pairs) <= tolerance,
        done,
    )


def _by_block(kernels: tuple[LinearizedKernel, ...], columns: jax.Array) -> jax.Array:
    """Applies each block's kernel to its own columns, ``[L, n, width]``."""
    return jnp.stack(
        [kernel.matmat(part) for kernel, part in zip(kernels, columns, strict=True)]
    )


def _swap(columns: jax.Array, pairs: _Pairs, *, back: bool = False) -> jax.Array:
    """Moves each pair's column from its first block m to its second l, or back.

    Column j of block m belongs to ``l = m + j``; so column j of block l comes from the
    block ``l - j``.
    """
    num_blocks = columns.shape[0]
    block, offset = np.arange(num_blocks)[:, None], np.arange(pairs.width)[None, :]
    other = (block + (offset if back else -offset)) % num_blocks
    return jnp.moveaxis(columns[other, :, offset], -1, 1)


@jax.jit
def _unit_columns(columns: jax.Array) -> jax.Array:
    return unit_vectors(columns, 1)[0]


@jax.jit
def _quotients(
    x: jax.Array,
    inner: jax.Array,
    outer: jax.Array,
    next_x: jax.Array,
    next_inner: jax.Array,
    partner: np.ndarray,
) -> tuple[jax.Array, jax.Array]:
    """Returns the Rayleigh quotients and relative residuals, ``[L, width]``.

    In the inner product of ``M_m``, in which ``M_l M_m`` is symmetric: with
    ``z = M_l M_m x``, the quotient is ``<z, M_m x> / <x, M_m x>`` and the residual is
    ``z - value x``, whose norm needs ``<z, M_m z>``, known from the next product.
    """
    weight = jnp.sum(x * inner, axis=1)
    safe = divisor(weight)
    values = jnp.where(weight > 0, jnp.sum(outer * inner, axis=1) / safe, 0)
    values = jnp.maximum(values, 0)
    grown = jnp.sum(outer**2, axis=1) * jnp.sum(next_x * next_inner, axis=1) / safe
    # |z|^2 - 2 value <z, x> + value^2 with <z, x> = value in units of the weight.
    squares = jnp.maximum(grown - values**2, 0)
    # Below the rounding of |J_l|^2 |J_m|^2 a value is zero, and nothing converges.
    scale = jnp.sqrt(values[:, :1]) * jnp.sqrt(values[:, 0])[partner]
    least = jnp.maximum(values, _NOISE_EPS * float(jnp.finfo(values.dtype).eps) * scale)
    return values, ratio(jnp.sqrt(squares), least)


def _matrix(entries: jax.Array, pairs: _Pairs) -> jax.Array:
    """Spreads ``[L, width]`` pairs over a symmetric ``[L, L]`` matrix."""
    num_blocks = entries.shape[0]
    rows = np.broadcast_to(np.arange(num_blocks)[:, None], pairs.partner.shape)
    upper = jnp.zeros((num_blocks, num_blocks), entries.dtype)
    upper = upper.at[rows, pairs.partner].max(entries)
    return jnp.maximum(upper, upper.T)
