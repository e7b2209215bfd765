"""Flax NNX modules as the outputs of a problem."""

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

import jax

from grsd_jax._typing import PyTree
from grsd_jax.models.inputs import Inputs, as_data, check_inputs, inputs_of

if TYPE_CHECKING:
    from flax import nnx


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["state"],
    meta_fields=["structure", "inputs"],
)
@dataclasses.dataclass(frozen=True)
class NNXOutputs:
    """``outputs_fn(params, batch)`` of an NNX module, itself a pytree.

    Attributes:
        structure: The module's graph, static.
        state: Everything that is no parameter (statistics, random streams), data.
        inputs: The key of the batch, or a function of it.
    """

    structure: Any
    state: PyTree
    inputs: Inputs

    def __call__(self, params: PyTree, batch: PyTree) -> jax.Array:
        """Returns the outputs ``[N, ...]`` of one batch."""
        from flax import nnx

        # A copy: what the module writes to its state stays in this call.
        model = nnx.merge(self.structure, params, self.state, copy=True)
        return model(inputs_of(batch, self.inputs))


def nnx_outputs(
    model: "nnx.Module", *, inputs: Inputs = "image"
) -> tuple[NNXOutputs, PyTree]:
    """Returns an NNX module as an ``outputs_fn``, and its parameters.

    The module runs in the mode that it is in. Call ``model.eval()`` before, so that
    dropout is off and BatchNorm uses its stored statistics; on the batch's own, the
    examples are not independent.

    Args:
        model: A module that maps inputs to ``[N, ...]``. It is not changed.
        inputs: The key of the batch under which the inputs are, or a function of the
            batch.

    Returns:
        A callable that is a pytree, its state data, and the ``nnx.Param`` variables.
        New values of either retrace nothing.

    Raises:
        ValueError: If the model is no callable NNX module.
    """
    from flax import nnx

    check_inputs(inputs)
    if not (isinstance(model, nnx.Module) and callable(model)):
        raise ValueError(
            f"model: expected a callable flax.nnx.Module, got {type(model).__name__}."
        )
    structure, params, state = nnx.split(model, nnx.Param, ...)
    return NNXOutputs(structure, as_data(state), inputs), params
