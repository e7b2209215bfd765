"""The table at the end of a measurement, from ``results.json`` alone."""

import math
from collections.abc import Sequence
from typing import Any

from grsd_jax.experiments.reproduce.results import Entry, finite, list_entries

_MISSING = "n/a"


def format_table(results: Any) -> str:
    """Writes a result as two aligned tables, valid as Markdown too.

    The first says what was measured and how the diagonal scales: the slope of
    ``|Mdot_ii|`` against ``lambda_i`` with its standard error and bootstrap interval,
    and the slope over shells. The second holds the Toeplitz residuals: of the whole
    coupling, and in windows from the spectral edges (the mean of both) to the centre.

    Args:
        results: The contents of ``results.json``, of one measurement or of several.

    Returns:
        The tables, one row for each network and protocol; what is undefined is "n/a".

    Raises:
        UserError: If there is no measurement in ``results``.
    """
    return "\n\n".join(aligned(rows) for rows in result_tables(results))


def result_tables(results: Any) -> list[list[list[str]]]:
    """Returns the cells of the tables of `format_table`, headings first.

    Args:
        results: The contents of ``results.json``, of one measurement or of several.

    Returns:
        The tables, as rows of cells.

    Raises:
        UserError: If there is no measurement in ``results``.
    """
    entries = list_entries(results)
    return [
        [["model", "protocol", *headings], *rows]
        for headings, rows in (
            (_SCALING, [[e.title, e.protocol, *_scaling(e)] for e in entries]),
            (_TOEPLITZ, [[e.title, e.protocol, *_toeplitz(e)] for e in entries]),
        )
    ]


_SCALING = (
    "accuracy",
    "n",
    "resolved",
    "solver",
    "slope +- stderr [interval]",
    "R^2",
    "shell slope",
)


def _scaling(entry: Entry) -> list[str]:
    """The cells of the first table."""
    resolved, pairs = entry.number("num_resolved"), entry.number("num_pairs")
    return [
        _fixed(entry.number("test_accuracy")),
        _fixed(entry.number("n"), digits=0),
        f"{_fixed(resolved, digits=0)}/{_fixed(pairs, digits=0)}",
        str(entry.fields.get("solver") or _MISSING),
        _slope(entry, "diagonal_fit", interval=True),
        _fixed(entry.number("diagonal_fit", "r_squared")),
        _slope(entry, "shell_fit", interval=False),
    ]


_TOEPLITZ = (
    "literal residual",
    "edge -> centre",
    "renormalized residual",
    "edge -> centre",
    "secant disagreement",
)


def _toeplitz(entry: Entry) -> list[str]:
    """The cells of the second table."""
    cells = []
    for kind in ("literal", "renormalized"):
        edge, centre = edge_and_centre(entry.windows(kind))
        cells.append(_fixed(entry.number("toeplitz", kind, "residual")))
        cells.append(f"{_fixed(edge)} -> {_fixed(centre)}")
    return [*cells, _significant(entry.number("secant_disagreement"))]


def edge_and_centre(
    windows: Sequence[tuple[float, float]],
) -> tuple[float | None, float | None]:
    """Summarises the windowed residuals by those at the edges and at the centre.

    Args:
        windows: (position, residual) in order of position, NaN where undefined.

    Returns:
        The mean residual of the outermost defined window on either side of the centre,
        and the mean of the defined windows nearest to it. Both are None with fewer than
        three defined windows.
    """
    defined = [window for window in windows if not math.isnan(window[1])]
    if len(defined) < 3:
        return None, None
    nearest = min(abs(position - 0.5) for position, _ in defined)
    central = [r for p, r in defined if abs(p - 0.5) <= nearest + 1e-9]
    return (defined[0][1] + defined[-1][1]) / 2, sum(central) / len(central)


def _slope(entry: Entry, fit: str, *, interval: bool) -> str:
    slope = entry.number(fit, "exponent")
    if slope is None:
        return _MISSING
    text = f"{slope:.3f} +- {_fixed(entry.number(fit, 'exponent_stderr'))}"
    if not interval:
        return text
    ends = _interval(entry, fit)
    return f"{text} [{_fixed(ends[0])}, {_fixed(ends[1])}]"


def _interval(entry: Entry, fit: str) -> tuple[float | None, float | None]:
    fields = entry.fields.get(fit)
    ends = fields.get("interval") if isinstance(fields, dict) else None
    if not isinstance(ends, list) or len(ends) != 2:
        return None, None
    return finite(ends[0]), finite(ends[1])


def _fixed(value: float | None, *, digits: int = 3) -> str:
    return _MISSING if value is None else f"{value:.{digits}f}"


def _significant(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.2g}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Writes a table, valid as Markdown, whose columns line up.

    Args:
        rows: The headings, then the rows.

    Returns:
        The table; the first two columns are flush left, the others right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if k < 2 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = [
        ":" + "-" * (width - 1) if k < 2 else "-" * (width - 1) + ":"
        for k, width in enumerate(widths)
    ]
    return "\n".join([line(rows[0]), line(rule), *map(line, rows[1:])])
