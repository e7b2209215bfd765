"""The figure of the study, from ``claims.json`` alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from grsd_jax.experiments.claims.analyse import QUANTITIES, values_by_seed
from grsd_jax.experiments.claims.run import NETWORKS, REDUCTIONS
from grsd_jax.experiments.common import files
from grsd_jax.experiments.common.config import TITLES
from grsd_jax.experiments.common.intervals import t_interval
from grsd_jax.experiments.common.plotting import (
    PAGE_WIDTH,
    draw_mean,
    look_of,
    save_figures,
)

#: Titles of the quantities, in two lines so that they stay clear of each other.
_HEADINGS = (
    "slope of the\ndiagonal",
    "$R^2$ of the\ndiagonal",
    "Toeplitz\nresidual",
    "Toeplitz\nresidual, edge",
    "Toeplitz\nresidual, center",
)


def write_claims_figure(
    results: Mapping[str, Any], folder: files.PathLike
) -> list[Path]:
    """Draws every quantity of both networks, ``claims.png`` and ``claims.pdf``.

    Args:
        results: The contents of ``claims.json``.
        folder: The folder to write to; it is made if need be.

    Returns:
        The files, each of which was replaced as a whole.

    Raises:
        UserError: If there are no rows, or the folder cannot be written.
    """
    return save_figures({"claims": lambda: _pairs(results)}, folder)


def _pairs(results: Mapping[str, Any]) -> Figure:
    """A row for each reduction, a column for each quantity, a line for each seed."""
    figure = Figure(figsize=(PAGE_WIDTH, 4.0), layout="constrained")
    grid = figure.subplots(len(REDUCTIONS), len(QUANTITIES), sharex=True, sharey="col")
    for reduction, axes in zip(REDUCTIONS, grid, strict=True):
        for quantity, axis in zip(QUANTITIES, axes, strict=True):
            _pair(axis, values_by_seed(results, reduction, quantity))
        axes[0].set_ylabel(f"batches: {reduction}")
    for heading, axis in zip(_HEADINGS, grid[0], strict=True):
        axis.set_title(heading, fontsize="medium")
    figure.supxlabel(
        "a gray line is a seed; marks are means with their 95% intervals",
        fontsize="small",
    )
    return figure


def _pair(axis: Axes, values: Mapping[str, Any]) -> None:
    """Joins the networks of each seed; the means have their intervals."""
    axis.plot(
        range(len(NETWORKS)), [values[network] for network in NETWORKS], "-",
        color="0.75", linewidth=0.7,
    )  # fmt: skip
    for place, network in enumerate(NETWORKS):
        draw_mean(axis, place, t_interval(values[network]), look_of(network))
    axis.set_xticks(range(len(NETWORKS)), [TITLES[network] for network in NETWORKS])
    axis.tick_params(axis="x", labelrotation=30)
    axis.set_xlim(-0.4, len(NETWORKS) - 0.6)
