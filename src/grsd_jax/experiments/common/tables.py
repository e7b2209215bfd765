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

#: Characters of a number at most.
_LONGEST = 15


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
        spec: Its format. A number that it would write as 0, or in a row of digits, has
            two significant digits.

    Returns:
        The text, `MISSING` for what is undefined.
    """
    known = finite(value)
    if value is None or known is None:
        return MISSING
    text = format(value, spec)
    reads_zero = bool(known) and not float(text)
    return f"{known:.2g}" if reads_zero or len(text) > _LONGEST else text


def of_how_many(known: int, whole: int) -> str:
    """Returns such as ``" (2 of 3)"``, nothing if all are known."""
    return "" if known == whole else f" ({known} of {whole})"


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
