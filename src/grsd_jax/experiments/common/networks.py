"""The networks of the experiments, by name, and where their weights come from."""

import functools
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from grsd_jax import models
from grsd_jax._checks import check_at_least
from grsd_jax._typing import PyTree
from grsd_jax.experiments.common.checkpoints import restore_latest
from grsd_jax.experiments.common.config import RESIDUAL, Config, UserError
from grsd_jax.experiments.common.data import Dataset
from grsd_jax.experiments.common.runs import check_same_run
from grsd_jax.experiments.common.sizes import check_fits
from grsd_jax.models import MLP, ConvNet, LinearStateSpace, Transformer

#: Strides of the CNNs' stem and sides of the patches: the nets work on 8 x 8 maps.
STEM_STRIDES = 4
PATCH_SIZE = 8

#: The settings that a network takes.
NETWORK_FIELDS = ("width", "depth", "branch_scale", "rho", "activation")

#: Training batches at most whose statistics a recalibration averages.
RECALIBRATION_BATCHES = 100


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
        raise UserError(f"network {name}: --{error}") from error


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


class Weights(NamedTuple):
    """What a checkpoint holds of a network.

    Attributes:
        params: Parameters.
        batch_stats: BatchNorm's running statistics, ``{}`` for a model without.
    """

    params: PyTree
    batch_stats: PyTree


def init_weights(model: nn.Module, image_shape: tuple[int, ...], seed: int) -> Weights:
    """Returns random weights, with BatchNorm statistics of no data.

    Args:
        model: A linen module with ``__call__(x, train)``.
        image_shape: ``(H, W, channels)`` of one example.
        seed: Seed of the weights.

    Returns:
        The weights.
    """
    # It runs once, and XLA's CPU backend would take half a minute to optimize the
    # random numbers of every layer (3 seconds without).
    on_cpu = jax.default_backend() == "cpu"
    options = {"xla_backend_optimization_level": 0} if on_cpu else None
    init = jax.jit(partial(_init, model, image_shape), compiler_options=options)
    return init(jax.random.key(seed))


def weights_template(model: nn.Module, image_shape: tuple[int, ...]) -> Weights:
    """Returns the tree, shapes and dtypes of the weights, computing nothing.

    Args:
        model: As for `init_weights`.
        image_shape: As for `init_weights`.

    Returns:
        Weights of `jax.ShapeDtypeStruct`, the template for reading checkpoints.
    """
    return jax.eval_shape(partial(_init, model, image_shape), jax.random.key(0))


def _init(model: nn.Module, image_shape: tuple[int, ...], key: jax.Array) -> Weights:
    variables = model.init(key, jnp.zeros((1, *image_shape), jnp.float32))
    return Weights(variables["params"], variables.get("batch_stats", {}))


def check_weights(model: nn.Module, image_shape: tuple[int, ...]) -> None:
    """Checks that the weights, their momentum and their gradient can fit in memory.

    Args:
        model: As for `init_weights`.
        image_shape: As for `init_weights`.

    Raises:
        UserError: If they do not fit.
    """
    sizes = {x: getattr(model, x) for x in ("width", "depth") if hasattr(model, x)}
    options = " or ".join(f"--{name}" for name in sizes)
    got = " and ".join(f"{name} {value}" for name, value in sizes.items())
    check_fits(options, got, "weights", 3 * weights_bytes(model, image_shape))


@functools.cache
def weights_bytes(model: nn.Module, image_shape: tuple[int, ...]) -> int:
    """Returns the bytes of a network's weights, computing nothing.

    Args:
        model: As for `init_weights`. One of any depth has equal blocks, so that only
            two of them are traced.
        image_shape: As for `init_weights`.

    Returns:
        Bytes.
    """
    depth = getattr(model, "depth", 0)
    if depth > 2:
        one, two = (weights_bytes(model.clone(depth=d), image_shape) for d in (1, 2))
        return one + (depth - 1) * (two - one)
    leaves = jax.tree.leaves(weights_template(model, image_shape))
    # In Python's integers, which do not overflow.
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def load_weights(name: str, dataset: Dataset, config: Config) -> Weights:
    """Reads the newest checkpoint that training left in ``workdir/name``.

    Args:
        name: The run's folder, the name of the model that was trained.
        dataset: The data, for shapes.
        config: The settings.

    Returns:
        The weights; ResNet-18 and its plain twin can both use them, having one tree.

    Raises:
        UserError: If there is no checkpoint, it is damaged or of another network, or
            the network was trained on other data or with another activation.
    """
    model = make_model(name, dataset.num_classes, config)
    folder = Path(config.workdir) / name
    if (folder / "config.json").exists():
        # The settings that a checkpoint must share with the network it is loaded into.
        fields = ("dataset", *NETWORK_FIELDS)
        network = {field: getattr(config, field) for field in fields}
        check_same_run(folder, network | {"data_fingerprint": dataset.fingerprint})
    template = weights_template(model, dataset.train_images.shape[1:])
    return restore_latest(folder / "checkpoints", template)


def protocol_weights(
    name: str, protocol: str, dataset: Dataset, config: Config
) -> Weights:
    """Returns the weights at which a network is measured under a protocol.

    Args:
        name: One of `config.MODELS`; the protocol of all but ``"plainnet18"`` is
            ``"own"``.
        protocol: ``"shared"`` takes the ResNet's checkpoint as it is;
            ``"recalibrated"`` takes it with BatchNorm statistics gathered again through
            the plain network; ``"own"`` takes the network's own checkpoint.
        dataset: The data.
        config: The settings.

    Returns:
        The weights.

    Raises:
        UserError: If the checkpoint cannot be read.
    """
    trained = name if protocol == "own" else "resnet18"
    weights = load_weights(trained, dataset, config)
    if protocol != "recalibrated":
        return weights
    model = make_model(name, dataset.num_classes, config)
    return recalibrated(model, weights, dataset, config)


def recalibrated(
    model: nn.Module, weights: Weights, dataset: Dataset, config: Config
) -> Weights:
    """Returns the weights with BatchNorm statistics of training batches.

    Args:
        model: The linen module that the statistics are gathered through.
        weights: The weights.
        dataset: The data.
        config: The settings, for the size of a batch.

    Returns:
        The weights, with the average over `RECALIBRATION_BATCHES` at most.
    """
    available = len(dataset.train_images) // config.train_batch_size
    batch_stats = recalibrate_batch_stats(
        model,
        weights,
        dataset.train_images,
        batch_size=config.train_batch_size,
        num_batches=min(RECALIBRATION_BATCHES, available),
    )
    return weights._replace(batch_stats=batch_stats)


def initial_weights(model: nn.Module, dataset: Dataset, config: Config) -> Weights:
    """Returns the weights that training starts from, rebuilt from the seed.

    The BatchNorm statistics are gathered from training batches: the stored ones are
    still those of no data.

    Args:
        model: The linen module.
        dataset: The data.
        config: The settings.

    Returns:
        The weights.
    """
    fresh = init_weights(model, dataset.train_images.shape[1:], config.seed)
    return recalibrated(model, fresh, dataset, config)


def recalibrate_batch_stats(
    model: nn.Module,
    weights: Weights,
    images: np.ndarray,
    *,
    batch_size: int,
    num_batches: int,
) -> PyTree:
    """Re-estimates BatchNorm's statistics: the plain average over batches.

    A running update is affine, ``new = m old + (1 - m) batch``, whatever the momentum
    m of a layer. One pass with ``old = 0`` gives ``(1 - m) batch``, and the derivative
    along ``old`` gives m exactly.

    Args:
        model: The linen module, in train mode in these passes; every layer sees the
            batch's own statistics, so that the stored ones play no part.
        weights: The weights; of the statistics, the tree and shapes are used.
        images: ``[examples, H, W, channels]``, used in order.
        batch_size: Examples of one batch.
        num_batches: Batches to average.

    Returns:
        The new statistics.

    Raises:
        ValueError: If there are fewer than ``batch_size * num_batches`` images.

    References:
        Paper 7.1; the protocol ``recalibrated``.
    """
    check_at_least("batch_size", batch_size, 1)
    check_at_least("num_batches", num_batches, 1)
    if not jax.tree.leaves(weights.batch_stats):
        return weights.batch_stats  # a model without BatchNorm
    if batch_size * num_batches > len(images):
        raise UserError(
            "batch_size * num_batches: expected at most the "
            f"{len(images)} images, got {batch_size * num_batches}."
        )
    total = jax.tree.map(jnp.zeros_like, weights.batch_stats)
    for start in range(0, batch_size * num_batches, batch_size):
        batch = images[start : start + batch_size]
        measured = _batch_statistics(model, weights, batch)
        total = jax.tree.map(jnp.add, total, measured)
    return jax.tree.map(lambda x: x / jnp.asarray(num_batches, x.dtype), total)


@partial(jax.jit, static_argnums=0)
def _batch_statistics(model: nn.Module, weights: Weights, images: jax.Array) -> PyTree:
    def update(old: PyTree) -> PyTree:
        variables = {"params": weights.params, "batch_stats": old}
        _, new = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return new["batch_stats"]

    zeros = jax.tree.map(jnp.zeros_like, weights.batch_stats)
    ones = jax.tree.map(jnp.ones_like, weights.batch_stats)
    new, momentum = jax.jvp(update, (zeros,), (ones,))
    return jax.tree.map(lambda x, m: x / (jnp.ones_like(m) - m), new, momentum)
