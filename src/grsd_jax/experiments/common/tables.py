"""Tables of text, and the numbers in them."""

import math
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

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
