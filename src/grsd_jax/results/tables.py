"""Results as the tables of other libraries, which are imported when they are asked for.

`xarray` and `pandas` are optional: ``pip install 'grsd-jax[tables]'``.
"""

import importlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from grsd_jax._checks import check_choice
from grsd_jax.results.flat import columns_of, labels_of, rows_of, variables_of

if TYPE_CHECKING:
    import pandas
    import xarray

#: Names of what the axes mean, which become coordinates.
_COORDINATES = ("edges", "centers", "effective_edges", "grid", "times")

#: What lines hold before and after, which is square where there are two shells.
_AT_ENDS = ("energies", "energy_error")


def needed(name: str, wanted: str, extra: str) -> Any:
    """Returns an optional module.

    Raises:
        ImportError: If it is not installed; it says what to install.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{wanted} needs {name}: pip install 'grsd-jax[{extra}]'."
        ) from error


def to_xarray(result: Any) -> "xarray.Dataset":
    """Returns a result as a dataset with named dimensions.

    Everything inside the result is a variable, named after the fields that lead to it;
    what is masked is NaN. Edges and centers are coordinates, and every variable carries
    its description. Texts and options are attributes of the dataset.

    Raises:
        ImportError: If xarray is not installed.
        ValueError: If the result is traced.
    """
    xarray = needed("xarray", "to_xarray", "tables")
    variables, labels = variables_of(result), labels_of(result)
    data = {
        variable.name: (variable.axes, variable.values, _attributes(variable))
        for variable in variables
        if variable.name not in labels
    }
    dataset = xarray.Dataset(data, attrs=labels)
    return dataset.set_coords(
        [name for name in data if name.endswith(_COORDINATES) and data[name][0]]
    )


def to_pandas(result: Any, axis: str | None = None) -> "pandas.DataFrame":
    """Returns a result as a data frame: one row a shell, a pair or an edge.

    Args:
        result: The result.
        axis: What makes the rows, one of the dimensions of `to_xarray`; shells or edges
            where there are any. Of square arrays over it the diagonal is a column.

    Returns:
        The frame; its index is named after the axis. A result of single numbers is one
        row, and one of square arrays alone has their diagonals.

    Raises:
        ImportError: If pandas is not installed.
        ValueError: If there is nothing along the axis, or the result is traced.
    """
    pandas = needed("pandas", "to_pandas", "tables")
    variables = variables_of(result)
    if axis is None:
        axis = next(iter(rows_of(result)), None)
    else:
        check_choice("axis", axis, sorted({a for v in variables for a in v.axes}))
    if axis is None:
        numbers = {v.name: v.values[()] for v in variables if not v.axes}
        if numbers or not variables:
            return pandas.DataFrame([numbers])
        axis = variables[0].axes[0]  # square arrays alone: their diagonals
    frame = pandas.DataFrame(columns_of(result, axis))
    return frame.rename_axis(index=axis)


def frame_of_lines(lines: Iterable[Mapping[str, Any]]) -> "pandas.DataFrame":
    """Returns records that were read from a file as a data frame, one row a record.

    Args:
        lines: Dictionaries of numbers, texts and lists of numbers; None is undefined.

    Returns:
        The frame. The entries of lists are columns of their own, ``energies_03``, and
        those of dictionaries have both names, ``measured_time_start``. Square tables
        over pairs of shells are left out. The index is the step, where there is one.

    Raises:
        ImportError: If pandas is not installed.
    """
    pandas = needed("pandas", "to_pandas", "tables")
    frame = pandas.DataFrame([dict(_cells(line)) for line in lines])
    return frame.set_index("step") if "step" in frame else frame


def _cells(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the numbers of a line by their names in a frame."""
    for key, value in line.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _cells(value, f"{name}_")
        elif not isinstance(value, list):
            yield name, value
        elif key in _AT_ENDS or not _is_square(value):
            yield from _cells({f"{k:02d}": x for k, x in enumerate(value)}, f"{name}_")


def _is_square(rows: list[Any]) -> bool:
    return bool(rows) and isinstance(rows[0], list) and len(rows[0]) == len(rows)


def _attributes(variable: Any) -> dict[str, str]:
    found = {"description": variable.about, "units": variable.unit}
    return {name: text for name, text in found.items() if text}
