"""The bundled Flax networks, and models of any framework as outputs of a problem.

Nothing is imported before it is used, so that a model in one framework asks for no
other.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grsd_jax.models.chain import linen_chain
    from grsd_jax.models.chains import MLP, ConvNet, LinearStateSpace, Transformer
    from grsd_jax.models.equinox import EquinoxOutputs, equinox_outputs
    from grsd_jax.models.haiku import HaikuOutputs, haiku_outputs
    from grsd_jax.models.linen import LinenOutputs, depth_blocks, linen_outputs
    from grsd_jax.models.linen_checks import ACTIVATIONS
    from grsd_jax.models.nnx import NNXOutputs, nnx_outputs
    from grsd_jax.models.resnet import PlainNet18, ResNet, ResNet18

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "ConvNet",
    "EquinoxOutputs",
    "HaikuOutputs",
    "LinearStateSpace",
    "LinenOutputs",
    "NNXOutputs",
    "PlainNet18",
    "ResNet",
    "ResNet18",
    "Transformer",
    "depth_blocks",
    "equinox_outputs",
    "haiku_outputs",
    "linen_chain",
    "linen_outputs",
    "nnx_outputs",
]

#: Where each name comes from.
_HOMES = {
    "chain": ("linen_chain",),
    "chains": ("MLP", "ConvNet", "LinearStateSpace", "Transformer"),
    "equinox": ("EquinoxOutputs", "equinox_outputs"),
    "haiku": ("HaikuOutputs", "haiku_outputs"),
    "linen": ("LinenOutputs", "depth_blocks", "linen_outputs"),
    "linen_checks": ("ACTIVATIONS",),
    "nnx": ("NNXOutputs", "nnx_outputs"),
    "resnet": ("PlainNet18", "ResNet", "ResNet18"),
}


def __getattr__(name: str) -> Any:
    """Returns a public name from its module, which is imported now."""
    for home, names in _HOMES.items():
        if name in names:
            try:
                module = importlib.import_module(f"{__name__}.{home}")
            except ModuleNotFoundError as error:
                raise ImportError(
                    f"{__name__}.{name} needs {error.name}; install it with: "
                    "pip install 'grsd-jax[models]'"
                ) from error
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
