"""Settings of a sweep and its cells: which networks, and how each is measured."""

import dataclasses
import itertools
from typing import NamedTuple

from flax import linen as nn

from grsd_jax.experiments.common.config import CHAINS, RESIDUAL, Settings, setting
from grsd_jax.experiments.common.networks import make_network
from grsd_jax.models import ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class SweepConfig(Settings):
    """All settings of one sweep, beside those of `Settings`."""

    workdir: str = setting("runs/sweep", "Folder of the run, and of all it writes.")
    models: tuple[str, ...] = setting(
        ("mlp", "resmlp", "cnn", "rescnn"),
        f"Networks, out of {', '.join(CHAINS)}.",
        each=CHAINS,
    )
    depths: tuple[int, ...] = setting((2, 4, 8, 16, 32), "Blocks L.", each_above=0)
    widths: tuple[int, ...] = setting((16,), "Features of the state.", each_above=0)
    activations: tuple[str, ...] = setting(("gelu",), "Activations.", each=ACTIVATIONS)
    branch_scales: tuple[float, ...] = setting(
        (0.1, 0.3), "Scales s of the residual branches.", each_above=0
    )
    seeds: tuple[int, ...] = setting(
        (0, 1, 2),
        "Seeds of the weights, the order of the data and the measured batches.",
        each_above=-1,
    )
    steps: int = setting(60, "Training steps before the measurement.", minimum=0)
    learning_rate: float = setting(
        0.02, "Learning rate; the default is meant for SGD.", low=0.0
    )
    batch_size: int = setting(16, "Examples N in one measured batch.", minimum=1)
    num_batches: int = setting(1, "Measured batches K.", minimum=1)
    num_shells: int = setting(10, "Logarithmic shells S.", minimum=2)
    window: int = setting(4, "Shells in one sliding window.", minimum=2)
    num_directions: int = setting(
        32, "Directions followed through the state Jacobians.", minimum=1
    )


class Cell(NamedTuple):
    """One network of a sweep.

    Attributes:
        model: One of `CHAINS`.
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
        parts += [f"s{self.branch_scale}"] if self.branch_scale else []
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


def cell_network(cell: Cell, num_classes: int, rho: float) -> nn.Module:
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
    return make_network(
        cell.model,
        num_classes,
        width=cell.width,
        depth=cell.depth,
        activation=cell.activation or ACTIVATIONS[0],
        branch_scale=cell.branch_scale or 1.0,
        rho=rho,
    )
