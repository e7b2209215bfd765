"""Where a model finds its inputs in a batch, and the state that it holds as data."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from grsd_jax._checks import check_numbers, entry_of
from grsd_jax._typing import PyTree

#: The key of a batch, or a function of the batch.
Inputs = str | Callable[[PyTree], Any]


def check_inputs(inputs: Inputs) -> None:
    """Raises ValueError unless ``inputs`` is a key or a function."""
    if not (isinstance(inputs, str) or callable(inputs)):
        raise ValueError(
            f"inputs: expected a key of the batch, or a function of it, got {inputs!r}."
        )


def inputs_of(batch: PyTree, inputs: Inputs) -> Any:
    """Returns what the model takes.

    Args:
        batch: One batch.
        inputs: A key of it, or a function of it.

    Returns:
        The inputs, leading axis N.

    Raises:
        ValueError: If the batch has no such key.
    """
    return entry_of("inputs", batch, inputs)


def as_data(state: PyTree) -> PyTree:
    """Returns a state with its numbers as arrays, so that new ones retrace nothing.

    Raises:
        ValueError: If a leaf holds no numbers; it names the leaf by its path.
    """

    def one(path: Any, leaf: Any) -> Any:
        check_numbers(f"state{jax.tree_util.keystr(path)}", leaf)
        shape = isinstance(leaf, jax.ShapeDtypeStruct)  # to plan by shapes alone
        return leaf if shape else jnp.asarray(leaf)

    return jax.tree_util.tree_map_with_path(one, state)
