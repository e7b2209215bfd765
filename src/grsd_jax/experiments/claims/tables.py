"""The tables of the study, from its files alone."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from grsd_jax.experiments.claims.claims import (
    CHOICES,
    CLAIMS,
    Claim,
    Interval,
    Study,
    Verdict,
    depends_on,
    draws_of,
    interval_of,
    verdicts,
)
from grsd_jax.experiments.claims.plan import CONTROLS, NETWORKS
from grsd_jax.experiments.common.config import TITLES
from grsd_jax.experiments.reproduce.tables import aligned

_SHOWN = {
    "slope": "slope",
    "r_squared": "R^2",
    "renormalized_edge": "edge",
    "renormalized_centre": "centre",
    "renormalized": "renormalized residual",
    "literal": "literal residual",
    "inter_over_intra": "neighbours / inside",
}


def study_tables(study: Study) -> list[list[list[str]]]:
    """Makes all tables of a study.

    Args:
        study: The study.

    Returns:
        Four tables of rows of cells, headings first: the numbers of the base, the
        claims with their verdicts, the verdicts under every choice, and the controls.
    """
    found = verdicts(study)
    return [
        _numbers(study),
        claim_rows(CLAIMS, found["base"], turned=partial(depends_on, found)),
        _choices(found),
        _controls(study),
    ]


def format_study(study: Study) -> str:
    """Writes all tables of a study.

    Args:
        study: The study.

    Returns:
        The tables of `study_tables`, valid as Markdown.
    """
    return "\n\n".join(aligned(rows) for rows in study_tables(study))


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


def claim_rows(
    claims: Sequence[Claim],
    found: Mapping[str, Verdict],
    *,
    turned: Callable[[str], Mapping[str, list[str]]] = lambda _: {},
) -> list[list[str]]:
    """Lists claims, one row for each check, the verdict beside the first.

    Args:
        claims: The claims.
        found: The verdicts by the names of the claims.
        turned: From a claim's name to other verdicts, and the choices behind them.

    Returns:
        Rows of cells, headings first.
    """
    rows = [["claim", "number", "estimate [interval]", "to be", "verdict"]]
    for claim in claims:
        verdict = found[claim.name]
        word = verdict.word
        for other, choices in turned(claim.name).items():
            named = ", ".join(CHOICES[choice] for choice in choices)
            word += f"; depends on: {other} with {named}"
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
