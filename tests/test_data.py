import os
import sys
from pathlib import Path

import numpy as np
import pytest

from grsd_jax.experiments.common import data
from grsd_jax.experiments.common.config import Config, UserError


def prepared_cifar10():
    """Returns the folder of prepared CIFAR-10, or skips."""
    sibling = Path(__file__).parents[2] / "shared" / "tfds"
    for folder in (os.environ.get("TFDS_DATA_DIR"), sibling):
        if folder and list(Path(folder).glob("cifar10/*/dataset_info.json")):
            return Path(folder)
    return pytest.skip("no prepared CIFAR-10: set TFDS_DATA_DIR to its folder")


@pytest.fixture(scope="module")
def textures():
    return data.synthetic_textures(num_train=400, num_test=100)


def test_textures_have_the_shapes_of_cifar(textures):
    assert textures.train_images.shape == (400, 32, 32, 3)
    assert textures.test_images.shape == (100, 32, 32, 3)
    assert textures.train_images.dtype == textures.test_images.dtype == np.float32
    assert textures.train_labels.dtype == textures.test_labels.dtype == np.int32
    np.testing.assert_array_equal(np.bincount(textures.train_labels), 40)
    np.testing.assert_array_equal(np.bincount(textures.test_labels), 10)


def test_textures_are_standardised_by_the_training_set(textures):
    images = textures.train_images.astype(np.float64)
    np.testing.assert_allclose(images.mean(axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(images.std(axis=(0, 1, 2)), 1, atol=1e-5)
    # The test set is another sample: near, and not at, zero and one.
    means = textures.test_images.astype(np.float64).mean(axis=(0, 1, 2))
    assert 1e-5 < np.abs(means).max() < 0.1


def test_textures_are_a_function_of_the_seed(textures):
    again = data.synthetic_textures(num_train=400, num_test=100)
    for one, two in zip(textures, again, strict=True):
        np.testing.assert_array_equal(one, two)
    other = data.synthetic_textures(seed=1, num_train=400, num_test=100)
    assert other.fingerprint != textures.fingerprint
    assert len(textures.fingerprint) == 64
    assert not np.array_equal(other.train_labels, textures.train_labels)


def test_the_power_spectrum_is_a_power_law(textures):
    power = np.abs(np.fft.fft2(textures.train_images, axes=(1, 2))) ** 2
    power = power.mean(axis=(0, 3))
    frequency = np.fft.fftfreq(32, 1 / 32)
    radius = np.hypot(frequency[:, None], frequency[None, :])
    rings = np.arange(2, 13)
    means = [power[np.abs(radius - ring) < 0.5].mean() for ring in rings]
    slope, offset = np.polyfit(np.log(rings), np.log(means), 1)
    assert slope == pytest.approx(-2, abs=0.15)
    misfit = np.log(means) - slope * np.log(rings) - offset
    assert np.abs(misfit).max() < 0.15


def test_a_class_is_an_orientation(textures):
    """The energy of a class peaks at its own angle of the spectrum."""
    power = np.abs(np.fft.fft2(textures.train_images, axes=(1, 2))) ** 2
    frequency = np.fft.fftfreq(32, 1 / 32)
    ky, kx = np.meshgrid(frequency, frequency, indexing="ij")
    inside = (np.hypot(ky, kx) >= 3) & (np.hypot(ky, kx) < 12)
    doubled = np.exp(2j * np.arctan2(ky, kx)) * inside * np.hypot(ky, kx) ** 2
    for label in range(10):
        mean = power[textures.train_labels == label].mean(axis=(0, 3))
        angle = np.angle(np.sum(mean * doubled)) / 2 % np.pi
        gap = (angle - np.pi * label / 10 + np.pi / 2) % np.pi - np.pi / 2
        assert abs(gap) < np.pi / 20, label


def test_counts_below_one_are_refused():
    for name in ("num_train", "num_test", "num_classes"):
        with pytest.raises(ValueError, match=f"{name}: expected an integer >= 1"):
            data.synthetic_textures(**{name: 0})


def test_the_fingerprint_sees_images_labels_and_their_split():
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3)).astype(np.uint8)
    labels = np.arange(6)

    def fingerprint(images, labels, cut=4):
        train, test = (images[:cut], labels[:cut]), (images[cut:], labels[cut:])
        return data.make_dataset("x", train, test, 6).fingerprint

    seen = {
        fingerprint(images, labels),
        fingerprint(images, labels[::-1]),
        fingerprint(images[::-1], labels),
        fingerprint(images, labels, cut=3),
    }
    assert len(seen) == 4
    assert fingerprint(images.copy(), labels.astype(np.int64)) in seen


def test_a_constant_channel_is_not_divided_by_zero():
    images = np.full((4, 2, 2, 3), 7, np.uint8)
    labels = np.zeros(4, np.int64)
    made = data.make_dataset("x", (images, labels), (images, labels), 1)
    np.testing.assert_array_equal(made.train_images, 0)


def test_evaluation_batches_are_fixed_and_without_repetition():
    images = np.arange(40, dtype=np.float32).reshape(20, 2)
    labels = np.arange(20, dtype=np.int32)
    options = {"num_batches": 3, "batch_size": 6}
    batches = data.evaluation_batches(images, labels, **options, seed=5)
    assert batches["image"].shape == (3, 6, 2)
    assert batches["label"].shape == (3, 6)
    assert len(np.unique(batches["label"])) == 18
    np.testing.assert_array_equal(batches["image"], images[batches["label"]])
    again = data.evaluation_batches(images, labels, **options, seed=5)
    np.testing.assert_array_equal(batches["label"], again["label"])
    other = data.evaluation_batches(images, labels, **options, seed=6)
    assert not np.array_equal(batches["label"], other["label"])


def test_more_evaluation_examples_than_there_are_is_an_error():
    images, labels = np.zeros((20, 2)), np.zeros(20)
    with pytest.raises(ValueError, match=r"at most the data set's 20 .* 3 \* 7 = 21"):
        data.evaluation_batches(images, labels, num_batches=3, batch_size=7, seed=0)
    with pytest.raises(ValueError, match="num_batches: expected an integer >= 1"):
        data.evaluation_batches(images, labels, num_batches=0, batch_size=7, seed=0)
    with pytest.raises(ValueError, match="batch_size: expected an integer >= 1"):
        data.evaluation_batches(images, labels, num_batches=1, batch_size=0, seed=0)


def test_a_seed_does_not_change_the_embedded_data(monkeypatch):
    calls = []
    monkeypatch.setattr(
        data, "synthetic_textures", lambda *a, **k: calls.append((a, k))
    )
    for seed in (0, 1):
        data.load_dataset(Config(seed=seed))
    assert calls == [((), {})] * 2


def test_a_missing_data_set_is_never_downloaded(tmp_path, monkeypatch):
    with pytest.raises(UserError) as caught:
        data.load_dataset(Config(dataset="cifar10", data_dir=str(tmp_path)))
    text = str(caught.value)
    assert text.startswith(f"--data_dir: expected prepared CIFAR-10 in '{tmp_path}'")
    assert "download_and_prepare" in text
    assert "pip install tensorflow" in text
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "from_env"))
    with pytest.raises(UserError, match="from_env"):
        data.load_cifar10()


def half_written(folder, *, cut):
    """Links prepared CIFAR-10 into a folder, with the test split cut or left out."""
    source = prepared_cifar10()
    info = sorted(source.glob("cifar10/*/dataset_info.json"))[-1]
    version = folder / "cifar10" / info.parent.name
    version.mkdir(parents=True)
    for path in info.parent.iterdir():
        if "test" not in path.name:
            (version / path.name).symlink_to(path.absolute())
        elif cut:
            (version / path.name).write_bytes(path.read_bytes()[: 2**20])
    return version


@pytest.mark.parametrize("cut", [True, False])
def test_a_half_written_data_set_is_one_sentence(tmp_path, cut):
    version = half_written(tmp_path, cut=cut)
    with pytest.raises(UserError) as caught:
        data.load_cifar10(str(tmp_path))
    text = str(caught.value)
    assert text.startswith("--data_dir: expected 50,000 training and 10,000 test")
    assert str(version) in text
    assert "download_and_prepare" in text
    assert "\n" not in text


def test_a_folder_that_is_not_a_data_set_is_one_sentence(tmp_path):
    version = tmp_path / "cifar10" / "3.0.2"
    version.mkdir(parents=True)
    (version / "dataset_info.json").write_text("not JSON")
    with pytest.raises(UserError, match="--data_dir: expected 50,000 training"):
        data.load_cifar10(str(tmp_path))


@pytest.mark.parametrize("fault", ["shape", "dtype", "label"])
def test_data_of_another_kind_is_refused(tmp_path, monkeypatch, fault):
    version = tmp_path / "cifar10" / "3.0.2"
    version.mkdir(parents=True)
    (version / "dataset_info.json").write_text("{}")
    side, dtype = (31, np.uint8) if fault == "shape" else (32, np.uint8)
    dtype = np.int32 if fault == "dtype" else dtype

    def read_splits(folder):
        assert folder == version
        # Broadcast zeros hold one element: nothing large is made.
        image, label = np.zeros((), dtype), np.asarray(10 if fault == "label" else 1)
        return {
            split: (
                np.broadcast_to(image, (count, side, side, 3)),
                np.broadcast_to(label, (count,)),
            )
            for split, count in {"train": 50_000, "test": 10_000}.items()
        }

    monkeypatch.setattr(data, "_read_splits", read_splits)
    with pytest.raises(UserError, match=r"--data_dir: expected 50,000 .* got train"):
        data.load_cifar10(str(tmp_path))


def test_the_newest_version_is_taken(tmp_path):
    for version in ("3.0.2", "3.0.10", "2.9.9"):
        (tmp_path / "cifar10" / version).mkdir(parents=True)
        (tmp_path / "cifar10" / version / "dataset_info.json").write_text("{}")
    (tmp_path / "cifar10" / "4.0.0.incomplete").mkdir()
    assert data._find_version(str(tmp_path)).name == "3.0.10"


@pytest.mark.slow
def test_cifar10_is_read_whole_and_without_tensorflow():
    found = data.load_cifar10(str(prepared_cifar10()))
    assert "tensorflow" not in sys.modules
    assert found.train_images.shape == (50_000, 32, 32, 3)
    assert found.test_images.shape == (10_000, 32, 32, 3)
    np.testing.assert_array_equal(np.bincount(found.train_labels), 5000)
    np.testing.assert_array_equal(np.bincount(found.test_labels), 1000)
    mean = found.train_images.mean(axis=(0, 1, 2), dtype=np.float64)
    np.testing.assert_allclose(mean, 0, atol=1e-4)
