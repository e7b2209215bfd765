"""Flax linen modules as the outputs of a problem, and their parameters by depth."""

import dataclasses
from functools import partial
from typing import Any

import jax
from flax import linen as nn

from grsd_jax._typing import PyTree
from grsd_jax.models.inputs import (
    Inputs,
    as_data,
    check_inputs,
    evaluation_flags,
    inputs_of,
)
from grsd_jax.models.linen_checks import coupled_examples_refused
from grsd_jax.parameter_blocks import ParameterBlocks, partition_by_prefix


def depth_blocks(model: nn.Module, params: PyTree) -> ParameterBlocks:
    """Cuts a model's parameters into blocks by depth, from input to output.

    Every bundled model says how by its method ``block_prefixes()``, which
    returns ``{block: (path prefixes)}`` in order of depth; so may any other.

    Args:
        model: A linen module with ``block_prefixes``.
        params: Its ``params`` collection; shapes alone are enough.

    Returns:
        The partition.

    Raises:
        ValueError: If the model has no ``block_prefixes``, or a parameter falls into no
            block or into two.
    """
    prefixes = getattr(model, "block_prefixes", None)
    if prefixes is None:
        raise ValueError(
            "model: expected one with the method block_prefixes(), got "
            f"{type(model).__name__}; cut its parameters with partition or "
            "partition_by_prefix."
        )
    return partition_by_prefix(params, prefixes())


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["state"],
    meta_fields=["model", "inputs"],
)
@dataclasses.dataclass(frozen=True)
class LinenOutputs:
    """``outputs_fn(params, batch)`` of a linen module, itself a pytree.

    The model is static and the state is data, so that new statistics retrace nothing,
    and the model stays visible to the operators.

    Attributes:
        model: The linen module.
        state: Its non-parameter collections, such as ``{"batch_stats": ...}``.
        inputs: The key of the batch, or a function of it.
    """

    model: nn.Module
    state: PyTree
    inputs: Inputs = "image"

    def __call__(self, params: PyTree, batch: PyTree) -> jax.Array:
        """Returns the outputs ``[N, ...]`` of one batch.

        Args:
            params: The ``params`` collection.
            batch: The batch, with the inputs under the key ``inputs``.

        Returns:
            The outputs.
        """
        options = evaluation_flags(type(self.model).__call__, self.model)
        variables = {**self.state, "params": params}
        with coupled_examples_refused():
            inputs = inputs_of(batch, self.inputs)
            outputs: Any = self.model.apply(variables, inputs, **options)
        return outputs


def linen_outputs(
    model: nn.Module, state: PyTree, *, inputs: Inputs = "image"
) -> LinenOutputs:
    """Returns a linen module as the ``outputs_fn`` of a `Problem`.

    It runs in evaluation mode: where the module's ``__call__`` takes them, with
    ``train``, ``training`` and ``is_training`` False, ``deterministic`` and
    ``use_running_average`` True. With BatchNorm on stored statistics the examples are
    independent. A layer that couples examples or draws random numbers (dropout,
    BatchNorm on the batch's own statistics) raises ValueError when it is called, and
    says why.

    Args:
        model: Any linen module that maps inputs to ``[N, ...]``.
        state: The non-parameter collections, ``{"batch_stats": ...}`` or ``{}``.
        inputs: The key of the batch under which the inputs are, or a function of the
            batch.

    Returns:
        A callable that is a pytree, its state data.

    Raises:
        ValueError: If ``state`` is not a mapping, holds ``params``, or has a leaf that
            holds no numbers.
    """
    check_inputs(inputs)
    _check_state(state)
    return LinenOutputs(model, as_data(state), inputs)


def _check_state(state: PyTree) -> None:
    if not hasattr(state, "keys") or "params" in state:
        got = list(state.keys()) if hasattr(state, "keys") else type(state).__name__
        raise ValueError(
            "state: expected the non-parameter collections of the module, such as "
            f"{{'batch_stats': ...}} or {{}}, got {got}."
        )
