"""A hash of what two spectra have to share: the examples, their targets, the loss."""

import functools
import inspect
import types
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import on_automatic_mesh
from grsd_jax.objective import ErrorObjective, OutputsObjective
from grsd_jax.problem import Problem

#: How deep a function is followed into the functions that it holds.
_DEPTH = 3


def fingerprint(problem: Problem) -> jax.Array:
    """Returns a hash of the batches and targets in their order, and of the loss.

    A loss that is a function counts by its name and code, which are the same in every
    process of one version of Python.

    Args:
        problem: The problem.

    Returns:
        [2] uint32.
    """
    return _fingerprint(on_automatic_mesh(problem))


@jax.jit
def _fingerprint(problem: Problem) -> jax.Array:
    data = [problem.batches]
    objective = problem.objective
    if isinstance(objective, OutputsObjective) and callable(objective.target):
        data.append(jax.vmap(objective.target)(problem.batches))
    total = jnp.full(2, zlib.crc32(_stated(objective).encode()), jnp.uint32)
    for index, leaf in enumerate(jax.tree.leaves(data)):
        total = total * np.uint32(31) + _hash(_words(leaf), index)
    return total


def _stated(objective: OutputsObjective | ErrorObjective) -> str:
    """Returns what makes errors of outputs, in words: the loss and the target's key."""
    if isinstance(objective, ErrorObjective):
        return "error"
    loss, target = objective.loss, objective.target
    named = loss if isinstance(loss, str) else _name_of(loss)
    return f"{named} of {'a function' if callable(target) else repr(target)}"


def _name_of(function: Any, depth: int = _DEPTH) -> str:
    """Returns what a function does, in words that are the same in every process.

    Its name and its code, with the plain values and the functions that are bound to it:
    what two lambdas differ in. Arrays that it holds, and globals, are not seen.
    """
    if isinstance(function, functools.partial):
        bound = [*enumerate(function.args), *sorted(function.keywords.items())]
        return f"{_name_of(function.func, depth)} with {_stated_values(bound, depth)}"
    name = getattr(function, "__qualname__", type(function).__qualname__)
    inner, owner = _opened(inspect.unwrap(function))
    if not isinstance(inner, types.FunctionType):
        return name
    bound = [
        *sorted(getattr(owner, "__dict__", {}).items()),
        *enumerate(inner.__defaults__ or ()),
        *sorted((inner.__kwdefaults__ or {}).items()),
        *inspect.getclosurevars(inner).nonlocals.items(),
    ]
    return f"{name} {_code_of(inner.__code__)} with {_stated_values(bound, depth)}"


def _opened(function: Any) -> tuple[Any, Any]:
    """Returns the plain function of a method or of a callable object, and its owner."""
    if isinstance(function, types.FunctionType):
        return function, None
    if isinstance(function, types.MethodType):
        return function.__func__, function.__self__
    return getattr(type(function), "__call__", None), function  # noqa: B004


def _stated_values(bound: list[tuple[Any, Any]], depth: int) -> list[tuple[Any, str]]:
    """Returns the plain values and the functions among some, under their names."""
    found = []
    for name, value in bound:
        if isinstance(value, str | int | float | bool | None):
            found.append((name, repr(value)))
        elif callable(value) and depth:
            found.append((name, _name_of(value, depth - 1)))
    return found


def _code_of(code: types.CodeType) -> str:
    """Returns a checksum of what a function's code does."""
    constants = [
        _code_of(each)
        if isinstance(each, types.CodeType)
        else repr(sorted(map(repr, each)) if isinstance(each, frozenset) else each)
        for each in code.co_consts
    ]
    text = repr((code.co_code, constants, code.co_names))
    return f"{zlib.crc32(text.encode()):08x}"


def _words(leaf: jax.typing.ArrayLike) -> jax.Array:
    """Returns the bits of an array as uint32, in order."""
    array = jnp.asarray(leaf)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag], axis=-1)
    bits = 8 * min(array.dtype.itemsize, 4)
    words = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{bits}"))
    return words.astype(jnp.uint32).reshape(-1)


def _hash(words: jax.Array, index: int) -> jax.Array:
    """Sums mixed words, each with its place, under two seeds."""
    place = jnp.arange(len(words), dtype=jnp.uint32)
    found = []
    for seed in (np.uint32(2 * index + 1), np.uint32(0x51ED270B + 2 * index)):
        # The multipliers are those of MurmurHash3 and of Fibonacci hashing.
        mixed = words ^ (place * np.uint32(0x9E3779B1) + seed)
        for multiplier in (np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)):
            mixed = (mixed ^ (mixed >> np.uint32(15))) * multiplier
        found.append(jnp.sum(mixed ^ (mixed >> np.uint32(16)), dtype=jnp.uint32))
    return jnp.stack(found)
