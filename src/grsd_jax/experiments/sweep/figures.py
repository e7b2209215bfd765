"""The figures of a sweep, from the rows of ``sweep.csv`` alone.

Every line is a network at one width, activation and branch scale; it goes through the
mean over seeds. A band reaches from the smallest to the largest seed, or a bar where
bands would cover each other. What no seed could measure is a gap, and what only some
could says how many.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from grsd_jax.experiments.common import files
from grsd_jax.experiments.common.config import TITLES
from grsd_jax.experiments.common.plotting import (
    COLUMN_WIDTH,
    PANELS_WIDTH,
    look_of,
    save_figures,
    shared_legend,
)
from grsd_jax.experiments.common.tables import finite
from grsd_jax.experiments.sweep.analyse import Line, Row, lines_of
from grsd_jax.plotting.drawing import say_empty

_DASHES = ("-", "--", ":", "-.")
_FILLS = ("full", "none", "left", "top", "bottom")

#: What the vertical axes say, by the columns that they show.
_COUPLING = {
    "toeplitz_residual": "Toeplitz residual,\nrenormalized",
    "slope": "slope of $|\\dot{M}_{ii}|$\nagainst $\\lambda_i$",
    "r_squared": "$R^2$ of that fit",
}
_INCREMENTS = {
    "initial_increment_mean": "mean increment of\nthe log-norm",
    "initial_increment_variance": "variance of the\nincrements",
    "initial_variance_of_mean": "variance of the mean\nover depth",
    "initial_normal_distance": "KS distance of the\nsum to normal",
}
_MEMORY = {"initial_correlation_time": "correlation time of\ndirections, blocks"}
_SCALE = {
    **_INCREMENTS,
    "initial_variance_ratio": r"$L\,$var(mean)$\,/\,$var",
    **_MEMORY,
}


class Band(NamedTuple):
    """One quantity of a line: its mean and its range over seeds.

    Attributes:
        at: ``[points]``, depths or branch scales, ascending.
        low: ``[points]``, the smallest.
        mean: ``[points]``.
        high: ``[points]``, the largest.
        known: ``[points]``, how many of the cells have the quantity.
        cells: ``[points]``, the cells.
    """

    at: np.ndarray
    low: np.ndarray
    mean: np.ndarray
    high: np.ndarray
    known: np.ndarray
    cells: np.ndarray


def band_of(line: Line, x: str, y: str) -> Band:
    """Returns the band of a quantity against another column.

    Args:
        line: The line.
        x: The column that the band runs over.
        y: The quantity, over the cells that have it.

    Returns:
        The band, NaN where no cell has the quantity.
    """
    cells: dict[float, list[float | None]] = {}
    for row in line.rows:
        at = finite(row[x])
        if at is not None:
            cells.setdefault(at, []).append(finite(row[y]))
    points = sorted(cells)
    known = [[v for v in cells[at] if v is not None] for at in points]
    low, mean, high = (
        np.array([summary(values) if values else np.nan for values in known])
        for summary in (min, np.mean, max)
    )
    counts = (np.array([*map(len, g)]) for g in (known, [cells[at] for at in points]))
    return Band(np.array(points), low, mean, high, *counts)


def write_sweep_figures(rows: Sequence[Row], folder: files.PathLike) -> list[Path]:
    """Draws the figures of a sweep, each as a PNG and a PDF.

    ``sweep_coupling`` (Toeplitz residual, slope and R^2 against depth),
    ``sweep_increments`` (log-norm increments against depth: mean, variance, variance of
    the mean over depth, distance of the sum to normal), ``sweep_mixing`` (correlation
    time of directions against depth) and ``sweep_scale`` (all of these of the deepest
    residual networks against the branch scale).

    Args:
        rows: The rows.
        folder: The folder to write to; it is made if need be.

    Returns:
        The files, each of which was replaced as a whole.

    Raises:
        UserError: If the folder cannot be written.
    """
    by_depth = _titled(lines_of(rows))
    deepest = max(row["depth"] for row in rows)
    at_depth = [row for row in rows if row["depth"] == deepest]
    by_scale = _titled(lines_of(at_depth, by_scale=False))
    drawings: dict[str, Callable[[], Figure]] = {
        "sweep_coupling": lambda: _coupling(by_depth),
        "sweep_increments": lambda: _increments(by_depth),
        "sweep_mixing": lambda: _mixing(by_depth),
        "sweep_scale": lambda: _scale(by_scale, deepest),
    }
    return save_figures(drawings, folder)


def _titled(lines: Sequence[Line]) -> list[Line]:
    """Returns the lines with the network's title in the place of its name."""
    return [
        line._replace(
            label=TITLES.get(line.model, line.model)
            + line.label.removeprefix(line.model)
        )
        for line in lines
    ]


def _looks(lines: Sequence[Line]) -> dict[str, dict[str, Any]]:
    """Returns the look of every line by its label.

    The network is the color and the marker, the branch scale the dashes, the width how
    pale the line is, and the activation the filling of the marker.
    """
    scales = _ordered(line.branch_scale for line in lines)
    widths = _ordered(line.width for line in lines)
    activations = _ordered(line.activation for line in lines)
    looks = {}
    for line in lines:
        look = look_of(line.model)
        looks[line.label] = {
            "color": look.color,
            "marker": look.marker,
            "linestyle": _DASHES[scales.get(line.branch_scale, 0) % len(_DASHES)],
            "markersize": 3,
            "alpha": 1 - 0.6 * widths[line.width] / len(widths),
            "fillstyle": _FILLS[activations.get(line.activation, 0) % len(_FILLS)],
        }
    return looks


def _ordered(values: Iterable[Any]) -> dict[Any, int]:
    """Returns the place of each value in ascending order, without None."""
    return {value: k for k, value in enumerate(sorted(set(values) - {None}))}


def _panels(
    axes: Iterable[Axes],
    lines: Sequence[Line],
    x: str,
    names: Mapping[str, str],
    *,
    bars: bool = False,
) -> dict[str, Axes]:
    """Draws one column in each axis, and returns the axes by the columns."""
    looks, panels = _looks(lines), dict(zip(names, axes, strict=True))
    for column, axis in panels.items():
        axis.set_ylabel(names[column])
        for place, line in enumerate(lines):
            band, look = band_of(line, x, column), looks[line.label]
            if not band.known.any():
                continue
            if bars:  # side by side
                aside = 1.4 ** ((place + 0.5) / len(lines) - 0.5)
                band = band._replace(at=band.at * aside)
            axis.plot(band.at, band.mean, label=line.label, **look)
            _draw_range(axis, band, look["color"], bars=bars)
            _say_how_many(axis, band, look["color"])
        if not axis.lines:
            say_empty(axis, "not measured")
        if x == "depth":
            axis.set_xscale("log", base=2)
            depths = sorted({row["depth"] for line in lines for row in line.rows})
            axis.set_xticks(depths, [str(depth) for depth in depths])
            axis.minorticks_off()
            axis.set_xlabel("depth $L$, blocks")
        else:
            axis.set(xscale="log", xlabel="branch scale $s$")
    return panels


def _draw_range(axis: Axes, band: Band, color: str, *, bars: bool) -> None:
    """Draws the range over seeds, as a bar at each point or as a band."""
    if bars:
        axis.vlines(band.at, band.low, band.high, color=color, linewidth=0.7)
    else:
        # With a line around it, the range at a single depth is seen too.
        shade: Any = {"color": color, "alpha": 0.15, "linewidth": 1.0}
        axis.fill_between(band.at, band.low, band.high, **shade)


def _say_how_many(axis: Axes, band: Band, color: str) -> None:
    """Writes beside a mean that it is that of some cells alone."""
    for k in np.flatnonzero((band.known > 0) & (band.known < band.cells)):
        axis.annotate(
            f"{band.known[k]} of {band.cells[k]}", (band.at[k], band.mean[k]),
            xytext=(3, 3), textcoords="offset points", color=color, fontsize="x-small",
        )  # fmt: skip


def _legend(figure: Figure, panels: Mapping[str, Axes]) -> None:
    labels = [str(x.get_label()) for axis in panels.values() for x in axis.lines]
    entry = 0.5 + 0.054 * max(map(len, labels), default=0)  # inches, at most
    columns = max(int(figure.get_figwidth() / entry), 1)
    place = {"loc": "outside lower center", "ncols": columns, "handlelength": 2.6}
    rows = math.ceil(len(set(labels)) / columns)
    figure.set_figheight(figure.get_figheight() + 0.15 * rows)
    shared_legend(figure, panels.values(), **place)


def _coupling(lines: Sequence[Line]) -> Figure:
    figure = Figure(figsize=(COLUMN_WIDTH, 5.8), layout="constrained")
    axes = figure.subplots(3, 1)
    panels = _panels(axes, lines, "depth", _COUPLING, bars=True)
    for name in ("toeplitz_residual", "r_squared"):
        panels[name].set_ylim(bottom=0)
    slope = panels["slope"]
    slope.axhline(1, color="0.65", linewidth=0.8, linestyle=":", label="slope 1")
    _cut_outliers(slope, {x.label: band_of(x, "depth", "slope") for x in lines})
    _legend(figure, panels)
    return figure


def _cut_outliers(axis: Axes, bands: Mapping[str, Band]) -> None:
    """Leaves out of view, and writes down, what would flatten all other bands.

    That is what lies three interquartile ranges beyond the quartiles, as in Tukey's
    box plots. Three seeds that disagree by far are one such point.
    """
    points = [
        (name, *each)
        for name, x in bands.items()
        for each in zip(x.at, x.low, x.mean, x.high, strict=True)
        if np.isfinite(each).all()
    ]
    if not points:
        return
    heights = np.array([point[2:] for point in points], np.float64)
    quarter, three_quarters = np.percentile(heights, [25, 75])
    reach = 3 * (three_quarters - quarter)
    low, high = quarter - reach, three_quarters + reach
    beyond = ((heights < low) | (heights > high)).any(axis=1)
    if not (beyond.any() and reach):  # equal heights are no scale
        return
    axis.set_ylim(low, high)
    told = [
        f"{points[k][0]} at {points[k][1]:g}: "
        f"{heights[k, 1]:.2g} [{heights[k, 0]:.2g}, {heights[k, 2]:.2g}]"
        for k in np.flatnonzero(beyond)
    ]
    text = "\n".join(["out of view:", *told])
    axis.text(0.03, 0.03, text, transform=axis.transAxes, fontsize="small")


def _logarithmic(axis: Axes) -> None:
    """Draws sizes by their logarithm, and names whose mean is 0 somewhere."""
    axis.set_yscale("log")
    heights = {str(x.get_label()): np.asarray(x.get_ydata(), float) for x in axis.lines}
    zero = [label for label, height in heights.items() if np.any(height <= 0)]
    if zero:
        text = f"0 somewhere: {', '.join(zero)}"
        axis.text(0.03, 0.03, text, transform=axis.transAxes, fontsize="small")


def _increments(lines: Sequence[Line]) -> Figure:
    figure = Figure(figsize=(PANELS_WIDTH, 3.9), layout="constrained")
    panels = _panels(figure.subplots(2, 2).flat, lines, "depth", _INCREMENTS)
    _logarithmic(panels["initial_increment_variance"])
    averaged = panels["initial_variance_of_mean"]
    _logarithmic(averaged)
    bands = [band_of(line, "depth", "initial_variance_of_mean") for line in lines]
    bands = [band for band in bands if len(band.at) and band.mean[0] > 0]  # not NaN
    if bands:  # a guide above the highest line
        highest = max(bands, key=lambda band: band.mean[0])
        guide = 1.5 * highest.mean[0] * highest.at[0] / highest.at
        averaged.plot(highest.at, guide, color="0.65", linestyle=":", label="1 / L")
    _legend(figure, panels)
    return figure


def _mixing(lines: Sequence[Line]) -> Figure:
    figure = Figure(figsize=(COLUMN_WIDTH, 2.4), layout="constrained")
    panels = _panels([figure.subplots()], lines, "depth", _MEMORY)
    for axis in panels.values():
        axis.set_yscale("symlog", linthresh=1)  # a plain net's is 0
        axis.set_ylim(0, 2 * max(axis.dataLim.y1, 1) if axis.lines else 1)
    _legend(figure, panels)
    return figure


def _scale(lines: Sequence[Line], depth: int) -> Figure:
    """Networks of one depth, since a short one cannot show a long memory."""
    figure = Figure(figsize=(PANELS_WIDTH, 5.9), layout="constrained")
    panels = _panels(figure.subplots(3, 2).flat, lines, "branch_scale", _SCALE)
    scales = sorted(
        {row["branch_scale"] for line in lines for row in line.rows} - {None}
    )
    for axis in panels.values():
        axis.set_xticks(scales, [f"{scale:g}" for scale in scales])
        axis.minorticks_off()
    logarithmic = (
        "initial_increment_variance",
        "initial_variance_of_mean",
        "initial_correlation_time",
    )
    for name in logarithmic:
        _logarithmic(panels[name])
    if scales:
        grid = np.geomspace(min(scales), max(scales), 50)
        law = [2 / math.log1p(s**2) for s in grid]
        label = r"$2 / \log(1 + s^2)$, isotropic"
        memory = panels["initial_correlation_time"]
        memory.plot(grid, law, color="0.2", linestyle=":", label=label, zorder=3)
    figure.suptitle(f"$L$ = {depth} blocks, at initialization", fontsize="medium")
    _legend(figure, panels)
    return figure
