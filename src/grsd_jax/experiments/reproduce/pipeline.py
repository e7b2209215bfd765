"""From a checkpoint to a result: the measurement of a model under a protocol.

A result is a dictionary for ``results.json`` and named arrays for ``arrays.npz``;
figures and tables are made from these two files alone.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grsd_jax import models
from grsd_jax._typing import PyTree
from grsd_jax.experiments.common import devices, estimates, records
from grsd_jax.experiments.common.config import Config, UserError
from grsd_jax.experiments.common.data import Dataset, measured_batches
from grsd_jax.experiments.common.entries import (
    THRESHOLDS,
    Arrays,
    fetched,
    measurement_arrays,
    measurement_entry,
)
from grsd_jax.experiments.common.networks import make_model
from grsd_jax.experiments.common.progress import progress_bar
from grsd_jax.experiments.common.training import evaluate, train
from grsd_jax.experiments.common.weights import Weights, protocol_weights
from grsd_jax.kernel.derivative import gradient_flow_direction
from grsd_jax.kernel.sharded import shard_batches
from grsd_jax.shells.diagnostics import CouplingMeasurement
from grsd_jax.shells.measurement import measure_coupling

#: Settings that do not change what one measurement computes.
_IRRELEVANT = {
    "data_dir",
    "workdir",
    "protocol",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "record_every",
}


def measurement_options(config: Config) -> dict[str, Any]:
    """Returns the settings that `measure_coupling` takes as they are.

    Args:
        config: The settings.

    Returns:
        Keyword arguments: reduction, solver, derivative, the Krylov dimensions, and
        `THRESHOLDS`.
    """
    names = ("reduction", "solver", "derivative", "block_size", "num_steps")
    return {name: getattr(config, name) for name in names} | THRESHOLDS


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
    measured = measure_weights(
        f"{name} {protocol}", model, weights, batches, config, mesh
    )
    accuracy = evaluate(
        model,
        weights.params,
        weights.batch_stats,
        dataset.test_images,
        dataset.test_labels,
    )
    entry = measurement_entry(measured, config)
    entry |= {
        "protocol": protocol,
        "test_accuracy": accuracy,
        "seconds": round(time.monotonic() - started, 1),
        "error_fn": "softmax_error",
        "direction": "minus the gradient of the mean cross-entropy, same batches",
        "data_fingerprint": dataset.fingerprint,
    }
    return entry, measurement_arrays(measured)


def measure_weights(
    title: str,
    model: nn.Module,
    weights: Weights,
    batches: PyTree,
    config: Config,
    mesh: Mesh | None = None,
) -> CouplingMeasurement:
    """Measures a network; says first what that takes, and shows progress.

    Args:
        title: What the bar of progress is called.
        model: The linen module.
        weights: Its weights.
        batches: A pytree with leading axes ``[K, N]``.
        config: The settings.
        mesh: Devices that share the examples; one device if None.

    Returns:
        The measurement, on the host but for the vectors.

    Raises:
        UserError: If the network is not finite there.
    """
    if mesh is not None:
        weights = jax.device_put(weights, NamedSharding(mesh, PartitionSpec()))
        batches = shard_batches(batches, mesh)
    state = {"batch_stats": weights.batch_stats}
    loss_fn = models.linen_loss_fn(model, state)
    error_fn = models.linen_error_fn(model, state)
    if devices.writes():
        print(estimates.sentence(error_fn, weights.params, batches, config, mesh))
    with progress_bar(desc=title, unit="step", leave=False) as bar:

        def progress(done: int) -> None:
            bar.update(done - bar.n)

        measured = measure_coupling(
            error_fn,
            weights.params,
            batches,
            gradient_flow_direction(loss_fn, weights.params, batches),
            key=jax.random.key(config.seed),
            **measurement_options(config),
            num_shells=config.num_shells,
            window=config.window,
            progress=progress if jax.default_backend() == "cpu" else None,
            mesh=mesh,
        )
        measured = fetched(measured)
    if not measured.finite:
        raise UserError(
            f"checkpoint of {title}: expected finite parameters, errors and products, "
            "got values that are not finite."
        )
    return measured


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


def header(config: Config) -> dict[str, Any]:
    """Returns what every ``results.json`` begins with: settings and environment.

    Args:
        config: The settings.

    Returns:
        ``{"config": ..., "environment": ...}``.
    """
    return {
        "config": dataclasses.asdict(config),
        "environment": records.environment(precision=config.precision),
    }


def write_results(folder: Path, results: dict[str, Any], arrays: Arrays) -> None:
    """Writes ``arrays.npz``, then ``results.json``, each whole or not at all.

    Results made with other settings that lie there already are kept beside, under the
    next free number.

    Args:
        folder: The folder.
        results: The contents of ``results.json``.
        arrays: The contents of ``arrays.npz``.

    Raises:
        UserError: If the folder cannot be written.
    """
    names = ("results.json", "arrays.npz")
    if (folder / names[0]).exists():
        earlier = records.read_json(folder / names[0])
        earlier = earlier.get("config") if isinstance(earlier, dict) else None
        if _comparable(earlier) != _comparable(results["config"]):
            records.set_aside(folder, names)
    records.write_npz(folder / names[1], arrays)
    records.write_json(folder / names[0], results)


def _comparable(config: Any) -> Any:
    """Returns the settings as JSON holds them, without where things lie."""
    config = json.loads(json.dumps(config))
    if not isinstance(config, dict):
        return config
    return {k: v for k, v in config.items() if k not in ("workdir", "data_dir")}


def _measured_once(
    prefix: str, name: str, protocol: str, dataset: Dataset, config: Config
) -> tuple[dict[str, Any], Arrays]:
    """Measures, or reads the same measurement from an earlier run of the workdir."""
    folder = Path(config.workdir) / "measurements"
    folder.mkdir(parents=True, exist_ok=True)
    made_by = {
        key: value
        for key, value in dataclasses.asdict(config).items()
        if key not in _IRRELEVANT
    }
    made_by |= {"data_fingerprint": dataset.fingerprint}
    made_by |= {"environment": records.environment(precision=config.precision)}
    note, file = folder / f"{prefix}.json", folder / f"{prefix}.npz"
    if note.exists() and file.exists():
        earlier = records.read_json(note)
        if isinstance(earlier, dict) and earlier.get("made_by") == made_by:
            return earlier["entry"], records.read_npz(file)
    entry, arrays = measure(name, protocol, dataset, config)
    note.unlink(missing_ok=True)  # never beside the arrays of another measurement
    records.write_npz(file, arrays)
    records.write_json(note, {"made_by": made_by, "entry": entry})
    return entry, arrays
