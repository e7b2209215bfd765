"""The contents of ``conditions.json``, and the tables that are made from it."""

from collections.abc import Mapping
from typing import Any

import jax

from grsd_jax.conditions import ConditionReport, ParameterBlocks, Verdict
from grsd_jax.experiments.common.quantities import coupling_quantities
from grsd_jax.experiments.common.tables import (
    MISSING,
    Legend,
    finite,
    with_legend,
)
from grsd_jax.results.text import counted, told_apart
from grsd_jax.shells import LayerMeasurements

TITLES = {
    "condition1": "1 locality",
    "condition2": "2 incoherence",
    "condition3": "3 stability",
    "condition4": "4 log-shift invariance",
}


#: What the columns of the table mean.
LEGEND: Legend = (
    "Number: what was measured, +- its error where that is known.",
    "Threshold: a convention; see the flags of grsd conditions.",
    "Undecided: the number is undefined, or an iteration behind it did not converge.",
    "Of: how many measured numbers a verdict stands on, where that is counted.",
)


def report_entry(report: ConditionReport) -> dict[str, Any]:
    """Returns the four conditions as ``conditions.json`` holds them.

    Args:
        report: The report.

    Returns:
        ``condition1`` to ``condition4``, each with its ``verdict``.
    """
    locality, incoherence = report.condition1, report.condition2
    stability, invariance = report.condition3, report.condition4
    coherence = incoherence.coherence
    return {
        "condition1": {
            "verdict": _verdict(locality.verdict),
            "points": [
                {
                    "step": int(step),
                    "influence": profile.influence,
                    "stderr": profile.stderr,
                    "num_probes": profile.num_probes,
                    "share_by_distance": share,
                    "band": band,
                }
                for step, profile, share, band in zip(
                    locality.times,
                    locality.profiles,
                    locality.shares,
                    locality.bands,
                    strict=True,
                )
            ],
        },
        "condition2": {
            "verdict": _verdict(incoherence.verdict),
            "norms": coherence.norms,
            "coherence": coherence.coherence,
            "profile": coherence.profile,
            "tail_sum": coherence.tail_sum,
            "flagged": [
                [report.blocks.names[i], report.blocks.names[j], value]
                for i, j, value in incoherence.flagged
            ],
        },
        "condition3": {
            "verdict": _verdict(stability.verdict),
            "norms": [found._asdict() for found in stability.norms],
            "leading_drift": [found._asdict() for found in stability.leading_drift],
            "shell_drift": stability.shell_drift._asdict(),
            "lipschitz": stability.lipschitz,
        },
        "condition4": {
            "verdict": _verdict(invariance.verdict),
            "points": [
                coupling_quantities(jax.device_get(measured))
                for measured in invariance.measurements
            ],
        },
    }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    checks = [check._asdict() | {"outcome": check.outcome} for check in verdict.checks]
    return {"outcome": verdict.outcome, "checks": checks}


def layers_entry(layers: LayerMeasurements, blocks: ParameterBlocks) -> dict[str, Any]:
    """Returns the additive structure as ``conditions.json`` holds it.

    Args:
        layers: The layers' measurements, by the names of the blocks.
        blocks: The partition.

    Returns:
        The quantities of each block in order of depth and of the total, and the
        Toeplitz residual of the average over depth.
    """
    return {
        "blocks": [
            {"name": name, **coupling_quantities(jax.device_get(layers.layers[name]))}
            for name in blocks.names
        ],
        "total": coupling_quantities(jax.device_get(layers.total)),
        "depth_average": {"toeplitz_residual": layers.average.residual},
    }


def find_check(found: Mapping[str, Any], condition: str, name: str) -> dict[str, Any]:
    """Returns one check of a condition.

    Args:
        found: The contents of ``conditions.json``.
        condition: A key of `TITLES`.
        name: How the check's name begins; some names go on with a setting.

    Returns:
        The check.

    Raises:
        KeyError: If the condition has no such check.
    """
    for check in found[condition]["verdict"]["checks"]:
        if check["name"].startswith(name):
            return check
    raise KeyError(f"{condition}: expected a check {name!r}, got none.")


def outcome(check: Mapping[str, Any]) -> str:
    """Returns whether a check holds, fails or is undecided, and then why.

    Args:
        check: A check of ``conditions.json``.

    Returns:
        A few words.
    """
    why = check["reason"] or ("" if check["converged"] else "not converged")
    return f"{check['outcome']}: {why}" if why else check["outcome"]


def condition_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Lists the verdicts, one row for each check.

    Args:
        found: The contents of ``conditions.json``.

    Returns:
        Rows of cells, headings first; what is undefined is "n/a".
    """
    rows = [["condition", "check", "number", "threshold", "verdict"]]
    for name, title in TITLES.items():
        for check in found[name]["verdict"]["checks"]:
            rows.append(
                [
                    title,
                    check["name"],
                    number_with_error(check),
                    f"{check['relation']} {sides(check)[1]}",
                    outcome(check) + _standing(check),
                ]
            )
    return rows


def format_conditions(found: Mapping[str, Any]) -> str:
    """Writes the verdicts as a table.

    Args:
        found: The contents of ``conditions.json``.

    Returns:
        The table of `condition_rows` with its legend; under it, for a state-space
        model, what Proposition 2 says.
    """
    parts = [with_legend([condition_rows(found)], LEGEND)]
    if found.get("propagation"):
        parts.append(format_propagation(found["propagation"]))
    return "\n\n".join(parts)


def format_propagation(found: Mapping[str, Any]) -> str:
    """Writes what Proposition 2 says of a state-space model, in one sentence.

    Args:
        found: ``propagation`` of ``conditions.json``.

    Returns:
        The sentence; ``rho >= 1`` is told as outside the condition, and an influence
        that is undefined as not compared.
    """
    start = f"Proposition 2, rho = {found['rho']:g}, squared error: "
    if not found["in_condition"]:
        return start + "outside the condition rho < 1, no range is predicted."
    if not found.get("defined", True):  # which older files do not say
        return start + "an influence is not finite, or all are 0: nothing was compared."
    place = "under" if found["below_bound"] else "NOT under"
    measured = found["measured_range"]
    where = "only beyond the depth"
    if measured is not None:
        where = f"at {counted(measured, 'block')}"
    return (
        f"{start}the influence lies {place} the bound c rho^distance; it falls below "
        f"{found['epsilon']:.2g} {where}, predicted {found['predicted_range']}."
    )


def comparison(check: Mapping[str, Any]) -> str:
    """Writes a check as its number, its relation and its threshold.

    Args:
        check: A check of ``conditions.json``.

    Returns:
        Such as ``"0.134 +- 0.02 <= 0.2"``.
    """
    return f"{number_with_error(check)} {check['relation']} {sides(check)[1]}"


def number_with_error(check: Mapping[str, Any]) -> str:
    """Writes the number of a check with its error; "n/a" where undefined.

    Args:
        check: A check of ``conditions.json``.

    Returns:
        Such as ``"0.134 +- 0.02"``; without an error that is zero or unknown.
    """
    told, error = sides(check)[0], finite(check["error"])
    return f"{told} +- {error:.1g}" if error and finite(check["number"]) else told


def sides(check: Mapping[str, Any]) -> tuple[str, str]:
    """Writes a check's number and its threshold so that one sees which is larger.

    Args:
        check: A check of ``conditions.json``.

    Returns:
        Their texts, "n/a" for a number that is undefined.
    """
    found, threshold = finite(check["number"]), check["threshold"]
    if found is not None:
        number, limit = told_apart([found, threshold])
        return number, limit
    # A number that is not finite is null in a file, and decided unless undefined.
    told = MISSING if check["outcome"] == "undecided" else "infinite"
    return told, f"{threshold:.3g}"


def _standing(check: Mapping[str, Any]) -> str:
    """Writes on how many numbers a decided check stands, if its file says so."""
    count = check.get("count")
    return "" if count is None or check["outcome"] == "undecided" else f", of {count}"
