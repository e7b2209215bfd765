"""A result with everything inside it as one flat list of arrays with named axes."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax.results.fields import (
    Field,
    defined,
    description_of,
    fields_of,
    is_key,
    on_host,
    reads_nan,
    with_undefined,
)

#: The axes that make the rows of a table where there are any.
_TELLING = ("shell", "inner_edge", "edge")


class Variable(NamedTuple):
    """One array of a result.

    Attributes:
        name: The names of the fields that lead to it, joined by ``_``.
        axes: The names of its axes, all different.
        values: The numbers, NaN where they are undefined.
        about: What the docstring says.
        unit: Its unit, empty if it has none.
    """

    name: str
    axes: tuple[str, ...]
    values: np.ndarray
    about: str
    unit: str


@reads_nan
def variables_of(result: Any) -> list[Variable]:
    """Returns every array and number of a result and of the results inside it.

    An axis of one name has one size: one of another size has it in its name. No axis
    has the name of an array.

    Raises:
        ValueError: If numbers are not at hand, such as those of a traced result.
    """
    sizes: dict[str, int] = {}
    found = []
    variables = list(_walk(with_undefined(result), ""))
    names = {variable.name for variable in variables}
    for variable in variables:
        axes = []
        for axis, size in zip(variable.axes, variable.values.shape, strict=True):
            named = axis
            if sizes.setdefault(axis, size) != size:
                named = f"{axis}_{size}"
            if named in names:
                named = f"{named}_axis"
            axes.append(named)
        found.append(variable._replace(axes=tuple(axes)))
    return found


def labels_of(result: Any) -> dict[str, Any]:
    """Returns the texts and truths of a result that are not arrays, by name."""
    kinds = (str, bool, int, float)
    pairs = [(field.name, field.value) for field in fields_of(result)]
    return {"result": type(result).__name__} | {
        name: value for name, value in pairs if isinstance(value, kinds)
    }


def rows_of(result: Any) -> list[str]:
    """Returns the axes that make the rows of a result's tables.

    Shells and edges, the one with more columns first; pairs if there are none of these.
    """
    axes = [v.axes[0] for v in variables_of(result) if len(v.axes) == 1]
    telling = sorted(set(axes) & set(_TELLING), key=axes.count, reverse=True)
    return telling or axes[:1]


def columns_of(result: Any, axis: str) -> dict[str, np.ndarray]:
    """Returns the arrays along one axis, and the diagonals of square ones, by name."""
    columns = {}
    for variable in variables_of(result):
        if variable.axes == (axis,):
            columns[variable.name] = variable.values
        elif variable.axes == (axis, f"other_{axis}"):
            columns[f"{variable.name}_diagonal"] = np.diagonal(variable.values)
    return columns


def _walk(result: Any, prefix: str) -> Iterator[Variable]:
    for field in fields_of(result, derived=True):
        name = prefix + field.name
        if description_of(field.value) is not None:
            yield from _walk(field.value, f"{name}_")
        elif isinstance(field.value, Mapping):
            for key, value in field.value.items():
                yield from _item(value, f"{name}_{key}", field)
        elif isinstance(field.value, list | tuple):
            yield from _sequence(field.value, name, field)
        elif not isinstance(field.value, str) and field.value is not None:
            yield from _array(defined(result, field), name, field)


def _item(value: Any, name: str, field: Field) -> Iterator[Variable]:
    if description_of(value) is not None:
        yield from _walk(value, f"{name}_")
    else:
        yield from _array(on_host(value), name, field)


def _sequence(values: Any, name: str, field: Field) -> Iterator[Variable]:
    """Yields numbers as one array, and results and arrays one by one."""
    arrays = [on_host(value) for value in values]
    if values and all(array is not None and array.ndim == 0 for array in arrays):
        axis = field.axes[0] if field.axes else name
        yield Variable(name, (axis,), np.asarray(arrays), field.about, field.unit)
    elif not all(isinstance(value, str) for value in values):
        for index, value in enumerate(values):
            yield from _item(value, f"{name}_{index}", field)


def _array(array: np.ndarray | None, name: str, field: Field) -> Iterator[Variable]:
    if array is None:
        if isinstance(field.value, jax.Array) and not is_key(field.value):
            raise ValueError(
                f"{name}: expected an array whose numbers are at hand, got "
                f"{type(field.value).__name__}."
            )
        return
    if jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.kind != "f":
        array = array.astype(np.float32)  # such as bfloat16, which tables do not know
    axes = list(field.axes or ())[: array.ndim]
    missing = array.ndim - len(axes)
    own = [f"{name}_{k}" for k in range(missing)]
    batch = ["batch", *(f"batch_{k}" for k in range(1, missing))]
    axes = (own if field.axes is None else batch[:missing]) + axes
    yield Variable(name, _all_different(axes), array, field.about, field.unit)


def _all_different(axes: list[str]) -> tuple[str, ...]:
    named: list[str] = []
    for axis in axes:
        name = axis
        while name in named:
            name = f"other_{name}"
        named.append(name)
    return tuple(named)
