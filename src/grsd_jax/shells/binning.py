"""Log-spectral shells, and the coupling between them (paper 2.1, 3.2 and 7.3).

Shells cut the axis ``s = log lambda`` into ``S`` intervals of equal width. The
projected derivative of the operator, averaged over pairs of shells, is the input of the
diagnostics in `grsd_jax.shells.toeplitz` and `grsd_jax.shells.power_law`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import as_floating, as_mask, is_traced, magnitude
from grsd_jax._checks import check_at_least, check_shape
from grsd_jax.results import NamedResult, result, span


@result(units={"edges": "units of M", "centers": "units of M"})
class Shells(NamedResult):
    """Shells of equal width in ``log lambda``, index 0 at the smallest ``lambda``.

    Attributes:
        edges: [S+1], increasing; shell a holds ``edges[a] <= lambda < edges[a+1]``,
            and the last shell its upper edge too.
        centers: [S], the geometric mean of each shell's two edges.
        index: [r] int32, the shell of each value, -1 where it is masked.
        counts: [S] int32, how many values each shell holds.
    """

    edges: jax.Array
    centers: jax.Array
    index: jax.Array
    counts: jax.Array

    def _headline(self) -> list[tuple[str, str]]:
        number = len(self.counts)
        return [
            ("edges", f"{span(self.edges, 'units of M')}, {number} shells"),
            ("counts", f"{span(self.counts)} values in a shell"),
        ]


@result(masks={"matrix": "mask"})
class ShellCoupling(NamedResult):
    """The coupling between shells.

    Attributes:
        matrix: [S, S], the mean over each pair of shells. Masked entries hold 0, a
            placeholder.
        mask: [S, S] bool, True where both shells hold enough values and the mean is in
            the range of the dtype: neither so large nor so small that its square left
            it. A mean of couplings that are all zero is 0 and valid.
    """

    matrix: jax.Array
    mask: jax.Array

    def _headline(self) -> list[tuple[str, str]]:
        mask = np.asarray(self.mask)
        return [
            ("matrix", span(np.asarray(self.matrix)[mask])),
            ("mask", f"{mask.sum()} of {mask.size} pairs of shells are defined"),
        ]


def log_shells(
    values: jax.typing.ArrayLike,
    num_shells: int,
    *,
    mask: jax.typing.ArrayLike | None = None,
) -> Shells:
    r"""Cuts the positive values into shells of equal width in ``log lambda``.

    .. math:: s_a = s_{\min} + a h, \qquad h = (s_{\max} - s_{\min}) / S,
              \qquad s = \log \lambda

    between the smallest and the largest unmasked value, which lie in the first and the
    last shell. Values that are not finite and positive, subnormal ones included, count
    as masked. If the values agree to rounding, the shells around them are as narrow as
    the precision allows. If every value is masked, the edges are finite, the counts 0
    and the index -1.

    Args:
        values: [r], in any order.
        num_shells: S, at least 1.
        mask: [r] bool, True for the values to use. Default: all.

    Returns:
        The shells: ``edges`` [S+1], ``centers`` [S], ``index`` [r], ``counts`` [S].

    Raises:
        ValueError: If ``num_shells`` is not an integer of at least 1, ``values`` not a
            floating [r] array, or ``mask`` not a bool [r] array.

    References:
        Paper 2.1 and 7.3.
    """
    num_shells = check_at_least("num_shells", num_shells, 1)
    values = as_floating("values", values, [None])
    info = jnp.finfo(values.dtype)
    usable = as_mask("mask", mask, values.shape)
    usable &= jnp.isfinite(values) & (values >= info.tiny)

    edges = _log_edges(*_extremes(values, usable), num_shells)
    return _assign(values, edges, usable)


def assign_shells(
    values: jax.typing.ArrayLike,
    edges: jax.typing.ArrayLike,
    *,
    mask: jax.typing.ArrayLike | None = None,
    open_ends: bool = False,
) -> Shells:
    """Puts the values into given shells, such as those of an earlier time.

    Shell a holds ``edges[a] <= lambda < edges[a+1]``, the last one its upper edge too.
    Values beyond the outer edges are in no shell, unless the ends are open.

    Args:
        values: [r], in any order.
        edges: [S+1], positive and increasing; inside `jit`, where they cannot be
            looked at, no value is in a shell if they are not.
        mask: [r] bool, True for the values to use. Default: all. Values that are not
            finite count as masked.
        open_ends: Whether the first shell also holds everything below it, and the last
            one everything above. Their widths stay those of the edges.

    Returns:
        The shells, with the given edges.

    Raises:
        ValueError: If ``values`` is not a floating [r] array, ``edges`` not a floating
            array of at least two, ``mask`` not a bool [r] array, or ``open_ends`` not a
            bool; or, outside of `jit`, if the edges are not positive or decrease, in
            the dtype of the values.

    References:
        Paper 2.1; shells fixed in time are ours.
    """
    if not isinstance(open_ends, bool):
        raise ValueError(f"open_ends: expected True or False, got {open_ends!r}.")
    values = as_floating("values", values, [None])
    given, edges = edges, as_floating("edges", edges, [None]).astype(values.dtype)
    check_at_least("len(edges)", edges.shape[0], 2)
    if not is_traced(given):
        known = np.asarray(given).astype(values.dtype)
        if not (known[0] > 0 and np.all(known[1:] >= known[:-1])):
            raise ValueError(
                f"edges: expected positive, increasing numbers, got {known.tolist()}."
            )
    ordered = (edges[0] > 0) & jnp.all(edges[1:] >= edges[:-1])
    usable = as_mask("mask", mask, values.shape) & jnp.isfinite(values) & ordered
    if not open_ends:
        usable &= (values >= edges[0]) & (values <= edges[-1])
    return _assign(values, edges, usable)


def shell_coupling(
    coupling: jax.typing.ArrayLike,
    values: jax.typing.ArrayLike,
    shells: Shells,
    *,
    renormalize: bool,
    min_count: int = 1,
) -> ShellCoupling:
    r"""Averages the squared coupling of modes over pairs of shells.

    .. math:: K_{ab} = \operatorname{mean}_{i \in S_a, j \in S_b} |\dot M_{ij}|^2,
              \qquad
              \hat K_{ab} = \operatorname{mean}_{i \in S_a, j \in S_b}
              \frac{|\dot M_{ij}|^2}{\lambda_i \lambda_j}

    The first, literal, form (``renormalize=False``) grows with the eigenvalues and so
    cannot depend on ``a - b`` alone over several decades; the second, renormalized, is
    the one that Condition 4 can hold for. Masked modes have no effect, even where their
    entries are not finite; a non-finite entry between unmasked modes makes the result
    NaN.

    Args:
        coupling: [r, r], the projected operator derivative ``Mdot_ij``.
        values: [r], the eigenvalues ``lambda_i`` the shells were made from.
        shells: The shells of ``values``.
        renormalize: Whether to divide by ``lambda_i lambda_j``.
        min_count: A shell with fewer values than this is masked. At least 1.

    Returns:
        ``matrix`` [S, S] and ``mask`` [S, S].

    Raises:
        ValueError: If the shapes do not fit together, an array is not floating,
            ``renormalize`` is not a bool, or ``min_count`` not an integer >= 1; or,
            outside of `jit`, if the shells are those of other values.

    References:
        Paper 3.2 (Condition 4), 7.3 and B.6.
    """
    return mean_squares(
        *root_mean_squares(
            coupling, values, shells, renormalize=renormalize, min_count=min_count
        )
    )


def mean_squares(root: jax.Array, mask: jax.Array) -> ShellCoupling:
    """Squares the result of `root_mean_squares`, and masks what leaves the dtype."""
    info = jnp.finfo(root.dtype)
    least, most = float(info.tiny) ** 0.5, float(info.max) ** 0.5
    # What is not finite is a finding, and stays.
    held = ((root >= least) & (root <= most)) | (root == 0) | ~jnp.isfinite(root)
    return ShellCoupling(jnp.where(mask & held, jnp.square(root), 0), mask & held)


def root_mean_squares(
    coupling: jax.typing.ArrayLike,
    values: jax.typing.ArrayLike,
    shells: Shells,
    *,
    renormalize: bool,
    min_count: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Returns the roots of `shell_coupling`, which stay in the range of the dtype.

    The arguments and errors are those of `shell_coupling`.

    Returns:
        ``[S, S]``, and the mask ``[S, S]`` of the shells that hold enough values.
    """
    if not isinstance(renormalize, bool):
        raise ValueError(f"renormalize: expected True or False, got {renormalize!r}.")
    min_count = check_at_least("min_count", min_count, 1)
    values = as_floating("values", values, [None])
    num_values = values.shape[0]
    coupling = as_floating("coupling", coupling, [num_values, num_values])
    check_shells_of(values, shells)
    dtype = jnp.promote_types(coupling.dtype, values.dtype)

    inside = shells.index >= 0
    pairs = inside[:, None] & inside[None, :]
    amplitude = jnp.where(pairs, coupling.astype(dtype), 0)
    if renormalize:
        scale = jax.lax.rsqrt(jnp.where(inside, values.astype(dtype), 1))
        # One factor is large where the other is small; their product may underflow.
        amplitude = amplitude * scale[:, None] * scale[None, :]
    root = _root_mean_squares(amplitude, shells.index, shells.counts)
    enough = shells.counts >= min_count
    mask = enough[:, None] & enough[None, :]
    return jnp.where(mask, root, 0), mask


def check_shells_of(values: jax.Array, shells: Shells) -> None:
    """Raises ValueError if values lie in other shells than these say.

    Inside `jit` only the shapes are compared.

    Args:
        values: [r].
        shells: The shells, with open ends or without.
    """
    check_shape("shells.index", shells.index, [values.shape[0]])
    if is_traced((values, shells)):
        return
    index, edges = np.asarray(shells.index), np.asarray(shells.edges)
    found = np.sum(np.asarray(values)[:, None] >= edges[None, 1:-1], axis=1)
    others = np.flatnonzero((index >= 0) & (index != found))
    if len(others):
        raise ValueError(
            f"shells: expected those of values, got shell {index[others[0]]} for "
            f"values[{others[0]}], which lies in shell {found[others[0]]}; "
            "`assign_shells` puts values into given shells."
        )


def _assign(values: jax.Array, edges: jax.Array, usable: jax.Array) -> Shells:
    """Puts the usable values into the shells between the edges, both ends open."""
    num_shells = len(edges) - 1
    # Compared with the stored edges themselves, so that index and edges never disagree.
    above = values[:, None] >= edges[None, 1:-1]
    index = jnp.sum(above, axis=1, dtype=jnp.int32)
    index = jnp.where(usable, index, jnp.int32(-1))
    member = index[:, None] == jnp.arange(num_shells, dtype=jnp.int32)[None, :]
    return Shells(
        edges=edges,
        centers=jnp.sqrt(edges[:-1]) * jnp.sqrt(edges[1:]),
        index=index,
        counts=jnp.sum(member, axis=0, dtype=jnp.int32),
    )


def _extremes(values: jax.Array, usable: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the smallest and the largest usable value, 1 and 1 if there is none."""
    largest = float(jnp.finfo(values.dtype).max)
    low = jnp.min(values, where=usable, initial=largest)
    high = jnp.max(values, where=usable, initial=0.0)
    any_usable = jnp.any(usable)
    return jnp.where(any_usable, low, 1), jnp.where(any_usable, high, 1)


def _log_edges(low: jax.Array, high: jax.Array, num_shells: int) -> jax.Array:
    """Returns [S+1] edges, evenly spaced in the logarithm from ``low`` to ``high``.

    Both ends are exact, unless a shell would be narrower than the rounding of the
    logarithm; the interval is then widened around its middle.
    """
    dtype = low.dtype
    info = jnp.finfo(dtype)
    # In units of the middle: logarithms of large and small numbers lose digits.
    unit = magnitude(jnp.sqrt(low) * jnp.sqrt(high))
    log_low, log_high = jnp.log(low / unit), jnp.log(high / unit)
    farthest = jnp.maximum(jnp.maximum(jnp.abs(log_low), jnp.abs(log_high)), 1)
    least = num_shells * 8 * float(info.eps) * farthest
    too_narrow = log_high - log_low < least
    middle = (log_low + log_high) / 2
    log_low = jnp.where(too_narrow, middle - least / 2, log_low)
    log_high = jnp.where(too_narrow, middle + least / 2, log_high)

    low = jnp.where(too_narrow, jnp.exp(log_low) * unit, low)
    high = jnp.where(too_narrow, jnp.exp(log_high) * unit, high)
    low, high = jnp.maximum(low, info.tiny), jnp.minimum(high, info.max)
    fractions = jnp.arange(1, num_shells, dtype=dtype) / num_shells
    inner = jnp.exp(log_low + (log_high - log_low) * fractions) * unit
    return jnp.concatenate([low[None], jnp.clip(inner, low, high), high[None]])


def _root_mean_squares(
    amplitude: jax.Array, index: jax.Array, counts: jax.Array
) -> jax.Array:
    """Returns the [S, S] roots of the mean squares of [r, r], 0 for empty shells."""
    num_shells = counts.shape[0]
    groups = jnp.where(index >= 0, index, num_shells)

    def over_pairs(combine: Callable[..., jax.Array], entries: jax.Array) -> jax.Array:
        rows = combine(entries, groups, num_shells + 1)
        return combine(rows.T, groups, num_shells + 1).T

    # Each pair of shells is measured in its own largest entry before it is squared.
    largest = over_pairs(jax.ops.segment_max, jnp.abs(amplitude))
    units = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    squares = jnp.square(amplitude / units[groups[:, None], groups[None, :]])
    sums = over_pairs(jax.ops.segment_sum, squares)[:-1, :-1]
    numbers = jnp.maximum(counts, 1).astype(amplitude.dtype)
    means = sums / numbers[:, None] / numbers[None, :]
    return jnp.sqrt(means) * units[:-1, :-1]
