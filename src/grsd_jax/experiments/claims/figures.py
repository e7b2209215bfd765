"""The figures of the study, from its files alone."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from grsd_jax.experiments.claims.claims import (
    CHOICES,
    CLAIMS,
    Study,
    cell_arrays,
    draws_of,
    interval_of,
    verdicts,
)
from grsd_jax.experiments.claims.plan import CONTROLS, NETWORKS
from grsd_jax.experiments.common import records
from grsd_jax.experiments.common.config import TITLES
from grsd_jax.experiments.reproduce.figures import LOOKS, PAGE_WIDTH, save_figures


def write_study_figures(study: Study, folder: records.PathLike) -> list[Path]:
    """Draws the figures of a study, each as a PNG and a PDF.

    ``study_windows`` (Toeplitz residual against window position, every seed),
    ``study_diagonal`` (the diagonal of every seed with the slope 1), ``study_choices``
    (slope, R^2 and residuals under every choice, with intervals) and ``study_verdicts``
    (the verdict of every claim under every choice).

    Args:
        study: The study.
        folder: The folder to write to; it is made if need be.

    Returns:
        The files, each of which was replaced as a whole.

    Raises:
        UserError: If the folder cannot be written.
    """
    drawings: dict[str, Callable[[], Figure]] = {
        "study_windows": lambda: _windows(study),
        "study_diagonal": lambda: _diagonal(study),
        "study_choices": lambda: _choices(study),
        "study_verdicts": lambda: _verdicts(study),
    }
    return save_figures(drawings, folder)


def _windows(study: Study) -> Figure:
    """Thin lines for the seeds, thick ones for their mean."""
    figure = Figure(figsize=(PAGE_WIDTH, 2.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for kind, axis in enumerate(axes):
        axis.set_title(("literal coupling", "renormalised coupling")[kind])
        axis.set(xlabel="position of the window in the spectrum", ylim=(0, 1.02))
        for network in NETWORKS:
            color, marker, line = LOOKS[network, "own"]
            lines = np.array(
                [
                    cell_arrays(study, seed, network, "base")["windows"][kind]
                    for seed in study.seeds
                ]
            )
            place = np.linspace(0, 1, lines.shape[1])
            axis.plot(place, lines.T, line, color=color, linewidth=0.6, alpha=0.5)
            axis.plot(
                place, lines.mean(axis=0), line, marker=marker, color=color,
                markersize=4, label=TITLES[network],
            )  # fmt: skip
    axes[0].set_ylabel("relative Toeplitz residual")
    axes[1].legend()
    return figure


def _diagonal(study: Study) -> Figure:
    """The diagonal against the eigenvalues, all seeds in one panel a network."""
    figure = Figure(figsize=(PAGE_WIDTH, 2.8), layout="constrained")
    axes = figure.subplots(1, len(NETWORKS), sharex=True, sharey=True)
    draws = draws_of(study, "base")
    for axis, network in zip(axes, NETWORKS, strict=True):
        color, _, _ = LOOKS[network, "own"]
        for seed in study.seeds:
            cell = cell_arrays(study, seed, network, "base")
            shown = cell["used"] & (cell["diagonal"] > 0)
            axis.plot(
                cell["values"][shown], cell["diagonal"][shown], ".", color=color,
                alpha=0.4, markersize=3.5, markeredgewidth=0,
            )  # fmt: skip
        slope = interval_of(draws("slope", network))
        square = interval_of(draws("r_squared", network))
        axis.set(xscale="log", yscale="log", xlabel=r"eigenvalue $\lambda_i$")
        axis.set_title(
            f"{TITLES[network]}: slope {slope.estimate:.2f} "
            f"[{slope.low:.2f}, {slope.high:.2f}], $R^2$ = {square.estimate:.2f}"
        )
        _guide(axis)
    axes[0].set_ylabel(r"diagonal coupling $|\dot{M}_{ii}\,|$")
    return figure


def _guide(axis: Axes) -> None:
    """Draws the slope 1 through the middle of the points."""
    points = np.log(np.concatenate([line.get_xydata() for line in axis.lines]))
    middle, ends = points.mean(axis=0), np.array([points.min(0)[0], points.max(0)[0]])
    axis.plot(
        np.exp(ends), np.exp(middle[1] + ends - middle[0]), ":", color="0.45", lw=1
    )


def _choices(study: Study) -> Figure:
    """A row for every choice and control, a column for every quantity."""
    shown = {
        "slope": "slope",
        "r_squared": "$R^2$",
        "edge": "edge residual",
        "centre": "centre residual",
        "inter_over_intra": "between/inside",
    }
    names = [*CHOICES, *(control.name for control in CONTROLS)]
    texts = [*CHOICES.values(), *(control.text for control in CONTROLS)]
    height = 0.22 * len(names) + 0.9
    figure = Figure(figsize=(PAGE_WIDTH, height), layout="constrained")
    axes = figure.subplots(1, len(shown), sharey=True)
    place = np.arange(len(names))[::-1]
    for axis, (quantity, title) in zip(axes, shown.items(), strict=True):
        for offset, network in zip((0.14, -0.14), NETWORKS, strict=True):
            color, marker, _ = LOOKS[network, "own"]
            numbers = [
                interval_of(draws_of(study, name)(quantity, network)) for name in names
            ]
            axis.hlines(
                place + offset, [n.low for n in numbers], [n.high for n in numbers],
                color=color, linewidth=1.2,
            )  # fmt: skip
            axis.plot(
                [n.estimate for n in numbers], place + offset, marker, color=color,
                markersize=3.5, label=TITLES[network],
            )  # fmt: skip
        axis.set_title(title, fontsize="medium")
        axis.grid(axis="x", color="0.92", linewidth=0.6)
        axis.axhline(len(CONTROLS) - 0.5, color="0.7", linewidth=0.8)
    axes[-1].set_xlim(-0.1, 2.5)  # a ratio without end where its denominator is none
    axes[0].set_yticks(place, texts)
    axes[0].axvline(1, color="0.6", linewidth=0.8, zorder=0)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
    return figure


def _verdicts(study: Study) -> Figure:
    """A cell for every claim and choice, in words and colours."""
    found = verdicts(study)
    colors = {"reproduced": "#7fc7a9", "undecided": "0.93", "not reproduced": "#ecab85"}
    words = list(colors)
    figure = Figure(figsize=(PAGE_WIDTH, 0.22 * len(found) + 0.6), layout="constrained")
    axis = figure.subplots()
    cells = [
        [words.index(by_claim[claim.name].word) for claim in CLAIMS]
        for by_claim in found.values()
    ]
    axis.imshow(
        cells, cmap=ListedColormap(list(colors.values())), vmin=0, vmax=2, aspect="auto"
    )
    for row, column in np.ndindex(len(cells), len(CLAIMS)):
        word = words[cells[row][column]]
        axis.text(column, row, word, ha="center", va="center", fontsize="small")
    axis.set_xticks(range(len(CLAIMS)), [claim.name for claim in CLAIMS])
    axis.set_yticks(range(len(found)), [CHOICES[choice] for choice in found])
    axis.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    axis.spines[:].set_visible(False)
    axis.set_xticks(np.arange(len(CLAIMS) + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(len(found) + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=1.5)
    axis.tick_params(which="minor", length=0)
    return figure
