"""The study: train both networks from several seeds, and measure every variation.

Every cell is a file of its own, so that a killed study goes on where it was. At the end
``study.json`` holds the settings, the environment, accuracies and names of the cells,
and ``study.npz`` their arrays; tables and figures are made from these two alone.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from grsd_jax.experiments.claims.cells import QUANTITIES, Cell, cell_of
from grsd_jax.experiments.claims.plan import (
    BINNINGS,
    CONTROLS,
    NETWORKS,
    VARIATIONS,
    Variation,
    cell_name,
)
from grsd_jax.experiments.common import records
from grsd_jax.experiments.common.config import Config, UserError
from grsd_jax.experiments.common.data import Dataset, measured_batches
from grsd_jax.experiments.common.networks import make_model
from grsd_jax.experiments.common.progress import progress_bar
from grsd_jax.experiments.common.training import train
from grsd_jax.experiments.common.weights import initial_weights, protocol_weights
from grsd_jax.experiments.reproduce import pipeline
from grsd_jax.shells.diagnostics import CouplingMeasurement

#: Random halves of the pairs behind the intervals of one cell.
NUM_REPLICATES = 200


def run_study(dataset: Dataset, config: Config, seeds: Sequence[int]) -> None:
    """Runs the cells that are not there yet, and writes both files.

    Args:
        dataset: The data.
        config: The settings of the base; ``seed`` and ``model`` are those of the cells.
        seeds: Seeds of weights, order and measured batches.

    Raises:
        UserError: If the workdir holds another study or cannot be written, or training
            or a measurement fails.
    """
    folder = Path(config.workdir)
    widest = max(binning.window or 0 for binning in BINNINGS)
    if config.num_shells < widest:
        raise UserError(
            f"--num_shells: expected at least {widest}, the study's widest window, "
            f"got {config.num_shells}."
        )
    if config.solver == "auto":
        raise UserError(
            "--solver: expected 'dense' or 'lanczos', so that the pairs do not change "
            "with n by the way, got 'auto'."
        )
    _check_settings(folder, dataset, config)
    accuracies, cells = {}, {}
    for position, seed in enumerate(seeds):
        workdir = folder / f"seed{seed}"
        settings = dataclasses.replace(config, seed=seed, workdir=str(workdir))
        for network in NETWORKS:
            result = train(
                make_model(network, dataset.num_classes, settings),
                dataset,
                dataclasses.replace(settings, model=network),
                workdir,
                name=network,
            )
            accuracies[f"seed{seed}-{network}"] = result.test_accuracy
        for network in NETWORKS:
            cells |= _cells_of(network, dataset, settings, folder / "cells")
        done = seeds[: position + 1]
        write_study(folder, dataset, config, done, accuracies, cells)


def write_study(
    folder: Path,
    dataset: Dataset,
    config: Config,
    seeds: Sequence[int],
    accuracies: dict[str, float],
    cells: dict[str, Cell],
) -> None:
    """Writes ``study.npz``, then ``study.json``.

    Args:
        folder: The folder.
        dataset: The data, for its fingerprint.
        config: The settings.
        seeds: The seeds that are done.
        accuracies: Test accuracy of each trained network.
        cells: The cells by name.

    Raises:
        UserError: If the folder cannot be written.
    """
    arrays = {
        f"{name}/{key}": array
        for name, cell in cells.items()
        for key, array in cell.items()
    }
    records.write_npz(folder / "study.npz", arrays)
    results = pipeline.header(config) | {
        "data_fingerprint": dataset.fingerprint,
        "error_fn": "softmax_error",
        "direction": "minus the gradient of the mean cross-entropy, same batches",
        "seeds": list(seeds),
        "num_replicates": NUM_REPLICATES,
        "quantities": QUANTITIES,
        "test_accuracy": accuracies,
        "cells": list(cells),
    }
    records.write_json(folder / "study.json", results)


def _check_settings(folder: Path, dataset: Dataset, config: Config) -> None:
    """Writes what the cells depend on, or checks that it is what is there."""
    settings = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in ("workdir", "data_dir", "seed", "model")
    }
    plan = [choice._asdict() for choice in (*VARIATIONS, *BINNINGS, *CONTROLS)]
    told = json.dumps(
        [settings, dataset.fingerprint, QUANTITIES, NUM_REPLICATES, plan],
        sort_keys=True,
    )
    mark = hashlib.sha256(told.encode()).hexdigest()
    path = folder / "cells" / "settings.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        records.write_json(path, {"settings": settings, "fingerprint": mark})
    elif records.read_json(path).get("fingerprint") != mark:
        raise UserError(
            f"--workdir: expected a study under these settings in '{folder}', got one "
            "under others; choose another folder."
        )


def _cells_of(
    network: str, dataset: Dataset, config: Config, folder: Path
) -> dict[str, Cell]:
    """Returns the cells of one network and seed, from the folder or measured."""
    found = {}
    concerned = [v for v in VARIATIONS if network in v.networks]
    for variation in progress_bar(concerned, desc=f"seed {config.seed} {network}"):
        binnings = (None,)
        if variation is VARIATIONS[0]:
            binnings = (None, *BINNINGS, *CONTROLS)
        names = [
            cell_name(config.seed, network, (binning or variation).name)
            for binning in binnings
        ]
        paths = [folder / f"{name}.npz" for name in names]
        if not all(path.exists() for path in paths):
            measured, key = _measured(network, variation, dataset, config)
            for binning, path in zip(binnings, paths, strict=True):
                cell = cell_of(
                    measured,
                    num_shells=config.num_shells,
                    window=config.window,
                    num_replicates=NUM_REPLICATES,
                    key=key,
                    binning=binning,
                )
                records.write_npz(path, cell)
        found |= {
            name: records.read_npz(path)
            for name, path in zip(names, paths, strict=True)
        }
    return found


def _measured(
    network: str, variation: Variation, dataset: Dataset, config: Config
) -> tuple[CouplingMeasurement, jax.Array]:
    """Measures one variation, and returns a key for what follows it."""
    changes: dict[str, Any] = dict(variation.settings)
    if "batch_size" in changes:
        changes["batch_size"] = int(changes["batch_size"] * config.batch_size)
    changed = dataclasses.replace(config, **changes)
    model = make_model(network, dataset.num_classes, config)
    if variation.initial:
        weights = initial_weights(model, dataset, config)
    else:
        weights = protocol_weights(network, variation.protocol, dataset, config)
    measured = pipeline.measure_weights(
        f"{network} {variation.name}",
        model,
        weights,
        measured_batches(dataset, changed, training=variation.training),
        changed,
    )
    return measured, jax.random.fold_in(jax.random.key(config.seed), 1)
