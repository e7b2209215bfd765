"""CIFAR-form ResNet-18 and its plain twin.

The plain twin keeps every convolution, normalization and projection shortcut of the
ResNet, in the same parameter tree; it only leaves out the addition of the skip (paper
7.1, "Models"). One checkpoint loads into both.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from grsd_jax._checks import check_at_least, check_choice
from grsd_jax.models.linen_checks import ACTIVATIONS


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and the skip around them.

    Attributes:
        features: Output channels.
        strides: Stride of the first convolution.
        activation: Name of the activation.
        residual: Whether the skip is added. Without it a projection shortcut keeps its
            parameters and statistics, unused, so that the tree stays the same.
    """

    features: int
    strides: int
    activation: str
    residual: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps ``[N, H, W, in]`` to ``[N, H / strides, W / strides, features]``."""
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        conv = partial(nn.Conv, features=self.features, use_bias=False)
        act = getattr(jax.nn, self.activation)
        y = conv(kernel_size=(3, 3), strides=self.strides, name="conv1")(x)
        y = act(norm(name="norm1")(y))
        y = conv(kernel_size=(3, 3), name="conv2")(y)
        y = norm(name="norm2")(y)
        if x.shape != y.shape:
            x = conv(kernel_size=(1, 1), strides=self.strides, name="shortcut_conv")(x)
            x = norm(name="shortcut_norm")(x)
        return act(x + y if self.residual else y)


class ResNet(nn.Module):
    """CIFAR-form ResNet: a 3x3 stem, no max-pool, four stages of basic blocks.

    Its convolutions are padded as "SAME": at stride 2 and an even side by (0, 1), and
    not by (1, 1) as with PyTorch's ``padding=1``.

    Attributes:
        num_classes: Outputs C.
        width: Channels w of the first stage; the stages have w, 2w, 4w, 8w.
        activation: Name of the activation, one of `ACTIVATIONS`.
        stage_sizes: Blocks in each stage.
        residual: Whether the blocks add their skips.
    """

    num_classes: int = 10
    width: int = 64
    activation: str = "relu"
    stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
    residual: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images ``[N, H, W, channels]`` to logits ``[N, C]``.

        Args:
            x: Images.
            train: Whether BatchNorm uses the batch's own statistics and updates the
                running ones; then the ``batch_stats`` collection must be mutable.

        Returns:
            The logits.
        """
        if x.ndim != 4:
            raise ValueError(
                f"x: expected images [N, H, W, channels], got shape {list(x.shape)}."
            )
        act = getattr(jax.nn, self.activation)
        x = nn.Conv(self.width, (3, 3), use_bias=False, name="stem_conv")(x)
        x = nn.BatchNorm(not train, momentum=0.9, name="stem_norm")(x)
        x = act(x)
        for stage, num_blocks in enumerate(self.stage_sizes):
            for index in range(num_blocks):
                x = BasicBlock(
                    features=self.width * 2**stage,
                    strides=2 if stage > 0 and index == 0 else 1,
                    activation=self.activation,
                    residual=self.residual,
                    name=f"stage{stage + 1}_block{index + 1}",
                )(x, train=train)
        return nn.Dense(self.num_classes, name="head")(jnp.mean(x, axis=(1, 2)))

    @nn.nowrap
    def block_prefixes(self) -> dict[str, tuple[str, ...]]:
        """Returns the blocks by depth, for `depth_blocks`: stem, basic blocks, head."""
        blocks: dict[str, tuple[str, ...]] = {"stem": ("stem_conv", "stem_norm")}
        for stage, num_blocks in enumerate(self.stage_sizes, start=1):
            names = [f"stage{stage}_block{i}" for i in range(1, num_blocks + 1)]
            blocks.update({name: (name,) for name in names})
        return {**blocks, "head": ("head",)}


def ResNet18(
    num_classes: int = 10, width: int = 64, activation: str = "relu"
) -> ResNet:
    """ResNet-18 in its CIFAR form: stages of 2-2-2-2 basic blocks.

    Args:
        num_classes: Outputs C.
        width: Channels of the first stage.
        activation: One of `ACTIVATIONS`.

    Returns:
        A linen module, used as ``apply(variables, x, train=False)``. At width 64 with
        10 classes it has 11,173,962 parameters.

    Raises:
        ValueError: If an argument is out of range.

    References:
        He et al. (2016), "Deep Residual Learning"; paper 7.1.
    """
    return _network(num_classes, width, activation, residual=True)


def PlainNet18(
    num_classes: int = 10, width: int = 64, activation: str = "relu"
) -> ResNet:
    """ResNet-18 without its skip additions; the same parameter tree and count.

    The projection shortcuts keep their parameters, which no output depends on: their
    columns of J are zero.

    Args:
        num_classes: Outputs C.
        width: Channels of the first stage.
        activation: One of `ACTIVATIONS`.

    Returns:
        A linen module, used as ``apply(variables, x, train=False)``.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Paper 7.1, "Models".
    """
    return _network(num_classes, width, activation, residual=False)


def _network(num_classes: int, width: int, activation: str, residual: bool) -> ResNet:
    num_classes = check_at_least("num_classes", num_classes, 1)
    width = check_at_least("width", width, 1)
    check_choice("activation", activation, ACTIVATIONS)
    return ResNet(num_classes, width, activation, residual=residual)
