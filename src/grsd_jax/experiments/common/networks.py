"""The networks of the experiments, by the names that the scripts take."""

from typing import Any

from flax import linen as nn

from grsd_jax import models
from grsd_jax.experiments.common.config import RESIDUAL, Config, UserError
from grsd_jax.models.chains import MLP, ConvNet, LinearStateSpace, Transformer

#: Strides of the CNNs' stem and sides of the patches: the nets work on 8 x 8 maps.
STEM_STRIDES = 4
PATCH_SIZE = 8

#: The settings that a network takes.
NETWORK_FIELDS = ("width", "depth", "branch_scale", "rho", "activation")


def make_network(
    name: str,
    num_classes: int,
    *,
    width: int,
    activation: str,
    depth: int,
    branch_scale: float,
    rho: float,
) -> nn.Module:
    """Returns a network by name; each takes those of the sizes that it has.

    Args:
        name: One of `config.MODELS`.
        num_classes: Outputs C.
        width: Channels of the first stage, or features of the state.
        activation: Name of the activation; the state-space model is linear.
        depth: Blocks L; that of the ResNet-18 and its twin is fixed.
        branch_scale: Factor s of the residual branches of `config.RESIDUAL`.
        rho: Spectral radius of the state-space model.

    Returns:
        The linen module.

    Raises:
        UserError: If the network cannot have this depth or width.
    """
    sizes = (num_classes, depth, width)
    residual: dict[str, Any] = {"residual": name in RESIDUAL}
    if residual["residual"]:
        residual["branch_scale"] = branch_scale
    try:
        match name:
            case "resnet18":
                return models.ResNet18(num_classes, width, activation)
            case "plainnet18":
                return models.PlainNet18(num_classes, width, activation)
            case "mlp" | "resmlp":
                return MLP(*sizes, activation, **residual)
            case "cnn" | "rescnn":
                return ConvNet(
                    *sizes, activation, stem_strides=STEM_STRIDES, **residual
                )
            case "transformer":
                return Transformer(
                    *sizes, activation, branch_scale, patch_size=PATCH_SIZE
                )
            case _:
                return LinearStateSpace(*sizes, rho=rho)
    except ValueError as error:
        raise UserError(f"network {name}: {error}") from error


def make_model(name: str, num_classes: int, config: Config) -> nn.Module:
    """Returns a network of the given settings.

    Args:
        name: One of `config.MODELS`.
        num_classes: Outputs C.
        config: The settings; `NETWORK_FIELDS` are used.

    Returns:
        The linen module.

    Raises:
        UserError: As for `make_network`.
    """
    sizes: dict[str, Any] = {field: getattr(config, field) for field in NETWORK_FIELDS}
    return make_network(name, num_classes, **sizes)
