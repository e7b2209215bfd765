"""How far a matrix is from depending on ``i - j`` alone (paper 7.4, 7.5).

Every function of a matrix takes a square one and a mask of its valid entries, and works
under ``jit``, ``vmap`` and ``grad``. What a masked entry holds, NaN included, has no
effect.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import (
    as_mask,
    as_square,
    is_traced,
    magnitude,
    norm,
    where_defined,
)
from grsd_jax._checks import check_at_least


def toeplitz_approximation(
    matrix: jax.typing.ArrayLike, mask: jax.typing.ArrayLike | None = None
) -> jax.Array:
    r"""Returns the nearest Toeplitz matrix: each entry is the mean along its diagonal.

    .. math:: \operatorname{Toep}(A)_{ij} = \operatorname{mean}_{k - l = i - j} A_{kl}

    Args:
        matrix: [S, S].
        mask: [S, S] bool, the valid entries that enter the means. Default: all.

    Returns:
        [S, S]; the diagonals without a valid entry hold 0.

    Raises:
        ValueError: If ``matrix`` is not a floating square matrix, or ``mask`` not a
            bool matrix of the same shape.

    References:
        Paper 7.4.
    """
    matrix, mask = _matrix_and_mask(matrix, mask)
    size = matrix.shape[0]
    entries = _along_diagonals(jnp.where(mask, matrix, 0))
    counts = _diagonal_counts(mask).astype(matrix.dtype)
    means = jnp.sum(entries / jnp.maximum(counts, 1)[None, :], axis=0)
    rows = jnp.arange(size, dtype=jnp.int32)
    return means[rows[None, :] - rows[:, None] + (size - 1)]


def toeplitz_residual(
    matrix: jax.typing.ArrayLike, mask: jax.typing.ArrayLike | None = None
) -> jax.Array:
    r"""Returns the relative distance to the nearest Toeplitz matrix.

    .. math:: \| A - \operatorname{Toep}(A) \|_F \,/\, \| A \|_F

    over the valid entries: 0 for a Toeplitz matrix, up to the rounding of the means,
    some 1e-7 in float32; at most 1; the same for every multiple of ``A`` and at every
    magnitude the dtype can hold. The gradient at a Toeplitz matrix is 0.

    Args:
        matrix: [S, S].
        mask: [S, S] bool, the valid entries. Default: all.

    Returns:
        [], NaN if no valid entry differs from zero, since nothing has no shape; inside
        `jit`, where a NaN would stop a run under `jax_debug_nans`, infinity. When as
        many diagonals as entries are valid it is 0 by construction: see
        :func:`toeplitz_degrees_of_freedom`.

    Raises:
        ValueError: If ``matrix`` is not a floating square matrix, or ``mask`` not a
            bool matrix of the same shape.

    References:
        Paper 7.4.
    """
    matrix, mask = _matrix_and_mask(matrix, mask)
    matrix = jnp.where(mask, matrix, 0)
    # So that no entry, mean or square leaves the range of the dtype.
    scaled = matrix / magnitude(matrix)
    rest = jnp.where(mask, scaled - toeplitz_approximation(scaled, mask), 0)
    whole = norm(scaled)
    residual = norm(rest) / jnp.where(whole == 0, 1, whole)
    return _or_nan(jnp.where(whole == 0, jnp.inf, residual))


def windowed_toeplitz_residual(
    matrix: jax.typing.ArrayLike,
    window: int,
    mask: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """Returns the Toeplitz residual of every run of ``window`` consecutive shells.

    Entry ``p`` is the :func:`toeplitz_residual` of the diagonal block of the shells
    ``p, ..., p + window - 1`` (Figure 2 of the paper draws it against ``p``).

    Args:
        matrix: [S, S].
        window: The number of shells in a window, from 1 to S. It is static.
        mask: [S, S] bool, the valid entries. Default: all.

    Returns:
        [S - window + 1], NaN where no valid entry of a window differs from zero; inside
        `jit`, infinity.

    Raises:
        ValueError: If ``window`` is not an integer from 1 to S, ``matrix`` is not a
            floating square matrix, or ``mask`` not a bool matrix of the same shape.

    References:
        Paper 7.5.
    """
    matrix, mask = _matrix_and_mask(matrix, mask)
    window = _checked_window(window, matrix.shape[0])
    blocks, masks = _windows(matrix, window), _windows(mask, window)
    return _or_nan(jax.vmap(toeplitz_residual)(blocks, masks))


def centre_toeplitz_residual(
    windows: jax.typing.ArrayLike,
    degrees_of_freedom: jax.typing.ArrayLike | None = None,
) -> float:
    """Returns the mean residual of the windows nearest to the center of the spectrum.

    Only defined windows count: those with a residual and a degree of freedom. With
    fewer than three of them no window lies between the two edges.

    Args:
        windows: [W], the :func:`windowed_toeplitz_residual`, NaN where undefined. On
            the host: this function cannot be traced.
        degrees_of_freedom: [W], the :func:`windowed_toeplitz_degrees_of_freedom`.
            Default: every residual that is finite is defined.

    Returns:
        The mean, in float64, over the one or two defined windows nearest to the center;
        NaN with fewer than three defined windows.

    References:
        Paper 7.5.
    """
    residuals = np.asarray(windows, np.float64)
    defined = np.isfinite(residuals)
    if degrees_of_freedom is not None:
        defined &= np.asarray(degrees_of_freedom) > 0
    if np.sum(defined) < 3:
        return math.nan
    offset = np.abs(np.arange(len(residuals)) - (len(residuals) - 1) / 2)
    nearest = defined & (offset == offset[defined].min())
    return float(residuals[nearest].mean())


def toeplitz_degrees_of_freedom(mask: jax.typing.ArrayLike) -> jax.Array:
    """Returns the degrees of freedom: valid entries less the diagonals that hold any.

    With 0 degrees of freedom every diagonal holds at most one valid entry, its own
    mean; the :func:`toeplitz_residual` is then 0 for any entries and carries no
    information. Entries count one by one: of a symmetric matrix, whose entries come in
    equal pairs, fewer are independent, 10 and not 16 for a full 5 x 5.

    Args:
        mask: [S, S] bool, the valid entries.

    Returns:
        [] int32.

    Raises:
        ValueError: If ``mask`` is not a square bool matrix.
    """
    return _degrees_of_freedom(_square_mask(mask))


def windowed_toeplitz_degrees_of_freedom(
    mask: jax.typing.ArrayLike, window: int
) -> jax.Array:
    """Returns the degrees of freedom of every :func:`windowed_toeplitz_residual`.

    Args:
        mask: [S, S] bool, the valid entries.
        window: The number of shells in a window, from 1 to S. It is static.

    Returns:
        [S - window + 1] int32.

    Raises:
        ValueError: If ``window`` is not an integer from 1 to S, or ``mask`` not a
            square bool matrix.
    """
    mask = _square_mask(mask)
    window = _checked_window(window, mask.shape[0])
    return jax.vmap(toeplitz_degrees_of_freedom)(_windows(mask, window))


def _or_nan(residuals: jax.Array) -> jax.Array:
    """Returns residuals, NaN where they are infinite; as they are inside `jit`."""
    if is_traced(residuals):
        return residuals
    return where_defined(jnp.isfinite(residuals), residuals)


def _matrix_and_mask(
    matrix: jax.typing.ArrayLike, mask: jax.typing.ArrayLike | None
) -> tuple[jax.Array, jax.Array]:
    """Returns both as arrays of one square shape [S, S]."""
    matrix = as_square("matrix", matrix)
    return matrix, as_mask("mask", mask, matrix.shape)


def _square_mask(mask: jax.typing.ArrayLike) -> jax.Array:
    """Returns the mask as an array of one square shape [S, S]."""
    mask = as_mask("mask", mask, [None, None])
    return as_mask("mask", mask, [mask.shape[0]] * 2)


def _checked_window(window: int, size: int) -> int:
    """Returns the window, and raises ValueError unless ``1 <= window <= size``."""
    window = check_at_least("window", window, 1)
    if window > size:
        raise ValueError(
            f"window: expected at most the number of shells, {size}, got {window}."
        )
    return window


def _along_diagonals(matrix: jax.Array) -> jax.Array:
    """Returns [S, 2S-1]: column k lists diagonal ``j - i = k - (S - 1)``, else 0."""
    size = matrix.shape[0]
    rows = jnp.arange(size, dtype=jnp.int32)[:, None]
    offsets = jnp.arange(-(size - 1), size, dtype=jnp.int32)[None, :]
    columns = rows + offsets
    inside = (columns >= 0) & (columns < size)
    entries = matrix[rows, jnp.clip(columns, 0, size - 1)]
    return jnp.where(inside, entries, jnp.zeros((), matrix.dtype))


@jax.jit
def _degrees_of_freedom(mask: jax.Array) -> jax.Array:
    # Each diagonal that holds any entry spends one of them on its mean.
    return jnp.sum(jnp.maximum(_diagonal_counts(mask) - 1, 0), dtype=jnp.int32)


def _diagonal_counts(mask: jax.Array) -> jax.Array:
    """Returns [2S-1] int32, the valid entries on each diagonal."""
    return jnp.sum(_along_diagonals(mask), axis=0, dtype=jnp.int32)


def _windows(matrix: jax.Array, window: int) -> jax.Array:
    """Returns [S - window + 1, window, window], the diagonal blocks in order."""
    starts = jnp.arange(matrix.shape[0] - window + 1, dtype=jnp.int32)

    def block(start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(matrix, (start, start), (window, window))

    return jax.vmap(block)(starts)
