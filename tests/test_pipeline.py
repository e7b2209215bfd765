"""The whole comparison on small networks: train, measure, resume, table, figures."""

import dataclasses

import numpy as np
import pytest

from grsd_jax import Binning, Lanczos
from grsd_jax.experiments.common import records
from grsd_jax.experiments.common.config import Config, UserError
from grsd_jax.experiments.common.data import measured_batches
from grsd_jax.experiments.common.measurement import (
    header,
    measurement_options,
    network_problem,
)
from grsd_jax.experiments.common.networks import (
    init_weights,
    load_weights,
    make_model,
)
from grsd_jax.experiments.reproduce import analyse, figures
from grsd_jax.experiments.reproduce import run as pipeline
from running import run_script, small, small_textures

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
SETTINGS = {
    "width": 2,
    "epochs": 1,
    "train_batch_size": 32,
    "batch_size": 4,
    "num_batches": 1,
    "num_shells": 4,
    "window": 2,
    "block_size": 4,
    "num_pairs": 8,
    "activation": "gelu",
    "solver": "dense",
}
FLAGS = [f"--{name}={value}" for name, value in SETTINGS.items()]


@pytest.fixture(autouse=True, scope="module")
def _small():
    with small():
        yield


@pytest.fixture(scope="module")
def dataset():
    return small_textures()


def settings(workdir, **changes):
    return Config(workdir=str(workdir), **(SETTINGS | {"reduction": "mean"} | changes))


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """The workdir of a whole run of the script, and what it printed."""
    folder = tmp_path_factory.mktemp("reproduced")
    done = run_script("reproduce.py", f"--workdir={folder}", *FLAGS)
    assert done.code == 0, done.err
    return folder, done.out


def test_reproduce_writes_the_schema_the_table_and_the_figures(reproduced):
    folder, out = reproduced
    found, arrays = analyse.read_results(folder)
    assert set(found) == {"command", "config", "environment", "models", "protocols"}
    assert found["config"]["reduction"] == "mean"  # the paper's
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
    assert len(analyse.list_entries(found)) == 4
    table = analyse.format_table(found)  # read back, the networks come by name
    assert set(table.splitlines()) <= set(out.splitlines())
    measured = ("resnet18 own", *(f"plainnet18 {x}" for x in found["protocols"]))
    for name in measured:
        assert f"{name}: n = 40, leading 8 pairs, dense" in out
    paths = figures.write_figures(found, arrays, folder / "figures")
    assert sorted(paths) == sorted((folder / "figures").iterdir())
    assert len(paths) == 10


def test_a_second_run_measures_nothing_again(reproduced, dataset, monkeypatch):
    folder, _ = reproduced
    config = settings(folder)

    def forbidden(*_args):
        raise AssertionError("measured again")

    monkeypatch.setattr(pipeline, "measure", forbidden)
    again, arrays = pipeline.reproduce(dataset, config)
    written, kept = analyse.read_results(folder)
    assert written["command"].startswith("reproduce.py --workdir=")
    assert records.plain(again) | {"command": written["command"]} == written
    assert set(arrays) == set(kept)
    np.testing.assert_array_equal(arrays["resnet18/values"], kept["resnet18/values"])
    with pytest.raises(AssertionError, match="measured again"):
        pipeline.reproduce(dataset, dataclasses.replace(config, num_shells=5))
    with pytest.raises(UserError, match="--width: expected 2"):
        pipeline.reproduce(dataset, dataclasses.replace(config, width=3))
    other = dataclasses.replace(config, activation="tanh")
    with pytest.raises(UserError, match="--activation: expected 'gelu'"):
        load_weights("resnet18", dataset, other)
    cell = folder / "measurements" / "resnet18.json"
    written = cell.read_bytes()
    cell.write_text("[]")
    with pytest.raises(AssertionError, match="measured again"):
        pipeline.reproduce(dataset, config)
    cell.write_bytes(written)


def test_measure_then_plot(reproduced):
    folder, _ = reproduced
    flags = [*FLAGS, "--model=plainnet18", "--protocol=shared", "--reduction=mean"]
    workdir = f"--workdir={folder}"
    one = run_script("measure.py", workdir, *flags)
    assert one.code == 0, one.err
    measured = records.read_json(folder / "plainnet18" / "results.json")
    shared = records.read_json(folder / "results.json")["models"]["plainnet18"]
    assert measured["model"]["lambda_max"] == pytest.approx(
        shared["lambda_max"], rel=1e-5
    )
    drawn = run_script("plot.py", f"--workdir={folder / 'plainnet18'}")
    assert drawn.code == 0, drawn.err
    assert len(list((folder / "plainnet18" / "figures").glob("*.pdf"))) == 5
    foreign = run_script("measure.py", workdir, *flags, "--width=3")
    assert foreign.code == 1
    assert "--width: expected 2 as in the run" in foreign.err


def test_results_of_other_settings_are_kept_and_named(tmp_path, capsys):
    for num_shells, workdir in ((4, "a"), (4, "b"), (5, "b")):
        config = settings(workdir, num_shells=num_shells)
        assert capsys.readouterr().out == ""
        pipeline.write_results(tmp_path, header(config), {"x": np.ones(1)})
    assert capsys.readouterr().out == (
        f"results of other settings are kept as {tmp_path / 'results-1.json'} and "
        f"{tmp_path / 'arrays-1.npz'}\n"
    )
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"results.json", "arrays.npz", "results-1.json", "arrays-1.npz"}
    kept = records.read_json(tmp_path / "results-1.json")
    assert kept["config"]["num_shells"] == 4
    (tmp_path / "results.json").write_text("mine")
    pipeline.write_results(tmp_path, header(config), {"x": np.ones(1)})
    assert (tmp_path / "results-2.json").read_text() == "mine"
    assert analyse.read_results(tmp_path)[0]["config"]["num_shells"] == 5


def test_a_missing_checkpoint_is_named(tmp_path, dataset):
    with pytest.raises(UserError, match="checkpoint"):
        pipeline.measure("resnet18", "own", dataset, settings(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("solver", ["auto", "dense", "lanczos"])
def test_options_are_those_of_the_measurement(dataset, solver):
    config = settings("unused", solver=solver, num_batches=2)
    model = make_model("resnet18", 10, config)
    weights = init_weights(model, dataset.train_images.shape[1:], 0)
    batches = measured_batches(dataset, config)
    problem = network_problem(model, weights, batches, config)
    assert problem.reduction == "mean"
    assert problem.dimension(weights.params) == 40
    options = measurement_options(problem, weights.params, config)
    # With so few pairs Lanczos is the cheaper of the two.
    assert options["solver"] == ("dense" if solver == "dense" else Lanczos(4))
    assert options["window"].num_pairs == 8
    assert options["shells"] == Binning(4, 2)
    assert options["derivative"].method == "exact"
