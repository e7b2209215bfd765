"""Where the weights of a measurement come from: checkpoints, protocols, the seed."""

from pathlib import Path
from typing import NamedTuple

from flax import linen as nn

from grsd_jax._typing import PyTree
from grsd_jax.experiments.common.checkpoints import restore_latest
from grsd_jax.experiments.common.config import Config
from grsd_jax.experiments.common.data import Dataset
from grsd_jax.experiments.common.networks import NETWORK_FIELDS, make_model
from grsd_jax.experiments.common.steps import init_state, make_optimizer, state_template
from grsd_jax.experiments.common.training import check_same_run, recalibrate_batch_stats

#: Training batches at most whose statistics a recalibration averages.
RECALIBRATION_BATCHES = 100

#: Settings that a checkpoint must share with the network that it is loaded into.
_NETWORK_FIELDS = ("dataset", *NETWORK_FIELDS)


class Weights(NamedTuple):
    """What a checkpoint holds of a network.

    Attributes:
        params: Parameters.
        batch_stats: BatchNorm's running statistics.
    """

    params: PyTree
    batch_stats: PyTree


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
        network = {field: getattr(config, field) for field in _NETWORK_FIELDS}
        check_same_run(folder, network | {"data_fingerprint": dataset.fingerprint})
    optimizer = make_optimizer(config, total_steps=1)
    state = state_template(model, optimizer, dataset.train_images[0])
    template = {"params": state.params, "batch_stats": state.batch_stats}
    loaded = restore_latest(folder / "checkpoints", template)
    return Weights(loaded["params"], loaded["batch_stats"])


def protocol_weights(
    name: str, protocol: str, dataset: Dataset, config: Config
) -> Weights:
    """Returns the weights at which a network is measured under a protocol.

    Args:
        name: One of `config.MODELS`; the protocol of all but ``"plainnet18"`` is
            ``"own"``.
        protocol: ``"shared"`` takes the ResNet's checkpoint as it is;
            ``"recalibrated"`` takes it with BatchNorm statistics gathered anew through
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
        weights.params,
        weights.batch_stats,
        dataset.train_images,
        batch_size=config.train_batch_size,
        num_batches=min(RECALIBRATION_BATCHES, available),
    )
    return Weights(weights.params, batch_stats)


def initial_weights(model: nn.Module, dataset: Dataset, config: Config) -> Weights:
    """Returns the weights that training starts from, made anew from the seed.

    The BatchNorm statistics are gathered from training batches: the stored ones are
    still those of no data.

    Args:
        model: The linen module.
        dataset: The data.
        config: The settings.

    Returns:
        The weights.
    """
    optimizer = make_optimizer(config, total_steps=1)
    state = init_state(model, optimizer, dataset.train_images[0], seed=config.seed)
    fresh = Weights(state.params, state.batch_stats)
    return recalibrated(model, fresh, dataset, config)
