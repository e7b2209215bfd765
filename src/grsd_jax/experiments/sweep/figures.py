"""The figures and the table of a sweep, from ``sweep.json`` alone.

Every line is a network at one width, activation and branch scale; it goes through the
mean over seeds, in a band from the smallest to the largest. What a cell could not
measure is left out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from grsd_jax.experiments.common import records
from grsd_jax.experiments.common.config import UserError
from grsd_jax.experiments.reproduce.figures import LOOKS, PAGE_WIDTH, save_figures
from grsd_jax.experiments.reproduce.results import finite
from grsd_jax.experiments.reproduce.tables import aligned

_LINES = ("-", "--", ":", "-.")
_FILLS = ("full", "none", "left", "top", "bottom")

Row = Mapping[str, Any]


class _Line(NamedTuple):
    """One network, whatever its depth and seed."""

    label: str
    rows: list[Row]
    look: dict[str, Any]

    def band(self, x: str, y: str) -> np.ndarray:
        """Returns (x, lowest, mean, highest) for each x with a finite y."""
        values: dict[float, list[float]] = {}
        for row in self.rows:
            at, value = finite(row.get(x)), finite(row.get(y))
            if at is not None and value is not None:
                values.setdefault(at, []).append(value)
        found = [(a, min(v), sum(v) / len(v), max(v)) for a, v in values.items()]
        return np.array(sorted(found)).reshape(-1, 4)


def write_sweep_figures(results: Any, folder: records.PathLike) -> list[Path]:
    """Draws the figures of a sweep, each as a PNG and a PDF.

    ``sweep_coupling`` (Toeplitz residual, slope and R^2 against depth),
    ``sweep_increments`` (log-norm increments against depth: mean, variance, variance of
    the mean over depth, distance of the sum to normal), ``sweep_mixing`` (correlation
    time of directions against depth) and ``sweep_scale`` (all of these of the deepest
    residual networks against the branch scale).

    Args:
        results: The contents of ``sweep.json``.
        folder: The folder to write to; it is made if need be.

    Returns:
        The files, each of which was replaced as a whole.

    Raises:
        UserError: If there are no rows, or the folder cannot be written.
    """
    rows = _rows(results)
    by_depth = _lines(rows)
    deepest = max(row["depth"] for row in rows)
    by_scale = _lines([row for row in rows if row["depth"] == deepest], by_scale=False)
    drawings: dict[str, Callable[[], Figure]] = {
        "sweep_coupling": lambda: _coupling(by_depth),
        "sweep_increments": lambda: _increments(by_depth),
        "sweep_mixing": lambda: _mixing(by_depth),
        "sweep_scale": lambda: _scale(by_scale, deepest),
    }
    return save_figures(drawings, folder)


def format_sweep(results: Any) -> str:
    """Writes a sweep as a table, the mean over seeds of each network and depth.

    Args:
        results: The contents of ``sweep.json``.

    Returns:
        The table, valid as Markdown.

    Raises:
        UserError: If there are no rows.
    """
    columns = {
        "loss": "train_loss",
        "accuracy": "test_accuracy",
        "Toeplitz": "toeplitz_residual",
        "slope": "slope",
        "R^2": "r_squared",
        "L var(mean)/var": "initial_variance_ratio",
        "memory": "initial_correlation_time",
    }
    table = [["network", "depth", "cells", *columns]]
    for line in _lines(_rows(results)):
        for depth in sorted({row["depth"] for row in line.rows}):
            cells = [row for row in line.rows if row["depth"] == depth]
            table.append(
                [
                    line.label,
                    str(depth),
                    str(len(cells)),
                    *(_mean(cells, key) for key in columns.values()),
                ]
            )
    return aligned(table)


def _mean(cells: Sequence[Row], key: str) -> str:
    values = [v for v in (finite(row.get(key)) for row in cells) if v is not None]
    return f"{sum(values) / len(values):.3g}" if values else "n/a"


def _rows(results: Any) -> list[Row]:
    rows = results.get("rows") if isinstance(results, Mapping) else None
    if not rows:
        raise UserError("sweep.json: expected at least one row, got none.")
    return rows


def _lines(rows: Sequence[Row], *, by_scale: bool = True) -> list[_Line]:
    """Groups the rows by all that makes a network but its depth and seed."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        scale = finite(row.get("branch_scale")) if by_scale else None
        kind = (row["model"], scale, row.get("width"), row.get("activation"))
        groups.setdefault(kind, []).append(row)
    scales = sorted({kind[1] for kind in groups if kind[1] is not None})
    widths = sorted({kind[2] for kind in groups if kind[2] is not None})
    activations = sorted({kind[3] for kind in groups if kind[3]})
    lines = []
    for (model, scale, width, activation), members in groups.items():
        color, marker, _ = LOOKS[model, "own"]
        label, dash, alpha = model, "-", 1.0
        if scale is not None:
            label += f", s = {scale:g}"
            dash = _LINES[scales.index(scale) % len(_LINES)]
        if len(widths) > 1 and width is not None:
            label += f", w = {width}"
            alpha = 1 - 0.6 * widths.index(width) / len(widths)
        fill = "full"
        if len(activations) > 1 and activation:
            label += f", {activation}"
            fill = _FILLS[activations.index(activation) % len(_FILLS)]
        look = {
            "color": color,
            "marker": marker,
            "linestyle": dash,
            "markersize": 3,
            "alpha": alpha,
            "fillstyle": fill,
        }
        lines.append(_Line(label, members, look))
    return lines


def _draw(axis: Axes, lines: Sequence[_Line], x: str, y: str, title: str) -> None:
    """Draws the band of every line; an axis without any says so."""
    axis.set_title(title)
    drawn = False
    for line in lines:
        band = line.band(x, y)
        if len(band):
            at, low, mean, high = band.T
            axis.plot(at, mean, label=line.label, **line.look)
            color = line.look["color"]
            axis.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
            drawn = True
    if not drawn:
        axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)


def _depth_axis(axis: Axes) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xlabel("depth L, blocks")


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    found: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    if found:
        figure.legend(
            list(found.values()),
            list(found),
            loc="outside lower center",
            ncols=4,
            handlelength=2.8,
        )


def _coupling(lines: Sequence[_Line]) -> Figure:
    figure = Figure(figsize=(PAGE_WIDTH, 2.9), layout="constrained")
    axes = list(figure.subplots(1, 3))
    panels = (
        ("toeplitz_residual", "Toeplitz residual, renormalised"),
        ("slope", r"slope of $|\dot{M}_{ii}|$ against $\lambda_i$"),
        ("r_squared", r"$R^2$ of that fit"),
    )
    for axis, (key, title) in zip(axes, panels, strict=True):
        _draw(axis, lines, "depth", key, title)
        _depth_axis(axis)
    axes[1].axhline(1, color="0.65", linewidth=0.8, linestyle=":")
    _legend(figure, axes)
    return figure


#: Statistics of the increments, with the titles of their panels.
_INCREMENTS = (
    ("initial_increment_mean", "mean increment of the log-norm"),
    ("initial_increment_variance", "variance of the increments"),
    ("initial_variance_of_mean", "variance of the mean over depth"),
    ("initial_normal_distance", "KS distance of the sum to normal"),
)


def _increments(lines: Sequence[_Line]) -> Figure:
    figure = Figure(figsize=(PAGE_WIDTH, 4.9), layout="constrained")
    axes = list(figure.subplots(2, 2).flat)
    for axis, (key, title) in zip(axes, _INCREMENTS, strict=True):
        _draw(axis, lines, "depth", key, title)
        _depth_axis(axis)
    axes[1].set_yscale("log")
    axes[2].set_yscale("log")
    bands = [line.band("depth", "initial_variance_of_mean") for line in lines]
    bands = [band for band in bands if len(band) and band[0, 2] > 0]
    if bands:
        first = max(bands, key=lambda band: band[0, 2])
        guide = 1.5 * first[0, 2] * first[0, 0] / first[:, 0]
        axes[2].plot(first[:, 0], guide, color="0.65", linestyle=":", label="1 / L")
    _legend(figure, axes)
    return figure


def _mixing(lines: Sequence[_Line]) -> Figure:
    figure = Figure(figsize=(PAGE_WIDTH * 0.6, 3.2), layout="constrained")
    axis = figure.subplots()
    title = "correlation time of directions, blocks"
    _draw(axis, lines, "depth", "initial_correlation_time", title)
    _depth_axis(axis)
    axis.set_yscale("symlog", linthresh=1)  # a plain net's is 0
    _legend(figure, [axis])
    return figure


def _scale(lines: Sequence[_Line], depth: int) -> Figure:
    """Networks of one depth, since a short one cannot show a long memory."""
    figure = Figure(figsize=(PAGE_WIDTH, 4.9), layout="constrained")
    axes = list(figure.subplots(2, 3).flat)
    panels = (
        *_INCREMENTS,
        ("initial_variance_ratio", "L var(mean) / var"),
        ("initial_correlation_time", "correlation time of directions"),
    )
    for axis, (key, title) in zip(axes, panels, strict=True):
        _draw(axis, lines, "branch_scale", key, title)
        axis.set(xscale="log", xlabel="branch scale s")
        ticks = sorted(
            {at for line in lines for at in line.band("branch_scale", key)[:, 0]}
        )
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    for axis in (*axes[1:3], axes[5]):
        axis.set_yscale("log")
    scales = [
        scale
        for line in lines
        for scale in line.band("branch_scale", "initial_correlation_time")[:, 0]
    ]
    if scales:
        grid = np.geomspace(min(scales), max(scales), 50)
        law = [2 / math.log1p(s**2) for s in grid]
        label = r"$2 / \log(1 + s^2)$, isotropic"
        axes[5].plot(grid, law, color="0.65", linestyle=":", label=label)
    figure.suptitle(f"L = {depth} blocks, at initialisation", fontsize="medium")
    _legend(figure, axes)
    return figure
