"""The claim about depth, held against the rows of a sweep.

Theorem 2 and Proposition 1 of the paper say that residual networks come closer to
log-shift invariance with depth. In a sweep it comes to rank correlations with the
depth, one for every seed; their mean is judged by its bootstrap over the seeds.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import scipy.stats

from grsd_jax.experiments.claims.claims import Check, Claim, Draws, judge
from grsd_jax.experiments.claims.tables import claim_rows
from grsd_jax.experiments.common.config import RESIDUAL, TITLES

Row = Mapping[str, Any]

_NUM_DRAWS = 4000

#: What makes a network of a sweep, but for its depth and seed.
_NETWORK = ("model", "branch_scale", "width", "activation")

#: What should change with depth, and whether it should fall.
_QUANTITIES: dict[str, tuple[str, Callable[[Row], float | None], bool]] = {
    "centre": ("central residual", lambda row: row["toeplitz_center"], True),
    "distance": ("|slope - 1|", lambda row: _distance(row["slope"]), True),
    "r_squared": ("R^2", lambda row: row["r_squared"], False),
}


def depth_rows(sweep: Mapping[str, Any]) -> list[list[str]]:
    """Judges the effect of depth on every network of a sweep.

    Args:
        sweep: The contents of ``sweep.json``.

    Returns:
        Rows of cells, headings first: for every network and branch scale the rank
        correlations with depth of the central Toeplitz residual, the distance of the
        slope to 1 and R^2. The claim is about the residual networks; the verdict of
        the others says whether they do the same.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in sweep["rows"]:
        groups.setdefault(tuple(row[name] for name in _NETWORK), []).append(row)
    several = [len({group[i] for group in groups}) > 1 for i in range(len(_NETWORK))]
    claims, found = [], {}
    for group, members in groups.items():
        model, scale, width, activation = group
        title = TITLES[model] + (f", s = {scale:g}" if scale else "")
        title += f", w = {width}" if several[2] else ""
        title += f", {activation}" if several[3] and activation else ""
        depths = sorted({row["depth"] for row in members})
        claim = _claim(title, depths, claimed=model in RESIDUAL)
        claims.append(claim)
        found[claim.name] = judge(claim, _draws(members))
    return claim_rows(claims, found)


def _claim(title: str, depths: list[int], *, claimed: bool) -> Claim:
    told = ", ".join(str(depth) for depth in depths)
    return Claim(
        title,
        f"{title}: nearer to Condition 4 with depth {told}",
        "Theorem 2" if claimed else "not claimed",
        tuple(
            Check(f"rank correlation, {text}", lambda q, n=name: q(n, ""), falls, 0.0)
            for name, (text, _, falls) in _QUANTITIES.items()
        ),
    )


def _draws(rows: list[Row]) -> Draws:
    """Returns draws of the mean rank correlation over seeds, the estimate first."""
    seeds = sorted({row["seed"] for row in rows})
    rng = np.random.default_rng(0)
    picked = rng.integers(0, len(seeds), (_NUM_DRAWS, len(seeds)))

    def draws(quantity: str, _: str) -> np.ndarray:
        value = _QUANTITIES[quantity][1]
        each = np.array(
            [
                rank_correlation(
                    [row["depth"] for row in rows if row["seed"] == seed],
                    [value(row) for row in rows if row["seed"] == seed],
                )
                for seed in seeds
            ]
        )
        return np.concatenate([[each.mean()], each[picked].mean(axis=1)])

    return draws


def _distance(slope: float | None) -> float | None:
    return None if slope is None else abs(slope - 1)


def rank_correlation(x: list[Any], y: list[Any]) -> float:
    """Returns Spearman's rank correlation of the pairs whose y is defined.

    Equal numbers share the mean of their ranks.

    Args:
        x: Numbers.
        y: Numbers, or None.

    Returns:
        A number between -1 and 1; NaN with fewer than three pairs, or if all x or all y
        are equal.
    """
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if b is not None]
    if len(pairs) < 3:
        return float("nan")
    if any(len(set(values)) == 1 for values in zip(*pairs, strict=True)):
        return float("nan")
    return float(scipy.stats.spearmanr(pairs).statistic)
