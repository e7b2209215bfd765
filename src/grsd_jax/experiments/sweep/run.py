"""A sweep over networks: train each cell briefly, measure it, keep one row.

Every finished cell is a file of its own, named by the cell and holding a fingerprint of
all that went into it. A sweep that is started again takes such cells from there, so
that it goes on after a kill and does nothing twice. ``sweep.json`` and ``sweep.csv``
gather the rows of the grid, those that are there after every cell.
"""

import csv
import dataclasses
import math
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn

from grsd_jax import models
from grsd_jax._typing import PyTree
from grsd_jax.conditions.depth import (
    correlation_time,
    increment_statistics,
    state_increments,
)
from grsd_jax.experiments.common import records
from grsd_jax.experiments.common.config import UserError
from grsd_jax.experiments.common.data import Dataset, evaluation_batches
from grsd_jax.experiments.common.progress import progress_bar
from grsd_jax.experiments.common.steps import TrainState, init_state, train_step
from grsd_jax.experiments.common.training import evaluate
from grsd_jax.experiments.sweep.config import (
    Cell,
    SweepConfig,
    cell_fingerprint,
    cell_network,
    list_cells,
)
from grsd_jax.kernel.derivative import gradient_flow_direction
from grsd_jax.models.chains import linen_chain
from grsd_jax.shells.diagnostics import CouplingMeasurement
from grsd_jax.shells.measurement import measure_coupling

#: The columns of ``sweep.csv``, and the keys of each row of ``sweep.json``.
COLUMNS = (
    *Cell._fields,
    "status",
    "num_params",
    "train_loss",
    "test_accuracy",
    "num_resolved",
    "toeplitz_residual",
    "toeplitz_center",
    "toeplitz_literal",
    "slope",
    "slope_stderr",
    "r_squared",
    *(
        f"{moment}_{name}"
        for moment in ("initial", "trained")
        for name in (
            "increment_mean",
            "increment_variance",
            "variance_of_mean",
            "variance_ratio",
            "normal_distance",
            "wasserstein",
            "correlation_time",
        )
    ),
    "num_paths",
    "seconds",
)

Row = dict[str, Any]


def run_sweep(dataset: Dataset, config: SweepConfig) -> dict[str, Any]:
    """Runs the cells of the grid that are not there yet, and gathers all rows.

    Args:
        dataset: The data.
        config: The settings.

    Returns:
        The contents of ``sweep.json``: settings, environment, and one row per cell.

    Raises:
        UserError: If the folder cannot be written, or a setting does not fit.
    """
    folder = Path(config.workdir)
    cells = list_cells(config)
    for cell in cells:
        cell_network(cell, dataset.num_classes, config.rho)  # complain before working
    optimizer = optax.sgd(config.learning_rate, momentum=config.momentum)
    results: dict[str, Any] = {
        "config": dataclasses.asdict(config),
        "environment": records.environment(precision=config.precision),
        "data_fingerprint": dataset.fingerprint,
        "error_fn": "softmax_error",
        "direction": "minus the gradient of the mean cross-entropy, same batches",
        "derivative": "exact",
        "rows": [],
    }
    paths = {cell: folder / "cells" / f"{cell.name}.json" for cell in cells}
    marks = {
        cell: cell_fingerprint(cell, config, dataset.fingerprint) for cell in cells
    }
    rows = {cell: _finished(paths[cell], marks[cell]) for cell in cells}
    _write(folder, results, rows)
    with progress_bar(cells, desc="sweep", unit="cell") as progress:
        for cell in progress:
            progress.set_postfix_str(cell.name, refresh=False)
            if rows[cell] is None:
                rows[cell] = measure_cell(cell, dataset, config, optimizer)
                done = {"fingerprint": marks[cell], "row": rows[cell]}
                records.write_json(paths[cell], done)
                _write(folder, results, rows)
    return results


def _write(
    folder: Path, results: dict[str, Any], rows: Mapping[Cell, Row | None]
) -> None:
    """Writes both files with the rows that are there, so that a killed sweep shows."""
    results["rows"] = [row for row in rows.values() if row is not None]
    write_table(folder / "sweep.csv", results["rows"])
    records.write_json(folder / "sweep.json", results)


def measure_cell(
    cell: Cell,
    dataset: Dataset,
    config: SweepConfig,
    optimizer: optax.GradientTransformation,
) -> Row:
    """Trains and measures one network.

    Args:
        cell: The cell.
        dataset: The data.
        config: The settings.
        optimizer: The optimiser, one for the whole sweep so that nothing retraces.

    Returns:
        A value for each of `COLUMNS`; what is undefined is NaN. A network whose
        training left the finite numbers has the status ``"diverged"``.
    """
    started = time.monotonic()
    model = cell_network(cell, dataset.num_classes, config.rho)
    row: Row = dict.fromkeys(COLUMNS, math.nan) | cell._asdict()
    batches = evaluation_batches(
        dataset.test_images,
        dataset.test_labels,
        num_batches=config.num_batches,
        batch_size=config.batch_size,
        seed=cell.seed,
    )
    state = init_state(model, optimizer, dataset.train_images[0], seed=cell.seed)
    row["num_params"] = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    key = jax.random.key(cell.seed)
    images = batches["image"][0]

    def follow(moment: str) -> None:
        found = _depth_statistics(
            model, state.params, images, key, num_directions=config.num_directions
        )
        row.update({f"{moment}_{name}": float(x) for name, x in found.items()})

    row["num_paths"] = config.num_directions * config.batch_size
    follow("initial")
    state, row["train_loss"], finite = _train(
        model, optimizer, state, dataset, config, cell.seed
    )
    row["status"] = "done" if finite else "diverged"
    if finite:
        follow("trained")
        row |= _coupling(model, state.params, batches, config, key)
        row["test_accuracy"] = evaluate(
            model, state.params, {}, dataset.test_images, dataset.test_labels
        )
    return row | {"seconds": round(time.monotonic() - started, 2)}


def write_table(path: records.PathLike, rows: list[Row]) -> None:
    """Writes rows as a CSV of `COLUMNS`, whole or not at all; empty where undefined.

    Args:
        path: The file.
        rows: The rows.

    Raises:
        UserError: If the file cannot be written.
    """
    with (
        records.atomic_path(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows:
            shown = {k: "" if _undefined(v) else v for k, v in row.items()}
            writer.writerow(shown)


def _undefined(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _finished(path: Path, fingerprint: str) -> Row | None:
    """Returns the row of a cell that is there, if it was made by the same settings."""
    if not path.exists():
        return None
    found = records.read_json(path)
    same = isinstance(found, dict) and found.get("fingerprint") == fingerprint
    return found["row"] if same else None


def _train(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    dataset: Dataset,
    config: SweepConfig,
    seed: int,
) -> tuple[TrainState, float, bool]:
    """Trains for some steps; returns the state, the last loss, and if all was finite.

    Batches are drawn anew at every step; the order is a function of the seed.
    """
    if config.train_batch_size > len(dataset.train_images):
        raise UserError(
            f"--train_batch_size: expected at most {len(dataset.train_images)} "
            f"examples, got {config.train_batch_size}."
        )
    rng = np.random.default_rng(seed)
    loss, finite = math.nan, True
    for _ in range(config.steps):
        chosen = rng.choice(
            len(dataset.train_images), config.train_batch_size, replace=False
        )
        state, metrics = train_step(
            model,
            optimizer,
            state,
            dataset.train_images[chosen],
            dataset.train_labels[chosen],
        )
        loss, finite = float(metrics["loss"]), bool(metrics["finite"])
        if not finite:
            break
    return state, loss, finite


@partial(jax.jit, static_argnums=0, static_argnames="num_directions")
def _depth_statistics(
    model: Any,
    params: PyTree,
    images: jax.Array,
    key: jax.Array,
    *,
    num_directions: int,
) -> dict[str, jax.Array]:
    state, maps = linen_chain(model, params, images)
    found = state_increments(maps, state, key=key, num_directions=num_directions)
    statistics = increment_statistics(found.increments)
    return {
        "increment_mean": statistics.mean,
        "increment_variance": statistics.variance,
        "variance_of_mean": statistics.variance_of_mean,
        "variance_ratio": statistics.variance_ratio,
        "normal_distance": statistics.normal_distance,
        "wasserstein": statistics.wasserstein,
        "correlation_time": correlation_time(found.overlap),
    }


def _coupling(
    model: nn.Module,
    params: PyTree,
    batches: PyTree,
    config: SweepConfig,
    key: jax.Array,
) -> Row:
    """Measures the shell coupling at the trained parameters."""
    measured: CouplingMeasurement = jax.device_get(
        measure_coupling(
            models.linen_error_fn(model, {}),
            params,
            batches,
            gradient_flow_direction(models.linen_loss_fn(model, {}), params, batches),
            key=key,
            num_shells=config.num_shells,
            window=config.window,
            num_bootstrap=0,
        )
    )
    windows = np.where(
        measured.renormalized.degrees_of_freedom > 0,
        measured.renormalized.windows,
        np.nan,
    )
    center = windows[len(windows) // 3 : len(windows) - len(windows) // 3]
    known = center[np.isfinite(center)]
    return {
        "num_resolved": int(np.sum(measured.resolved)),
        "toeplitz_residual": float(measured.renormalized.residual),
        "toeplitz_center": float(np.mean(known)) if len(known) else math.nan,
        "toeplitz_literal": float(measured.literal.residual),
        "slope": float(measured.diagonal_fit.exponent),
        "slope_stderr": float(measured.diagonal_fit.exponent_stderr),
        "r_squared": float(measured.diagonal_fit.r_squared),
    }
