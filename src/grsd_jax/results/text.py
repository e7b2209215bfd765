"""Results as text: a screenful for the notebook, and tables for the eye."""

import dataclasses
import html
import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from grsd_jax.results.fields import (
    Field,
    defined,
    description_of,
    fields_of,
    is_abstract,
    is_concrete,
    is_key,
    on_host,
    reads_nan,
    with_undefined,
)
from grsd_jax.results.flat import columns_of, rows_of

#: What stands for what is undefined.
MISSING = "n/a"

_LINES, _WIDTH = 24, 100

#: Numbers of an array that is shown number by number; those up to which an array is
#: fetched for its range; and the rows of one table.
_FEW, _MANY, _ROWS = 4, 2**20, 24

Row = tuple[str, str]


def number(value: Any, digits: int = 4) -> str:
    """Returns a number as text, ``n/a`` for NaN or None."""
    if value is None:
        return MISSING
    value = np.asarray(value)
    if value.dtype == np.bool_ or np.issubdtype(value.dtype, np.integer):
        return str(value[()])
    value = float(value)
    return MISSING if np.isnan(value) else f"{value:.{digits}g}"


def percent(share: float) -> str:
    """Returns a share as text, "0%" and "100%" only where it is that up to 1e-6.

    Such as "26%", and "99.6%" or "0.02%" near both ends, ``n/a`` for NaN.
    """
    share = float(share)
    if math.isnan(share):
        return MISSING
    away = 100 * min(abs(share), abs(1 - share))
    digits = math.ceil(-math.log10(away)) if 1e-4 <= away < 0.501 else 0
    return f"{share:z.{digits}%}"


def counted(number: int, name: str) -> str:
    """Returns such as ``"1 seed"`` and ``"2 seeds"``."""
    return f"{number} {name}" + ("" if number == 1 else "s")


def told_apart(
    values: Sequence[float],
    others: Sequence[float] = (),
    *,
    decimals: int | None = None,
    tolerance: float = 0.0,
) -> list[str]:
    """Returns numbers with as many digits as tell them apart.

    Args:
        values: The numbers, finite.
        others: What they must not read as unless they are that, such as 0.
        decimals: The least number of decimals; of large numbers, and otherwise, three
            significant digits are the least.
        tolerance: The relative difference of those that may read alike.
    """
    specs = [f".{digits}g" for digits in range(3, 18)]
    if decimals is not None and all(abs(value) < 1e7 for value in values):
        specs = [*(f".{digits}f" for digits in range(decimals, 7)), *specs]
    for spec in specs:
        texts = [format(value, spec) for value in values]
        read = dict(zip([*values, *others], [*map(float, texts), *others], strict=True))
        if all(
            read[a] != read[b] or math.isclose(a, b, rel_tol=tolerance)
            for a, b in itertools.combinations(read, 2)
        ):
            return texts
    return [repr(float(value)) for value in values]


def with_interval(value: Any, interval: Any = None, stderr: Any = None) -> str:
    """Returns a number with its interval, or with its standard error."""
    if interval is not None and not np.isnan(np.asarray(interval)).any():
        low, high = np.asarray(interval)
        return f"{_padded(value, 3)} [{_padded(low, 3)}, {_padded(high, 3)}]"
    if stderr is not None and not np.isnan(stderr) and not np.isnan(value):
        return f"{_padded(value, 3)} ± {_padded(stderr, 2)}"
    return _padded(value, 3)


def _padded(value: Any, digits: int) -> str:
    """Returns a number with all its digits, trailing zeros included."""
    value = float(value)
    return MISSING if np.isnan(value) else f"{value:#.{digits}g}".rstrip(".")


def span(values: Any, unit: str = "") -> str:
    """Returns the smallest and the largest of some numbers as text."""
    values = np.asarray(values)
    if not values.size:
        return MISSING
    low, high = number(values.min()), number(values.max())
    ends = f"{low} to {high}" if low != MISSING else MISSING
    return f"{ends} {unit}".rstrip()


@reads_nan
def as_text(result: Any) -> str:
    """Returns a result as at most 24 lines of at most 100 characters."""
    title, rows, rest = _screenful(result)
    width = max((len(label) for label, _ in rows), default=0)
    lines = [title, *(f"  {label:<{width}}  {text}".rstrip() for label, text in rows)]
    return "\n".join(_cut(line) for line in [*lines, *([rest] if rest else [])])


@reads_nan
def as_html(result: Any) -> str:
    """Returns a result as a small table for notebooks."""
    title, rows, rest = _screenful(result)
    cells = "".join(
        f'<tr><th style="text-align:left">{html.escape(label)}</th>'
        f'<td style="text-align:left">{html.escape(text)}</td></tr>'
        for label, text in rows
    )
    caption = f"<p>{html.escape(rest)}</p>" if rest else ""
    return f"<div><b>{html.escape(title)}</b><table>{cells}</table>{caption}</div>"


@reads_nan
def summary(result: Any) -> str:
    """Returns a result as its most important numbers and its tables."""
    title, rows, _ = _screenful(result, arrays=False)
    width = max((len(label) for label, _ in rows), default=0)
    parts = [title, *(f"  {label:<{width}}  {text}" for label, text in rows)]
    for caption, columns in _tables_of(result).items():
        parts += ["", f"{caption}:", *_table(columns)]
    return "\n".join(_cut(line) for line in parts)


def _tables_of(result: Any) -> dict[str, dict[str, Any]]:
    """Returns the columns of a summary by title: its own, or of what is inside it."""
    result = with_undefined(result)
    if hasattr(result, "_tables") and is_concrete(result):
        return result._tables()
    inside = {
        f"{field.name}: {caption}": columns
        for field in fields_of(result)
        if hasattr(field.value, "_tables") and is_concrete(field.value)
        for caption, columns in field.value._tables().items()
    }
    if inside:
        return inside
    return {f"by {axis}": columns_of(result, axis) for axis in rows_of(result)}


@reads_nan
def headline(result: Any) -> list[Row]:
    """Returns the most important numbers of a result as pairs of label and text."""
    result = with_undefined(result)
    if hasattr(result, "_headline") and is_concrete(result):
        return result._headline()
    return [_row(result, field) for field in fields_of(result) if _is_number(field)]


def _screenful(result: Any, *, arrays: bool = True) -> tuple[str, list[Row], str]:
    """Returns the title, the rows, and one line on what is left out."""
    result = with_undefined(result)
    fields = list(fields_of(result))
    title = type(result).__name__
    texts = [f"{f.name} {f.value}" for f in fields if isinstance(f.value, str)]
    title = f"{title}: {', '.join(texts)}" if texts else title
    fields = [field for field in fields if not isinstance(field.value, str)]
    rows = headline(result)
    labels = [label for label, _ in rows]
    others = [f for f in fields if not _is_number(f) and f.name not in labels]
    more = [_row(result, field) for field in others] if arrays else []
    width = max((len(label) for label, _ in [*rows, *more]), default=0)
    rows = [line for row in rows for line in _lines(row, _WIDTH - width - 4)]
    numbers = len(rows)
    rows += more
    if len(rows) <= _LINES - 2:
        return title, rows, ""
    shown, hidden = rows[: _LINES - 2], rows[_LINES - 2 :]
    names = [label for label, _ in hidden if label]
    kind = "number" if len(shown) < numbers else "field"
    kind += "" if len(names) == 1 else "s"
    return title, shown, f"  left out: {len(names)} {kind} ({', '.join(names)})"


def _lines(row: Row, width: int) -> list[Row]:
    """Returns a row as several, none of whose texts is cut."""
    label, text = row
    first, *rest = textwrap.wrap(text, width) or [""]
    return [(label, first), *(("", line) for line in rest)]


def _is_number(field: Field) -> bool:
    value = field.value
    if isinstance(value, bool | int | float | np.generic) or value is None:
        return True
    return isinstance(value, jax.Array | np.ndarray) and value.ndim == 0


def _row(result: Any, field: Field) -> Row:
    """Returns the line of one field."""
    if getattr(field.value, "size", 0) > _MANY:  # not worth fetching
        return field.name, f"{list(field.value.shape)} {field.value.dtype}"
    array = defined(result, field)
    text = _value_text(field.value, array, field)
    return field.name, text if array is None else f"{text} {field.unit}".rstrip()


def _value_text(value: Any, array: np.ndarray | None, field: Field) -> str:
    if value is None:
        return MISSING
    if description_of(value) is not None:
        return one_line(value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return f"{len(value)} by name: {', '.join(value)}" if value else "none"
    if isinstance(value, list | tuple):
        return _sequence_text(value)
    if array is None:
        return _abstract_text(value)
    if array.ndim == 0:
        text = number(array)
        return text + _why(field) if text == MISSING else text
    return _array_text(array, field)


def _array_text(array: np.ndarray, field: Field) -> str:
    """Returns the shape, the dtype and the range of an array, or its few numbers."""
    kind = f"{list(array.shape)} {array.dtype}"
    if not array.size:
        return kind
    if array.dtype == np.bool_:
        return f"{kind}, {int(array.sum())} of {array.size} True"
    if not np.issubdtype(array.dtype, np.integer):
        array = array.astype(np.float64)
    known = array[~np.isnan(array)]
    if not known.size:
        return f"{kind}, {MISSING}{_why(field)}"
    if array.ndim == 1 and array.size <= _FEW:
        return f"{kind}: {', '.join(number(entry) for entry in array)}"
    gaps = array.size - known.size
    return f"{kind}, {span(known)}" + (f", {gaps} {MISSING}" if gaps else "")


def _why(field: Field) -> str:
    return f" ({field.reason})" if field.reason else ""


def _abstract_text(value: Any) -> str:
    """Returns what is known of something without numbers at hand."""
    if dataclasses.is_dataclass(value):  # options, which hold no arrays
        return repr(value)
    if not isinstance(value, jax.Array | jax.ShapeDtypeStruct):
        return type(value).__name__
    kind = f"{list(value.shape)} {value.dtype}"
    if is_key(value):
        return kind
    return f"{kind}, {'traced' if is_abstract(value) else 'without numbers'}"


def _sequence_text(values: Sequence[Any]) -> str:
    if not values:
        return "none"
    first = values[0]
    if description_of(first) is not None:
        return f"{len(values)} of {type(first).__name__}"
    arrays = [on_host(value) for value in values]
    if all(array is not None and array.ndim == 0 for array in arrays):
        shown = ", ".join(number(array) for array in arrays[:_FEW])
        return shown + (f", ... ({len(values)} in all)" if len(values) > _FEW else "")
    if all(isinstance(value, str) for value in values):
        shown = ", ".join(values[:_FEW])
        return shown + (f", ... ({len(values)} in all)" if len(values) > _FEW else "")
    return f"{len(values)} of {type(first).__name__}"


def one_line(result: Any) -> str:
    """Returns a result as its first few numbers, for a line of another one."""
    shown = "; ".join(f"{label} {text}".strip() for label, text in headline(result)[:3])
    return shown or type(result).__name__


def _table(columns: Mapping[str, Any]) -> list[str]:
    """Returns columns as lines, as many columns as fit, and a word on the others."""
    length = max((len(values) for values in columns.values()), default=0)
    shown = {
        name: [name, *(_cell(value) for value in list(values)[:_ROWS])]
        for name, values in columns.items()
    }
    widths = {name: max(map(len, cells)) for name, cells in shown.items()}
    kept, total = [], 0
    for name, width in widths.items():
        total += width + 2
        if total <= _WIDTH:
            kept.append(name)
    lines = [
        "  " + "  ".join(shown[name][row].rjust(widths[name]) for name in kept)
        for row in range(1 + min(length, _ROWS))
    ]
    if length > _ROWS:
        lines.append(f"  ... {length - _ROWS} more rows")
    hidden = [name for name in shown if name not in kept]
    return lines + ([f"  left out: {', '.join(hidden)}"] if hidden else [])


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    value = np.asarray(value)
    if value.dtype == np.bool_:
        return "yes" if value else "no"
    return number(value, 3)


def _cut(line: str) -> str:
    return line if len(line) <= _WIDTH else line[: _WIDTH - 3] + "..."
