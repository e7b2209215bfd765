"""What the study varies, one choice at a time, and the controls beside it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

NETWORKS = ("resnet18", "plainnet18")


class Variation(NamedTuple):
    """One choice other than that of the base measurement.

    Attributes:
        name: Its name, in files and tables.
        text: What is different, in a table's words.
        settings: Settings of `Config` that differ; the measurement is made anew.
        protocol: Where the plain network's weights come from.
        initial: Whether the weights are those before training.
        training: Whether the batches are of the training set.
        networks: The networks that it concerns; for the others the base counts.
    """

    name: str
    text: str
    settings: Mapping[str, Any] = {}
    protocol: str = "own"
    initial: bool = False
    training: bool = False
    networks: tuple[str, ...] = NETWORKS


class Binning(NamedTuple):
    """Another way to bin the base measurement, or a control in its coupling's place.

    Attributes:
        name: Its name, in files and tables.
        text: What is different, in a table's words.
        num_shells: S; the base's if None.
        window: Shells in one window; the base's if None.
        floor: Smallest value in use over the largest.
        control: What takes the coupling's place, see `study_cells.controlled`.
    """

    name: str
    text: str
    num_shells: int | None = None
    window: int | None = None
    floor: float = 0.0
    control: str | None = None


#: The first is the base, from which each other one but the last differs in one choice.
VARIATIONS = (
    Variation("base", "as stated"),
    Variation(
        "difference",
        "finite difference of M",
        {"derivative": "finite_difference"},
    ),
    Variation(
        "shared",
        "plain net with the ResNet's weights",
        protocol="shared",
        networks=("plainnet18",),
    ),
    Variation(
        "recalibrated",
        "the same, statistics gathered anew",
        protocol="recalibrated",
        networks=("plainnet18",),
    ),
    Variation("untrained", "before training", initial=True),
    Variation("half_n", "half the images, N / 2", {"batch_size": 0.5}),
    Variation("double_n", "twice the images, 2 N", {"batch_size": 2}),
    Variation("stack", "one stack of the batches", {"reduction": "stack"}),
    Variation("lanczos", "leading pairs by Lanczos", {"solver": "lanczos"}),
    Variation("training", "training images", training=True),
    Variation(
        "paper",
        "the paper's three: weights, difference, Lanczos",
        {"derivative": "finite_difference", "solver": "lanczos"},
        protocol="shared",
    ),
)

#: Made from the base measurement, without another.
BINNINGS = (
    Binning("shells_8", "8 shells", num_shells=8),
    Binning("shells_16", "16 shells", num_shells=16),
    Binning("window_3", "windows of 3 shells", window=3),
    Binning("window_7", "windows of 7 shells", window=7),
    Binning("floor_1e-4", "values above 1e-4 of the largest", floor=1e-4),
    Binning("floor_1e-3", "values above 1e-3 of the largest", floor=1e-3),
)

#: They must fail or pass by construction.
CONTROLS = (
    Binning("random", "random symmetric coupling", control="random"),
    Binning("shuffled", "values in another order", control="shuffled"),
    Binning("planted", "planted log-shift-invariant coupling", control="planted"),
)


def cell_name(seed: int, network: str, variation: str) -> str:
    """Returns the name of one cell of the study.

    Args:
        seed: Seed.
        network: One of `NETWORKS`.
        variation: Name of a variation, binning or control.

    Returns:
        Such as ``"seed0-resnet18-base"``.
    """
    return f"seed{seed}-{network}-{variation}"
