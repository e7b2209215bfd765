"""The figure of the documentation's page, from ``results.json`` alone."""

import itertools
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("agg")

import matplotlib.pyplot as plt

from comparison.grid import PEERS, TASKS
from comparison.table import problem_title, task_title
from comparison.targets import best, cost

Record = dict[str, Any]


def relative_times(rows: list[Record]) -> dict[tuple[str, str], dict[str, float]]:
    """Returns each peer's best time over ours, by problem and task.

    Args:
        rows: Those of ``results.json``.

    Returns:
        ``{(problem, task): {peer: ratio}}`` where ours and at least one peer's result
        count.
    """
    found: dict[tuple[str, str], dict[str, float]] = {}
    for problem in dict.fromkeys(row["problem"] for row in rows):
        for task in TASKS:
            ours = best(rows, problem, task, "grsd_jax")
            if ours is None:
                continue
            others = {
                peer: best(rows, problem, task, peer)
                for peer in PEERS
                if peer != "grsd_jax"
            }
            ratios = {p: cost(row) / cost(ours) for p, row in others.items() if row}
            if ratios:
                found[problem, task] = ratios
    return found


def draw(rows: list[Record], path: Path) -> None:
    """Draws the best time of each peer over ours, on a log axis.

    Args:
        rows: Those of ``results.json``.
        path: The PNG to write.
    """
    groups = relative_times(rows)
    colors = dict(zip(PEERS, plt.colormaps["tab10"].colors, strict=False))
    bars = [
        (group, peer, ratio)
        for group, ratios in groups.items()
        for peer, ratio in sorted(ratios.items(), key=lambda item: item[1])
    ]
    gaps = np.cumsum([0, *(a[0] != b[0] for a, b in itertools.pairwise(bars))])
    places = np.arange(len(bars)) + gaps[: len(bars)]
    figure, axes = plt.subplots(
        figsize=(8, 1.2 + 0.22 * (len(bars) + len(groups))), layout="constrained"
    )
    for place, (_, peer, ratio) in zip(places, bars, strict=True):
        axes.barh(place, ratio, color=colors[peer])
        axes.annotate(
            f"{PEERS[peer].title}  {ratio:.2f}",
            (ratio, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    centers = [
        np.mean([p for p, bar in zip(places, bars, strict=True) if bar[0] == group])
        for group in groups
    ]
    labels = [f"{problem_title(p)}\n{task_title(t)}" for p, t in groups]
    axes.set_yticks(centers, labels, fontsize=7)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.margins(x=0.25)
    axes.invert_yaxis()
    axes.set_xlabel("time over that of grsd_jax (1 is equal, more is slower)")
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
