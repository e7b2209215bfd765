"""Equinox models as the outputs of a problem."""

import dataclasses
from functools import partial
from typing import Any

import jax

from grsd_jax._typing import PyTree
from grsd_jax.models.inputs import Inputs, check_inputs, inputs_of


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["arrays", "state"],
    meta_fields=["static", "tree", "inputs"],
)
@dataclasses.dataclass(frozen=True)
class EquinoxOutputs:
    """``outputs_fn(params, batch)`` of an Equinox model, itself a pytree.

    Attributes:
        arrays: The model's arrays that are no parameters, None elsewhere; data.
        state: The model's ``eqx.nn.State``, data, or None.
        static: The model's leaves that are no arrays.
        tree: The tree of ``static``.
        inputs: The key of the batch, or a function of it.
    """

    arrays: PyTree
    state: PyTree
    static: tuple[Any, ...]
    tree: Any
    inputs: Inputs

    def __call__(self, params: PyTree, batch: PyTree) -> jax.Array:
        """Returns the outputs ``[N, ...]`` of one batch."""
        import equinox as eqx

        static = jax.tree.unflatten(self.tree, self.static)
        model = eqx.combine(params, self.arrays, static)

        def one(x: Any) -> jax.Array:
            if self.state is None:
                return model(x)
            # A copy: a state is spent once a layer has written to it.
            return model(x, jax.tree.map(lambda leaf: leaf, self.state))[0]

        return jax.vmap(one)(inputs_of(batch, self.inputs))


def equinox_outputs(
    model: Any, state: PyTree = None, *, inputs: Inputs = "image"
) -> tuple[EquinoxOutputs, PyTree]:
    """Returns an Equinox model as an ``outputs_fn``, and its parameters.

    The model maps one example and runs under `jax.vmap`, in inference mode and without
    a random key: dropout is off and BatchNorm uses its stored statistics. Arrays that
    are not floating, such as counters or a fixed permutation, are held constant;
    complex ones are refused where the problem is used.

    Args:
        model: A callable pytree, ``model(x)`` of one example, or ``model(x, state)``
            that returns the outputs and a state.
        state: The ``eqx.nn.State`` of a model with one, else None.
        inputs: The key of the batch under which the inputs are, or a function of the
            batch.

    Returns:
        A callable that is a pytree, its state and its other arrays data, and the
        model with None in place of all that is no parameter. New values retrace
        nothing.

    Raises:
        ValueError: If the model is not callable or has no floating array.
    """
    import equinox as eqx

    check_inputs(inputs)
    if not callable(model):
        raise ValueError(
            f"model: expected a callable pytree, got {type(model).__name__}."
        )
    if state is not None and not isinstance(state, eqx.nn.State):
        raise ValueError(
            f"state: expected an eqx.nn.State or None, got {type(state).__name__}."
        )
    model = eqx.nn.inference_mode(model)
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    if not jax.tree.leaves(params):
        raise ValueError(
            "model: expected a pytree with floating arrays, got none in "
            f"{type(model).__name__}."
        )
    arrays, static = eqx.partition(rest, eqx.is_array)
    leaves, tree = jax.tree.flatten(static)
    return EquinoxOutputs(arrays, state, tuple(leaves), tree, inputs), params
