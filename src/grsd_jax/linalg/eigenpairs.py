"""The leading eigenpairs of an operator, from as few of its columns as they need.

The steps are those of `grsd_jax.linalg.lanczos`; this module decides when to stop. The
projected operator T is small, so its eigenvectors are found on the host, in float64.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from grsd_jax._arrays import all_finite, is_traced, matmul
from grsd_jax._checks import (
    check_at_least,
    check_choice,
    check_key,
    check_positive,
    check_shape,
)
from grsd_jax._typing import Matmat
from grsd_jax.linalg.lanczos import (
    LanczosState,
    lanczos_block,
    lanczos_init,
    lanczos_step,
)
from grsd_jax.linalg.ritz import default_floor, rounding_bound
from grsd_jax.results import NamedResult, number, result, span

REFERENCES = ("value", "largest")

#: Columns allocated at first, and at most, for each pair asked for.
_FIRST_COLUMNS, _MOST_COLUMNS = 4, 20

#: Blocks allocated at first, at least: each time the room grows, a step is compiled.
_FIRST_BLOCKS = 8


@result(units={"values": "units of M"})
class LeadingEigenpairs(NamedResult):
    """The leading eigenpairs ``M v = theta v`` and what they cost.

    Attributes:
        values: theta, ``[num_pairs]``, descending.
        vectors: V, ``[n, num_pairs]``, orthonormal columns.
        residuals: ``[num_pairs]``, bounds of ``|M v - theta v|``, rounding included;
            each bounds the distance of theta to the spectrum.
        converged: ``[num_pairs]`` bool, pairs that meet the tolerance and, once the
            Krylov space has closed, are shown by a new random direction to have no
            larger value missing above them. None are if a product was not finite.
        num_columns: Columns that were multiplied by M, b for each product.
        orthogonality: [], the largest entry of ``|V^T V - I|``.
        asymmetry: [], how far the projected blocks were from symmetric, over ``|M|``; a
            value far above epsilon points to low-precision products or a wrong
            operator.
        finite: [] bool, whether every product and every value was finite. If not, the
            run stopped at the next check; it contains no NaN, but it is of no use.
        proven: [] bool, whether no copy of a repeated value can be missing among the
            pairs that converged: the space closed and went on, or it holds fewer than b
            copies of every value above the last. Always False for ``b = 1`` while the
            space is open, since it then holds one copy of each.
        complete: [] bool, whether all pairs converged and that is proven of them.
    """

    values: jax.Array
    vectors: jax.Array
    residuals: jax.Array
    converged: jax.Array
    num_columns: int
    orthogonality: jax.Array
    asymmetry: jax.Array
    finite: jax.Array
    proven: jax.Array
    complete: jax.Array

    def _headline(self) -> list[tuple[str, str]]:
        found = np.asarray(self.values)[np.asarray(self.converged)]
        return [
            ("converged pairs", f"{found.size} of {self.values.size}"),
            ("converged values", span(found, "units of M")),
            ("columns multiplied", str(self.num_columns)),
            ("orthogonality", number(self.orthogonality)),
            ("asymmetry", number(self.asymmetry)),
            ("complete", str(bool(self.complete))),
            ("finite", str(bool(self.finite))),
        ]


class _Progress(NamedTuple):
    """The leading Ritz pairs so far and which have converged, in NumPy."""

    values: np.ndarray  # [num_pairs]
    rotation: np.ndarray  # [r, num_pairs]
    bounds: np.ndarray  # [num_pairs]
    converged: np.ndarray  # [num_pairs]
    proven: bool


def leading_eigenpairs(
    matmat: Matmat,
    start_block: jax.Array,
    num_pairs: int,
    *,
    key: jax.Array,
    tolerance: float = 1e-4,
    relative_to: Literal["value", "largest"] = "value",
    max_steps: int | None = None,
    check_every: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> LeadingEigenpairs:
    """Runs block Lanczos until its leading Ritz pairs have converged.

    After j steps ``T = S Theta S^T``, ``V = Q S``, and the residual
    ``|M v_i - theta_i v_i| = |B_j S[last block rows, i]|`` is free. A pair has
    converged once that is at most

    - ``tolerance theta_i``, or ``tolerance theta_1`` with ``relative_to="largest"``;
    - or ``eps |M|``, since no product is more accurate;
    - or ten eps of ``|M|``, for a value of at most that: it is noise around zero.

    The run ends when all leading pairs have converged. Where the Krylov space closes,
    even in one direction, it goes on from a random one, until the largest value found
    from there is no larger than the last pair asked for; so all copies of repeated
    values are found for the identity or an operator of low rank. *In a spectrum too
    rich for the space to close, a value repeated more than b times is found about b
    times*, and the pairs in its place count as converged: choose b larger than the
    multiplicity expected, which ``complete`` then confirms. Values closer to each other
    than the tolerance may be found as one.

    Narrow blocks need the fewest columns; wide ones may make a column cheaper. Nothing
    is restarted, so no column is spent twice, and all blocks are kept: n numbers a
    column. The room is doubled when it is used up, from 4 to at most 20 columns a
    pair; the step is compiled once for each size.

    Args:
        matmat: ``M V`` for a block ``[n, b]``; linear, symmetric positive semidefinite,
            of the block's dtype. It is called eagerly: jit it.
        start_block: ``[n, b]``, orthonormalized here; Gaussian, to miss no eigenvector.
        num_pairs: The number of pairs, at most n.
        key: Consumed for the random replacements of dead directions.
        tolerance: Largest residual of a converged pair, relative to its value as in
            `ritz_pairs`, or to the largest value.
        relative_to: ``"value"`` or ``"largest"``. The latter stops earlier, and then
            values near ``tolerance theta_1`` and below are not to be trusted.
        max_steps: Products at most; if None, enough for ``min(n, 20 num_pairs)``
            columns. With n columns everything has converged.
        check_every: Steps between two checks, each of which takes the eigenvectors of T
            and waits for the device. If None, the next check follows after a third of
            the steps that would add one column for each missing pair.
        progress: Called with the number of steps done.

    Returns:
        `LeadingEigenpairs`. What has not converged in ``max_steps`` is returned as it
        is, and marked.

    Raises:
        ValueError: If ``num_pairs`` exceeds n or the columns of ``max_steps`` blocks,
            the start block is not finite, a shape or dtype does not fit, an option is
            out of range, or this is called inside `jit`.

    References:
        Paper 7.2 and B.3; Parlett (1998), "The Symmetric Eigenvalue Problem", 13.
    """
    check_shape("start_block", start_block, [None, None])
    size, width = start_block.shape
    check_at_least("start_block.shape[1]", width, 1)
    num_pairs = check_at_least("num_pairs", num_pairs, 1)
    if num_pairs > size:
        raise ValueError(f"num_pairs: expected at most n = {size}, got {num_pairs}.")
    check_key(key)
    tolerance = check_positive("tolerance", tolerance)
    check_choice("relative_to", relative_to, REFERENCES)
    fewest = _blocks(num_pairs, width)
    if max_steps is None:
        max_steps = _blocks(min(size, _MOST_COLUMNS * num_pairs), width)
    max_steps = check_at_least("max_steps", max_steps, fewest, sys.maxsize)
    if check_every is not None:
        check_every = check_at_least("check_every", check_every, 1, sys.maxsize)
    _check_not_traced((start_block, key))
    if not all_finite(start_block):
        raise ValueError("start_block: expected finite numbers, got others.")

    first = max(_FIRST_BLOCKS, _blocks(_FIRST_COLUMNS * num_pairs, width))
    room = min(max_steps, first)
    state, block = _start(start_block, room, key)
    done, due = 0, fewest
    while True:
        while done < due:
            if done == room:
                room = min(max_steps, 2 * room)
                state = _enlarge(state, room, width)
            product = matmat(block)
            if done == 0:
                _check_not_traced(product)
            state, block = _advance(state, product)
            done += 1
            if progress is not None:
                jax.block_until_ready(state.step)
                progress(done)
        found = _assess(state, done, width, num_pairs, tolerance, relative_to)
        missing = num_pairs - int(np.sum(found.converged))
        if missing == 0 or done == max_steps or not state.finite:
            break
        due = min(max_steps, done + (check_every or max(1, missing // (3 * width))))
    return _finish(state, found, done * width)


def _check_not_traced(values: Any) -> None:
    """Raises ValueError inside `jit`, where the number of steps cannot be known."""
    if is_traced(values):
        raise ValueError(
            "start_block, or what matmat multiplies by: expected numbers at hand, got "
            "some that jit traces; how many steps pairs need follows from the numbers, "
            "so call this outside of jit, or block_lanczos, whose steps are given."
        )


def _blocks(columns: int, width: int) -> int:
    return -(-columns // width)


@functools.partial(jax.jit, static_argnames="num_steps")
def _start(
    start_block: jax.Array, num_steps: int, key: jax.Array
) -> tuple[LanczosState, jax.Array]:
    state = lanczos_init(start_block, num_steps, key=key)
    return state, lanczos_block(state, start_block.shape[1])


@functools.partial(jax.jit, donate_argnames="state")
def _advance(state: LanczosState, product: jax.Array) -> tuple[LanczosState, jax.Array]:
    # One program and a basis that grows in place, since dispatch dominates the cost.
    state = lanczos_step(state, product)
    return state, lanczos_block(state, product.shape[1])


def _enlarge(state: LanczosState, num_steps: int, width: int) -> LanczosState:
    """Returns the state with room for m steps."""
    steps = num_steps + 1 - len(state.live_counts)
    columns = steps * width
    return state._replace(
        basis=jnp.pad(state.basis, ((0, 0), (0, columns))),
        tridiagonal=jnp.pad(state.tridiagonal, (0, columns)),
        live_counts=jnp.pad(state.live_counts, (0, steps)),
        # The start has used the old key under the number of a step to come.
        key=jax.random.fold_in(state.key, num_steps),
    )


def _assess(
    state: LanczosState,
    done: int,
    width: int,
    num_pairs: int,
    tolerance: float,
    relative_to: str,
) -> _Progress:
    """Computes the leading Ritz pairs after j steps, and which have converged."""
    # Past n dimensions the columns of the basis are zero and not part of the problem.
    used = min(done * width, state.basis.shape[0])
    projected = np.asarray(state.tridiagonal, np.float64)[: used + width, :used]
    values, rotation, residuals = _leading(projected, num_pairs, width)

    largest = values[0]
    norm = max(float(state.scale), largest)
    eps = float(jnp.finfo(state.basis.dtype).eps)
    floor = default_floor(state.basis.dtype) * norm

    def accurate(values: np.ndarray, errors: np.ndarray) -> np.ndarray:
        reference = values if relative_to == "value" else largest
        rounding = np.where(values > floor, eps * norm, floor)
        return errors <= np.maximum(tolerance * reference, rounding)

    converged = accurate(values, residuals) & bool(state.finite)
    proven = used == state.basis.shape[0]
    if not proven:
        weak = eps**0.5 * norm
        proven, above = _completeness(projected, values, accurate, weak)
        converged &= above
    solved = projected[:used] @ rotation - rotation * values  # rounding, in float64
    rounding = rounding_bound(used, state.basis.dtype) * norm
    return _Progress(
        values,
        rotation,
        bounds=residuals + np.linalg.norm(solved, axis=0) + rounding,
        converged=converged,
        proven=proven,
    )


def _completeness(
    projected: np.ndarray,
    values: np.ndarray,
    accurate: Callable[..., np.ndarray],
    weak: float,
) -> tuple[bool, np.ndarray]:
    """Returns whether no copy of any pair can be missing, and the pairs to ask it of.

    A Krylov space holds at most b copies of a repeated value, and one more for each
    random direction that has replaced a dead one. T after the block in which a random
    direction came in is M on the complement of all columns before. Once the largest
    value of the run that begins there from the random directions alone has converged,
    nothing outside those columns is larger.

    While no direction is coupled by less than ``weak = sqrt(eps) |M|``, the space is
    open and all its b runs began together: fewer than b copies are all there are.
    """
    used = projected.shape[1]
    width = len(projected) - used
    sizes = np.array(
        [
            np.linalg.norm(projected[end : end + width, end - width : end], axis=1)
            for end in range(width, used + 1, width)
        ]
    )
    if np.all(sizes > weak):
        alike = accurate(values[:-1], values[:-1] - values[1:])
        ends = np.flatnonzero(~np.append(alike, False))[:-1]
        copies = np.diff(np.append(-1, ends))
        return bool(np.all(copies < width)), np.ones(len(values), bool)
    random = sizes[:-1] == 0  # a dead direction was replaced
    for block in reversed(np.flatnonzero(random.any(axis=1)).tolist()):
        after = projected[(block + 1) * width :, (block + 1) * width :]
        top, residual = _top_from(after, random[block])
        if accurate(top, residual):
            return True, accurate(values, top - values)
    return True, np.zeros(len(values), bool)


def _top_from(
    projected: np.ndarray, chosen: np.ndarray
) -> tuple[np.floating, np.floating]:
    """Returns the largest Ritz value, and its residual, from a part of the first block.

    Block Lanczos in the space that T spans: what those directions alone would have
    given in as many steps, without a product.
    """
    used = projected.shape[1]
    width = len(projected) - used
    if chosen.all():
        (top,), _, (residual,) = _leading(projected, 1, width)
        return top, residual
    block = np.eye(used)[:, np.flatnonzero(chosen)]
    basis, least = block, 1e-14 * np.linalg.norm(projected)
    for _ in range(used // width - 1):
        block = projected[:used] @ block
        block -= basis @ (basis.T @ block)
        left, sizes, _ = np.linalg.svd(block, full_matrices=False)
        block = left[:, sizes > least]
        block, _ = np.linalg.qr(block - basis @ (basis.T @ block))
        basis = np.hstack([basis, block])
    values, rotation = np.linalg.eigh(basis.T @ projected[:used] @ basis)
    vector = basis @ rotation[:, -1]
    left_over = projected @ vector
    left_over[:used] -= values[-1] * vector
    return values[-1], np.linalg.norm(left_over)


def _leading(
    projected: np.ndarray, num_pairs: int, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns values, vectors and residuals of T, given it with the rows of ``B_j``.

    Solved as the band matrix that T is: LAPACK's dense solvers leave the threads of
    OpenBLAS spinning for tens of milliseconds, which slows the next product.
    """
    used = projected.shape[1]
    band = np.zeros((min(2 * width, used), used))
    for offset, row in enumerate(band):
        row[: used - offset] = projected.diagonal(-offset)[: used - offset]
    found = _band_pairs(band, min(num_pairs, used))
    values, rotation = np.linalg.eigh(projected[:used]) if found is None else found
    leading = slice(None, -num_pairs - 1, -1)
    values, rotation = values[leading], rotation[:, leading]
    residuals = np.linalg.norm(projected[used:] @ rotation, axis=0)
    return values, rotation, residuals


def _band_pairs(band: np.ndarray, wanted: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the largest values and their vectors; None if LAPACK does not find all.

    Its bisection can lose one among copies of a value that rounding has split.
    """
    last = band.shape[1] - 1
    try:
        found: Any = scipy.linalg.eig_banded(
            band, lower=True, select="i", select_range=(last + 1 - wanted, last)
        )
    except (np.linalg.LinAlgError, ValueError):
        return None
    values, rotation = found
    return (values, rotation) if len(values) == wanted else None


def _finish(
    state: LanczosState, found: _Progress, num_columns: int
) -> LeadingEigenpairs:
    dtype = state.basis.dtype
    unit = float(state.unit)
    values, bounds = (
        jnp.asarray(numbers * unit, dtype) for numbers in (found.values, found.bounds)
    )
    finite = state.finite & jnp.all(jnp.isfinite(values))
    # Padded to the columns of the basis, so that one program serves every length.
    used, num_pairs = found.rotation.shape
    rotation = np.zeros((state.basis.shape[1], num_pairs), dtype)
    rotation[:used] = found.rotation
    vectors, orthogonality = _vectors(state.basis, rotation)
    return LeadingEigenpairs(
        values=jnp.where(finite, values, 0),
        vectors=vectors,
        residuals=jnp.where(finite, bounds, 0),
        converged=jnp.asarray(found.converged) & finite,
        num_columns=num_columns,
        orthogonality=orthogonality,
        asymmetry=state.asymmetry,
        finite=finite,
        proven=finite & found.proven,
        complete=finite & found.proven & bool(found.converged.all()),
    )


@jax.jit
def _vectors(basis: jax.Array, rotation: jax.Array) -> tuple[jax.Array, jax.Array]:
    vectors = matmul(basis, rotation)
    gram = matmul(vectors.T, vectors)
    return vectors, jnp.max(jnp.abs(gram - jnp.eye(gram.shape[0], dtype=gram.dtype)))
