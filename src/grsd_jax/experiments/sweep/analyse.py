"""The rows of a sweep, and the tables that are made from them."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from grsd_jax.experiments.common import files, records
from grsd_jax.experiments.common.tables import (
    MISSING,
    Legend,
    finite,
    number,
    of_how_many,
    with_legend,
)
from grsd_jax.experiments.sweep.config import Cell

Row = dict[str, Any]

#: What a sweep.json says of the sweep.csv that was written with it.
ROWS_CHECKSUM = "rows_sha256"

#: What `coupling_quantities` gives to a row.
COUPLING = (
    "num_resolved",
    "toeplitz_residual",
    "toeplitz_middle_third",
    "toeplitz_literal",
    "slope",
    "slope_stderr",
    "r_squared",
)

#: The columns of ``sweep.csv``.
COLUMNS = (
    *Cell._fields,
    "status",
    "num_params",
    "train_loss",
    "test_accuracy",
    *COUPLING,
    *(
        f"{moment}_{name}"
        for moment in ("initial", "trained")
        for name in (
            "increment_mean",
            "increment_variance",
            "variance_of_mean",
            "variance_ratio",
            "normal_distance",
            "wasserstein",
            "correlation_time",
        )
    ),
    "num_paths",
    "seconds",
)

#: What the columns of the tables mean.
LEGEND: Legend = (
    "Cells: the trainings, of which each number is the mean; '(2 of 3)' if only so "
    "many have it.",
    "Toeplitz: residual of the renormalized coupling, 0 if it is log-shift invariant. "
    "Slope and R^2: of |Mdot_ii| against lambda_i.",
    "L var(mean)/var: of the increments over L blocks, 1 if they are independent. "
    "Memory: over how many blocks directions decorrelate. Both at initialization.",
    "From three depths on: Spearman's correlation with depth, mean [range] over seeds. "
    "A network that nears the theory has Toeplitz and distance < 0, and R^2 > 0.",
)

#: The columns that hold words or whole numbers; the others hold numbers.
_KINDS: dict[str, type] = {"model": str, "activation": str, "status": str}
_KINDS |= dict.fromkeys(
    ("depth", "width", "seed", "num_params", "num_resolved", "num_paths"), int
)


def write_rows(path: files.PathLike, rows: Sequence[Row]) -> None:
    """Writes rows as a CSV of `COLUMNS`, whole or not at all; empty where undefined.

    Args:
        path: The file.
        rows: The rows, None where undefined.

    Raises:
        UserError: If the file cannot be written.
    """
    with (
        files.atomic_path(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: files.PathLike) -> list[Row]:
    """Reads the rows of a ``sweep.csv``; a ``sweep.json`` beside it has its checksum.

    Args:
        path: The file.

    Returns:
        The rows, None where undefined.

    Raises:
        UserError: If the file cannot be read or has no rows of a sweep.
    """
    path = files.as_path(path)
    with files.reading(path, "the rows of a sweep"):
        with open(path, newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file, strict=True))
        if lines[:1] != [list(COLUMNS)]:
            raise ValueError("other headings")
        if len(lines) == 1:
            wanted = f"at least one row of {len(COLUMNS)} columns"
            raise files.cannot_read(path, wanted, "none")
        _check_rows(path)
        return [
            {k: _value(k, v) for k, v in zip(COLUMNS, line, strict=True)}
            for line in lines[1:]
        ]


def _check_rows(path: Path) -> None:
    """Raises UserError unless the rows are those that the ``sweep.json`` speaks of."""
    about = path.with_name("sweep.json")
    told = records.read_json(about).get(ROWS_CHECKSUM) if about.exists() else None
    if told not in (None, files.checksum(path)):  # none in older files
        wanted = "the rows that sweep.json was written with"
        raise files.cannot_read(path, wanted, "others; run the sweep again")


def _value(column: str, text: str) -> Any:
    return _KINDS.get(column, float)(text) if text else None


class Line(NamedTuple):
    """One network of a sweep, whatever its depth and seed.

    Attributes:
        model: The network.
        branch_scale: s; None without a residual branch, or where scales are one line.
        width: Features.
        activation: Name of the activation; None for the linear ``ssm``.
        label: The network in words.
        rows: Its rows.
    """

    model: str
    branch_scale: float | None
    width: int
    activation: str | None
    label: str
    rows: list[Row]


def lines_of(rows: Sequence[Row], *, by_scale: bool = True) -> list[Line]:
    """Groups rows by all that makes a network but its depth and seed.

    Args:
        rows: The rows.
        by_scale: Whether networks of different branch scales are different lines.

    Returns:
        The lines, in the order of the rows. A label names the width and the activation
        only where there are several.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        scale = row["branch_scale"] if by_scale else None
        kind = (row["model"], scale, row["width"], row["activation"])
        groups.setdefault(kind, []).append(row)
    several_widths = len({row["width"] for row in rows}) > 1
    several_activations = len({row["activation"] for row in rows} - {None}) > 1
    lines = []
    for (model, scale, width, activation), members in groups.items():
        label = model + (f", s = {scale:g}" if scale is not None else "")
        label += f", w = {width}" if several_widths else ""
        label += f", {activation}" if several_activations and activation else ""
        lines.append(Line(model, scale, width, activation, label, members))
    return lines


def format_sweep(rows: Sequence[Row]) -> str:
    """Writes a sweep as tables: the means over seeds, and the trend with depth.

    Args:
        rows: The rows.

    Returns:
        The tables with their legend, valid as Markdown.
    """
    return with_legend(sweep_tables(rows), LEGEND)


def sweep_tables(rows: Sequence[Row]) -> list[list[list[str]]]:
    """Returns the cells of the tables of `format_sweep`, headings first.

    Args:
        rows: The rows.

    Returns:
        The tables; the second one only of three depths or more.
    """
    tables = [mean_rows(rows)]
    if len({row["depth"] for row in rows}) > 2:
        tables.append(depth_rows(rows))
    return tables


def mean_rows(rows: Sequence[Row]) -> list[list[str]]:
    """Lists the mean over seeds of each network and depth.

    Args:
        rows: The rows.

    Returns:
        Rows of cells, headings first; "n/a" where undefined, and how many have it where
        some do not.
    """
    columns = {
        "loss": "train_loss",
        "accuracy": "test_accuracy",
        "Toeplitz": "toeplitz_residual",
        "slope": "slope",
        "R^2": "r_squared",
        "L var(mean)/var": "initial_variance_ratio",
        "memory": "initial_correlation_time",
    }
    table = [["network", "depth", "cells", *columns]]
    for line in lines_of(rows):
        for depth in sorted({row["depth"] for row in line.rows}):
            cells = [row for row in line.rows if row["depth"] == depth]
            means = [_mean(cells, key) for key in columns.values()]
            table.append([line.label, str(depth), str(len(cells)), *means])
    return table


def _mean(cells: Sequence[Row], key: str) -> str:
    values = [v for v in (finite(row[key]) for row in cells) if v is not None]
    if not values:
        return MISSING
    text = number(sum(values) / len(values), ".3g")
    return text + of_how_many(len(values), len(cells))


def depth_rows(rows: Sequence[Row]) -> list[list[str]]:
    """Lists how much each network changes with depth, by rank correlations.

    Theorem 2 and Proposition 1 say that residual networks come nearer to log-shift
    invariance with depth: the first two correlations are then negative, and that of R^2
    is positive.

    Args:
        rows: The rows.

    Returns:
        Rows of cells, headings first: for each network the mean and the range over
        seeds of Spearman's correlation with depth, and how many of the cells they stand
        on where some do not have the quantity; "n/a" where that of a seed is undefined.
    """
    table = [
        [
            "network",
            "depths",
            "Toeplitz, middle third",
            "distance of the slope to 1",
            "R^2",
        ]
    ]
    for line in lines_of(rows):
        depths = sorted({row["depth"] for row in line.rows})
        correlations: dict[str, list[float]] = {}
        known: dict[str, int] = {}
        for seed in sorted({row["seed"] for row in line.rows}):
            of_seed = [row for row in line.rows if row["seed"] == seed]
            at = [row["depth"] for row in of_seed]
            slopes = [finite(row["slope"]) for row in of_seed]
            for name, values in {
                "middle third": [finite(x["toeplitz_middle_third"]) for x in of_seed],
                "distance": [None if x is None else abs(x - 1) for x in slopes],
                "R^2": [finite(row["r_squared"]) for row in of_seed],
            }.items():
                found = rank_correlation(at, values)
                correlations.setdefault(name, []).append(found)
                had = sum(value is not None for value in values)
                known[name] = known.get(name, 0) + had
        cells = [
            _mean_and_range(found, of_how_many(known[name], len(line.rows)))
            for name, found in correlations.items()
        ]
        table.append([line.label, ", ".join(map(str, depths)), *cells])
    return table


def _mean_and_range(values: Sequence[float], standing: str) -> str:
    mean = float(np.mean(values))
    if math.isnan(mean):
        return MISSING
    return f"{mean:.2f} [{min(values):.2f}, {max(values):.2f}]{standing}"


def rank_correlation(x: Sequence[float], y: Sequence[float | None]) -> float:
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
        return math.nan
    if any(len(set(values)) == 1 for values in zip(*pairs, strict=True)):
        return math.nan
    return float(scipy.stats.spearmanr(pairs).statistic)
