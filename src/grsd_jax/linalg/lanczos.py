"""Block Lanczos with full re-orthogonalization that survives float32 and rank loss.

``lanczos_init``, ``lanczos_step`` and ``lanczos_finish`` are the algorithm; two drivers
run the same step: `lax.scan` (composable, for GPU and TPU) and a host loop (for CPU,
where convolutions in an XLA loop body are slow, and for progress). The step takes the
product ``M Q``, never the operator, so the operator is compiled once, by its owner.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from grsd_jax._arrays import divisor, is_traced, magnitude, matmul, norm
from grsd_jax._checks import (
    check_at_least,
    check_choice,
    check_key,
    check_shape,
    check_single_or_double,
)
from grsd_jax._typing import Matmat
from grsd_jax.results import NamedResult, result

DRIVERS = ("scan", "host")

#: A direction is dead below this many eps of the largest product's norm. Larger factors
#: lose part of the tail, and the second orthogonalization keeps this one safe.
DEAD_EPS = 4.0

#: Rows of a block that are factorized at once.
_QR_ROWS = 256


@result()
class LanczosState(NamedResult):
    """The run after j steps.

    Attributes:
        basis: ``[n, (m + 1) b]``, orthonormal; columns not yet reached are zero.
        tridiagonal: ``[(m + 1) b, (m + 1) b]``, the projected operator so far, over
            ``unit``.
        live_counts: ``[m + 1]`` int32, live directions of each block.
        step: [] int32, the number j of steps taken.
        unit: [], a power of two, the size of the first product that is not zero: what
            is squared on the way is measured in it, so that it stays in range.
        scale: [], the largest norm of a product's column, an estimate of ``|M|``, over
            ``unit``.
        asymmetry: [], the largest ``|Q^T M Q - (Q^T M Q)^T|`` over ``|M|``.
        finite: [] bool, whether every product was finite.
        key: Key of the random replacements of dead directions.
    """

    basis: jax.Array
    tridiagonal: jax.Array
    live_counts: jax.Array
    step: jax.Array
    unit: jax.Array
    scale: jax.Array
    asymmetry: jax.Array
    finite: jax.Array
    key: jax.Array


@result()
class LanczosResult(NamedResult):
    """A block Krylov decomposition ``M Q = Q T + Q_{m+1} B_m E_m^T``.

    Attributes:
        basis: Q, ``[n, m b]``. Columns are orthonormal; once all n dimensions are used
            up the remaining columns are zero.
        tridiagonal: T, ``[m b, m b]``, symmetric, block tridiagonal.
        residual_block: ``B_m``, ``[b, b]``, the coupling to the block that would
            follow.
        live_counts: ``[m]`` int32, the directions of each block that the operator
            reached; the others are random ones with zero coupling.
        scale: [], the largest norm of a product's column, an estimate of ``|M|``.
        orthogonality: [], the largest entry of ``|Q^T Q - I|`` over non-zero columns.
        asymmetry: [], how far the projected blocks were from symmetric, over ``|M|``; a
            value far above epsilon points to low-precision products or a wrong
            operator.
        finite: [] bool, whether the start block, every product and the result are
            finite. If a product was not, the run stopped growing there; what is
            returned contains no NaN.
    """

    basis: jax.Array
    tridiagonal: jax.Array
    residual_block: jax.Array
    live_counts: jax.Array
    scale: jax.Array
    orthogonality: jax.Array
    asymmetry: jax.Array
    finite: jax.Array

    @property
    def block_size(self) -> int:
        """The block width b."""
        return self.residual_block.shape[-1]


def block_lanczos(
    matmat: Matmat,
    start_block: jax.Array,
    num_steps: int,
    *,
    key: jax.Array,
    driver: Literal["scan", "host"] = "scan",
    progress: Callable[[int], None] | None = None,
) -> LanczosResult:
    """Runs m steps of block Lanczos on a symmetric positive semidefinite operator.

    ``W = M Q_j``, ``A_j = Q_j^T W``, W orthogonalized against all blocks twice, its
    rank decided by singular values, dead directions replaced by random ones with zero
    coupling, the block orthogonalized against all blocks and within itself twice more,
    ``B_j = Q_{j+1}^T W``.

    Args:
        matmat: ``M V`` for a block ``[n, b]``; linear, symmetric, of the block's dtype.
        start_block: ``[n, b]``, orthonormalized here; Gaussian for unbiased quadrature.
            The basis is sharded over a mesh like this block.
        num_steps: m, the number of products.
        key: Consumed for the random replacements of dead directions.
        driver: ``"scan"`` runs `lax.scan` and composes with `jit`; ``"host"`` loops in
            Python and calls ``matmat`` eagerly, which is much faster for convolutions
            on CPU. Both run the same step.
        progress: Called with the number of steps done; host driver only.

    Returns:
        A `LanczosResult`, with Krylov dimension ``r = m b``, which may exceed n.

    Raises:
        ValueError: If the block is wider than n, a shape or dtype does not fit, or an
            option is out of range.

    References:
        Paper 7.2 and B.3; Golub and Underwood (1977), "The block Lanczos method for
        computing eigenvalues"; Daniel et al. (1976) on orthogonalizing twice.
    """
    check_choice("driver", driver, DRIVERS)
    if progress is not None and driver != "host":
        raise ValueError("progress: expected driver='host' with it, got 'scan'.")
    state = lanczos_init(start_block, num_steps, key=key)
    if driver == "scan":

        def body(carry: LanczosState, _: None) -> tuple[LanczosState, None]:
            return lanczos_step(carry, matmat(lanczos_block(carry, width))), None

        width = start_block.shape[1]
        state, _ = jax.lax.scan(body, state, length=num_steps)
    else:
        width = start_block.shape[1]
        for done in range(num_steps):
            product = matmat(_jitted_block(state, width))
            following, state = _jitted_advance(state, product)
            # A program of its own, since beside the products XLA would copy the basis.
            state = state._replace(basis=_placed_in(state.basis, following, state.step))
            if progress is not None:
                jax.block_until_ready(state.step)
                progress(done + 1)
        return _jitted_finish(state, width)
    return lanczos_finish(state, width)


def lanczos_init(
    start_block: jax.Array, num_steps: int, *, key: jax.Array
) -> LanczosState:
    """Orthonormalizes the start block and allocates room for m steps.

    Args:
        start_block: ``[n, b]``.
        num_steps: m.
        key: Consumed for the random replacements of dead directions.

    Returns:
        The state before the first step.

    Raises:
        ValueError: If the block is wider than n, or a shape or dtype does not fit.
    """
    check_shape("start_block", start_block, [None, None])
    check_single_or_double("start_block", jnp.result_type(start_block))
    num_steps = check_at_least("num_steps", num_steps, 1)
    check_key(key)
    size, width = start_block.shape
    if not 1 <= width <= size:
        raise ValueError(
            f"start_block: expected 1 <= b <= n columns, got b = {width}, n = {size}."
        )
    start_block = jnp.asarray(start_block)
    state = _first_state(start_block, key, num_steps=num_steps)
    basis = jax.device_put(state.basis, _sharding(start_block))
    return state._replace(basis=basis)


# One program: eager operations on a mesh send their parts one by one, and on simulated
# devices may wait for each other without end.
@partial(jax.jit, static_argnames="num_steps")
def _first_state(
    start_block: jax.Array, key: jax.Array, *, num_steps: int
) -> LanczosState:
    size, width = start_block.shape
    columns, dtype = (num_steps + 1) * width, start_block.dtype
    basis = jnp.zeros((size, columns), dtype)
    finite = jnp.all(jnp.isfinite(start_block))
    start_block = jnp.where(finite, start_block, 0)
    start_block = start_block / magnitude(start_block)
    scale = jnp.max(norm(start_block, 0))
    first, _, live = _next_block(
        basis, start_block, scale, jnp.int32(0), jax.random.fold_in(key, num_steps)
    )
    return LanczosState(
        basis=basis.at[:, :width].set(first),
        tridiagonal=jnp.zeros((columns, columns), dtype),
        live_counts=jnp.zeros(num_steps + 1, jnp.int32).at[0].set(live),
        step=jnp.int32(0),
        unit=jnp.ones((), dtype),
        scale=jnp.zeros((), dtype),
        asymmetry=jnp.zeros((), dtype),
        finite=finite,
        key=key,
    )


def lanczos_block(state: LanczosState, width: int) -> jax.Array:
    """Returns the newest block ``Q_{j+1}``, ``[n, b]``, the one to multiply next.

    Args:
        state: The state after j steps.
        width: The block width b.

    Returns:
        ``[n, b]``.
    """
    return jax.lax.dynamic_slice_in_dim(state.basis, state.step * width, width, axis=1)


def lanczos_step(state: LanczosState, product: jax.Array) -> LanczosState:
    """Takes one step, given ``W = M Q`` of the newest block.

    Args:
        state: The state after j steps.
        product: W, ``[n, b]``, the product with `lanczos_block` of the state.

    Returns:
        The state after ``j + 1`` steps.

    Raises:
        ValueError: If the product's shape or dtype is not that of the block.
    """
    following, state = _advance(state, product)
    return state._replace(basis=_placed(state.basis, following, state.step))


def _advance(state: LanczosState, product: jax.Array) -> tuple[jax.Array, LanczosState]:
    """Returns the block that follows, and the state of a step but for its basis."""
    size, width = state.basis.shape[0], product.shape[-1]
    check_shape("matmat(block)", product, [size, width])
    if product.dtype != state.basis.dtype:
        raise ValueError(
            f"matmat(block): expected dtype {state.basis.dtype}, that of the block, "
            f"got {product.dtype}."
        )
    finite = state.finite & jnp.all(jnp.isfinite(product))
    product = jnp.where(finite, product, 0)  # the flag is passed on, the NaN is not
    unit = jnp.where(state.scale > 0, state.unit, magnitude(product))
    product = product / unit
    offset = state.step * width
    scale = jnp.maximum(state.scale, jnp.max(norm(product, 0)))

    block = lanczos_block(state, width)
    diagonal = matmul(block.T, product)
    skew = jnp.max(jnp.abs(diagonal - diagonal.T)) / divisor(scale)
    rest = _project_out(state.basis, _project_out(state.basis, product))
    following, coupling, live = _next_block(
        state.basis,
        rest,
        scale,
        offset + width,
        jax.random.fold_in(state.key, state.step),
    )

    tridiagonal = state.tridiagonal
    for part, row, column in (
        ((diagonal + diagonal.T) / 2, offset, offset),
        (coupling, offset + width, offset),
        (coupling.T, offset, offset + width),
    ):
        tridiagonal = jax.lax.dynamic_update_slice(tridiagonal, part, (row, column))
    later = LanczosState(
        basis=state.basis,
        tridiagonal=tridiagonal,
        live_counts=state.live_counts.at[state.step + 1].set(live),
        step=state.step + 1,
        unit=unit,
        scale=scale,
        asymmetry=jnp.maximum(state.asymmetry, skew),
        finite=finite,
        key=state.key,
    )
    return following, later


def _placed(basis: jax.Array, block: jax.Array, step: jax.Array) -> jax.Array:
    """Returns the basis with a block at its place after so many steps."""
    return jax.lax.dynamic_update_slice_in_dim(
        basis, block, step * block.shape[1], axis=1
    )


def lanczos_finish(state: LanczosState, width: int) -> LanczosResult:
    """Returns the result of a run that has taken all its m steps.

    Args:
        state: The state after m steps.
        width: The block width b.

    Returns:
        A `LanczosResult`.
    """
    kept = state.basis.shape[1] - width
    basis = state.basis[:, :kept]
    gram = matmul(basis.T, basis)
    expected = jnp.diag((jnp.diag(gram) > 0).astype(gram.dtype))
    projected = state.tridiagonal[:, :kept] * state.unit
    scale = state.scale * state.unit
    held = jnp.isfinite(scale) & jnp.all(jnp.isfinite(projected))
    projected, scale = jnp.where(held, projected, 0), jnp.where(held, scale, 0)
    return LanczosResult(
        basis=basis,
        tridiagonal=projected[:kept],
        residual_block=projected[kept:, kept - width :],
        live_counts=state.live_counts[:-1],
        scale=scale,
        orthogonality=jnp.max(jnp.abs(gram - expected)),
        asymmetry=state.asymmetry,
        finite=state.finite & held,
    )


def _sharding(block: jax.Array) -> NamedSharding | None:
    """Returns how a block lies on a mesh, None if it does not or is abstract."""
    sharding = None if is_traced(block) else block.sharding
    return sharding if isinstance(sharding, NamedSharding) else None


_jitted_advance = jax.jit(_advance)
_placed_in = jax.jit(_placed, donate_argnames="basis")
_jitted_block = jax.jit(lanczos_block, static_argnames="width")
_jitted_finish = jax.jit(lanczos_finish, static_argnames="width")


def _next_block(
    basis: jax.Array,
    block: jax.Array,
    scale: jax.Array,
    offset: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Orthonormalizes ``block`` (already projected) into the next columns of the basis.

    Args:
        basis: ``[n, columns]``, zero from ``offset`` on.
        block: W, ``[n, b]``.
        scale: The size against which a direction counts as dead.
        offset: The column of the basis at which the block will stand.
        key: Key of the random replacements.

    Returns:
        ``(Q, B, live)``: Q ``[n, b]``, ``B = Q^T W`` with zero rows for dead
        directions, and the number of live ones.
    """
    size, width = block.shape
    # The singular values of R, not of the Gram matrix, which is blind below sqrt(eps).
    orthonormal, triangular = _tall_qr(block)
    left, sigma, _ = jnp.linalg.svd(triangular)
    position = jnp.arange(width, dtype=jnp.int32)
    room = offset + position < size  # past n dimensions only zero is left
    alive = (sigma > DEAD_EPS * jnp.finfo(block.dtype).eps * scale) & room
    candidates = matmul(orthonormal, left)
    random = jax.random.normal(key, block.shape, block.dtype) / np.sqrt(size).astype(
        block.dtype
    )
    # Live directions come first, so QR keeps their span.
    following = jnp.where(alive, candidates, _project_out(basis, random))
    for _ in range(2):
        orthonormal, _ = _tall_qr(_project_out(basis, following))
        following = jnp.where(room, orthonormal, 0)
    coupling = jnp.where(alive[:, None], matmul(following.T, block), 0)
    return following, coupling, jnp.sum(alive, dtype=jnp.int32)


def _tall_qr(block: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Factorizes pieces of the rows, then the triangles of the pieces.

    As stable as one factorization, and faster on CPU: beyond some hundred rows LAPACK
    uses threads of OpenBLAS, which keep spinning for tens of milliseconds and slow the
    next product.

    References:
        Demmel et al. (2012), "Communication-optimal parallel and sequential QR and LU
        factorizations".
    """
    size, width = block.shape
    if size <= _QR_ROWS or 2 * width > _QR_ROWS:
        return jnp.linalg.qr(block)
    # The last piece is padded with zeros, which the reflections leave zero as long as
    # it has no fewer rows of its own than columns.
    candidates = range(_QR_ROWS, width, -1)
    rows = next(r for r in candidates if (size - 1) % r + 1 >= width)
    number = -(-size // rows)
    padded = jnp.pad(block, ((0, number * rows - size), (0, 0)))
    inner, triangles = jnp.linalg.qr(padded.reshape(number, rows, width))
    outer, triangular = _tall_qr(triangles.reshape(number * width, width))
    whole = matmul(inner, outer.reshape(number, width, width))
    return whole.reshape(-1, width)[:size], triangular


def _project_out(basis: jax.Array, block: jax.Array) -> jax.Array:
    # XLA on CPU takes four times as long for `basis.T @ block`, to which it would turn
    # this without the barrier.
    inside = jax.lax.optimization_barrier(matmul(block.T, basis))
    return block - matmul(basis, inside.T)
