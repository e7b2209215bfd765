"""What every result offers: text, files and tables, by one decorator.

A result is a named tuple or a frozen dataclass. `result` gives its class ``repr``,
``_repr_html_``, ``summary``, ``save``, ``to_xarray`` and ``to_pandas``; its fields, and
how JAX flattens it, stay as they are.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from grsd_jax.results.fields import Description, with_undefined
from grsd_jax.results.storage import load, save
from grsd_jax.results.tables import to_pandas, to_xarray
from grsd_jax.results.text import (
    as_html,
    as_text,
    headline,
    number,
    span,
    summary,
    with_interval,
)

__all__ = [
    "headline",
    "load",
    "number",
    "result",
    "save",
    "span",
    "summary",
    "to_pandas",
    "to_xarray",
    "with_interval",
    "with_undefined",
]

_Class = TypeVar("_Class", bound=type)

_METHODS = (summary, save, to_xarray, to_pandas)


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
        attributes: dict[str, Any] = {method.__name__: method for method in _METHODS}
        attributes |= {"__repr__": as_text, "_repr_html_": as_html}
        attributes["_description"] = Description(**described)
        for name, value in attributes.items():
            setattr(kind, name, value)
        return kind

    return decorate
