"""The contents of ``conditions.json``, and the tables that are made from it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grsd_jax.conditions.report import ConditionReport
from grsd_jax.conditions.verdicts import Verdict
from grsd_jax.experiments.common import records
from grsd_jax.experiments.common.config import Config
from grsd_jax.experiments.reproduce.pipeline import measurement_entry
from grsd_jax.experiments.reproduce.results import finite
from grsd_jax.experiments.reproduce.tables import aligned
from grsd_jax.parameter_blocks import ParameterBlocks
from grsd_jax.shells.layers import LayerMeasurements

TITLES = {
    "condition1": "1 locality",
    "condition2": "2 incoherence",
    "condition3": "3 stability",
    "condition4": "4 log-shift invariance",
}


def report_entry(report: ConditionReport, config: Config) -> dict[str, Any]:
    """Returns the four conditions as ``conditions.json`` holds them.

    Args:
        report: The report.
        config: The settings, for the seed and the window.

    Returns:
        ``condition1`` to ``condition4``, each with its ``verdict``.
    """
    locality, incoherence = report.condition1, report.condition2
    stability, invariance = report.condition3, report.condition4
    return {
        "condition1": _verdict(locality.verdict)
        | {
            "steps": [int(step) for step in locality.times],
            "influence": [profile.influence for profile in locality.profiles],
            "stderr": [profile.stderr for profile in locality.profiles],
            "num_probes": locality.profiles[0].num_probes,
            "share_by_distance": locality.shares,
            "bands": locality.bands,
        },
        "condition2": _verdict(incoherence.verdict)
        | {
            name: getattr(incoherence.coherence, name)
            for name in (
                "products",
                "norms",
                "coherence",
                "residuals",
                "converged",
                "num_iterations",
                "profile",
                "tail_sum",
                "product_profile",
                "product_tail_sum",
            )
        }
        | {
            "flagged": [
                [report.blocks.names[i], report.blocks.names[j], value]
                for i, j, value in incoherence.flagged
            ]
        },
        "condition3": _verdict(stability.verdict)
        | {
            "norms": [found._asdict() for found in stability.norms],
            "leading_drift": [found._asdict() for found in stability.leading_drift],
            "shell_drift": stability.shell_drift._asdict(),
            "lipschitz": stability.lipschitz,
        },
        "condition4": _verdict(invariance.verdict)
        | {
            "central_residuals": invariance.central_residuals,
            "measurements": [
                measurement_entry(measured, config)
                for measured in invariance.measurements
            ],
        },
    }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    checks = [check._asdict() | {"holds": check.holds} for check in verdict.checks]
    return {"verdict": {"holds": verdict.holds, "checks": checks}}


def layers_entry(
    layers: LayerMeasurements, blocks: ParameterBlocks, config: Config
) -> dict[str, Any]:
    """Returns the additive structure as ``conditions.json`` holds it.

    Args:
        layers: The layers' measurements, by the names of the blocks.
        blocks: The partition.
        config: The settings, for the seed and the window.

    Returns:
        An entry for each block in order of depth, for the total, and the average.
    """
    return {
        "blocks": [
            measurement_entry(layers.layers[name], config) | {"name": name}
            for name in blocks.names
        ],
        "total": measurement_entry(layers.total, config),
        "depth_average": {
            "coupling": layers.average.coupling.matrix,
            "mask": layers.average.coupling.mask,
            "residual": layers.average.residual,
            "windows": layers.average.windows,
        },
    }


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
            verdict = "holds" if check["holds"] else "fails"
            rows.append(
                [
                    title,
                    check["name"],
                    number_with_error(check),
                    f"{check['relation']} {check['threshold']:.3g}",
                    verdict if check["converged"] else f"{verdict}, not converged",
                ]
            )
    return rows


def format_conditions(found: Mapping[str, Any]) -> str:
    """Writes the verdicts as a table.

    Args:
        found: The contents of ``conditions.json``.

    Returns:
        The table of `condition_rows`; under it, for a state-space model, what
        Proposition 2 says.
    """
    parts = [aligned(condition_rows(found))]
    if found.get("propagation"):
        parts.append(format_propagation(found["propagation"]))
    return "\n\n".join(parts)


def format_propagation(found: Mapping[str, Any]) -> str:
    """Writes what Proposition 2 says of a state-space model, in one sentence.

    Args:
        found: ``propagation`` of ``conditions.json``.

    Returns:
        The sentence; ``rho >= 1`` is told as outside the condition.
    """
    start = f"Proposition 2, rho = {found['rho']:g}, squared error: "
    if not found["in_condition"]:
        return start + "outside the condition rho < 1, no range is predicted."
    place = "under" if found["below_bound"] else "NOT under"
    measured = found["measured_range"]
    told = "beyond the depth" if measured is None else f"{measured} blocks"
    return (
        f"{start}the influence lies {place} the bound c rho^distance; it falls below "
        f"{found['epsilon']:.2g} at {told}, predicted {found['predicted_range']}."
    )


def number_with_error(check: Mapping[str, Any]) -> str:
    """Writes the number of a check with its error; "n/a" where undefined.

    Args:
        check: A check of ``conditions.json``.

    Returns:
        Such as ``"0.134 +- 0.02"``; without an error that is zero or unknown.
    """
    number, error = finite(check["number"]), finite(check["error"])
    if number is None:
        return "n/a"
    return f"{number:.3g} +- {error:.1g}" if error else f"{number:.3g}"


def write_conditions(folder: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Writes ``conditions.json``, whole or not at all.

    Args:
        folder: The folder.
        found: The contents.

    Returns:
        The contents as they are read back, for the table and the figures.

    Raises:
        UserError: If the folder cannot be written.
    """
    records.write_json(folder / "conditions.json", found)
    return records.read_json(folder / "conditions.json")
