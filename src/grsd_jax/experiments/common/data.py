"""Data sets of the experiments: embedded textures, and CIFAR-10 read through TFDS.

Both are 32 x 32 color images in 10 classes, kept as 8-bit numbers until they are
standardized, so that a fingerprint of the raw data identifies them on every machine.
"""

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grsd_jax._checks import check_at_least
from grsd_jax.experiments.common.config import Config, Settings, UserError
from grsd_jax.experiments.common.sizes import check_measurement

_SIZE = 32
_CIFAR10_COUNTS = {"train": 50_000, "test": 10_000}
_PREPARE = (
    'pip install tensorflow && python -c "import tensorflow_datasets as tfds; '
    "tfds.builder('cifar10', data_dir='{data_dir}', file_format='array_record')"
    '.download_and_prepare()"'
)


class Dataset(NamedTuple):
    """Images and labels, standardized by the training set's channel statistics.

    Attributes:
        train_images: ``[num_train, 32, 32, 3]``, float32.
        train_labels: ``[num_train]``, int32 in ``[0, num_classes)``.
        test_images: ``[num_test, 32, 32, 3]``, float32.
        test_labels: ``[num_test]``, int32.
        num_classes: Classes C.
        name: Name of the data set.
        fingerprint: SHA-256 of the raw images and labels, in order.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int
    name: str
    fingerprint: str


def load_dataset(config: Settings) -> Dataset:
    """Returns the data set that ``--dataset`` names.

    The embedded set is the same whatever ``--seed`` is: a seed changes the weights, the
    order and the measured batches, never the data.

    Args:
        config: The settings.

    Returns:
        The data set.

    Raises:
        UserError: If the data is missing or damaged.
    """
    if config.dataset == "cifar10":
        return load_cifar10(config.data_dir)
    return synthetic_textures()


def synthetic_textures(
    seed: int = 0,
    num_train: int = 2048,
    num_test: int = 512,
    num_classes: int = 10,
) -> Dataset:
    """Makes textures whose class is an orientation and a color.

    An image adds an oriented texture, colored by its class, to three independent
    isotropic ones; every one is a random-phase field with amplitude spectrum
    ``|k|^-1``, near that of natural images. Orientations and colors
    scatter, so that the classes overlap: nets learn them well above chance, and not
    perfectly.

    Args:
        seed: Seed; the same one always gives the same data.
        num_train: Training images.
        num_test: Test images.
        num_classes: Classes C, equally frequent up to one.

    Returns:
        The data set.

    Raises:
        ValueError: If a count is below 1.
    """
    check_at_least("num_train", num_train, 1)
    check_at_least("num_test", num_test, 1)
    check_at_least("num_classes", num_classes, 1)
    rng = np.random.default_rng(seed)
    colors = rng.normal(size=(num_classes, 3))
    colors /= np.linalg.norm(colors, axis=1, keepdims=True)
    train = _textures(rng, num_train, colors)
    test = _textures(rng, num_test, colors)
    return make_dataset("synthetic", train, test, num_classes)


def load_cifar10(data_dir: str | None = None) -> Dataset:
    """Reads CIFAR-10 as prepared by TensorFlow Datasets, without TensorFlow.

    Nothing is ever downloaded: preparing the data needs TensorFlow, once.

    Args:
        data_dir: The folder that holds ``cifar10/<version>``; by default the
            environment variable TFDS_DATA_DIR, then TFDS's own default.

    Returns:
        The data set.

    Raises:
        UserError: If the data is missing, half-written or damaged.
    """
    splits = read_cifar10(data_dir)
    return make_dataset("cifar10", splits["train"], splits["test"], 10)


def read_cifar10(
    data_dir: str | None = None,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads the raw images of CIFAR-10, see `load_cifar10`.

    Args:
        data_dir: As for `load_cifar10`.

    Returns:
        Images in uint8 and labels, under ``train`` and ``test``.

    Raises:
        UserError: If the data is missing, half-written or damaged.
    """
    data_dir = os.path.expanduser(
        data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    )
    folder = _find_version(data_dir)
    try:
        splits = _read_splits(folder)
    except ImportError as error:
        raise UserError(
            "--dataset=cifar10: expected the package tensorflow-datasets, got: "
            f"{error}; install it with: pip install 'grsd-jax[experiments]'"
        ) from error
    except Exception as error:  # TFDS raises many kinds for a damaged folder
        reason = " ".join(str(error).split())[:200]
        raise _damaged(data_dir, folder, f"{type(error).__name__}: {reason}") from error
    for split, (images, labels) in splits.items():
        _check_split(data_dir, folder, split, images, labels)
    return splits


def make_dataset(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    num_classes: int,
) -> Dataset:
    """Standardizes raw images, ``(x / 255 - mean) / std`` channel by channel.

    Args:
        name: Name of the data set.
        train: Images ``[num_train, H, W, channels]`` in uint8 and labels.
        test: The same for the test set.
        num_classes: Classes C.

    Returns:
        The data set; mean and standard deviation are the training set's.
    """
    digest = hashlib.sha256()
    for images, labels in (train, test):
        for array in (images, labels.astype(np.int32)):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    # Sums of 8-bit numbers are exact in integers: no rounding differs by machine.
    axes, count = (0, 1, 2), train[0][..., 0].size
    total = train[0].sum(axis=axes, dtype=np.int64)
    total_squares = np.square(train[0], dtype=np.int32).sum(axis=axes, dtype=np.int64)
    mean = total / count
    std = np.sqrt(np.maximum(total_squares / count - mean**2, 1.0))

    def standardize(images: np.ndarray) -> np.ndarray:
        scaled = images.astype(np.float32)
        scaled -= mean.astype(np.float32)
        scaled /= std.astype(np.float32)
        return scaled

    return Dataset(
        train_images=standardize(train[0]),
        train_labels=train[1].astype(np.int32),
        test_images=standardize(test[0]),
        test_labels=test[1].astype(np.int32),
        num_classes=num_classes,
        name=name,
        fingerprint=digest.hexdigest(),
    )


def evaluation_batches(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    num_batches: int,
    batch_size: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Draws fixed batches without replacement; the same seed gives the same ones.

    Args:
        images: ``[examples, ...]``.
        labels: ``[examples]``.
        num_batches: Batches K.
        batch_size: Examples N of one batch.
        seed: Seed.

    Returns:
        ``{"image": [K, N, ...], "label": [K, N]}``.

    Raises:
        ValueError: If K or N is below 1, or there are fewer than K N examples.
    """
    check_at_least("num_batches", num_batches, 1)
    check_at_least("batch_size", batch_size, 1)
    wanted = num_batches * batch_size
    if wanted > len(images):
        raise UserError(
            "num_batches * batch_size: expected at most the data set's "
            f"{len(images)} examples, got {num_batches} * {batch_size} = {wanted}."
        )
    chosen = np.random.default_rng(seed).permutation(len(images))[:wanted]
    chosen = chosen.reshape(num_batches, batch_size)
    return {"image": images[chosen], "label": labels[chosen]}


def measured_batches(
    dataset: Dataset, config: Config, *, training: bool = False
) -> dict[str, np.ndarray]:
    """Returns the batches of the test set that the settings say to measure on.

    Args:
        dataset: The data.
        config: The settings.
        training: Whether to take them from the training set instead.

    Returns:
        ``{"image": [K, N, ...], "label": [K, N]}``.

    Raises:
        UserError: If there are fewer than K N examples, or as for `check_measurement`.
    """
    stacked = config.num_batches if config.reduction == "stack" else 1
    size = config.batch_size * dataset.num_classes * stacked
    check_measurement(config, size)
    return evaluation_batches(
        dataset.train_images if training else dataset.test_images,
        dataset.train_labels if training else dataset.test_labels,
        num_batches=config.num_batches,
        batch_size=config.batch_size,
        seed=config.seed,
    )


def _textures(
    rng: np.random.Generator, num_images: int, colors: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns uint8 images ``[num_images, 32, 32, 3]`` and their labels."""
    num_classes = len(colors)
    labels = rng.permutation(np.arange(num_images) % num_classes)
    angles = np.pi * np.arange(num_classes) / num_classes
    turns = angles[labels] + _ANGLE_SPREAD * rng.normal(size=num_images)
    tints = colors[labels] + _COLOR_SPREAD * rng.normal(size=(num_images, 3))
    oriented = _fields(rng, turns[:, None])
    isotropic = _fields(rng, np.full((num_images, 3), np.nan))
    images = oriented * tints[:, None, None, :] + _NOISE * isotropic
    levels = np.clip(np.rint(128 + _CONTRAST * images), 0, 255)
    return levels.astype(np.uint8), labels


#: Spread within a class of its orientation (radians; neighbors lie pi / 10 apart) and
#: of its color, share of the isotropic textures, and gray levels of unit variance.
_ANGLE_SPREAD = 0.12
_COLOR_SPREAD = 0.3
_NOISE = 0.6
_CONTRAST = 40.0


def _fields(rng: np.random.Generator, angles: np.ndarray) -> np.ndarray:
    """Returns unit-variance random-phase fields ``[images, 32, 32, channels]``.

    Args:
        rng: Source of the phases.
        angles: Orientation of every field ``[images, channels]``; NaN for none.
    """
    ky, kx = np.meshgrid(*[np.fft.fftfreq(_SIZE, 1 / _SIZE)] * 2, indexing="ij")
    radius = np.hypot(ky, kx)
    amplitude = np.where(radius > 0, np.maximum(radius, 1.0) ** -1.0, 0.0)
    turn = np.cos(np.arctan2(ky, kx) - angles[:, :, None, None])
    # The band depends on the angle alone, so that the radial law stays |k|^-1.
    band = np.where(np.isnan(turn), 1.0, np.abs(turn) ** 3)
    noise = np.fft.fft2(rng.normal(size=band.shape))
    phases = noise / np.maximum(np.abs(noise), 1e-12)
    fields = np.fft.ifft2(amplitude * band * phases).real
    fields /= fields.std(axis=(2, 3), keepdims=True)
    return np.moveaxis(fields, 1, -1)


def _find_version(data_dir: str) -> Path:
    """Returns the newest complete version under ``data_dir``."""
    found = sorted(Path(data_dir).glob("cifar10/*/dataset_info.json"), key=_version)
    if not found:
        raise UserError(
            f"--data_dir: expected prepared CIFAR-10 in '{data_dir}' "
            "(cifar10/<version>/dataset_info.json), got none; prepare it once with: "
            f"{_PREPARE.format(data_dir=data_dir)}"
        )
    return found[-1].parent


def _version(path: Path) -> tuple[int, ...]:
    parts = path.parent.name.split(".")
    return tuple(int(part) if part.isdecimal() else -1 for part in parts)


def _read_splits(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Decodes the splits into uint8 images and labels; opens all before reading one."""
    import tensorflow_datasets as tfds
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # it recommends OpenCV, which is not needed
    try:
        builder = tfds.builder_from_directory(folder)
        sources: dict[str, Any] = {
            name: builder.as_data_source(split=name) for name in _CIFAR10_COUNTS
        }
        for name, count in _CIFAR10_COUNTS.items():
            if len(sources[name]) != count:
                raise ValueError(f"{len(sources[name])} {name} images")
            sources[name][count - 1]  # opens the files: a missing one is seen now
        return {name: _decode(source) for name, source in sources.items()}
    finally:
        logging.set_verbosity(verbosity)


def _decode(source: Any) -> tuple[np.ndarray, np.ndarray]:
    """Reads a TFDS source in pieces, to keep few decoded examples as objects."""
    images, labels = [], []
    for start in range(0, len(source), 1000):
        rows = range(start, min(start + 1000, len(source)))
        examples = source.__getitems__(list(rows))
        images.append(np.stack([example["image"] for example in examples]))
        labels.append(np.asarray([example["label"] for example in examples]))
    return np.concatenate(images), np.concatenate(labels)


def _check_split(
    data_dir: str, folder: Path, split: str, images: np.ndarray, labels: np.ndarray
) -> None:
    shape = (_CIFAR10_COUNTS[split], _SIZE, _SIZE, 3)
    if images.shape != shape or images.dtype != np.uint8:
        got = f"{split} images of shape {images.shape} and dtype {images.dtype}"
        raise _damaged(data_dir, folder, got)
    if labels.min() < 0 or labels.max() > 9:
        got = f"{split} labels from {labels.min()} to {labels.max()}"
        raise _damaged(data_dir, folder, got)


def _damaged(data_dir: str, folder: Path, got: str) -> UserError:
    return UserError(
        "--data_dir: expected 50,000 training and 10,000 test images of 32 x 32 x 3 "
        f"with labels 0 to 9 in '{folder}', got {got}; remove that folder and prepare "
        f"it again with: {_PREPARE.format(data_dir=data_dir)}"
    )
