"""The figure page of the conditions, from ``conditions.json`` alone."""

import math
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from grsd_jax.experiments.common import files
from grsd_jax.experiments.common.plotting import PANELS_WIDTH, save_figures
from grsd_jax.experiments.common.tables import finite
from grsd_jax.experiments.conditions.analyse import (
    TITLES,
    comparison,
    find_check,
    number_with_error,
    outcome,
    sides,
)
from grsd_jax.plotting.drawing import say_empty

_BLUE, _RED, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "0.5"

#: How the figure writes what the names of the checks spell out.
_SYMBOLS = {
    "Jdot": r"$\dot J$",
    "J": "$J$",
    "R^2": "$R^2$",
    "log lambda": r"$\log\lambda$",
    "<=": "≤",
    ">=": "≥",
    "+-": "±",
}

#: Numbers over thresholds beyond these are drawn at the edge.
_RATIOS = (0.05, 20.0)


def write_condition_page(found: Any, folder: files.PathLike) -> list[Path]:
    """Draws all four conditions and the layers on one page, as a PNG and a PDF.

    Args:
        found: The contents of ``conditions.json``, as measured or as read back.
        folder: The folder to write to; it is made if need be.

    Returns:
        The files, each of which was replaced as a whole.

    Raises:
        UserError: If the folder cannot be written.
    """
    return save_figures({"conditions": lambda: _page(found)}, folder)


def _page(found: Any) -> Figure:
    figure = Figure(figsize=(PANELS_WIDTH, 11.2), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 2.2))
    top, rest = parts
    _verdicts(top.subplots(), found)
    axes = rest.subplot_mosaic(
        [
            ["influence", "shares"],
            ["coherence", "profile"],
            ["norms", "drift"],
            ["invariance", "layers"],
        ]
    )
    last = found["condition1"]["points"][-1]
    _heat(rest, axes["influence"], last["influence"], r"$R_{lm}$")
    axes["influence"].set_title("1: influence, last point")
    axes["influence"].set(xlabel="moving block, $m$", ylabel="changed block, $l$")
    _influence_shares(axes["shares"], found)
    coherence = found["condition2"]["coherence"]
    formula = r"$\Vert J_l^\top J_m\Vert\,/\,\Vert J_l\Vert\,\Vert J_m\Vert$"
    _heat(rest, axes["coherence"], coherence, formula, top=1.0)
    axes["coherence"].set_title("2: coherence, first point")
    axes["coherence"].set(xlabel="block $m$", ylabel="block $l$")
    _coherence_profile(axes["profile"], found)
    _norms(axes["norms"], found)
    _drift(axes["drift"], found)
    _invariance(axes["invariance"], found)
    _layers(axes["layers"], found)
    return figure


def _verdicts(axis: Axes, found: Any) -> None:
    """Draws every check as its number over its threshold, the allowed side shaded."""
    checks = {
        f"{number}: {check['name']}": check
        for number, name in enumerate(TITLES, start=1)
        for check in found[name]["verdict"]["checks"]
    }
    rows = np.arange(len(checks))[::-1]
    labels = []
    for row, (name, check) in zip(rows.tolist(), checks.items(), strict=True):
        color = {"holds": _GREEN, "fails": _RED}.get(check["outcome"], _GREY)
        ratio = _over_threshold(check)
        if ratio is not None:
            axis.plot(np.clip(ratio, *_RATIOS), row, "o", color=color, markersize=4.5)
        told = f"{comparison(check)} {outcome(check)}"
        labels.append(_typeset(f"{name}\n{told}"))
    axis.set_yticks(rows, labels, fontsize="small")
    axis.axvspan(_RATIOS[0], 1, color=_GREEN, alpha=0.08, linewidth=0)
    axis.axvline(1, color=_GREY, linestyle=":", linewidth=0.9)
    axis.set(xscale="log", xlim=_RATIOS, ylim=(-0.7, len(checks) - 0.3))
    axis.set_xlabel("number over threshold\n(≥: threshold over number)")
    held = [
        title
        for name, title in TITLES.items()
        if found[name]["verdict"]["outcome"] == "holds"
    ]
    axis.set_title("conditions that hold: " + ("; ".join(held) or "none"))


def _typeset(text: str) -> str:
    """Returns a text with the symbols that it spells out."""
    spelled = rf"(?<!\w)(?:{'|'.join(map(re.escape, _SYMBOLS))})(?!\w)"
    return re.sub(spelled, lambda found: _SYMBOLS[found[0]], text)


def _over_threshold(check: Any) -> float | None:
    """Returns the number in units of the threshold, at most 1 where the check holds."""
    number, threshold = finite(check["number"]), check["threshold"]
    if number is None:
        return None
    above, below = (
        (number, threshold) if check["relation"] == "<=" else (threshold, number)
    )
    return above / below if below > 0 else (np.inf if above > 0 else 1.0)


def _legend_above(axis: Axes, ncols: int) -> None:
    """Draws a legend between the title and the axes, where it covers no line."""
    narrow: Any = {"handlelength": 1.2, "columnspacing": 0.8, "handletextpad": 0.4}
    place: Any = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}
    axis.legend(ncols=ncols, borderaxespad=0.1, **place, **narrow)
    rows = math.ceil(len(axis.get_legend_handles_labels()[1]) / ncols)
    axis.set_title(axis.get_title(), pad=4 + 11 * rows)


def _numbers(values: Any) -> np.ndarray:
    """Returns an array of floats, NaN for null."""
    return np.array(np.asarray(values, dtype=object), dtype=np.float64)


def _dotted(axis: Axes, value: float) -> None:
    """Draws a threshold as a dotted line."""
    axis.axhline(value, color=_GREY, linestyle=":", linewidth=0.9, label="threshold")


def _from_zero(axis: Axes) -> None:
    """Shows 0 at the bottom, or all of what lies below it, such as a falling slope."""
    if axis.dataLim.y0 >= 0:
        axis.set_ylim(bottom=0)


def _heat(
    figure: SubFigure, axis: Axes, values: Any, label: str, top: float | None = None
) -> None:
    """Draws a matrix over blocks from its smallest positive entry up.

    Zeros are white, below the color bar, and what is undefined is hatched.
    """
    matrix = _numbers(values)
    positive = matrix[matrix > 0]
    low, high = (positive.min(), positive.max()) if positive.size else (0.1, 1.0)
    high = top or high
    norm = LogNorm(low, high if high > low else low * 1.01)
    axis.patch.set(facecolor="0.93", edgecolor="0.7", hatch="/////")
    colors = mpl.colormaps["viridis"].with_extremes(under="white")
    mesh = axis.imshow(np.maximum(matrix, low / 2), norm=norm, cmap=colors)
    ends = "min" if (matrix <= 0).any() else "neither"
    bar = figure.colorbar(mesh, ax=axis, shrink=0.9, label=label, extend=ends)
    bar.outline.set_linewidth(0.6)
    if not positive.size:
        say_empty(axis, "none is above 0" if (matrix == 0).any() else "undefined")
    if high < 10 * low:  # no or one decade is in view
        bar.ax.yaxis.set_major_formatter(ScalarFormatter())
        bar.ax.yaxis.set_minor_formatter(ScalarFormatter())
    ticks = range(0, len(matrix), max(1, len(matrix) // 8))
    axis.set_xticks(ticks)
    axis.set_yticks(ticks)
    axis.spines[:].set_visible(True)


def _series(
    axis: Axes, at: Any, values: np.ndarray, style: str, *, color: str, label: str
) -> None:
    """Draws one quantity, or writes that all of it is undefined."""
    if np.isfinite(values).any():
        axis.plot(at, values, style, color=color, markersize=3, label=label)
        return
    place = (0.04, 0.04 + 0.1 * len(axis.texts))  # one above the other
    look: Any = {"color": color, "fontsize": "small", "transform": axis.transAxes}
    axis.text(*place, f"{label}: undefined", **look)


def _influence_shares(axis: Axes, found: Any) -> None:
    for point, color in zip(found["condition1"]["points"], (_RED, _BLUE), strict=False):
        held = np.cumsum(_numbers(point["share_by_distance"]))
        label = f"step {point['step']}"
        _series(axis, range(len(held)), held, "o-", color=color, label=label)
    size = len(found["blocks"])
    distance = np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
    even = np.cumsum(np.bincount(distance.reshape(-1))) / size**2
    axis.plot(even, color=_GREY, linewidth=0.9, label="even influence")
    _dotted(axis, found["options"]["thresholds"]["influence_share"])
    band = find_check(found, "condition1", "band with")
    axis.axvline(band["threshold"], color=_GREY, linestyle=":", linewidth=0.9)
    axis.set_title("1: squared influence in a band")
    axis.set_ylabel("share")
    axis.set(xlabel=r"distance $|l - m|$", ylim=(0, 1.03))
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    _legend_above(axis, 2)


def _coherence_profile(axis: Axes, found: Any) -> None:
    profile = _numbers(found["condition2"]["profile"])
    distances = range(len(profile))
    _series(axis, distances, profile, "o-", color=_BLUE, label="largest coherence")
    thresholds = found["options"]["thresholds"]
    _dotted(axis, thresholds["max_distant_coherence"])
    axis.axvline(thresholds["distant"], color=_GREY, linestyle=":", linewidth=0.9)
    tail = find_check(found, "condition2", "tail sum")
    axis.set_title(
        f"2: tail sum {number_with_error(tail)} "
        rf"(allowed: $\leq$ {sides(tail)[1]})"
    )
    axis.set(xlabel=r"distance $|l - m|$", ylim=(0, 1.03))
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    _legend_above(axis, 2)


def _norms(axis: Axes, found: Any) -> None:
    """Both norms with the growth that is allowed, and the Lipschitz constant."""
    part, thresholds = found["condition3"], found["options"]["thresholds"]
    for name, label, color in (
        ("jacobian", r"$\Vert J\,\Vert$", _BLUE),
        ("derivative", r"$\Vert\dot J\,\Vert$", _RED),
    ):
        values = _numbers([point[name] for point in part["norms"]])
        _series(axis, found["steps"], values, "o-", color=color, label=label)
        limit = values[0] * thresholds["max_growth"]
        axis.axhline(limit, color=color, linestyle=":", linewidth=0.9)
    lipschitz = _numbers(part["lipschitz"])
    _series(axis, found["steps"], lipschitz, "s--", color=_GREEN, label="Lipschitz")
    axis.axhline(
        thresholds["max_lipschitz"], color=_GREEN, linestyle=":", linewidth=0.9
    )
    axis.set(yscale="log", xlabel="step")
    axis.set_title("3: norms (dotted: allowed)")
    _legend_above(axis, 3)


def _drift(axis: Axes, found: Any) -> None:
    part, steps = found["condition3"], found["steps"][1:]
    leading = _numbers([point["frobenius"] for point in part["leading_drift"]])
    _series(axis, steps, leading, "o-", color=_BLUE, label="leading")
    shells = _numbers(part["shell_drift"]["drift"]).reshape(len(steps), -1)
    total, number = np.nansum(shells, axis=1), np.isfinite(shells).sum(axis=1)
    means = np.where(number > 0, total / np.maximum(number, 1), np.nan)
    _series(axis, steps, means, "s--", color=_GREEN, label="mean shell")
    _dotted(axis, found["options"]["thresholds"]["max_drift"])
    axis.set(xlabel="step", ylim=(0, 1.03), title="3: drift of spectral projectors")
    _legend_above(axis, 3)


def _invariance(axis: Axes, found: Any) -> None:
    thresholds = found["options"]["thresholds"]
    for name, label, style, color in (
        ("toeplitz_centre", "residual", "o-", _BLUE),
        ("slope", "slope", "s--", _RED),
        ("r_squared", "$R^2$", "^:", _GREEN),
    ):
        values = _numbers([point[name] for point in found["condition4"]["points"]])
        _series(axis, found["steps"], values, style, color=color, label=label)
    off = thresholds["max_slope_error"]
    allowed: Any = {"color": _RED, "alpha": 0.08, "linewidth": 0}
    axis.axhspan(1 - off, 1 + off, **allowed, label="slope allowed")
    for name, color in (("max_residual", _BLUE), ("min_r_squared", _GREEN)):
        axis.axhline(thresholds[name], color=color, linestyle=":", linewidth=0.9)
    axis.plot([], [], ":", color=_GREY, linewidth=0.9, label="threshold")
    axis.set(xlabel="step", title="4: log-shift invariance")
    _from_zero(axis)
    _legend_above(axis, 2)


def _layers(axis: Axes, found: Any) -> None:
    layers = found["layers"]
    for name, label, style, color in (
        ("toeplitz_residual", "residual", "o-", _BLUE),
        ("slope", "slope", "s--", _RED),
    ):
        values = _numbers([block[name] for block in layers["blocks"]])
        _series(axis, range(len(values)), values, style, color=color, label=label)
    average = float(_numbers(layers["depth_average"]["toeplitz_residual"]))
    ends = np.array([0, len(layers["blocks"]) - 1])
    _series(axis, ends, average + 0 * ends, "-", color=_BLUE, label="depth average")
    axis.axhline(1, color=_RED, linestyle=":", linewidth=0.9, label="slope 1")
    axis.set_title("additive structure, last point")
    names = [name.replace("_", " ") for name in found["blocks"]]
    ticks = range(0, len(names), max(1, len(names) // 8))
    labels = [f"{names[tick]}: {tick}" for tick in ticks]
    axis.set_xticks(ticks, labels, rotation=90, fontsize="small")
    _from_zero(axis)
    _legend_above(axis, 2)
