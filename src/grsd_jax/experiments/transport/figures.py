"""The figures of the study, from ``transport.json`` alone."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from grsd_jax.experiments.common import files
from grsd_jax.experiments.common.config import TITLES
from grsd_jax.experiments.common.intervals import t_interval
from grsd_jax.experiments.common.plotting import (
    PAGE_WIDTH,
    draw_mean,
    look_of,
    save_figures,
    shared_legend,
)
from grsd_jax.experiments.transport.analyse import (
    Runs,
    arms_of,
    reading_of,
    runs_by_network,
    value_of,
)
from grsd_jax.experiments.transport.quantities import STATISTICS

#: Titles of the statistics, in two lines so that they stay clear of each other.
_SPREADS = (
    "size",
    "spread\nover edges",
    "spread over\nintervals",
    "over edges,\nrelative",
    "over intervals,\nrelative",
)

#: What the time resolution shows.
_LOOKS = {
    "non_adjacent_share": "share between\nnon-adjacent shells",
    "moved": "moved, $\\frac{1}{2}\\sum |T_{ab}|\\;/\\;|e\\,|^2$",
    "flux": "mean of $|F_k|\\;/\\;|e\\,|^2$",
}

_SEEDS = "means over seeds with their 95% intervals"
_HOLLOW = "hollow: a mean over some of the seeds, where the others are undefined"

#: How far the second network is drawn beside the first, so that no bar hides another.
_ASIDE = 1.06


def write_transport_figures(
    results: Mapping[str, Any], folder: files.PathLike
) -> list[Path]:
    """Draws the figures of every arm that has a finished pair, as PNG and PDF.

    ``transport_products_ARM`` (``(v - v^N) tau`` over the edges, for each interval),
    ``transport_spreads_ARM`` (the statistic, a line for each seed),
    ``transport_law_ARM`` (p and ``c tau`` over time), and ``transport_resolution_ARM``
    (what is seen over h steps) if the training was long enough.

    Args:
        results: The contents of ``transport.json``.
        folder: The folder to write to; it is made if need be.

    Returns:
        The files, each of which was replaced as a whole.

    Raises:
        UserError: If there is no finished pair, or the folder cannot be written.
    """
    drawings: dict[str, Callable[[], Figure]] = {}
    for arm in arms_of(results):
        runs = runs_by_network(results, arm)
        drawings[f"transport_products_{arm}"] = partial(_products, runs)
        drawings[f"transport_spreads_{arm}"] = partial(_spreads, runs)
        drawings[f"transport_law_{arm}"] = partial(_law, runs)
        if any(run["resolution"] for run in next(iter(runs.values()))):
            drawings[f"transport_resolution_{arm}"] = partial(_resolution, runs)
    return save_figures(drawings, folder)


def _products(runs: Mapping[str, Runs]) -> Figure:
    """A panel for each network, a line for each interval."""
    figure = Figure(figsize=(PAGE_WIDTH, 2.7), layout="constrained")
    axes = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for axis, (network, each) in zip(axes, runs.items(), strict=True):
        readings = [reading_of(run) for run in each]
        places = np.mean([_relative_edges(x) for x in readings], axis=0)
        products = np.array([x["products"] for x in readings], np.float64)
        steps = readings[0]["steps"]
        colors = mpl.colormaps["viridis"](np.linspace(0, 0.9, len(steps)))
        axis.axhline(0, color="0.8", linewidth=0.6, zorder=0)
        for number, (ends, color) in enumerate(zip(steps, colors, strict=True)):
            shift = 1.03 ** (number - len(steps) / 2)  # so that bars do not overlap
            _with_bars(
                axis, places * shift, products[:, number], color=color, marker="o",
                label=f"steps {ends[0]} to {ends[1]}",
            )  # fmt: skip
        axis.set(xscale="log", title=TITLES[network])
        axis.set_xlabel("edge over the largest eigenvalue")
    axes[0].set_ylabel("$(v - v^N)\\,\\tau$")
    axes[0].set_ylim(*_products_range(runs))
    shared_legend(figure, axes, loc="outside upper center")
    return figure


def _products_range(runs: Mapping[str, Runs]) -> tuple[float, float]:
    """Returns limits for the means: bars of few seeds may leave the panel."""
    products = [[reading_of(run)["products"] for run in each] for each in runs.values()]
    known = np.ma.masked_invalid(np.array(products, np.float64))
    means = np.ma.mean(known, axis=1).compressed()
    if not len(means):
        return -1.0, 1.0
    low, high = min(float(means.min()), 0.0), max(float(means.max()), 0.0)
    margin = 0.3 * max(high - low, 0.1)
    return low - margin, high + margin


def _relative_edges(reading: Mapping[str, Any]) -> np.ndarray:
    """Returns the edges over the largest eigenvalue, the same in all intervals."""
    edges = np.array(reading["edges"][0])
    return edges / edges[-1] * 10 ** (-4 / 9)


def _spreads(runs: Mapping[str, Runs]) -> Figure:
    """A column for each statistic, a line for each seed."""
    figure = Figure(figsize=(PAGE_WIDTH, 2.4), layout="constrained")
    axes = figure.subplots(1, len(STATISTICS))
    names = list(runs)
    for axis, statistic, title in zip(axes, STATISTICS, _SPREADS, strict=True):
        values = [[value_of(run, statistic) for run in runs[name]] for name in names]
        axis.plot(range(len(names)), values, "-", color="0.75", linewidth=0.7)
        for place, (name, each) in enumerate(zip(names, values, strict=True)):
            draw_mean(axis, place, t_interval(np.array(each)), look_of(name))
        axis.set_xticks(range(len(names)), [TITLES[name] for name in names])
        axis.tick_params(axis="x", labelrotation=30)
        axis.set_xlim(-0.4, len(names) - 0.6)
        axis.set_title(title, fontsize="medium")
    figure.supxlabel(f"a gray line is a seed; marks are {_SEEDS}", fontsize="small")
    return figure


def _law(runs: Mapping[str, Runs]) -> Figure:
    """The exponent and ``c tau`` of every interval, over time."""
    figure = Figure(figsize=(PAGE_WIDTH, 2.5), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, quantity, null in zip(axes, ("exponents", "means"), (1, 0), strict=True):
        axis.axhline(null, color="0.8", linewidth=0.6, zorder=0)
        axis.set(xscale="log", xlabel="effective time $\\tau$")
        axis.minorticks_off()
        for place, (network, each) in enumerate(runs.items()):
            readings = [reading_of(run) for run in each]
            times = np.array(readings[0]["times"], np.float64)
            values = np.array([x[quantity] for x in readings], np.float64)
            look = look_of(network)
            axis.set_xticks(times, [f"{time:.2g}" for time in times])
            beside = times * _ASIDE**place
            _with_bars(
                axis, beside, values, color=look.color, marker=look.marker,
                label=TITLES[network],
            )  # fmt: skip
    axes[0].set_ylabel("exponent $p$ of $v - v^N$")
    axes[1].set_ylabel("$c\\,\\tau$")
    shared_legend(figure, axes, loc="outside upper center")
    return figure


def _resolution(runs: Mapping[str, Runs]) -> Figure:
    """What is seen over h steps, the mean of the starts of each seed."""
    figure = Figure(figsize=(PAGE_WIDTH, 2.5), layout="constrained")
    axes = figure.subplots(1, len(_LOOKS))
    for axis, (quantity, label) in zip(axes, _LOOKS.items(), strict=True):
        for place, (network, each) in enumerate(runs.items()):
            lengths = sorted({x["length"] for x in each[0]["resolution"]})
            values = np.array([_over_starts(run, quantity, lengths) for run in each])
            look = look_of(network)
            beside = np.array(lengths) * _ASIDE**place
            _with_bars(
                axis, beside, values, color=look.color, marker=look.marker,
                label=TITLES[network],
            )  # fmt: skip
            axis.set_xscale("log", base=2)
            axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.set(xlabel="training steps $h$", ylabel=label)
        axis.set_ylim(0, 1 if quantity == "non_adjacent_share" else None)
    shared_legend(figure, axes, loc="outside upper center")
    return figure


def _over_starts(
    run: Mapping[str, Any], quantity: str, lengths: Sequence[int]
) -> list[float]:
    """Returns the mean over the starts at each length."""
    looks = run["resolution"]
    return [
        float(np.mean([_float(x[quantity]) for x in looks if x["length"] == length]))
        for length in lengths
    ]


def _with_bars(
    axis: Axes, places: np.ndarray, values: np.ndarray, *, color: Any, marker: str,
    label: str,
) -> None:  # fmt: skip
    """Draws means over seeds, ``[seeds, places]``, of those that are known there.

    Hollow where some are not.
    """
    known = [column[np.isfinite(column)] for column in values.T]
    some = np.array([0 < len(column) < len(values) for column in known])
    found = [t_interval(x if len(x) else np.array([np.nan])) for x in known]
    means = np.array([x.mean for x in found])
    half = np.array([x.high - x.mean for x in found])
    axis.errorbar(
        places, means, np.where(np.isfinite(half), half, 0), color=color,
        marker=marker, markersize=3, elinewidth=0.7, label=label,
    )  # fmt: skip
    if some.any():
        axis.plot(
            places[some], means[some], marker, color=color, markersize=3,
            markerfacecolor="white", zorder=3,
        )  # fmt: skip
        axis.figure.supxlabel(_HOLLOW, fontsize="small")


def _float(value: Any) -> float:
    return float("nan") if value is None else float(value)
