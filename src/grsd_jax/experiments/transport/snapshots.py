"""Spectral snapshots of a training at chosen steps, one file each.

The balance of any two of them needs no network, so that shells, edges and images are
chosen after the training.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from grsd_jax import Problem
from grsd_jax._arrays import all_finite
from grsd_jax.dynamics import SpectralSnapshot, spectral_snapshot
from grsd_jax.experiments.common import files, records
from grsd_jax.experiments.common.config import Config, UserError
from grsd_jax.experiments.common.data import Dataset, measured_batches
from grsd_jax.experiments.common.training import TrainState
from grsd_jax.models import linen_outputs


class SnapshotWriter:
    """A `Callback` that writes all eigenpairs at chosen steps.

    A file is a function of the training's settings and the step, so that a resumed run
    writes the same ones again.

    Args:
        model: The linen module that is trained.
        dataset: The data; the kernel is that of batches of its test set.
        config: The settings.
        folder: The folder of the files.
        steps: The steps.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        config: Config,
        folder: Path,
        steps: Sequence[int],
    ):
        self._model, self._folder, self._steps = model, folder, frozenset(steps)
        batches = measured_batches(dataset, config)
        self._problem = Problem(linen_outputs(model, {}), batches)
        self.settings = {
            name: getattr(config, name) for name in ("batch_size", "num_batches")
        }

    def init(self, state: TrainState) -> dict[str, Any]:
        """Returns the number of snapshots before the first one."""
        del state
        return {"taken": jnp.int32(0)}

    def rewind(self, own: Any) -> None:
        """Leaves the files, which will be written again."""

    def update(self, own: Any, state: TrainState, step: int) -> dict[str, Any]:
        """Writes the snapshot of a chosen step.

        Raises:
            UserError: If the network is not finite there, or the file cannot be
                written.
        """
        if step not in self._steps:
            return own
        outputs_fn = linen_outputs(self._model, {"batch_stats": state.batch_stats})
        problem = self._problem.replace(outputs_fn=outputs_fn)
        snapshot = spectral_snapshot(problem, state.params)
        if not bool(all_finite(snapshot)):
            raise UserError(
                "training: expected a network whose error and kernel are finite, got "
                f"another at step {step}; a smaller --learning_rate may help."
            )
        records.write_npz(_path(self._folder, step), snapshot._asdict())
        return {"taken": own["taken"] + jnp.int32(1)}


def read_snapshot(folder: Path, step: int) -> SpectralSnapshot:
    """Reads the snapshot of a step.

    Args:
        folder: The folder of the files.
        step: The step.

    Returns:
        The snapshot.

    Raises:
        UserError: If it is not there, damaged, or of a version that did not measure the
            rounding of products.
    """
    path = _path(folder, step)
    arrays = records.read_npz(path)
    if "values" in arrays and not {"rounding", "complete"} <= arrays.keys():
        wanted = "a spectral snapshot with its rounding, as a new training writes it"
        raise files.cannot_read(path, wanted, "one without")
    with files.reading(path, "a spectral snapshot"):
        return SpectralSnapshot(**{k: jnp.asarray(x) for k, x in arrays.items()})


def of_images(
    snapshot: SpectralSnapshot, kept: np.ndarray, num_images: int
) -> SpectralSnapshot:
    """Returns the snapshot of some of the images.

    The kernel of fewer images is a block of the whole one, if examples are independent.

    Args:
        snapshot: All n pairs of the kernel of ``num_images`` images.
        kept: The numbers of the images that stay.
        num_images: N; those of several batches follow each other.

    Returns:
        The snapshot.
    """
    outputs = len(snapshot.error) // num_images
    rows = (kept[:, None] * outputs + np.arange(outputs)).ravel()
    vectors = np.asarray(snapshot.vectors, np.float64)[rows]
    kernel = (vectors * np.asarray(snapshot.values, np.float64)) @ vectors.T
    values, vectors = np.linalg.eigh(kernel)
    dtype = snapshot.error.dtype
    return snapshot._replace(
        values=jnp.asarray(values[::-1], dtype),
        vectors=jnp.asarray(vectors[:, ::-1], dtype),
        error=snapshot.error[rows],
    )


def without_groups(
    snapshots: Mapping[int, SpectralSnapshot], *, num_images: int, num_groups: int
) -> list[dict[int, SpectralSnapshot]]:
    """Returns the snapshots without each group of images.

    Args:
        snapshots: By their steps.
        num_images: N.
        num_groups: Groups, at most one an image.

    Returns:
        As many dictionaries as there are groups; none with fewer than two groups.
    """
    images, number = np.arange(num_images), min(num_groups, num_images)
    if number < 2:
        return []
    return [
        {
            step: of_images(snapshot, np.setdiff1d(images, group), num_images)
            for step, snapshot in snapshots.items()
        }
        for group in np.array_split(images, number)
    ]


def _path(folder: Path, step: int) -> Path:
    return folder / f"{step}.npz"
