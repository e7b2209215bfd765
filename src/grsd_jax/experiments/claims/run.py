"""Trains both networks from several seeds, and measures each of them at the end.

A cell is one network of one seed under one reduction: ``stack`` is the base case, and
``mean`` is the paper's variation of it.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grsd_jax._typing import Reduction
from grsd_jax.experiments.common import records
from grsd_jax.experiments.common.config import Config, UserError
from grsd_jax.experiments.common.data import Dataset, measured_batches
from grsd_jax.experiments.common.measurement import (
    PROVENANCE,
    header,
    made_by,
    measure_network,
    measurement_entry,
)
from grsd_jax.experiments.common.networks import load_weights, make_model
from grsd_jax.experiments.common.quantities import coupling_quantities
from grsd_jax.experiments.common.runs import Result, cached
from grsd_jax.experiments.common.training import train

NETWORKS = ("resnet18", "plainnet18")
REDUCTIONS: tuple[Reduction, ...] = ("stack", "mean")


class Cell(NamedTuple):
    """One measurement of the study.

    Attributes:
        seed: Seed of the weights, the order of the data and the measured batches.
        network: One of `NETWORKS`.
        reduction: One of `REDUCTIONS`.
    """

    seed: int
    network: str
    reduction: Reduction

    @property
    def name(self) -> str:
        """The cell in one word, for its files."""
        return f"seed{self.seed}-{self.network}-{self.reduction}"


def run_claims(
    dataset: Dataset, config: Config, seeds: Sequence[int]
) -> dict[str, Any]:
    """Trains and measures what is not there yet, and writes ``claims.json``.

    The file is written again after every seed, so that a killed run has the seeds that
    it finished.

    Args:
        dataset: The data.
        config: The settings; seed, model and reduction are those of the cells.
        seeds: The seeds, one pair of trainings each.

    Returns:
        The contents of ``claims.json``: settings, environment, and one row per cell.

    Raises:
        UserError: If the workdir holds other trainings or cannot be written, or a
            training or a measurement fails.
    """
    if config.solver == "auto":
        raise UserError(
            "--solver: expected 'dense' or 'lanczos', so that every cell has the same "
            "one, got 'auto'."
        )
    folder = Path(config.workdir)
    results = header(config) | {
        "data_fingerprint": dataset.fingerprint,
        **PROVENANCE,
        "rows": [],
    }
    for seed in seeds:
        settings = dataclasses.replace(
            config, seed=seed, workdir=str(folder / f"seed{seed}")
        )
        for network in NETWORKS:
            settings = dataclasses.replace(settings, model=network)
            measured_batches(dataset, settings)  # complains before the training
            accuracy = _train(dataset, settings)
            results["rows"] += [
                _row(Cell(seed, network, reduction), dataset, settings, folder)
                | {"test_accuracy": accuracy}
                for reduction in REDUCTIONS
            ]
        records.write_json(folder / "claims.json", results)
    return results


def _train(dataset: Dataset, config: Config) -> float:
    """Trains one network, or takes it from the workdir; returns its test accuracy."""
    model = make_model(config.model, dataset.num_classes, config)
    done = train(model, dataset, config, config.workdir, name=config.model)
    return done.test_accuracy


def _row(cell: Cell, dataset: Dataset, config: Config, folder: Path) -> dict[str, Any]:
    """Returns the quantities of a cell, measured or from its file."""
    config = dataclasses.replace(config, reduction=cell.reduction)
    path = folder / "cells" / cell.name
    entry, _ = cached(
        path, made_by(config, dataset), lambda: measure_cell(dataset, config)
    )
    return cell._asdict() | entry["quantities"]


def measure_cell(dataset: Dataset, config: Config) -> Result:
    """Measures the trained network of the settings under their reduction.

    Args:
        dataset: The data.
        config: The settings of the cell.

    Returns:
        The entry with its ``quantities``, and the eigenvalues, the mask of the resolved
        ones and the coupling of the modes.

    Raises:
        UserError: If the checkpoint cannot be read, or the network is not finite there.
    """
    measured = measure_network(
        f"seed {config.seed} {config.model} {config.reduction}",
        make_model(config.model, dataset.num_classes, config),
        load_weights(config.model, dataset, config),
        measured_batches(dataset, config),
        config,
    )
    entry = measurement_entry(measured, config)
    entry |= {"quantities": coupling_quantities(measured)}
    names = ("values", "resolved", "coupling")
    return entry, {name: getattr(measured, name) for name in names}
