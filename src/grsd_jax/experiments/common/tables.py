"""Tables of text, and the numbers in them."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from tabulate import tabulate

#: Sentences that say what the columns of a table mean.
Legend = tuple[str, ...]

#: Characters of a line of a legend.
_WIDTH = 88

#: What stands in a table for what is undefined.
MISSING = "n/a"


def finite(value: Any) -> float | None:
    """Returns ``value`` as a float if it is a finite number, and None otherwise.

    Args:
        value: What a JSON file holds.

    Returns:
        The number or None.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def number(value: float | None, spec: str = ".3f") -> str:
    """Returns a number as a table shows it.

    Args:
        value: The number; None or NaN where it is undefined.
        spec: Its format.

    Returns:
        The text, `MISSING` for what is undefined.
    """
    return MISSING if finite(value) is None else format(value, spec)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Returns a table, valid as Markdown, whose columns line up.

    Args:
        rows: The headings, then the rows.

    Returns:
        The table; the first two columns are flush left, the others right.
    """
    sides = ("left", "left", *["right"] * (len(rows[0]) - 2))
    return tabulate(
        rows[1:], rows[0], "pipe", disable_numparse=True, colalign=sides[: len(rows[0])]
    )


def with_legend(tables: Iterable[Sequence[Sequence[str]]], legend: Legend) -> str:
    """Returns tables with what their columns mean below them.

    Args:
        tables: Rows of cells of each, headings first.
        legend: Sentences, each of which begins a line.

    Returns:
        The text, valid as Markdown.
    """
    lines = [textwrap.fill(sentence, _WIDTH) for sentence in legend]
    return "\n\n".join([*map(aligned, tables), "\n".join(lines)])
