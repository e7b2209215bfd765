"""Figures along a training: energies, flux, velocity and eigenvalues.

Records come from a probe, or from its file as dictionaries. What a figure shows is
found by its name, wherever in the record it is.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from grsd_jax.dynamics import ProbeRecord
from grsd_jax.plotting.drawing import (
    DARK,
    GRAY,
    LEGEND,
    axes_of,
    color_bar,
    leave_room,
    say_empty,
)
from grsd_jax.results.fields import description_of, names_of, with_undefined

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: A record of a probe, or one line of its file.
Record = ProbeRecord | Mapping[str, Any]

TIME = r"effective time $\tau$"
STEP = "training step (not all times are known)"

#: Results drawn over the edges at most, evenly over the records.
_MOST = 6

_MARKERS = "os^Dv*"
_MARKS: dict[str, Any] = {"linewidth": 1.0, "markersize": 3.5}


def energies(records: Sequence[Record], ax: "Axes | None" = None) -> "Axes":
    """Draws the energy of each shell over time, colored by its place in the spectrum.

    Neighboring shells also have different markers. The axis is logarithmic: an energy
    of 0 is a gap, as is one that is undefined. If not all times are known, training
    steps are in their place.

    Args:
        records: The records of a probe, or the lines of its file.
        ax: The axes; new ones if None.

    Returns:
        The axes, with a color bar beside them.

    Raises:
        ImportError: If Matplotlib is not installed.
        ValueError: If something else is given, or records of different shells.
    """
    import matplotlib as mpl
    from matplotlib.colors import LogNorm

    ax = axes_of(ax)
    label, time, found, edges = _columns(records, "energies", "edges")
    ax.set(xlabel=label, ylabel=r"energy $E_a$")
    edges = edges[[np.isfinite(x).all() for x in edges]]  # of those that hold something
    if not (len(edges) and np.nanmax(found, initial=0) > 0):
        say_empty(ax, "no record with energy")
        return ax
    if not np.allclose(edges, edges[:1], rtol=1e-5, atol=0):
        raise ValueError("records: expected the same edges in all, got different ones.")
    ax.set_yscale("log")
    found = found[:, -1] if found.ndim == 3 else found  # before and after
    centers = _centers(edges[0], found.shape[1])
    norm, colors = LogNorm(centers[0], centers[-1]), _colors()
    shells = zip(found.T, centers, itertools.cycle(_MARKERS), strict=False)
    for energy, center, marker in shells:
        shown = np.where(energy > 0, energy, np.nan)
        style: Any = _MARKS | {"color": colors(norm(center)), "marker": marker}
        ax.plot(time, shown, **style)
    # A part of the shells is no sum, and a sum of 0 would be drawn as a fall.
    whole = np.where((total := np.sum(found, axis=1)) > 0, total, np.nan)
    ax.plot(time, whole, "--", color=DARK, label="sum of the shells")
    leave_room(ax, 0.15)
    ax.legend(loc="upper left", fontsize=LEGEND)
    color_bar(ax, mpl.cm.ScalarMappable(norm, colors), r"shell $\lambda_a$")
    return ax


def eigenvalues(records: Sequence[Record], ax: "Axes | None" = None) -> "Axes":
    """Draws the leading eigenvalues over time, each a line, in order of size.

    Values below ten eps of float32, relative to the largest of their record, are
    rounding and left out. If not all times are known, training steps are in their
    place.

    Args:
        records: The records of a probe, or the lines of its file.
        ax: The axes; new ones if None.

    Returns:
        The axes, with a color bar of the order beside them.

    Raises:
        ImportError: If Matplotlib is not installed.
        ValueError: If something else is given, or records with different numbers of
            eigenvalues.
    """
    import matplotlib as mpl
    from matplotlib.colors import Normalize

    ax = axes_of(ax)
    label, time, values = _columns(records, "values")
    ax.set(xlabel=label, ylabel=r"eigenvalue $\lambda_i$")
    if not np.nanmax(values, initial=0) > 0:
        say_empty(ax, "no record with a positive eigenvalue")
        return ax
    ax.set_yscale("log")
    norm, colors = Normalize(1, max(values.shape[1], 2)), _colors().reversed()
    largest = np.max(np.where(np.isfinite(values), values, 0), axis=1)
    rounding = 10 * np.finfo(np.float32).eps * largest
    for index, track in enumerate(values.T, start=1):
        shown = np.where(track > rounding, track, np.nan)
        shade = colors(norm(index))
        ax.plot(time, shown, ".-", color=shade, linewidth=0.8, markersize=2)
    bar = color_bar(ax, mpl.cm.ScalarMappable(norm, colors), "index $i$")
    bar.ax.invert_yaxis()  # the largest eigenvalue is the first
    return ax


def _colors() -> Any:
    """Returns the color map of what has an order, without its palest yellow."""
    import matplotlib as mpl
    from matplotlib.colors import ListedColormap

    return ListedColormap(mpl.colormaps["viridis"](np.linspace(0, 0.92, 256)))


def flux(
    results: Any, ax: "Axes | None" = None, *, labels: Sequence[str] | None = None
) -> "Axes":
    """Draws the energy that passed each edge, upward where it is positive.

    Args:
        results: An `ExactBalance` or a record of a probe, or a sequence of them, of
            which six are drawn unless they have labels.
        ax: The axes; new ones if None.
        labels: What the legend calls each result; the times of records by default.

    Returns:
        The axes; a band is the error, where it is known. Hollow points are edges whose
        error is infinite: they have not converged.

    Raises:
        ImportError: If Matplotlib is not installed.
        ValueError: If something else is given, or not as many labels as results.
    """
    ax = _edge_axes(ax, r"flux $F_k$ upward")
    for result, style in _styled(ax, results, labels, "flux"):
        edges, found = _over_edges(result, "flux")
        error = _found(result, "flux_error")
        _band(ax, edges, found, error, style)
        if error is not None:
            _hollow(ax, edges, np.where(np.isfinite(error), np.nan, found), style)
    _legend(ax)
    return ax


def velocity(
    results: Any, ax: "Axes | None" = None, *, labels: Sequence[str] | None = None
) -> "Axes":
    """Draws the velocity of the energy at each edge, beside that of a null.

    The null is the counting velocity: that of a kernel that only grows. Only what
    exceeds it speaks for the theory. It is a dashed line where it was computed.

    Args:
        results: An `ExactBalance` or a record of a probe, or a sequence of them, of
            which six are drawn unless they have labels.
        ax: The axes; new ones if None.
        labels: What the legend calls each result; the times of records by default.

    Returns:
        The axes; a band is the error, where it is known. Hollow points are edges whose
        velocity cannot be used; far ones set no limits of a linear axis.

    Raises:
        ImportError: If Matplotlib is not installed.
        ValueError: If something else is given, or not as many labels as results.
    """
    ax = _edge_axes(ax, r"velocity $v_k$")
    seen = [
        _draw_velocity(ax, result, style)
        for result, style in _styled(ax, results, labels, "velocity")
    ]
    if any(line.get_linestyle() == "--" for line in ax.lines):
        ax.plot([], [], "--", color=GRAY, label="null: growth alone")
    linear = ax.get_yscale() == "linear"
    _legend(ax, _with_near(ax, np.concatenate([*seen, [0.0]])) if linear else None)
    return ax


def _with_near(ax: "Axes", seen: np.ndarray) -> np.ndarray:
    """Adds what lies at most their own span beyond the heights that must be seen.

    What cannot be used must not squeeze what can, nor hide behind the legend.
    """
    drawn = np.concatenate([np.asarray(x.get_ydata(), float) for x in ax.lines])
    low, high = np.nanmin(seen), np.nanmax(seen)
    span = high - low if high > low else np.inf
    near = (drawn >= low - span) & (drawn <= high + span)
    return np.concatenate([seen, drawn[near]])


def _draw_velocity(ax: "Axes", result: Any, style: dict[str, Any]) -> np.ndarray:
    """Draws one result, and returns the heights that must be seen."""
    edges, found = _over_edges(result, "velocity")
    mask, error, null = (
        _found(result, name)
        for name in ("velocity_mask", "velocity_error", "counting_velocity")
    )
    usable = np.ones(len(found), bool) if mask is None else np.asarray(mask, bool)
    error = np.zeros(len(found)) if error is None else np.asarray(error, np.float64)
    usable = usable & np.isfinite(error)
    _band(ax, edges, found, np.where(usable, error, np.nan), style)
    _hollow(ax, edges, np.where(usable, np.nan, found), style)
    drawn = [found, found - error, found + error]
    if null is not None:
        ax.plot(edges, null, "--", color=style["color"], linewidth=0.9)
        drawn.append(np.asarray(null, np.float64))
    return np.concatenate([x[usable] for x in drawn])


def _edge_axes(ax: "Axes | None", ylabel: str) -> "Axes":
    ax = axes_of(ax)
    ax.set(xscale="log", xlabel=r"edge $\lambda_k$", ylabel=ylabel)
    ax.axhline(0, color="0.8", linewidth=0.6, zorder=0)
    return ax


def _band(
    ax: "Axes", x: np.ndarray, y: np.ndarray, error: Any, style: dict[str, Any]
) -> None:
    """Draws a line over edges, with its error as a band where it is finite."""
    ax.plot(x, y, **_MARKS | style)
    if error is not None:
        finite = np.where(np.isfinite(error), np.asarray(error, np.float64), np.nan)
        # With a line around it, a band over a single edge is seen too.
        shade: Any = {"color": style["color"], "alpha": 0.2, "linewidth": 1.0}
        ax.fill_between(x, y - finite, y + finite, **shade)


def _hollow(ax: "Axes", x: np.ndarray, y: np.ndarray, style: dict[str, Any]) -> None:
    """Draws points that cannot be relied on, if there are any."""
    if not np.isfinite(y).any():
        return
    hollow: Any = {"linestyle": "", "markerfacecolor": "white", "label": None}
    ax.plot(x, y, **_MARKS | style | hollow)


def _styled(
    ax: "Axes", results: Any, labels: Sequence[str] | None, name: str
) -> Iterable[tuple[Any, dict[str, Any]]]:
    """Yields each result that holds a quantity, with its color and its label.

    The legend names those that have a label and do not hold it, too.
    """
    several = _several("results", results)
    if labels is not None and len(labels) != len(several):
        raise ValueError(
            f"labels: expected {len(several)}, one for each result, got {len(labels)}."
        )
    kept = [k for k, x in enumerate(several) if _is_known(_found(x, name))]
    if labels is None and len(kept) > _MOST:
        kept = [kept[k] for k in np.linspace(0, len(kept) - 1, _MOST).astype(int)]
    colors = _colors()(np.linspace(0, 1, max(len(kept), 1)))
    for k, color, marker in zip(kept, colors, itertools.cycle(_MARKERS), strict=False):
        label = labels[k] if labels is not None else _time_text(several[k])
        yield several[k], {"color": color, "marker": marker, "label": label}
    for k, label in enumerate(labels or ()):
        if k not in kept:
            ax.plot([], [], linestyle="", label=f"{label}: undefined")


def _is_known(values: Any) -> bool:
    return values is not None and bool(np.isfinite(np.asarray(values, float)).any())


def _several(name: str, results: Any) -> list[Any]:
    """Returns one result, or each of a sequence, with NaN where they are undefined."""
    one = _is_result(results) or not isinstance(results, Iterable)
    several = [results] if one or isinstance(results, str) else list(results)
    for result in several:
        if not _is_result(result):
            raise ValueError(
                f"{name}: expected records of a probe, lines of its file or balances, "
                f"got a {type(result).__name__}."
            )
    return [x if isinstance(x, Mapping) else with_undefined(x) for x in several]


def _is_result(value: Any) -> bool:
    return isinstance(value, Mapping) or description_of(value) is not None


def _time_text(result: Any) -> str | None:
    time, step = _number(result, "effective_time"), _number(result, "step")
    if np.isfinite(time):
        return rf"$\tau$ = {time:.3g}"
    return f"step {step:.0f}" if np.isfinite(step) else None


def _legend(ax: "Axes", heights: np.ndarray | None = None) -> None:
    if names := ax.get_legend_handles_labels()[1]:
        rows = math.ceil(len(names) / 2)
        leave_room(ax, 0.07 + 0.14 * rows, heights=heights)
        narrow: Any = {"handlelength": 1.4, "columnspacing": 1.0}
        # Points that set no limits may lie behind it: its text must stay legible.
        opaque: Any = {"frameon": True, "framealpha": 1.0, "edgecolor": "white"}
        ax.legend(loc="upper left", ncols=2, fontsize=LEGEND, **narrow, **opaque)
    if not ax.lines[1:]:
        say_empty(ax, "nothing defined was recorded")


def _columns(records: Sequence[Record], *names: str) -> tuple[Any, ...]:
    """Returns the label of the time, the times, and fields, ``[records, ...]``.

    Of the records that have all of these fields; NaN where their time is not known.

    Raises:
        ValueError: If a field has another size in another record.
    """
    several = _several("records", records)
    found = [[_found(record, name) for name in names] for record in several]
    kept = [k for k, row in enumerate(found) if all(x is not None for x in row)]
    label, times = time_of([several[k] for k in kept])
    columns = []
    for place, name in enumerate(names):
        column = [found[k][place] for k in kept]
        if len(shapes := {np.shape(x) for x in column}) > 1:
            raise ValueError(
                f"records: expected {name} of one shape in all, got {sorted(shapes)}."
            )
        columns.append(np.array(column, np.float64))
    return label, times, *columns


def time_of(records: Sequence[Any]) -> tuple[str, np.ndarray]:
    """Returns what records are drawn over, in words, and where each of them lies.

    Args:
        records: Records of a probe, or lines of its file.

    Returns:
        The effective time; the training step if a time is not known and the steps are.
    """
    times, steps = (
        np.array([_number(record, name) for record in records])
        for name in ("effective_time", "step")
    )
    unknown = not np.isfinite(times).all() and np.isfinite(steps).all()
    return (STEP, steps) if unknown else (TIME, times)


def _number(result: Any, name: str) -> float:
    """Returns a single number of a result, NaN without any."""
    value = _found(result, name)
    return math.nan if value is None else float(value)


def _found(result: Any, name: str) -> Any:
    """Returns what has a name in a result, or in one inside it; None without any."""
    if isinstance(result, Mapping):
        value = result.get(name)
        return None if value is None else np.array(value, np.float64)
    if name in names_of(type(result)) or isinstance(
        getattr(type(result), name, None), property
    ):
        value = getattr(result, name)
        return None if value is None else np.asarray(value)
    for field in names_of(type(result)):
        inner = getattr(result, field)
        if description_of(inner) is not None:
            value = _found(inner, name)
            if value is not None:
                return value
    return None


def _over_edges(result: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the edges that a quantity belongs to, and the quantity."""
    edges, values = _found(result, "edges"), np.asarray(_found(result, name), float)
    return (edges if len(edges) == len(values) else edges[1:-1]), values


def _centers(edges: np.ndarray, num_shells: int) -> np.ndarray:
    """Returns the middles of the shells; those beyond all edges are as wide as next."""
    if len(edges) < num_shells:  # open at both ends
        step = edges[1] / edges[0] if len(edges) > 1 else 2.0
        edges = np.concatenate([edges[:1] / step, edges, edges[-1:] * step])
    return np.sqrt(edges[:-1] * edges[1:])
