"""Trains both networks from several seeds under several arms, and compares their ends.

A cell is one network of one seed in one arm. Its training writes spectral snapshots,
from which every reading, the time resolution and the errors over images follow.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grsd_jax.dynamics import effective_time
from grsd_jax.experiments.common import files, records
from grsd_jax.experiments.common.config import Config, UserError
from grsd_jax.experiments.common.data import Dataset
from grsd_jax.experiments.common.measurement import UNRELATED, header, made_by
from grsd_jax.experiments.common.networks import make_model
from grsd_jax.experiments.common.runs import Result, cached, progress_bar
from grsd_jax.experiments.common.training import make_schedule, train
from grsd_jax.experiments.transport.protocol import Protocol, Reading, arm_config
from grsd_jax.experiments.transport.quantities import (
    image_errors,
    law_of,
    resolution_of,
    statistics,
)
from grsd_jax.experiments.transport.snapshots import (
    SnapshotWriter,
    read_snapshot,
    without_groups,
)

#: The file that holds the results of all finished pairs.
RESULTS = "transport.json"


class Cell(NamedTuple):
    """One training of the study.

    Attributes:
        arm: One of `protocol.ARMS`.
        seed: Seed of the weights, the order of the data and the measured images.
        network: One of `config.MODELS`.
    """

    arm: str
    seed: int
    network: str


def run_transport(
    dataset: Dataset,
    config: Config,
    *,
    arms: Sequence[str],
    seeds: Sequence[int],
    networks: Sequence[str],
    protocol: Protocol,
) -> dict[str, Any]:
    """Trains and compares what is not there yet, and writes ``transport.json``.

    The file is written again after every pair of trainings, so that a killed run has
    the pairs that it finished. Pairs of other arms and seeds that were finished before
    stay in it.

    Args:
        dataset: The data.
        config: The settings of the arm ``main``; the other arms change them.
        arms: The arms, of `protocol.ARMS`.
        seeds: The seeds, one pair of trainings each.
        networks: The residual network and its plain twin.
        protocol: What is compared.

    Returns:
        The contents of ``transport.json``.

    Raises:
        UserError: If the settings do not fit, the workdir holds other trainings or
            cannot be written, or a training fails.
    """
    if config.optimizer != "sgd":
        raise UserError(
            "--optimizer: expected 'sgd', whose time is the sum of its rates, got "
            f"{config.optimizer!r}."
        )
    path = Path(config.workdir) / RESULTS
    results = header(config) | {
        "data_fingerprint": dataset.fingerprint,
        "protocol": protocol.as_json(),
        "networks": list(networks),
        "runs": [],
    }
    if path.exists():
        results["runs"] = _finished_runs(path, results)
    pairs = list(itertools.product(arms, seeds))
    for arm, seed in progress_bar(pairs, desc="pairs of trainings"):
        pair = [Cell(arm, seed, network) for network in networks]
        entries = [_entry(cell, dataset, config, protocol) for cell in pair]
        others = [run for run in results["runs"] if not _is_one(run, pair)]
        results["runs"] = others + entries
        records.write_json(path, results)
    return results


def _is_one(run: dict[str, Any], cells: Sequence[Cell]) -> bool:
    return tuple(run[name] for name in Cell._fields) in cells


def _finished_runs(path: Path, now: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the finished runs of a file, if it was made the same way."""
    before = records.read_json(path)
    with files.reading(path, "the results of a study of transport"):
        _check_same_study(path, before, records.plain(now))
        runs = before["runs"]
        if not all(_named(run) for run in runs):
            raise ValueError("a run that names no cell")
        return runs


def _named(run: dict[str, Any]) -> bool:
    return all(name in run for name in Cell._fields)


def _check_same_study(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises UserError unless a file's study was made the same way."""
    ignored = {*UNRELATED, "seed", "model"}
    for name in ("protocol", "networks", "data_fingerprint", "config"):
        there, here = before.get(name), now[name]
        if name == "config":
            there, here = (
                {k: v for k, v in (x or {}).items() if k not in ignored}
                for x in (there, here)
            )
        if there != here:
            raise UserError(
                f"--workdir: expected the {name} of the study in '{path}', got "
                "another; choose another --workdir for other settings."
            )


def _entry(
    cell: Cell, dataset: Dataset, config: Config, protocol: Protocol
) -> dict[str, Any]:
    """Returns what a cell found, from its file or by training."""
    folder = Path(config.workdir)
    settings = dataclasses.replace(
        arm_config(cell.arm, config),
        seed=cell.seed,
        model=cell.network,
        workdir=str(folder / cell.arm / f"seed{cell.seed}"),
    )
    origin = made_by(settings, dataset) | {"protocol": protocol.as_json()}
    path = folder / "cells" / "-".join(map(str, cell))
    entry, _ = cached(path, origin, lambda: run_cell(dataset, settings, protocol))
    return cell._asdict() | {k: v for k, v in entry.items() if k != "lines"}


def run_cell(dataset: Dataset, config: Config, protocol: Protocol) -> Result:
    """Trains one network with snapshots, and compares them.

    Args:
        dataset: The data.
        config: The settings of the cell.
        protocol: What is compared.

    Returns:
        The entry: ``test_accuracy``, ``readings``, ``resolution``, and ``lines``, the
        amounts of every interval in every reading. No arrays.

    Raises:
        UserError: As for `train`, or if a snapshot is missing.
    """
    steps = len(dataset.train_images) // config.train_batch_size * config.epochs
    instants = protocol.instants(steps)
    folder = Path(config.workdir) / config.model / "snapshots"
    model = make_model(config.model, dataset.num_classes, config)
    writer = SnapshotWriter(model, dataset, config, folder, instants)
    done = train(
        model, dataset, config, config.workdir, name=config.model, callback=writer
    )
    schedule = make_schedule(config, total_steps=steps)
    times = np.asarray(effective_time(schedule, steps)) / (1 - config.momentum)
    snapshots = {step: read_snapshot(folder, step) for step in instants}
    ends = protocol.ends(steps)
    without = without_groups(
        {step: snapshots[step] for step in ends},
        num_images=config.batch_size * config.num_batches,
        num_groups=protocol.num_groups,
    )
    entry: dict[str, Any] = {"test_accuracy": done.test_accuracy, "readings": []}
    lines = []
    for width, grid in dict.fromkeys((r.width, r.grid) for r in protocol.readings):

        def compute(group: Any, width: float = width, grid: str = grid) -> Any:
            return law_of(group, times, ends, width=width, grid=grid)

        law = compute(snapshots)
        errors = image_errors(without, compute, protocol)
        lines.append({"width": width, "grid": grid, "intervals": law.lines})
        for form, products in law.products.items():
            reading = Reading(form, width, grid)
            if reading not in protocol.readings:
                continue
            found = statistics(products, min_edges=protocol.min_edges)
            found |= {"image_stderr": errors[form], "products": products}
            # The fits are those of the flux, the amount that is exact.
            more = law.numbers if form == "flux" else {}
            entry["readings"].append(reading._asdict() | found | more)
    entry["resolution"] = resolution_of(snapshots, protocol.looks(steps))
    return entry | {"lines": lines}, {}
