"""What every result offers: text, files and tables, by one decorator.

A result is a `NamedResult`, which is a named tuple, or a frozen dataclass that inherits
`Result`. The decorator `result` gives its class the methods of `Result`; its fields,
and how JAX flattens it, stay as they are.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    NamedTuple,
    Self,
    TypeVar,
    dataclass_transform,
)

from grsd_jax.results.fields import Description, with_undefined
from grsd_jax.results.storage import load, save
from grsd_jax.results.tables import to_pandas, to_xarray
from grsd_jax.results.text import (
    as_html,
    as_text,
    headline,
    number,
    percent,
    span,
    summary,
    with_interval,
)

__all__ = [
    "NamedResult",
    "Result",
    "headline",
    "load",
    "number",
    "percent",
    "result",
    "save",
    "span",
    "summary",
    "to_pandas",
    "to_xarray",
    "with_interval",
    "with_undefined",
]


class Result:
    """The methods of every result."""

    _description: ClassVar[Description]

    summary = summary
    save = save
    to_xarray = to_xarray
    to_pandas = to_pandas
    __repr__ = as_text
    _repr_html_ = as_html


if TYPE_CHECKING:

    @dataclass_transform(frozen_default=True)
    class NamedResult(Result):
        """What type checkers read in place of `NamedTuple`, which takes no other base.

        A frozen class with the fields of its subclass. It can be unpacked, as `Any`.
        """

        _fields: ClassVar[tuple[str, ...]]

        def _asdict(self) -> dict[str, Any]: ...
        def _replace(self, **changes: Any) -> Self: ...
        def __getitem__(self, index: Any) -> Any: ...
        def __iter__(self) -> Iterator[Any]: ...
        def __len__(self) -> int: ...

else:
    NamedResult = NamedTuple

_Class = TypeVar("_Class", bound=type[Result])


def result(**described: Any) -> Callable[[_Class], _Class]:
    """Returns a decorator that gives a class of results text, files and tables.

    The axes of the fields and the reasons for NaN are read from the docstring. What it
    does not say is declared here.

    Args:
        **described: The attributes of `Description`.

    Returns:
        The decorator, which returns the class itself.
    """

    def decorate(kind: _Class) -> _Class:
        for name, member in vars(Result).items():
            if inspect.isfunction(member):
                setattr(kind, name, member)
        kind._description = Description(**described)
        return kind

    return decorate
