"""The table of a benchmark."""

from collections.abc import Mapping, Sequence
from typing import Any

from grsd_jax.experiments.common.tables import Legend, number, with_legend

#: What the columns of the table mean.
LEGEND: Legend = (
    "Seconds: the smallest of three runs; first: the call that compiles, too.",
    "Gradients: seconds in units of one gradient of the same batches.",
    "FLOP rate: operations a second over those of the forward pass.",
    "Peak: the most memory that the process of the case held.",
)


def benchmark_rows(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Lists the times of each case.

    Args:
        rows: What `run.run_case` returned, one for each case.

    Returns:
        Rows of cells, headings first.
    """
    known = {"case", "seconds", "first_seconds", "gradients", "gradient_seconds"}
    known |= {"forward_seconds", "flops_share", "peak_mib"}  # columns, or their units
    table = [["case", "", "seconds", "first", "gradients", "FLOP rate", "peak MiB"]]
    for row in rows:
        notes = [
            f"{key} {number(value, '.2f') if isinstance(value, float) else value}"
            for key, value in row.items()
            if key not in known
        ]
        table.append(
            [
                row["case"],
                ", ".join(notes),
                number(row["seconds"]),
                number(row["first_seconds"], ".2f"),
                number(row["gradients"], ".1f"),
                number(row["flops_share"], ".2f"),
                number(row["peak_mib"], ".0f"),
            ]
        )
    return table


def format_benchmark(rows: Sequence[Mapping[str, Any]]) -> str:
    """Writes the times of each case as a table.

    Args:
        rows: What `run.run_case` returned, one for each case.

    Returns:
        The table, with its legend.
    """
    return with_legend([benchmark_rows(rows)], LEGEND)
