"""What every bundled network of section 6 is: L blocks between a stem and a head.

Submodules are named in order of depth, ``stem``, ``block1`` .. ``blockL``, ``head``,
and the methods `first_state` and `next_state` are the maps between the states ``h_l``:

    h_0 = stem(x),   h_{l+1} = h_l + s G_l(h_l)   or, plain,   h_{l+1} = G_l(h_l)

(paper 4.1). `linen_chain` hands them to the numerics of `grsd_jax.conditions.depth`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import linen as nn

from grsd_jax._checks import check_at_least, check_choice, check_positive, make_plain
from grsd_jax._typing import PyTree
from grsd_jax.models.linen_checks import ACTIVATIONS


class DepthChain(nn.Module):
    """What all networks of this module share: L blocks between a stem and a head.

    Attributes:
        num_classes: Outputs C.
        depth: Blocks L.
        width: Features of the state.
    """

    num_classes: int = 10
    depth: int = 4
    width: int = 16

    def __post_init__(self) -> None:
        """Checks the attributes."""
        make_plain(self)
        check_at_least("num_classes", self.num_classes, 1)
        check_at_least("depth", self.depth, 1)
        check_at_least("width", self.width, 1)
        activation = getattr(self, "activation", ACTIVATIONS[0])
        check_choice("activation", activation, ACTIVATIONS)
        check_positive("branch_scale", getattr(self, "branch_scale", 1.0))
        super().__post_init__()

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps inputs ``[N, ...]`` to outputs ``[N, C]``.

        Args:
            x: Inputs.
            train: Without effect; every layer is the same in training.

        Returns:
            The outputs.
        """
        del train
        state = self.first_state(x)
        for index in range(self.depth):
            state = self.next_state(state, index, x)
        return self.outputs(state)

    def first_state(self, x: jax.Array) -> jax.Array:
        """Returns ``h_0 = stem(x)``, with leading axis N."""
        return self.stem(x)

    def next_state(self, state: jax.Array, index: int, x: jax.Array) -> jax.Array:
        """Returns ``h_{l+1}`` from ``h_l``.

        Args:
            state: ``h_l``.
            index: l, from 0 to ``L - 1``.
            x: The network's inputs, which only a state-space model reads again.

        Returns:
            ``h_{l+1}``, in the shape of ``h_l``.
        """
        del x
        return getattr(self, f"block{index + 1}")(state)

    def outputs(self, state: jax.Array) -> jax.Array:
        """Returns the outputs ``[N, C]`` from ``h_L``."""
        return self.head(state)

    @nn.nowrap
    def block_prefixes(self) -> dict[str, tuple[str, ...]]:
        """Returns the blocks by depth, for `grsd_jax.models.depth_blocks`."""
        names = ["stem", *(f"block{i + 1}" for i in range(self.depth)), "head"]
        return {name: (name,) for name in names}

    def _set_blocks(self, make: Any) -> None:
        for index in range(self.depth):
            setattr(self, f"block{index + 1}", make())


def linen_chain(
    model: DepthChain, params: PyTree, x: jax.Array
) -> tuple[jax.Array, tuple[Callable[[jax.Array], jax.Array], ...]]:
    """Returns a network as a chain of maps between its states.

    Args:
        model: The network.
        params: Its ``params`` collection.
        x: Inputs ``[N, ...]``.

    Returns:
        ``h_0``, with leading axis N, and the L maps from ``h_l`` to ``h_{l+1}``, as
        `grsd_jax.conditions.state_increments` takes them.
    """
    variables = {"params": params}

    def advance(state: jax.Array, *, index: int) -> jax.Array:
        new: Any = model.apply(variables, state, index, x, method="next_state")
        return new

    first: Any = model.apply(variables, x, method="first_state")
    return first, tuple(partial(advance, index=i) for i in range(model.depth))
