"""The bundled Flax networks, and Flax linen modules as outputs of a problem."""

try:
    import flax  # noqa: F401
except ImportError as error:
    raise ImportError(
        "grsd_jax.models needs flax; install it with: pip install 'grsd-jax[models]'"
    ) from error

from grsd_jax.models.chain import linen_chain
from grsd_jax.models.chains import MLP, ConvNet, LinearStateSpace, Transformer
from grsd_jax.models.linen import LinenOutputs, depth_blocks, linen_outputs
from grsd_jax.models.linen_checks import ACTIVATIONS
from grsd_jax.models.resnet import PlainNet18, ResNet, ResNet18

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "ConvNet",
    "LinearStateSpace",
    "LinenOutputs",
    "PlainNet18",
    "ResNet",
    "ResNet18",
    "Transformer",
    "depth_blocks",
    "linen_chain",
    "linen_outputs",
]
