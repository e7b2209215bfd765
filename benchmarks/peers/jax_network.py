"""The networks as plain functions of a dictionary of arrays, for any version of JAX."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from comparison.grid import ProblemSpec

Arrays = Mapping[str, jax.Array]


def make_logits(
    spec: ProblemSpec, statistics: Arrays
) -> Callable[[Arrays, jax.Array], jax.Array]:
    """Returns ``f(params, images [N, 32, 32, 3]) -> logits [N, C]``."""
    if spec.model == "mlp":
        return _mlp
    return lambda params, images: _resnet18(params, statistics, images)


def _mlp(params: Arrays, images: jax.Array) -> jax.Array:
    x = images.reshape(images.shape[0], -1)
    for index in range(3):
        layer = f"hidden{index + 1}"
        x = jax.nn.relu(x @ params[f"{layer}/kernel"] + params[f"{layer}/bias"])
    return x @ params["head/kernel"] + params["head/bias"]


def _resnet18(params: Arrays, statistics: Arrays, images: jax.Array) -> jax.Array:
    def conv(path: str, x: jax.Array, stride: int = 1) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x,
            params[f"{path}/kernel"],
            window_strides=(stride, stride),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def norm(path: str, x: jax.Array) -> jax.Array:
        deviation = jnp.sqrt(statistics[f"{path}/var"] + 1e-5)
        centered = (x - statistics[f"{path}/mean"]) / deviation
        return centered * params[f"{path}/scale"] + params[f"{path}/bias"]

    x = jax.nn.relu(norm("stem_norm", conv("stem_conv", images)))
    for stage in range(4):
        for index in range(2):
            block = f"stage{stage + 1}_block{index + 1}"
            stride = 2 if stage > 0 and index == 0 else 1
            y = jax.nn.relu(norm(f"{block}/norm1", conv(f"{block}/conv1", x, stride)))
            y = norm(f"{block}/norm2", conv(f"{block}/conv2", y))
            if f"{block}/shortcut_conv/kernel" in params:
                x = conv(f"{block}/shortcut_conv", x, stride)
                x = norm(f"{block}/shortcut_norm", x)
            x = jax.nn.relu(x + y)
    x = jnp.mean(x, axis=(1, 2))
    return x @ params["head/kernel"] + params["head/bias"]
