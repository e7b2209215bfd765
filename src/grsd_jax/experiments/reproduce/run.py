"""From a checkpoint to a result: the measurement of a model under a protocol.

A result is a dictionary for ``results.json`` and named arrays for ``arrays.npz``;
figures and tables are made from these two files alone.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from grsd_jax.experiments.common import files, records
from grsd_jax.experiments.common.config import Config, UserError
from grsd_jax.experiments.common.data import Dataset, measured_batches
from grsd_jax.experiments.common.measurement import (
    PROVENANCE,
    Arrays,
    header,
    made_by,
    measure_network,
    measurement_arrays,
    measurement_entry,
)
from grsd_jax.experiments.common.networks import make_model, protocol_weights
from grsd_jax.experiments.common.runs import cached
from grsd_jax.experiments.common.training import evaluate, train
from grsd_jax.experiments.reproduce.analyse import ARRAYS_CHECKSUM


def measure(
    name: str,
    protocol: str,
    dataset: Dataset,
    config: Config,
    *,
    mesh: Mesh | None = None,
) -> tuple[dict[str, Any], Arrays]:
    """Measures one network under one protocol on fixed batches of the test set.

    The direction is the gradient flow of the mean cross-entropy on the same batches.

    Args:
        name: One of `config.MODELS`.
        protocol: ``"own"``, ``"shared"`` or ``"recalibrated"``.
        dataset: The data.
        config: The settings.
        mesh: Devices that share the examples; one device if None.

    Returns:
        The entry of ``results.json``, and its arrays without their prefix.

    Raises:
        UserError: If the checkpoint cannot be read or the network is not finite there.
    """
    started = time.monotonic()
    model = make_model(name, dataset.num_classes, config)
    weights = protocol_weights(name, protocol, dataset, config)
    batches = measured_batches(dataset, config)
    measured = measure_network(
        f"{name} {protocol}", model, weights, batches, config, mesh=mesh
    )
    accuracy = evaluate(model, weights, dataset.test_images, dataset.test_labels)
    entry = measurement_entry(measured, config) | PROVENANCE
    entry |= {
        "protocol": protocol,
        "test_accuracy": accuracy,
        "seconds": round(time.monotonic() - started, 1),
        "data_fingerprint": dataset.fingerprint,
    }
    return entry, measurement_arrays(measured)


def reproduce(dataset: Dataset, config: Config) -> tuple[dict[str, Any], Arrays]:
    """Trains what the protocols need, and measures both networks.

    Training and measurements that are already in the workdir, made under the same
    settings, are taken from there, so that a killed run goes on where it was.

    Args:
        dataset: The data.
        config: The settings.

    Returns:
        The contents of ``results.json`` and of ``arrays.npz``.

    Raises:
        UserError: If the workdir holds another run or cannot be written, or training
            or a measurement fails.
    """
    measured_batches(dataset, config)  # complains before the training
    trained = ["resnet18"] + (["plainnet18"] if "own" in config.protocol else [])
    for name in trained:
        settings = dataclasses.replace(config, model=name)
        train(
            make_model(name, dataset.num_classes, config),
            dataset,
            settings,
            config.workdir,
            name=name,
        )
    entries, arrays = {}, {}
    runs = {"resnet18": ("resnet18", "own")}
    runs |= {f"plainnet18.{p}": ("plainnet18", p) for p in config.protocol}
    for prefix, (name, protocol) in runs.items():
        entry, found = _measured_once(prefix, name, protocol, dataset, config)
        entries[prefix] = entry | {"arrays": prefix}
        arrays |= {f"{prefix}/{key}": array for key, array in found.items()}
    protocols = {p: entries[f"plainnet18.{p}"] for p in config.protocol}
    results = header(config) | {
        "models": {
            "resnet18": entries["resnet18"],
            "plainnet18": protocols[config.protocol[0]],
        },
        "protocols": protocols,
    }
    return results, arrays


def write_results(folder: Path, results: dict[str, Any], arrays: Arrays) -> None:
    """Writes ``arrays.npz``, then ``results.json``, each whole or not at all.

    Results of other settings that lie there already are kept beside, under the next
    free number, which is printed, and so is a file that holds no results.
    ``results.json`` has the checksum of its arrays.

    Args:
        folder: The folder.
        results: The contents of ``results.json``.
        arrays: The contents of ``arrays.npz``.

    Raises:
        UserError: If the folder cannot be written.
    """
    names = ("results.json", "arrays.npz")
    if (folder / names[0]).exists():
        try:
            earlier = records.read_json(folder / names[0]).get("config")
        except UserError:  # damaged or foreign: kept, like others' results
            earlier = None
        if _comparable(earlier) != _comparable(results["config"]):
            kept = " and ".join(map(str, files.set_aside(folder, names)))
            print(f"results of other settings are kept as {kept}")
    records.write_npz(folder / names[1], arrays)
    checksum = files.checksum(folder / names[1])
    records.write_json(folder / names[0], results | {ARRAYS_CHECKSUM: checksum})


def _comparable(config: Any) -> Any:
    """Returns the settings as JSON holds them, without where things lie."""
    config = records.plain(config)
    if not isinstance(config, dict):
        return config
    return {k: v for k, v in config.items() if k not in ("workdir", "data_dir")}


def _measured_once(
    prefix: str, name: str, protocol: str, dataset: Dataset, config: Config
) -> tuple[dict[str, Any], Arrays]:
    """Measures, or reads the same measurement from an earlier run of the workdir."""
    path = Path(config.workdir) / "measurements" / prefix
    return cached(
        path,
        made_by(config, dataset),
        lambda: measure(name, protocol, dataset, config),
    )
