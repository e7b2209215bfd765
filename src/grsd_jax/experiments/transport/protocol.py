"""What the study compares and how it counts, chosen before the first run.

The hypothesis is that ``(v - v^N) tau``, the velocity beyond that of a growing kernel
times the effective time, is the same at all edges and in all intervals of a residual
network, and less so in its plain twin. Nothing here is a flag, so that no choice
depends on what a run found.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from grsd_jax.experiments.common.config import Config, UserError
from grsd_jax.shells import SoftShells

#: The outer edges of the grid that is the same for all intervals and networks.
_FIXED = (1e-2, 1e5)

#: What each arm changes of the settings that are given.
ARMS = ("main", "momentum", "decay", "wide", "images")

_MOMENTUM = 0.9


#: The forms of a velocity, see `Reading`.
FORMS = ("flux", "shift")


#: Paired seeds that a verdict needs: one that is looked at before is no test.
NUM_SEEDS = 8


class Reading(NamedTuple):
    """One way to read the same snapshots.

    Attributes:
        form: ``"flux"``, the velocity ``F / (Delta tau eps)``, or ``"shift"``,
            ``u / Delta tau``, whose null is exact for any growth.
        width: The width w of the soft shells.
        grid: ``"top"``, eight edges within the four decades below the largest
            eigenvalue of the interval, or ``"fixed"``, eleven from 1e-2 to 1e5.
    """

    form: str
    width: float
    grid: str

    @property
    def name(self) -> str:
        """The reading in words, for tables."""
        return f"{self.form}, w = 1/{round(1 / self.width)}, {self.grid} edges"


#: All readings; the first is the one that decides, the others say what it depends on.
READINGS = tuple(
    Reading(form, width, grid)
    for form in FORMS
    for width in (1 / 2, 1 / 3)
    for grid in ("top", "fixed")
)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The steps that are compared, and how many images and edges a number needs.

    Attributes:
        first_step: Where the first interval begins; each ends at twice its beginning.
        lengths: Training steps h for the time resolution, ascending. Every end of an
            interval from the longest h on is a start.
        num_groups: Groups of images that are left out in turn, for errors over images.
        min_edges: Usable edges without which an interval is left out.
        readings: How the snapshots are read; the first reading decides.
    """

    first_step: int = 16
    lengths: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    num_groups: int = 8
    min_edges: int = 3
    readings: tuple[Reading, ...] = READINGS

    def as_json(self) -> dict[str, Any]:
        """Returns all choices, as files hold them."""
        readings = [reading._asdict() for reading in self.readings]
        return dataclasses.asdict(self) | {"readings": readings}

    def ends(self, total_steps: int) -> list[int]:
        """Returns the steps at which intervals begin and end.

        Args:
            total_steps: Steps of the training.

        Returns:
            ``first_step`` times the powers of two.

        Raises:
            UserError: If there are fewer than two intervals.
        """
        steps = [self.first_step]
        while 2 * steps[-1] <= total_steps:
            steps.append(2 * steps[-1])
        if len(steps) < 3:
            raise UserError(
                f"--epochs: expected at least {4 * self.first_step} training steps, "
                f"two intervals of doubling time, got {total_steps}."
            )
        return steps

    def looks(self, total_steps: int) -> list[tuple[int, int]]:
        """Returns ``(start, h)`` of all balances of the time resolution."""
        longest = self.lengths[-1]
        starts = [s for s in self.ends(total_steps) if s >= longest]
        return [
            (start, length)
            for start in starts
            if start + longest <= total_steps
            for length in self.lengths
        ]

    def instants(self, total_steps: int) -> list[int]:
        """Returns the steps of all snapshots, in order."""
        looks = self.looks(total_steps)
        return sorted({*self.ends(total_steps), *(start + h for start, h in looks)})


def arm_config(arm: str, config: Config) -> Config:
    """Returns the settings of an arm.

    Args:
        arm: ``"main"``, the settings that are given; ``"momentum"``, momentum 0.9 at a
            rate that keeps the effective time of a step; ``"decay"``, a rate that falls
            to 0 as a cosine; ``"wide"``, twice the width; ``"images"``, twice the
            measured images.
        config: The settings that are given.

    Returns:
        The settings.
    """
    changes: dict[str, Any] = {}
    if arm == "momentum":
        slower = (1 - _MOMENTUM) / (1 - config.momentum)
        rate = config.learning_rate * slower
        changes = {"momentum": _MOMENTUM, "learning_rate": rate}
    elif arm == "decay":
        changes = {"schedule": "cosine_decay_schedule"}
    elif arm == "wide":
        changes = {"width": 2 * config.width}
    elif arm == "images":
        changes = {"batch_size": 2 * config.batch_size}
    return dataclasses.replace(config, **changes)


def grid_of(grid: str, top: float, width: float) -> SoftShells:
    """Returns the shells of a grid.

    Args:
        grid: ``"top"`` or ``"fixed"``, see `Reading`.
        top: The largest eigenvalue.
        width: The width of the shells, 0 for sharp ones.

    Returns:
        The shells.
    """
    if grid == "top":
        edges = top * np.geomspace(1e-4, 1, 10)
    else:
        edges = np.geomspace(*_FIXED, 13)
    # The outer edges of open shells are no edges.
    return SoftShells(jnp.asarray(edges[1:-1], jnp.float32), width=width)
