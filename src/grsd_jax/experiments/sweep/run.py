"""Trains every network of a grid for some steps, measures it, and keeps one row.

``sweep.csv`` gathers the rows, those that are there after every cell; ``sweep.json``
says how they were made.
"""

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn

from grsd_jax import Binning, Problem, Window, measure_coupling
from grsd_jax._typing import PyTree
from grsd_jax.conditions import (
    correlation_time,
    increment_statistics,
    state_increments,
)
from grsd_jax.experiments.common import files, records
from grsd_jax.experiments.common.config import UserError
from grsd_jax.experiments.common.data import Dataset, evaluation_batches
from grsd_jax.experiments.common.measurement import PROVENANCE, header, made_by
from grsd_jax.experiments.common.networks import Weights, check_weights, init_weights
from grsd_jax.experiments.common.quantities import coupling_quantities
from grsd_jax.experiments.common.runs import cached, progress_bar
from grsd_jax.experiments.common.sizes import check_fits, check_measurement
from grsd_jax.experiments.common.training import (
    TrainState,
    evaluate,
    init_state,
    train_step,
)
from grsd_jax.experiments.sweep.analyse import (
    COLUMNS,
    COUPLING,
    ROWS_CHECKSUM,
    Row,
    write_rows,
)
from grsd_jax.experiments.sweep.config import (
    Cell,
    SweepConfig,
    cell_network,
    list_cells,
)
from grsd_jax.models import linen_chain, linen_outputs

#: Settings that say where and which cells, not what one cell computes.
_GRID = {
    "data_dir",
    "workdir",
    "models",
    "depths",
    "widths",
    "activations",
    "branch_scales",
    "seeds",
}


def run_sweep(dataset: Dataset, config: SweepConfig) -> list[Row]:
    """Runs the cells of the grid that are not there yet, and gathers all rows.

    Args:
        dataset: The data.
        config: The settings.

    Returns:
        One row per cell, as ``sweep.csv`` holds them.

    Raises:
        UserError: If the folder cannot be written, or a setting does not fit.
    """
    folder = Path(config.workdir)
    cells = list_cells(config)
    _check(cells, dataset, config)  # complains before working
    about = header(config) | PROVENANCE | {"data_fingerprint": dataset.fingerprint}
    origin = made_by(config, dataset, without=_GRID)
    optimizer = optax.sgd(config.learning_rate, momentum=config.momentum)
    rows: list[Row] = []
    with progress_bar(cells, desc="sweep", unit="cell") as progress:
        for cell in progress:
            progress.set_postfix_str(cell.name, refresh=False)
            row, _ = cached(
                folder / "cells" / cell.name,
                origin | {"cell": cell._asdict()},
                lambda cell=cell: (measure_cell(cell, dataset, config, optimizer), {}),
            )
            rows.append(row)
            write_rows(folder / "sweep.csv", rows)
            about[ROWS_CHECKSUM] = files.checksum(folder / "sweep.csv")
            records.write_json(folder / "sweep.json", about)
    return rows


def _check(cells: list[Cell], dataset: Dataset, config: SweepConfig) -> None:
    """Raises UserError if a network or its measurement cannot be made."""
    check_measurement(
        config, config.batch_size * config.num_batches * dataset.num_classes
    )
    if config.train_batch_size > len(dataset.train_images):
        raise UserError(
            f"--train_batch_size: expected at most {len(dataset.train_images)} "
            f"examples, got {config.train_batch_size}."
        )
    for cell in cells:
        network = cell_network(cell, dataset.num_classes, config.rho)
        check_weights(network, dataset.train_images.shape[1:])
        paths = 4 * config.num_directions * config.batch_size * cell.width
        check_fits("--num_directions", config.num_directions, "directions", paths)


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
        optimizer: The optimizer, one for the whole sweep so that nothing retraces.

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
    start = init_weights(model, dataset.train_images.shape[1:], cell.seed)
    state = init_state(start, optimizer)
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
            model, Weights(state.params, {}), dataset.test_images, dataset.test_labels
        )
    return row | {"seconds": round(time.monotonic() - started, 2)}


def _train(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    dataset: Dataset,
    config: SweepConfig,
    seed: int,
) -> tuple[TrainState, float, bool]:
    """Trains for some steps; returns the state, the last loss, and if all was finite.

    Batches are drawn again at every step; the order is a function of the seed.
    """
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
    problem = Problem(linen_outputs(model, {}), batches)
    shells = Binning(config.num_shells, config.window, num_bootstrap=0)
    everything = Window(num_pairs=None)
    measured = measure_coupling(
        problem, params, key=key, window=everything, shells=shells
    )
    found = coupling_quantities(jax.device_get(measured))
    return {name: found[name] for name in COUPLING}
