"""The tables of the study, from its files alone."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from grsd_jax.experiments.config import TITLES
from grsd_jax.experiments.study_claims import (
    CHOICES,
    CLAIMS,
    Interval,
    Study,
    Verdict,
    depends_on,
    draws_of,
    interval_of,
    verdicts,
)
from grsd_jax.experiments.study_plan import CONTROLS, NETWORKS
from grsd_jax.experiments.tables import aligned

_SHOWN = {
    "slope": "slope",
    "r_squared": "R^2",
    "renormalized_edge": "edge",
    "renormalized_centre": "centre",
    "renormalized": "renormalized residual",
    "literal": "literal residual",
    "inter_over_intra": "neighbours / inside",
}


def format_study(study: Study) -> str:
    """Writes all tables of a study.

    Args:
        study: The study.

    Returns:
        Four tables, valid as Markdown: the numbers of the base, the claims with their
        verdicts, the verdicts under every choice, and the controls.
    """
    found = verdicts(study)
    tables = (
        _numbers(study),
        _claims(found),
        _choices(found),
        _controls(study),
    )
    return "\n\n".join(aligned(rows) for rows in tables)


def _numbers(study: Study) -> list[list[str]]:
    """The base's numbers of each network, with the accuracies."""
    draws = draws_of(study, "base")
    rows = [["network", "test accuracy", *_SHOWN.values()]]
    for network in NETWORKS:
        accuracies = [
            study.info["test_accuracy"][f"seed{seed}-{network}"] for seed in study.seeds
        ]
        told = ", ".join(f"{accuracy:.3f}" for accuracy in accuracies)
        numbers = [written(interval_of(draws(name, network))) for name in _SHOWN]
        rows.append([TITLES[network], told, *numbers])
    return rows


def _claims(found: Mapping[str, Mapping[str, Verdict]]) -> list[list[str]]:
    """The claims, one row for each check, the verdict beside the first."""
    rows = [["claim", "number", "estimate [interval]", "to be", "verdict"]]
    for claim in CLAIMS:
        verdict = found["base"][claim.name]
        word = verdict.word
        turned = depends_on(found, claim.name)
        if turned:
            word += ", depends on: " + "; ".join(CHOICES[name] for name in turned)
        for index, (check, number) in enumerate(
            zip(claim.checks, verdict.numbers, strict=True)
        ):
            bound = f"{'<=' if check.at_most else '>='} {check.threshold:g}"
            first = index == 0
            rows.append(
                [
                    f"{claim.text} ({claim.source})" if first else "",
                    check.text,
                    written(number),
                    bound,
                    word if first else "",
                ]
            )
    return rows


def _choices(found: Mapping[str, Mapping[str, Verdict]]) -> list[list[str]]:
    """The verdict of every claim under every choice."""
    rows = [["choice", *(claim.name for claim in CLAIMS)]]
    for choice, by_claim in found.items():
        rows.append([CHOICES[choice], *(by_claim[c.name].word for c in CLAIMS)])
    return rows


def _controls(study: Study) -> list[list[str]]:
    """The controls' numbers, which are known by construction."""
    rows = [["control", "network", *_SHOWN.values()]]
    for control in CONTROLS:
        draws = draws_of(study, control.name)
        for network in NETWORKS:
            numbers = [written(interval_of(draws(name, network))) for name in _SHOWN]
            rows.append([control.text, TITLES[network], *numbers])
    return rows


def written(number: Interval) -> str:
    """Writes a number and its interval; "n/a" where undefined.

    Args:
        number: The number.

    Returns:
        Such as ``"0.912 [0.871, 0.951]"``.
    """
    if not np.isfinite(number.estimate):
        return "n/a"
    return f"{number.estimate:.3f} [{number.low:.3f}, {number.high:.3f}]"


def depth_table(sweep: Mapping[str, Any]) -> str:
    """Writes how the coupling follows the depth, from the rows of a sweep.

    Args:
        sweep: The contents of ``sweep.json``.

    Returns:
        A table: the rank correlation with depth of the central Toeplitz residual, the
        distance of the slope to 1 and R^2, each with the range over seeds.
    """
    columns = {
        "central residual": lambda row: row["toeplitz_center"],
        "|slope - 1|": lambda row: _minus_one(row["slope"]),
        "R^2": lambda row: row["r_squared"],
    }
    rows = [["network", "depths", *(f"{name} with depth" for name in columns)]]
    groups: dict[tuple[Any, Any], list[Mapping[str, Any]]] = {}
    for row in sweep["rows"]:
        groups.setdefault((row["model"], row["branch_scale"]), []).append(row)
    for (model, scale), members in groups.items():
        title = TITLES[model] + (f", s = {scale:g}" if scale else "")
        depths = sorted({row["depth"] for row in members})
        cells = []
        for value in columns.values():
            found = [
                rank_correlation(
                    [row["depth"] for row in members if row["seed"] == seed],
                    [value(row) for row in members if row["seed"] == seed],
                )
                for seed in sorted({row["seed"] for row in members})
            ]
            mean = np.mean(found)
            cells.append(f"{mean:+.2f} [{min(found):+.2f}, {max(found):+.2f}]")
        rows.append([title, ", ".join(str(depth) for depth in depths), *cells])
    return aligned(rows)


def _minus_one(slope: float | None) -> float | None:
    return None if slope is None else abs(slope - 1)


def rank_correlation(x: list[Any], y: list[Any]) -> float:
    """Returns Spearman's rank correlation of the pairs whose y is defined.

    Args:
        x: Numbers.
        y: Numbers, or None.

    Returns:
        A number between -1 and 1; NaN with fewer than three pairs.
    """
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if b is not None]
    if len(pairs) < 3:
        return float("nan")
    ranks = np.argsort(np.argsort(np.array(pairs, np.float64), axis=0), axis=0)
    return float(np.corrcoef(ranks.T)[0, 1])
