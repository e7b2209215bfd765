import dataclasses

import jax
import numpy as np
import pytest

from grsd_jax.experiments.common import records
from grsd_jax.experiments.common.config import Config, UserError
from grsd_jax.experiments.common.data import synthetic_textures
from grsd_jax.experiments.common.weights import load_weights
from grsd_jax.experiments.reproduce import figures, pipeline, results
from grsd_jax.experiments.reproduce.tables import format_table

ENTRY_KEYS = {
    "n",
    "num_pairs",
    "num_resolved",
    "solver",
    "derivative",
    "protocol",
    "test_accuracy",
    "diagonal_fit",
    "shell_fit",
    "toeplitz",
    "secant_disagreement",
    "data_fingerprint",
}
FIT_KEYS = {"exponent", "r_squared", "exponent_stderr", "interval", "num_points"}


@pytest.fixture(scope="module")
def dataset():
    return synthetic_textures(num_train=64, num_test=32)


def settings(workdir, **changes):
    small = Config(
        workdir=str(workdir),
        width=2,
        epochs=1,
        train_batch_size=32,
        batch_size=4,
        num_batches=1,
        num_shells=4,
        window=2,
        block_size=4,
        num_steps=4,
        activation="gelu",
    )
    return dataclasses.replace(small, **changes)


@pytest.mark.slow
def test_reproduce_writes_the_schema_and_goes_on_where_it_was(
    tmp_path, dataset, monkeypatch
):
    with jax.numpy_dtype_promotion("standard"):
        config = settings(tmp_path)
        found, arrays = pipeline.reproduce(dataset, config)
        assert set(found) == {"config", "environment", "models", "protocols"}
        assert set(found["protocols"]) == {"shared", "recalibrated", "own"}
        assert found["models"]["plainnet18"] == found["protocols"]["shared"]
        for entry in [found["models"]["resnet18"], *found["protocols"].values()]:
            assert set(entry) >= ENTRY_KEYS
            assert set(entry["diagonal_fit"]) >= FIT_KEYS
            assert entry["n"] == 40
            assert entry["num_resolved"] <= 36  # a null vector for each example
            for kind in ("literal", "renormalized"):
                assert len(entry["toeplitz"][kind]["windows"]) == 3
        own, shared = (found["protocols"][p] for p in ("own", "shared"))
        assert own["lambda_max"] != shared["lambda_max"]

        pipeline.write_results(tmp_path, found, arrays)
        read = records.read_json(tmp_path / "results.json")
        assert len(results.list_entries(read)) == 4
        assert "ResNet-18" in format_table(read)
        loaded = records.read_npz(tmp_path / "arrays.npz")
        paths = figures.write_figures(read, loaded, tmp_path / "figures")
        assert all(path.stat().st_size > 1000 for path in paths)

        def forbidden(*_args):
            raise AssertionError("measured again")

        monkeypatch.setattr(pipeline, "measure", forbidden)
        again, arrays_again = pipeline.reproduce(dataset, config)
        records.write_json(tmp_path / "again.json", again)
        assert records.read_json(tmp_path / "again.json") == read
        np.testing.assert_array_equal(
            arrays_again["resnet18/values"], arrays["resnet18/values"]
        )
        with pytest.raises(AssertionError, match="measured again"):
            pipeline.reproduce(dataset, dataclasses.replace(config, num_shells=5))
        with pytest.raises(UserError, match="--width: expected 2"):
            pipeline.reproduce(dataset, dataclasses.replace(config, width=3))
        other = dataclasses.replace(config, activation="tanh")
        with pytest.raises(UserError, match="--activation: expected 'gelu'"):
            load_weights("resnet18", dataset, other)
        records.write_json(tmp_path / "measurements" / "resnet18.json", [])
        with pytest.raises(AssertionError, match="measured again"):
            pipeline.reproduce(dataset, config)


def test_results_of_other_settings_are_kept(tmp_path):
    for num_shells, workdir in ((4, "a"), (4, "b"), (5, "b")):
        config = settings(workdir, num_shells=num_shells)
        pipeline.write_results(tmp_path, pipeline.header(config), {"x": np.ones(1)})
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"results.json", "arrays.npz", "results-1.json", "arrays-1.npz"}
    kept = records.read_json(tmp_path / "results-1.json")
    assert kept["config"]["num_shells"] == 4


def test_a_missing_checkpoint_is_named(tmp_path, dataset):
    with (
        jax.numpy_dtype_promotion("standard"),
        pytest.raises(UserError, match="checkpoint"),
    ):
        pipeline.measure("resnet18", "own", dataset, settings(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_options_are_those_of_the_measurement():
    options = pipeline.measurement_options(Config(solver="dense", reduction="stack"))
    assert options["solver"] == "dense"
    assert options["reduction"] == "stack"
