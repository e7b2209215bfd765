"""What a model is called with: its inputs in a batch, its mode, its state as data."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from grsd_jax._checks import check_numbers, entry_of
from grsd_jax._typing import PyTree

#: The key of a batch, or a function of the batch.
Inputs = str | Callable[[PyTree], Any]

#: The arguments by which a network is told its mode, as they are in evaluation.
_EVALUATION = {
    "train": False,
    "training": False,
    "is_training": False,
    "deterministic": True,
    "use_running_average": True,
}


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


def evaluation_flags(call: Callable[..., Any], owner: Any = None) -> dict[str, Any]:
    """Returns the arguments that tell a network that it is not trained.

    Args:
        call: What is called with them.
        owner: The network, if some of its fields say the same. Where such a field is
            set, an argument that may be left out is: layers refuse to be told twice.

    Returns:
        Those of `_EVALUATION` that ``call`` takes, by name.
    """
    given = inspect.signature(call).parameters
    return {
        name: value
        for name, value in _EVALUATION.items()
        if name in given
        and given[name].kind is not inspect.Parameter.POSITIONAL_ONLY
        and (given[name].default is not None or getattr(owner, name, None) is None)
    }


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
