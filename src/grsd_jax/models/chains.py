"""Networks of any depth and width: MLP, CNN, small Transformer, state-space model.

All are chains of L blocks (`grsd_jax.models.chain`), all take their depth, width and
activation as arguments (the state-space model is linear), and nothing in them draws
random numbers or couples examples (paper 6).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from grsd_jax._checks import check_at_least, make_plain
from grsd_jax.models.chain import DepthChain, linen_chain
from grsd_jax.models.state_space import LinearStateSpace

__all__ = ["MLP", "ConvNet", "LinearStateSpace", "Transformer", "linen_chain"]


class Branch(nn.Module):
    """A block: a layer of activations, ``G(h) = W act(h) + b``, and the skip around it.

    Attributes:
        layer: ``W``, with its bias.
        activation: Name of the activation.
        residual: Whether the block adds its input.
        scale: s, the factor of a residual branch.
    """

    layer: nn.Module
    activation: str
    residual: bool
    scale: float

    def __call__(self, state: jax.Array) -> jax.Array:
        """Maps ``h_l`` to ``h_{l+1}``, of the same shape."""
        branch = self.layer(getattr(jax.nn, self.activation)(state))
        return state + self.scale * branch if self.residual else branch


class MLP(DepthChain):
    """Multilayer perceptron of L blocks, plain or residual.

    ``h_0 = W x + b`` of the flattened input, ``G_l(h) = W_l act(h) + b_l`` and outputs
    ``W act(h_L) + b``. The weights start normal with the variance at which states of
    unit variance keep it in a plain net: ``1 / (fan_in E[act(z)^2])``, z normal.

    Attributes:
        num_classes: Outputs C.
        depth: Blocks L.
        width: Features of the state.
        activation: Name of the activation, one of ``models.ACTIVATIONS``.
        residual: Whether ``h_{l+1} = h_l + s G_l(h_l)``, or ``G_l(h_l)``.
        branch_scale: s.

    References:
        Paper 6.1; 4.1 for the residual form.
    """

    activation: str = "relu"
    residual: bool = False
    branch_scale: float = 1.0

    def setup(self) -> None:
        """Makes the layers."""
        init = preserving_init(self.activation)
        self.stem = nn.Dense(self.width)
        self._set_blocks(
            lambda: Branch(
                nn.Dense(self.width, kernel_init=init),
                self.activation,
                self.residual,
                self.branch_scale,
            )
        )
        self.head = nn.Dense(self.num_classes)

    def first_state(self, x: jax.Array) -> jax.Array:
        """Returns ``h_0``, ``[N, width]``."""
        return self.stem(x.reshape(x.shape[0], -1))

    def outputs(self, state: jax.Array) -> jax.Array:
        """Returns the outputs ``[N, C]`` from ``h_L``."""
        return self.head(getattr(jax.nn, self.activation)(state))


class ConvNet(DepthChain):
    """Convolutional network of L blocks on one resolution, plain or residual.

    ``h_0`` is a 3x3 convolution of the images, ``G_l(h) = conv_l(act(h))`` with 3x3
    windows, and the outputs are linear in the spatial mean of ``act(h_L)``. Plain and
    residual nets have one parameter tree; the weights start as in `MLP`.

    Attributes:
        num_classes: Outputs C.
        depth: Blocks L.
        width: Channels.
        activation: Name of the activation, one of ``models.ACTIVATIONS``.
        residual: Whether ``h_{l+1} = h_l + s G_l(h_l)``, or ``G_l(h_l)``.
        branch_scale: s.
        stem_strides: Strides of the stem, which set the resolution of the blocks.

    References:
        Paper 6.2; 4.1 for the residual form.
    """

    activation: str = "relu"
    residual: bool = False
    branch_scale: float = 1.0
    stem_strides: int = 1

    def setup(self) -> None:
        """Makes the layers."""
        init = preserving_init(self.activation)
        self.stem = nn.Conv(self.width, (3, 3), strides=self.stem_strides)
        self._set_blocks(
            lambda: Branch(
                nn.Conv(self.width, (3, 3), kernel_init=init),
                self.activation,
                self.residual,
                self.branch_scale,
            )
        )
        self.head = nn.Dense(self.num_classes)

    def first_state(self, x: jax.Array) -> jax.Array:
        """Returns ``h_0``, ``[N, H / strides, W / strides, width]``."""
        _check_images(x)
        return self.stem(x)

    def outputs(self, state: jax.Array) -> jax.Array:
        """Returns the outputs ``[N, C]`` from ``h_L``."""
        activated = getattr(jax.nn, self.activation)(state)
        return self.head(jnp.mean(activated, axis=(1, 2)))


class PatchEmbedding(nn.Module):
    """Patches of images as tokens, with learned positions.

    Attributes:
        width: Features of a token.
        patch_size: Pixels along the side of a patch.
    """

    width: int
    patch_size: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images ``[N, H, W, channels]`` to tokens ``[N, T, width]``."""
        side = (self.patch_size, self.patch_size)
        if x.shape[1] % self.patch_size or x.shape[2] % self.patch_size:
            raise ValueError(
                f"x: expected images whose sides are multiples of {self.patch_size}, "
                f"got shape {list(x.shape)}."
            )
        patches = nn.Conv(self.width, side, strides=side, name="patches")(x)
        tokens = patches.reshape(x.shape[0], -1, self.width)
        # One index for each example, so that the layer's examples are independent.
        places = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        places = jnp.broadcast_to(places, tokens.shape[:2])
        return tokens + nn.Embed(tokens.shape[1], self.width, name="positions")(places)


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP, each with its own skip.

    Attributes:
        num_heads: Attention heads.
        mlp_width: Hidden features of the MLP.
        activation: Name of the MLP's activation.
        scale: s, the factor of both branches.
    """

    num_heads: int
    mlp_width: int
    activation: str
    scale: float

    @nn.compact
    def __call__(self, state: jax.Array) -> jax.Array:
        """Maps tokens ``[N, T, width]`` to tokens."""
        attention = nn.MultiHeadDotProductAttention(self.num_heads, name="attention")
        attended: Any = attention(nn.LayerNorm(name="norm1")(state))
        state = state + self.scale * attended
        hidden = nn.Dense(self.mlp_width, name="mlp1")(
            nn.LayerNorm(name="norm2")(state)
        )
        hidden = getattr(jax.nn, self.activation)(hidden)
        branch = nn.Dense(state.shape[-1], name="mlp2")(hidden)
        return state + self.scale * branch


class NormHead(nn.Module):
    """LayerNorm, the mean over tokens, and a linear layer.

    Attributes:
        num_classes: Outputs C.
    """

    num_classes: int

    @nn.compact
    def __call__(self, state: jax.Array) -> jax.Array:
        """Maps tokens ``[N, T, width]`` to outputs ``[N, C]``."""
        tokens = nn.LayerNorm(name="norm")(state)
        return nn.Dense(self.num_classes, name="linear")(jnp.mean(tokens, axis=1))


class Transformer(DepthChain):
    """Small vision Transformer: patches, L pre-norm blocks, LayerNorm and a mean.

    A block is ``h' = h + s attention(LN(h))``, then ``h' + s mlp(LN(h'))``.

    Attributes:
        num_classes: Outputs C.
        depth: Blocks L.
        width: Features of a token, a multiple of ``num_heads``.
        activation: Activation of the MLP, one of ``models.ACTIVATIONS``.
        branch_scale: s.
        num_heads: Attention heads.
        mlp_ratio: Hidden features of the MLP over ``width``.
        patch_size: Pixels along the side of a patch.

    References:
        Paper 6.3.
    """

    activation: str = "gelu"
    branch_scale: float = 1.0
    num_heads: int = 2
    mlp_ratio: int = 2
    patch_size: int = 8

    def __post_init__(self) -> None:
        """Checks the attributes."""
        make_plain(self)
        check_at_least("num_heads", self.num_heads, 1)
        if self.width % self.num_heads:
            raise ValueError(
                f"width: expected a multiple of num_heads = {self.num_heads}, "
                f"got {self.width}."
            )
        super().__post_init__()

    def setup(self) -> None:
        """Makes the layers."""
        self.stem = PatchEmbedding(self.width, self.patch_size)
        self._set_blocks(
            lambda: TransformerBlock(
                self.num_heads,
                self.mlp_ratio * self.width,
                self.activation,
                self.branch_scale,
            )
        )
        self.head = NormHead(self.num_classes)

    def first_state(self, x: jax.Array) -> jax.Array:
        """Returns ``h_0``, ``[N, T, width]``."""
        _check_images(x)
        return self.stem(x)


@functools.cache
def preserving_init(activation: str) -> jax.nn.initializers.Initializer:
    """Returns the normal initializer under which unit-variance states keep theirs.

    Args:
        activation: Name of the activation.

    Returns:
        An initializer of variance ``1 / (fan_in E[act(z)^2])``, z standard normal.

    References:
        He et al. (2015), whose factor 2 is that of relu.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(99)
    with jax.ensure_compile_time_eval():
        values = np.asarray(getattr(jax.nn, activation)(nodes.astype(np.float32)))
    square = float(np.sum(weights * values**2) / np.sum(weights))
    return nn.initializers.variance_scaling(1.0 / square, "fan_in", "normal")


def _check_images(x: jax.Array) -> None:
    if x.ndim != 4:
        raise ValueError(
            f"x: expected images [N, H, W, channels], got shape {list(x.shape)}."
        )
