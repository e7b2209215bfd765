"""Checks that run at trace time: each raises one sentence that names the argument."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._typing import PyTree

#: The largest integer that JAX counts with, that of int32.
_MOST_COUNTED = 2**31 - 1

#: The leading axes of batches.
_AXES = {"K": "batches", "N": "examples"}


def check_choice(name: str, value: object, options: Sequence[object]) -> None:
    """Raises ValueError unless ``value`` is one of ``options``."""
    if isinstance(value, np.ndarray | jax.Array) or value not in options:
        listed = ", ".join(repr(option) for option in options)
        raise ValueError(f"{name}: expected one of {listed}, got {value!r}.")


def check_type(name: str, value: object, kind: type) -> None:
    """Raises ValueError unless ``value`` is of the given type."""
    if not isinstance(value, kind):
        raise ValueError(f"{name}: expected a {kind.__name__}, got {value!r}.")


def check_at_least(
    name: str, value: object, minimum: int, maximum: int = _MOST_COUNTED
) -> int:
    """Returns an integer as Python's, whose arithmetic does not wrap as NumPy's does.

    Raises:
        ValueError: Unless ``value`` is an integer from ``minimum`` to ``maximum``.
    """
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_integer or value < minimum:  # pyrefly: ignore[unsupported-operation]
        raise ValueError(f"{name}: expected an integer >= {minimum}, got {value!r}.")
    if value > maximum:  # pyrefly: ignore[unsupported-operation]
        raise ValueError(f"{name}: expected an integer <= {maximum}, got {value!r}.")
    return int(value)  # pyrefly: ignore[bad-argument-type]


def check_positive(name: str, value: object) -> float:
    """Returns a number as Python's, which takes the dtype of what it meets.

    Raises:
        ValueError: Unless ``value`` is a finite number above zero.
    """
    if not (_is_finite(value) and value > 0):  # pyrefly: ignore[unsupported-operation]
        raise ValueError(f"{name}: expected a finite number > 0, got {value!r}.")
    return float(value)  # pyrefly: ignore[bad-argument-type]


def check_not_negative(name: str, value: object) -> float:
    """Returns a number as Python's.

    Raises:
        ValueError: Unless ``value`` is a finite number, zero or above.
    """
    if not (_is_finite(value) and value >= 0):  # pyrefly: ignore[unsupported-operation]
        raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}.")
    return float(value)  # pyrefly: ignore[bad-argument-type]


def check_share(name: str, value: object) -> float:
    """Returns a number as Python's.

    Raises:
        ValueError: Unless ``value`` is a number above 0 and below 1.
    """
    if not (_is_finite(value) and 0 < value < 1):  # pyrefly: ignore
        raise ValueError(f"{name}: expected a number between 0 and 1, got {value!r}.")
    return float(value)  # pyrefly: ignore[bad-argument-type]


def make_plain(options: Any) -> None:
    """Turns NumPy scalars among the fields of a new dataclass into Python's numbers."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if isinstance(value, np.generic):
            object.__setattr__(options, field.name, value.item())


def _is_finite(value: object) -> bool:
    """Whether ``value`` is a finite real number, and no bool."""
    real = isinstance(value, int | float | np.integer | np.floating)
    try:
        return real and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def check_floating(name: str, array: jax.typing.ArrayLike) -> None:
    """Raises ValueError unless ``array`` holds real floating-point numbers."""
    dtype = jnp.result_type(array)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name}: expected a real floating dtype, got {dtype}.")


def check_real(name: str, array: jax.typing.ArrayLike) -> None:
    """Raises ValueError if ``array`` holds no numbers, or complex ones.

    A cast to a real dtype would drop their imaginary parts.
    """
    check_numbers(name, array)
    if jnp.issubdtype(jnp.result_type(array), jnp.complexfloating):
        raise ValueError(f"{name}: expected real numbers, got complex ones.")


def check_numbers(name: str, leaf: Any) -> None:
    """Raises ValueError unless ``leaf`` is of a kind that JAX computes with."""
    try:
        if leaf is not None:  # which has the dtype float32 by JAX's rules
            jnp.result_type(leaf)
            return
    except (TypeError, ValueError):  # strings, objects, dates
        pass
    dtype = getattr(leaf, "dtype", None)
    got = type(leaf).__name__ if dtype is None else f"an array of dtype {dtype}"
    raise ValueError(f"{name}: expected an array of numbers, got {got}.")


def check_key(key: Any, needed_for: str = "") -> jax.Array:
    """Returns ``key`` if it is one PRNG key, typed or plain numbers.

    Args:
        key: The argument of that name.
        needed_for: What consumes it, for the message.

    Raises:
        ValueError: If it is another thing, or none.
    """
    dtype, axes = getattr(key, "dtype", None), np.ndim(key)
    if dtype is not None:
        typed = jnp.issubdtype(dtype, jax.dtypes.prng_key)
        if (typed and axes == 0) or (dtype == jnp.uint32 and axes == 1):
            return key
    wanted = "a PRNG key" + (f" for {needed_for}" if needed_for else "")
    got = repr(key) if dtype is None else f"shape {list(np.shape(key))} of {dtype}"
    raise ValueError(f"key: expected {wanted}, such as jax.random.key(0), got {got}.")


def check_hashable(name: str, tree: PyTree, *, unless: Callable[[Any], bool]) -> None:
    """Raises ValueError unless the leaves of a tree can be compared as static values.

    Args:
        name: The tree's name.
        tree: The tree.
        unless: Says which leaves are data, and need not be hashable.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    for path, leaf in flat:
        if unless(leaf):
            continue
        try:
            hash(leaf)
        except TypeError:
            got = type(leaf).__name__
            got += f" of dtype {leaf.dtype}" if hasattr(leaf, "dtype") else ""
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)}: expected an array of numbers or "
                f"a hashable value, got {got}."
            ) from None


def check_single_or_double(name: str, dtype: jax.typing.DTypeLike) -> None:
    """Raises ValueError unless ``dtype`` is float32 or float64."""
    if jnp.dtype(dtype) not in (jnp.float32, jnp.float64):
        raise ValueError(
            f"{name}: expected dtype float32 or float64, got {jnp.dtype(dtype)}."
        )


def check_tree_single_or_double(name: str, tree: PyTree) -> None:
    """Raises ValueError unless every leaf of a tree is in float32 or float64."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        where = f"{name}{jax.tree_util.keystr(path)}"
        check_single_or_double(where, jnp.result_type(leaf))


def check_shape(
    name: str, array: jax.typing.ArrayLike, expected: Sequence[int | None]
) -> None:
    """Raises ValueError unless the shape is ``expected`` (None matches any length)."""
    shape = np.shape(array)
    fits = len(shape) == len(expected) and all(
        want is None or want == got for want, got in zip(expected, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in expected)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(shape)}.")


def check_same_tree(name: str, tree: PyTree, reference: PyTree, of: str) -> None:
    """Raises ValueError unless ``tree`` has the structure and shapes of ``reference``.

    Args:
        name: The argument's name.
        tree: The tree to check.
        reference: The tree it must match.
        of: The name of the reference, for the message.
    """
    got, want = jax.tree.structure(tree), jax.tree.structure(reference)
    if got != want:
        raise ValueError(f"{name}: expected the tree of {of}, {want}, got {got}.")
    flat, _ = jax.tree_util.tree_flatten_with_path(reference)
    for (path, wanted), leaf in zip(flat, jax.tree.leaves(tree), strict=True):
        if np.shape(leaf) != np.shape(wanted):
            where = jax.tree_util.keystr(path)
            raise ValueError(
                f"{name}{where}: expected shape {list(np.shape(wanted))} as in {of}, "
                f"got {list(np.shape(leaf))}."
            )


def entry_of(name: str, batch: PyTree, key: Any | Callable[[PyTree], Any]) -> Any:
    """Returns what a key of a batch, or a function of it, finds there.

    Args:
        name: The name of the argument ``key``.
        batch: One batch, or several with a leading axis if ``key`` is a key.
        key: A key of the batch, or a function of it.

    Raises:
        ValueError: If the batch has no such key.
    """
    if callable(key):
        return key(batch)
    try:
        return batch[key]
    except (KeyError, TypeError, IndexError):
        keys = list(batch) if isinstance(batch, dict) else type(batch).__name__
        raise ValueError(
            f"{name}: expected a key of the batch, or a function of it, got {key!r} "
            f"and a batch with {keys}."
        ) from None


def check_batches(batches: PyTree) -> tuple[int, int]:
    """Returns ``(K, N)``, the leading axes that every leaf of ``batches`` shares.

    Args:
        batches: A pytree whose leaves have leading axes ``[K, N, ...]``.

    Raises:
        ValueError: If there is no leaf, a leaf holds no numbers or has fewer than two
            axes, leaves disagree, or K or N is 0.
    """
    num_batches, num_examples = check_leading("batches", batches, _AXES)
    return num_batches, num_examples


def check_leading(name: str, tree: PyTree, axes: dict[str, str]) -> tuple[int, ...]:
    """Returns the leading axes that every leaf of a tree shares.

    Args:
        name: The tree's name.
        tree: The tree.
        axes: The letters of the axes, and what each counts.

    Raises:
        ValueError: If there is no leaf, a leaf holds no numbers or has fewer axes,
            leaves disagree, or an axis is 0; it names the leaf by its path.
    """
    hint = "; axes are [K, N, ...], K = 1 for a single batch" if "K" in axes else ""
    wanted, number = f"leading axes [{', '.join(axes)}]", len(axes)
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    if not flat:
        raise ValueError(f"{name}: expected arrays with {wanted}, got none.")
    first: tuple[int, ...] = ()
    for path, leaf in flat:
        where = f"{name}{jax.tree_util.keystr(path)}"
        check_numbers(where, leaf)
        shape = np.shape(leaf)
        if len(shape) < number:
            raise ValueError(
                f"{where}: expected {wanted}, got shape {list(shape)}{hint}."
            )
        first = first or shape[:number]
        if shape[:number] != first:
            raise ValueError(
                f"{where}: expected leading axes {list(first)} as in the first leaf, "
                f"got {list(shape[:number])}{hint}."
            )
        if 0 in first:
            least = " of ".join(f"{axis} >= 1 {what}" for axis, what in axes.items())
            raise ValueError(
                f"{where}: expected {least}, got leading axes {list(first)}."
            )
    return first


def check_not_explicit(batches: PyTree) -> None:
    """Raises ValueError if examples are spread over an axis that is explicit.

    Arrays at hand are moved to an automatic mesh as a problem is used; inside `jit`, or
    under `jax.set_mesh`, they cannot be.
    """
    leaves = [leaf for leaf in jax.tree.leaves(batches) if isinstance(leaf, jax.Array)]
    if any(any(jax.typeof(leaf).sharding.spec) for leaf in leaves):
        raise ValueError(
            "batches: expected no explicit mesh inside jit or under jax.set_mesh, "
            "whose operations have to say where their results lie, got one; call this "
            "outside of them, or make the mesh's axes of type AxisType.Auto."
        )
