"""What a result consists of: its fields, their axes, and where they are undefined.

The docstring of a result states the shape of every field, ``[S, S]``, in the letters of
the theory. The names of the axes are read from there, so that they are stated once.
"""

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import is_traced

_Function = TypeVar("_Function", bound=Callable[..., Any])

#: What the letters of the docstrings stand for.
_AXES = {
    "(m + 1) b": "krylov",
    "2": "end",
    "B": "balance",
    "L": "block",
    "L + 1": "boundary",
    "N": "example",
    "R": "direction",
    "S": "shell",
    "S + 1": "edge",
    "S - 1": "inner_edge",
    "S - w + 1": "window",
    "T": "time",
    "T - 1": "interval",
    "b": "column",
    "m": "step",
    "m + 1": "step",
    "m b": "krylov",
    "n": "entry",
    "num_pairs": "pair",
    "num_points": "point",
    "num_values": "leading_pair",
    "q": "edge",
    "r": "pair",
}

#: A shape such as ``[2, S]`` or ``[(m + 1) b]``, but no interval such as ``[0, 1)``.
_SHAPE = re.compile(r"\[((?:[\w() +-]+(?:, )?)*)\]")

_UNDEFINED = re.compile(r"NaN\s+(if|where|with|without|for|after)\b([^.;]*)", re.S)


@dataclasses.dataclass(frozen=True)
class Description:
    """What is declared about a class of results beyond its fields and its docstring.

    Attributes:
        axes: Names of axes, by their letters, where they are not the usual ones.
        masks: The field or property that says where another one is defined, by name;
            of a result inside this one, whether it is. It is boolean, or numbers that
            are finite where they are defined, such as those of the field itself.
        units: Units, by the name of the field.
        derived: Properties that count as fields.

    A class may also have two methods. ``_headline`` returns its most important numbers
    as pairs of label and text, and ``_tables`` those of a summary, as columns by title.
    Both are called only where all numbers are at hand.
    """

    axes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    masks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    units: Mapping[str, str] = dataclasses.field(default_factory=dict)
    derived: tuple[str, ...] = ()


class Field(NamedTuple):
    """One field of a result.

    Attributes:
        name: Its name.
        value: Its value.
        axes: The names of its axes, without those that a `vmap` has put in front; None
            if its docstring states no shape.
        about: What the docstring says of it.
        unit: Its unit, empty if it has none.
    """

    name: str
    value: Any
    axes: tuple[str, ...] | None
    about: str
    unit: str

    @property
    def reason(self) -> str:
        """When the field is undefined, in the words of its docstring; or empty."""
        found = _UNDEFINED.search(self.about)
        return (
            ""
            if found is None
            else " ".join(found.group(0)[4:].replace("`", "").split())
        )


def description_of(result: Any) -> Description | None:
    """Returns what is declared about a result's class, None if it is no result."""
    return getattr(type(result), "_description", None)


def names_of(kind: type) -> tuple[str, ...]:
    """Returns the names of the fields of a named tuple or dataclass."""
    if dataclasses.is_dataclass(kind):
        return tuple(field.name for field in dataclasses.fields(kind))
    return kind._fields  # pyrefly: ignore[missing-attribute]


def fields_of(result: Any, *, derived: bool = False) -> Iterator[Field]:
    """Yields the fields of a result, and the derived ones if asked for."""
    described = description_of(result) or Description()
    for name in (*names_of(type(result)), *(described.derived if derived else ())):
        yield _named(result, name)


def defined(result: Any, field: Field) -> np.ndarray | None:
    """Returns the numbers of a field, NaN where it is undefined; None without any.

    Numbers that are not floating ones are returned as they are, without a mask.
    """
    array = on_host(field.value)
    described = description_of(result) or Description()
    name = described.masks.get(field.name)
    if array is None or name is None or not _is_floating(array):
        return array
    mask = on_host(getattr(result, name))
    if mask is None:
        return array
    if _is_floating(mask):
        mask = np.isfinite(mask)
    axes = _named(result, name).axes
    batch = 0 if axes is None else mask.ndim - len(axes)  # None under python -OO
    ones = (1,) * (array.ndim - mask.ndim)
    mask = mask.reshape(mask.shape[:batch] + ones + mask.shape[batch:])
    return np.where(mask, array, np.full((), np.nan, array.dtype))


def reads_nan(function: _Function) -> _Function:
    """Returns a function that makes text or tables, in which NaN is no error."""

    def quietly(x64: bool, args: Any, options: Any) -> Any:
        with jax.debug_nans(False), jax.enable_x64(x64):
            return function(*args, **options)

    @functools.wraps(function)
    def reading(*args: Any, **options: Any) -> Any:
        if not jax.debug_nans.value:
            return function(*args, **options)
        # In a thread of its own: in one that has left `jax.debug_nans`, JAX looks for
        # NaN only at the first call of a compiled function.
        x64 = jnp.result_type(float) == jnp.float64
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(quietly, x64, args, options).result()

    return cast(_Function, reading)


def with_undefined(result: Any) -> Any:
    """Returns a result with NaN where its masks say that it is undefined.

    Compiled functions leave zeros or infinities there, since a NaN that is computed
    stops a run under `jax_debug_nans`. Results inside it are treated alike; a mask of
    one of them holds for all of its numbers. What is not at hand stays as it is.
    """
    described = description_of(result)
    if described is None:
        return result
    changes = {}
    for field in fields_of(result):
        value, masked = field.value, field.name in described.masks
        if description_of(value) is not None:
            value = with_undefined(value)
            if masked and all(map(_has_numbers, jax.tree.leaves(result))):
                mask = on_host(getattr(result, described.masks[field.name]))
                value = value if mask is None else _blanked(value, mask)
        elif masked:
            array = defined(result, field)
            value = value if array is None else _like(value, array)
        changes[field.name] = value
    if dataclasses.is_dataclass(result):
        return dataclasses.replace(result, **changes)
    return result._replace(**changes)


def _blanked(result: Any, mask: np.ndarray) -> Any:
    """Returns a result whose numbers are all NaN where a mask is False."""

    def blank(leaf: Any) -> Any:
        array = on_host(leaf)
        if array is None or not _is_floating(array):
            return leaf
        there = mask.reshape(mask.shape + (1,) * (array.ndim - mask.ndim))
        return _like(leaf, np.where(there, array, np.full((), np.nan, array.dtype)))

    return result if mask.all() else jax.tree.map(blank, result)


def _like(value: Any, array: np.ndarray) -> Any:
    """Returns an array of the host as a JAX array where another value is one."""
    if not isinstance(value, jax.Array):
        return array
    return jax.device_put(array, value.sharding)


def on_host(value: Any) -> np.ndarray | None:
    """Returns a number or an array as a NumPy array, None if it is none or not at hand.

    Not at hand is what is traced, was deleted, lies on other processes, or is abstract.
    """
    if isinstance(value, bool | int | float | np.ndarray | np.generic):
        array = np.asarray(value)
        return None if array.dtype.hasobject else array
    return np.asarray(value) if _is_at_hand(value) else None


def _has_numbers(value: Any) -> bool:
    """Whether something is a number, or an array whose numbers are at hand."""
    plain = isinstance(value, int | float | np.generic | np.ndarray)
    return plain or _is_at_hand(value)


def _is_at_hand(value: Any) -> bool:
    """Whether something is a JAX array whose numbers this process can fetch."""
    if not isinstance(value, jax.Array) or is_abstract(value):
        return False
    if is_key(value) or value.is_deleted():
        return False
    return value.is_fully_addressable or value.is_fully_replicated


def is_concrete(result: Any) -> bool:
    """Whether every number of a result is at hand, and none has an axis of a `vmap`."""
    hints = inspect.get_annotations(type(result))
    for field in fields_of(result):
        absent = field.value is None and "None" in str(hints.get(field.name))
        if not absent and not _is_usable(field.value, field.axes):
            return False
    return True


def _is_usable(value: Any, axes: tuple[str, ...] | None) -> bool:
    if description_of(value) is not None:
        return is_concrete(value)
    if dataclasses.is_dataclass(value):  # options, which hold no arrays
        return True
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return all(_is_usable(item, axes) for item in value)
    if axes is None and isinstance(value, str):
        return True
    if not _is_at_hand(value):  # which fetches nothing
        value = on_host(value)
    # What has no shape in its docstring, as under python -OO, may be from a `vmap`.
    return value is not None and value.ndim == (0 if axes is None else len(axes))


def is_key(array: Any) -> bool:
    """Whether an array or its shape is one of typed random keys."""
    return bool(jnp.issubdtype(array.dtype, jax.dtypes.prng_key))


def is_abstract(array: Any) -> bool:
    """Whether an array is a value of an enclosing transformation, without numbers."""
    try:
        return is_traced(array)
    except RuntimeError:  # it was deleted
        return False


def field_of(kind: type, name: str) -> Field:
    """Returns what is known of a field or property of a class, without a value."""
    described = getattr(kind, "_description", Description())
    about = _documented(kind.__doc__).get(name, "")
    if name not in names_of(kind):
        about = inspect.cleandoc(getattr(kind, name).__doc__ or "")
    axes, shape = None, _SHAPE.search(about)
    if shape is not None:
        letters = [part for part in shape.group(1).split(", ") if part]
        axes = tuple(_axis(part, described.axes) for part in letters)
    return Field(name, None, axes, about, described.units.get(name, ""))


def _named(result: Any, name: str) -> Field:
    return field_of(type(result), name)._replace(value=getattr(result, name))


def _axis(letters: str, special: Mapping[str, str]) -> str:
    """Returns the name of an axis of a size such as ``S+1`` or ``m b``."""
    size = " ".join(re.sub(r"([+-])", r" \1 ", letters).split())
    return special.get(size) or _AXES.get(size) or re.sub(r"\W+", "_", size).strip("_")


@functools.cache
def _documented(docstring: str | None) -> dict[str, str]:
    """Returns what a docstring says of each attribute, by its name."""
    text = inspect.cleandoc(docstring or "")
    _, _, section = text.partition("Attributes:\n")
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        start = re.match(r"    (\w+): (.*)", line)
        if start is not None:
            name = start[1]
            found[name] = start[2]
        elif line.startswith("        ") and name:
            found[name] += " " + line.strip()
        elif line.strip():
            break
    return found


def _is_floating(array: np.ndarray) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.inexact))
