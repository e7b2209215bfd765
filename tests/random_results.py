"""A result of every public class, with random numbers in the shapes it documents."""

import importlib
import inspect
import re
import types
import typing

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax.results.fields import field_of, names_of
from grsd_jax.shells import SoftShells

TOPICS = ("conditions", "dynamics", "kernel", "linalg", "shells")

#: Named tuples and dataclasses that are no results: options, inputs and operators.
OTHERS = {
    "Binning",
    "Derivative",
    "Instantaneous",
    "KrylovSteps",
    "Lanczos",
    "LinearizedKernel",
    "PathPoint",
    "Probe",
    "ShardedKernel",
    "Signs",
    "Thresholds",
    "Window",
}

SIZES = {"shell": 4, "other_shell": 4, "edge": 5, "inner_edge": 3, "end": 2, "bound": 2}
_DEFAULT = 3


def public_classes():
    """Returns the public named tuples and dataclasses of results, by name."""
    found = {}
    for topic in TOPICS:
        module = importlib.import_module(f"grsd_jax.{topic}")
        for name in module.__all__:
            value = getattr(module, name)
            fields = ("_fields", "__dataclass_fields__")
            if inspect.isclass(value) and any(hasattr(value, x) for x in fields):
                found[name] = value
    return {name: value for name, value in found.items() if name not in OTHERS}


def random_result(kind, seed=0, dtype=None):
    """Returns a result of a class; what may be None is None for odd seeds."""
    dtype = dtype or jnp.zeros(()).dtype  # which the mode decides
    rng = np.random.default_rng(seed)
    return _made(kind, rng, dtype, optional=seed % 2 == 0)


def _made(kind, rng, dtype, *, optional):
    if kind is SoftShells:
        return SoftShells(jnp.asarray([0.1, 0.2, 0.4, 0.8, 1.6], dtype), 0.5)
    hints = typing.get_type_hints(kind)
    return kind(
        **{
            name: _value(hints[name], field_of(kind, name), rng, dtype, optional)
            for name in names_of(kind)
        }
    )


def _value(hint, field, rng, dtype, optional):
    arguments = typing.get_args(hint)
    if type(None) in arguments and not optional:
        return None
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(x for x in arguments if x is not type(None))
        arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType):  # an array, or its value on the host
        hint = arguments[0]
        arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    again = (field, rng, dtype, optional)
    if hint in (jax.Array, np.ndarray):
        return _array(field, rng, dtype, hint)
    if origin is list:
        return [_value(arguments[0], *again) for _ in range(2)]
    if origin is tuple:
        repeated = arguments[-1] is Ellipsis
        kinds = [arguments[0]] * 2 if repeated else arguments
        return tuple(_value(x, *again) for x in kinds)
    if origin is dict:
        return {name: _value(arguments[1], *again) for name in ("first", "second")}
    simple = {bool: True, int: 3, float: 0.25, str: "<="}  # also a relation of a check
    if hint in simple:
        return simple[hint]
    if hint is typing.Any:  # a tree
        return {"vectors": _array(field, rng, dtype, jax.Array)}
    return _made(hint, rng, dtype, optional=optional)


def _array(field, rng, dtype, hint):
    if field.name == "key":
        return jax.random.key(1)
    shape = [SIZES.get(axis, _DEFAULT) for axis in _axes_of(field)]
    kind = re.search(r"\]`* (bool|int32|uint32)", field.about)
    kind = kind and kind[1]
    if kind == "bool":
        array = rng.random(shape) < 0.6
    elif kind == "int32":
        array = rng.integers(0, 3, shape).astype(np.int32)
    elif kind == "uint32":
        array = rng.integers(0, 2**31, shape).astype(np.uint32)
    else:
        array = np.asarray(rng.normal(size=shape)).astype(dtype)
    return jnp.asarray(array) if hint is jax.Array else array


def _axes_of(field):
    return ("any",) if field.axes is None else field.axes
