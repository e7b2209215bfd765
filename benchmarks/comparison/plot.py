"""The figure of the documentation's page, from ``results.json`` alone."""

import itertools
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt

from comparison.grid import PEERS, TASKS
from comparison.table import problem_title, task_title
from comparison.targets import best, cost

Record = dict[str, Any]

#: Width of the figure in inches: its text is legible in a column and on a page.
WIDTH = 4.2

#: Colors (Okabe and Ito's palette) and markers of the peers.
LOOKS = (
    ("#D55E00", "s"),
    ("#0072B2", "o"),
    ("#009E73", "^"),
    ("#E69F00", "D"),
    ("#CC79A7", "v"),
    ("#56B4E9", "P"),
    ("0.35", "X"),
    ("#332288", "<"),
)


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
    """Draws the best time of each peer over ours, a row for each task, on a log axis.

    Args:
        rows: Those of ``results.json``.
        path: The PNG to write.
    """
    groups = relative_times(rows)
    drawn = [peer for peer in PEERS if any(peer in found for found in groups.values())]
    figure, axes = plt.subplots(
        figsize=(WIDTH, 1.4 + 0.32 * len(groups)), layout="constrained"
    )
    axes.axvline(1.0, color="0.4", linewidth=0.8, zorder=0)
    for place in range(0, len(groups), 2):
        axes.axhspan(place - 0.5, place + 0.5, color="0.95", linewidth=0, zorder=-1)
    for peer, (color, marker) in zip(drawn, itertools.cycle(LOOKS), strict=False):
        found = [
            (
                ratios[peer],
                place + 0.17 * (list(ratios).index(peer) - (len(ratios) - 1) / 2),
            )
            for place, ratios in enumerate(groups.values())
            if peer in ratios
        ]
        axes.plot(
            *zip(*found, strict=True),
            marker,
            color=color,
            markersize=5,
            markeredgecolor="white",
            markeredgewidth=0.5,
            label=PEERS[peer].title,
        )
    labels = [f"{problem_title(p)}: {task_title(t)}" for p, t in groups]
    axes.set_yticks(range(len(groups)), labels, fontsize=7)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_xscale("log")
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(
        "time over that of grsd_jax\n(right of the line is slower)", fontsize=8
    )
    narrow = {"handletextpad": 0.2, "columnspacing": 1.0, "frameon": False}
    figure.legend(loc="outside upper center", ncols=3, fontsize=7, **narrow)
    figure.savefig(path, dpi=300, metadata={"Software": None})
    plt.close(figure)
