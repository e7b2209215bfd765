"""Targets of the losses known by name: classes, one-hot rows, or plain numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import is_half, is_traced
from grsd_jax._checks import check_floating, check_numbers, check_shape


def class_targets(
    outputs: jax.Array,
    labels: jax.typing.ArrayLike,
    *,
    names: tuple[str, str] = ("logits", "labels"),
    min_axes: int = 1,
) -> jax.Array:
    """Returns the targets in the shape and the dtype of the outputs, at least float32.

    Args:
        outputs: Model outputs, ``[N, ..., C]``, or ``[N]`` if ``min_axes`` is 1.
        labels: Integer (or bool) classes ``[N, ...]``, or targets of the shape of the
            outputs. Narrow integers are widened, since C may lie beyond their range.
        names: The names of the two, for messages.
        min_axes: 2 for distributions over classes, whose integer targets of the full
            shape have to be one-hot rows; 1 for targets that may be any numbers.

    Returns:
        The targets. A class out of range, or a row that is not one-hot, is a row of
        NaN, since it would otherwise pass for a target of zeros.

    Raises:
        ValueError: If shapes or dtypes do not fit, or labels whose values are at hand
            are out of range or not one-hot.
    """
    outputs_name, name = names
    check_floating(outputs_name, outputs)
    if outputs.ndim < min_axes:
        raise ValueError(
            f"{outputs_name}: expected at least {min_axes} axes, examples first, "
            f"got shape {list(outputs.shape)}."
        )
    if outputs.shape[-1:] == (0,):
        raise ValueError(
            f"{outputs_name}: expected at least one output, got shape "
            f"{list(outputs.shape)}."
        )
    over_classes = min_axes > 1
    _check_kind(name, labels, outputs.shape)
    check_targets(name, labels, outputs.shape, over_classes=over_classes)
    labels = widened(labels)
    dtype = jnp.dtype(jnp.float32) if is_half(outputs.dtype) else outputs.dtype
    if _are_classes(labels, outputs.shape):
        targets = jax.nn.one_hot(labels, outputs.shape[-1], dtype=dtype)
    else:
        targets = labels.astype(dtype)
    # By value; a NaN would upset `jax_debug_nans`.
    if _are_at_hand(labels) or not _are_checked(labels, outputs.shape, over_classes):
        return targets
    wrong = _misfits(labels, outputs.shape)[..., None]
    return jnp.where(wrong, jnp.asarray(jnp.nan, dtype), targets)


def check_targets(
    name: str,
    labels: jax.typing.ArrayLike,
    shape: tuple[int, ...],
    *,
    over_classes: bool,
) -> None:
    """Raises ValueError if labels whose values are at hand fit no output.

    Args:
        name: What to call the labels.
        labels: The labels; nothing is checked of traced ones, of those spread over
            several processes or of floating numbers.
        shape: The shape of the outputs.
        over_classes: Whether integers of the full shape have to be one-hot rows.

    Raises:
        ValueError: If a class is out of range or a row is not one-hot; it names the
            first.
    """
    nothing = not _are_at_hand(labels) or 0 in np.shape(labels)
    if nothing or not _are_checked(labels, shape, over_classes):
        return
    values = np.asarray(labels)
    wrong = _misfits(values, shape)
    if not wrong.any():
        return
    low, high = values.min(), values.max()
    where = [int(index) for index in np.unravel_index(wrong.argmax(), shape[:-1])]
    if _are_classes(labels, shape):
        raise ValueError(
            f"{name}: expected classes in [0, {shape[-1]}), got values from {low} to "
            f"{high}, the first at {where}."
        )
    raise ValueError(
        f"{name}: expected one-hot rows, since integers of the shape of the outputs "
        f"{list(shape)} are no classes, got values from {low} to {high}, the first "
        f"row that is not one-hot at {where}."
    )


def count_misfits(
    labels: jax.typing.ArrayLike, shape: tuple[int, ...], *, over_classes: bool
) -> jax.Array:
    """Counts classes out of range, or rows that are not one-hot, [] int32.

    Args:
        labels: The labels, which may be traced.
        shape: The shape of the outputs.
        over_classes: As for `check_targets`.
    """
    if not _are_checked(labels, shape, over_classes):
        return jnp.int32(0)
    return jnp.sum(_misfits(widened(labels), shape), dtype=jnp.int32)


def widened(labels: jax.typing.ArrayLike) -> jax.Array:
    """Returns labels in an integer type that holds every number of classes.

    Values that 64 bits hold and JAX's integers do not stay out of range.
    """
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "iu":
        limits = np.iinfo(np.int32)
        labels = np.clip(labels, limits.min, limits.max).astype(np.int32)
    labels = jnp.asarray(labels)
    floating = jnp.issubdtype(labels.dtype, jnp.floating)
    narrow = labels.dtype.itemsize < 4 and not floating
    return labels.astype(jnp.int32) if narrow else labels


def _check_kind(
    name: str, labels: jax.typing.ArrayLike, shape: tuple[int, ...]
) -> None:
    """Raises ValueError unless labels are classes, or of the shape of the outputs."""
    check_numbers(name, labels)
    dtype = jnp.result_type(labels)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise ValueError(f"{name}: expected real numbers, got {dtype}.")
    floating = jnp.issubdtype(dtype, jnp.floating)
    if floating and np.shape(labels) == shape[:-1] and len(shape) > 1:
        raise ValueError(
            f"{name}: expected shape {list(shape)}, got {list(shape[:-1])} of {dtype}; "
            "classes have to be integers."
        )
    full = floating or np.ndim(labels) == len(shape)
    check_shape(name, labels, shape if full else shape[:-1])


def _are_at_hand(labels: jax.typing.ArrayLike) -> bool:
    """Whether this process sees all the values: not traced, not spread over several."""
    if not isinstance(labels, jax.Array):
        return True
    return not is_traced(labels) and labels.is_fully_addressable


def _are_classes(labels: jax.typing.ArrayLike, shape: tuple[int, ...]) -> bool:
    floating = jnp.issubdtype(jnp.result_type(labels), jnp.floating)
    return not floating and np.ndim(labels) < len(shape)


def _are_checked(
    labels: jax.typing.ArrayLike, shape: tuple[int, ...], over_classes: bool
) -> bool:
    """Whether the values of labels can be wrong: classes, and rows of integers."""
    floating = jnp.issubdtype(jnp.result_type(labels), jnp.floating)
    return not floating and (over_classes or _are_classes(labels, shape))


def _misfits(labels: Any, shape: tuple[int, ...]) -> Any:
    """Marks the classes out of range, or the rows not one-hot, ``[N, ...]`` bool.

    NumPy arrays of what NumPy holds.
    """
    if _are_classes(labels, shape):
        return (labels < 0) | (labels >= shape[-1])
    ones = (labels == 1).sum(axis=-1)
    return (ones != 1) | ((labels != 0) & (labels != 1)).any(axis=-1)
