"""Haiku functions as the outputs of a problem."""

import dataclasses
import inspect
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax

from grsd_jax._typing import PyTree
from grsd_jax.models.inputs import (
    Inputs,
    as_data,
    check_inputs,
    evaluation_flags,
    inputs_of,
)

if TYPE_CHECKING:
    import haiku as hk


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["state"],
    meta_fields=["transformed", "inputs"],
)
@dataclasses.dataclass(frozen=True)
class HaikuOutputs:
    """``outputs_fn(params, batch)`` of a Haiku function, itself a pytree.

    Attributes:
        transformed: The transformed function, static.
        state: Its state, such as the averages of BatchNorm, data; None without one.
        inputs: The key of the batch, or a function of it.
    """

    transformed: Any
    state: PyTree
    inputs: Inputs

    def __call__(self, params: PyTree, batch: PyTree) -> jax.Array:
        """Returns the outputs ``[N, ...]`` of one batch."""
        apply = self.transformed.apply
        names = inspect.signature(apply).parameters
        leading = (params,) if self.state is None else (params, self.state)
        if "rng" in names:
            leading = (*leading, None)  # a function that draws numbers raises
        options = evaluation_flags(apply)
        outputs = apply(*leading, inputs_of(batch, self.inputs), **options)
        return outputs if self.state is None else outputs[0]


def haiku_outputs(
    transformed: "hk.Transformed | hk.TransformedWithState",
    state: PyTree = None,
    *,
    inputs: Inputs = "image",
) -> HaikuOutputs:
    """Returns a transformed Haiku function as the ``outputs_fn`` of a `Problem`.

    It runs without a random key, and in evaluation mode: with ``is_training=False``, or
    as `linen_outputs` has it, where the function takes such an argument. With BatchNorm
    on its averages the examples are independent.

    Args:
        transformed: What `hk.transform` or `hk.transform_with_state` returned, of a
            function that maps inputs to ``[N, ...]``.
        state: The state after `hk.transform_with_state`; else None or ``{}``.
        inputs: The key of the batch under which the inputs are, or a function of the
            batch.

    Returns:
        A callable that is a pytree, its state data.

    Raises:
        ValueError: If ``transformed`` is neither of the two, or the state does not go
            with it.
    """
    import haiku as hk

    check_inputs(inputs)
    if isinstance(transformed, hk.TransformedWithState):
        if not isinstance(state, Mapping):
            raise ValueError(
                "state: expected the state that transform_with_state initialized, got "
                f"{type(state).__name__}."
            )
        return HaikuOutputs(transformed, as_data(state), inputs)
    if not isinstance(transformed, hk.Transformed):
        raise ValueError(
            "transformed: expected what hk.transform or hk.transform_with_state "
            f"returns, got {type(transformed).__name__}."
        )
    if state:
        raise ValueError(
            "state: expected None after hk.transform; use hk.transform_with_state for "
            "a function with state."
        )
    return HaikuOutputs(transformed, None, inputs)
