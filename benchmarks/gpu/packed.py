"""The packed subset of CIFAR-10: how it is chosen, written and read."""

from pathlib import Path
from typing import Any

import common  # noqa: F401  (puts the source tree on the path)
import numpy as np
from grsd_jax.experiments.common.data import Dataset, make_dataset

FILE = "cifar10_subset.npz"

#: Bytes of an image with its label and its index, and of the names in the file.
IMAGE_BYTES, FILE_BYTES = 32 * 32 * 3 + 4 + 4, 4096

_CLASSES = 10


def counts(max_bytes: int, available: dict[str, int]) -> dict[str, int]:
    """Returns how many images of each split fit: of six, five are for training.

    Args:
        max_bytes: Bytes for the file.
        available: The images that there are, by split.

    Returns:
        Multiples of the number of classes.

    Raises:
        ValueError: If not one image of each class fits into either split.
    """
    fit = max(0, max_bytes - FILE_BYTES) // IMAGE_BYTES
    test = min(available["test"], fit // 6) // _CLASSES * _CLASSES
    train = min(available["train"], fit - test) // _CLASSES * _CLASSES
    if min(test, train) < _CLASSES:
        raise ValueError(
            f"max_bytes: expected room for {6 * _CLASSES} images, got {max_bytes}."
        )
    return {"train": train, "test": test}


def first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Returns the indices, ascending, of the first images of each class."""
    each = count // _CLASSES
    chosen = [np.flatnonzero(labels == label)[:each] for label in range(_CLASSES)]
    return np.sort(np.concatenate(chosen))


def write(path: Path, splits: dict[str, Any], max_bytes: int) -> dict[str, np.ndarray]:
    """Writes as many images as fit.

    Args:
        path: The file.
        splits: Images in uint8 and labels, under ``train`` and ``test``.
        max_bytes: Bytes for the file.

    Returns:
        The indices of the images in their split.
    """
    wanted = counts(max_bytes, {name: len(y) for name, (_, y) in splits.items()})
    chosen = {
        name: first_of_each_class(labels, wanted[name])
        for name, (_, labels) in splits.items()
    }
    arrays: dict[str, np.ndarray] = {}
    for name, (images, labels) in splits.items():
        arrays[f"{name}_images"] = images[chosen[name]]
        arrays[f"{name}_labels"] = labels[chosen[name]].astype(np.int32)
        arrays[f"{name}_indices"] = chosen[name].astype(np.int32)
    np.savez(path, **arrays)
    return chosen


def read(path: Path) -> Dataset:
    """Returns the packed images, standardized by those for training among them."""
    with np.load(path, allow_pickle=False) as file:
        train, test = (
            (file[f"{name}_images"], file[f"{name}_labels"])
            for name in ("train", "test")
        )
    return make_dataset("cifar10_subset", train, test, _CLASSES)
