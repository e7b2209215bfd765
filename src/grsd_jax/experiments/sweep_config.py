"""Settings of a sweep and its cells: which networks, and how each is measured."""

import dataclasses
import hashlib
import itertools
import json
from typing import Any, NamedTuple

from flax import linen as nn

from grsd_jax.architectures import MLP, ConvNet, LinearStateSpace, Transformer
from grsd_jax.experiments.config import UserError, check_field
from grsd_jax.models import ACTIVATIONS

#: The networks of a sweep; those with a residual branch take ``branch_scale``.
MODELS = ("mlp", "resmlp", "cnn", "rescnn", "transformer", "ssm")
RESIDUAL = ("resmlp", "rescnn", "transformer")

#: Strides of the CNNs' stem and sides of the patches: the nets work on 8 x 8 maps.
STEM_STRIDES = 4
PATCH_SIZE = 8


def _option(default: Any, help_text: str, **checks: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": help_text, **checks})


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """All settings of one sweep; invalid ones raise `UserError` at construction."""

    dataset: str = _option(
        "synthetic",
        "Data set: the embedded textures, or CIFAR-10 read through TFDS.",
        choices=("synthetic", "cifar10"),
    )
    data_dir: str | None = _option(
        None, "Folder of the prepared TFDS data; default: TFDS_DATA_DIR, then TFDS's."
    )
    workdir: str = _option("runs/sweep", "Folder for everything that is written.")
    models: tuple[str, ...] = _option(
        ("mlp", "resmlp", "cnn", "rescnn"), "Networks.", each=MODELS
    )
    depths: tuple[int, ...] = _option((2, 4, 8, 16, 32), "Blocks L.", each_above=0)
    widths: tuple[int, ...] = _option((16,), "Features of the state.", each_above=0)
    activations: tuple[str, ...] = _option(("gelu",), "Activations.", each=ACTIVATIONS)
    branch_scales: tuple[float, ...] = _option(
        (0.1, 0.3), "Scales s of the residual branches.", each_above=0
    )
    seeds: tuple[int, ...] = _option(
        (0, 1, 2), "Seeds of weights, order and measured batches.", each_above=-1
    )
    rho: float = _option(0.9, "Spectral radius of the state-space model.", low=0.0)
    steps: int = _option(60, "Training steps before the measurement.", minimum=0)
    train_batch_size: int = _option(64, "Examples in one training step.", minimum=1)
    learning_rate: float = _option(0.02, "Learning rate of SGD.", low=0.0)
    momentum: float = _option(0.9, "Momentum of SGD, in [0, 1).", low=0.0, high=1.0)
    batch_size: int = _option(16, "Examples N in one measured batch.", minimum=1)
    num_batches: int = _option(1, "Measured batches K.", minimum=1)
    num_shells: int = _option(10, "Logarithmic shells S.", minimum=2)
    window: int = _option(4, "Shells in one sliding window.", minimum=2)
    num_directions: int = _option(
        32, "Directions followed through the state Jacobians.", minimum=1
    )
    precision: str = _option(
        "highest",
        "Precision of matrix products outside the ones that are always highest.",
        choices=("highest", "high", "default"),
    )

    def __post_init__(self) -> None:
        """Checks every field."""
        for field in dataclasses.fields(self):
            check_field(field, getattr(self, field.name))
        if self.window > self.num_shells:
            raise UserError(
                f"--window: expected at most --num_shells = {self.num_shells}, "
                f"got {self.window}."
            )


#: Settings that say where and which cells, not what one cell computes.
_GRID = (
    "data_dir",
    "workdir",
    "models",
    "depths",
    "widths",
    "activations",
    "branch_scales",
    "seeds",
)


class Cell(NamedTuple):
    """One network of a sweep.

    Attributes:
        model: One of `MODELS`.
        depth: L.
        width: Features.
        activation: Name of the activation; None for the linear ``ssm``.
        branch_scale: s; None without a residual branch.
        seed: Seed.
    """

    model: str
    depth: int
    width: int
    activation: str | None
    branch_scale: float | None
    seed: int

    @property
    def name(self) -> str:
        """The cell in one word, for its file."""
        parts = [self.model, f"L{self.depth}", f"w{self.width}"]
        parts += [self.activation] if self.activation else []
        parts += [f"s{self.branch_scale:g}"] if self.branch_scale else []
        return "-".join([*parts, f"seed{self.seed}"])


def list_cells(config: SweepConfig) -> list[Cell]:
    """Lists the cells of the grid, each once, seeds of one network side by side.

    Args:
        config: The settings.

    Returns:
        The cells. A network that does not take a setting is there once for all its
        values: a plain net has no branch scale, a linear one no activation.
    """
    grid = itertools.product(
        config.models,
        config.depths,
        config.widths,
        config.activations,
        config.branch_scales,
        config.seeds,
    )
    cells = [
        Cell(
            model,
            depth,
            width,
            None if model == "ssm" else activation,
            scale if model in RESIDUAL else None,
            seed,
        )
        for model, depth, width, activation, scale, seed in grid
    ]
    return list(dict.fromkeys(cells))


def cell_fingerprint(cell: Cell, config: SweepConfig, data_fingerprint: str) -> str:
    """Identifies what a cell computes: its network, the settings and the data.

    Args:
        cell: The cell.
        config: The settings.
        data_fingerprint: Of the data set.

    Returns:
        A SHA-256 in hexadecimal.
    """
    settings = dataclasses.asdict(config)
    made_by = {
        "cell": cell._asdict(),
        "settings": {k: v for k, v in settings.items() if k not in _GRID},
        "data": data_fingerprint,
    }
    return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()


def make_network(cell: Cell, num_classes: int, rho: float) -> nn.Module:
    """Returns the network of a cell.

    Args:
        cell: The cell.
        num_classes: Outputs C.
        rho: Spectral radius of a state-space model.

    Returns:
        The linen module.

    Raises:
        UserError: If the network cannot have this depth or width.
    """
    sizes = (num_classes, cell.depth, cell.width)
    scale = 1.0 if cell.branch_scale is None else cell.branch_scale
    residual = cell.model in RESIDUAL
    activation = cell.activation or ACTIVATIONS[0]
    try:
        if cell.model == "ssm":
            return LinearStateSpace(*sizes, rho=rho)
        if cell.model == "transformer":
            return Transformer(*sizes, activation, scale, patch_size=PATCH_SIZE)
        if cell.model in ("mlp", "resmlp"):
            return MLP(*sizes, activation, residual, scale)
        return ConvNet(*sizes, activation, residual, scale, STEM_STRIDES)
    except ValueError as error:
        raise UserError(f"--models={cell.model}: {error}") from error
