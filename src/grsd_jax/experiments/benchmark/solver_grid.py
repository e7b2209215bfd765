"""The choice of the solver against measurement, on a grid of problems.

Each point is one measurement by both solvers, on random inputs and weights: a network,
its examples N (and so n), its width (and so P) and the Krylov dimension r. The choice
is good where the time of the chosen solver is near that of the faster one.
"""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from grsd_jax import models
from grsd_jax._typing import ErrorFn, PyTree
from grsd_jax.experiments.benchmark.run import make_problem
from grsd_jax.experiments.common.config import Config
from grsd_jax.experiments.reproduce import figures, tables
from grsd_jax.kernel.derivative import gradient_flow_direction
from grsd_jax.kernel.solver import choose_solver, estimate_measurement
from grsd_jax.shells.measurement import measure_coupling

_BLOCK = 8
_CLASSES = 10
_SOLVERS = ("dense", "lanczos")

#: A fast solver is timed again until this many seconds have gone by.
_SECONDS = 1.0


class Point(NamedTuple):
    """One problem of the grid.

    Attributes:
        network: ``"mlp"`` or ``"resnet18"``.
        width: Hidden units, or channels of the first stage.
        num_examples: N; the error dimension is ``n = 10 N``.
        num_columns: The Krylov dimension r.
        jacobian: ``"plain"`` or ``"factored"``.
    """

    network: str
    width: int
    num_examples: int
    num_columns: int
    jacobian: str


def grid() -> list[Point]:
    """Returns the points, those of one network and size after each other.

    Returns:
        The grid; it straddles the crossing of the two solvers' times.
    """
    sizes = [("mlp", w, n) for w in (32, 256) for n in (16, 64, 160)]
    sizes += [("resnet18", w, n) for w, n in ((2, 16), (2, 48), (6, 16), (8, 64))]
    return [
        Point(*size, columns, jacobian)
        for size in sizes
        for jacobian in ("factored", "plain")
        for columns in (16, 48, 144)
        if columns < size[2] * _CLASSES
    ]


class _MLP(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = nn.gelu(nn.Dense(self.width)(x))
        return nn.Dense(_CLASSES)(x)


def measure_point(point: Point) -> dict[str, Any]:
    """Times both solvers on one point, compiled and warm.

    Args:
        point: The point.

    Returns:
        The point's fields, n and P, each solver's ``seconds`` (minimum of the repeats),
        and what `estimate_measurement` and `choose_solver` say of it.
    """
    error_fn, params, batches, direction = _problem(point)
    options: dict[str, Any] = {"jacobian": point.jacobian}
    row: dict[str, Any] = point._asdict() | {
        "n": point.num_examples * _CLASSES,
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(params)),
        **predict_point(point),
    }
    for solver in _SOLVERS:
        options |= {"solver": solver, "block_size": _BLOCK, "num_shells": 8}
        run = partial(
            measure_coupling,
            error_fn,
            params,
            batches,
            direction,
            key=jax.random.key(0),
            num_steps=point.num_columns // _BLOCK,
            num_bootstrap=0,
            **options,
        )
        row[f"{solver}_seconds"] = _timed(run)
    return row


def predict_point(point: Point) -> dict[str, Any]:
    """Estimates both solvers on one point, and chooses, from shapes alone.

    Args:
        point: The point.

    Returns:
        What `choose_solver` says, ``chosen``, and each solver's ``operations`` by
        `estimate_measurement`.
    """
    error_fn, params, batches, _ = _problem(point)
    options: dict[str, Any] = {
        "num_columns": point.num_columns,
        "block_size": _BLOCK,
        "jacobian": point.jacobian,
    }
    found = estimate_measurement(error_fn, params, batches, **options)
    return {
        "chosen": choose_solver(error_fn, params, batches, **options),
        **{f"{solver}_operations": found[solver].operations for solver in _SOLVERS},
    }


def loss_of_choice(row: Mapping[str, Any]) -> float:
    """Returns the chosen solver's time over that of the faster one, 1 at best.

    Args:
        row: What `measure_point` returned.

    Returns:
        The ratio.
    """
    seconds = {solver: row[f"{solver}_seconds"] for solver in _SOLVERS}
    return seconds[row["chosen"]] / min(seconds.values())


def format_grid(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats the grid as a table.

    Args:
        rows: What `measure_point` returned of each point.

    Returns:
        Lines with aligned columns.
    """
    head = ["network", "width", "jacobian", "n", "P", "r"]
    head += ["dense s", "lanczos s", "ratio", "predicted", "chosen", "over best"]
    body = [
        [
            row["network"],
            str(row["width"]),
            row["jacobian"],
            str(row["n"]),
            str(row["num_params"]),
            str(row["num_columns"]),
            f"{row['dense_seconds']:.3f}",
            f"{row['lanczos_seconds']:.3f}",
            f"{row['dense_seconds'] / row['lanczos_seconds']:.2f}",
            f"{row['dense_operations'] / row['lanczos_operations']:.2f}",
            row["chosen"],
            f"{loss_of_choice(row):.2f}",
        ]
        for row in rows
    ]
    return tables.aligned([head, *body])


def draw_grid(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draws the predicted against the measured ratio of the two solvers' times.

    Args:
        rows: What `measure_point` returned of each point.
        folder: Where ``solver_grid.png`` and ``.pdf`` go.

    Returns:
        The files.
    """
    return figures.save_figures({"solver_grid": lambda: _drawing(rows)}, folder)


def _drawing(rows: Sequence[Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(figures.PAGE_WIDTH / 2, figures.PAGE_WIDTH / 2))
    axis = figure.add_subplot(
        xscale="log",
        yscale="log",
        xlabel="measured time, dense over Lanczos",
        ylabel="predicted operations, dense over Lanczos",
    )
    looks = {"factored": ("#0072B2", "o"), "plain": ("#D55E00", "s")}
    for jacobian, (color, marker) in looks.items():
        for network, fill in (("mlp", "none"), ("resnet18", color)):
            picked = [
                row
                for row in rows
                if (row["jacobian"], row["network"]) == (jacobian, network)
            ]
            axis.scatter(
                [row["dense_seconds"] / row["lanczos_seconds"] for row in picked],
                [row["dense_operations"] / row["lanczos_operations"] for row in picked],
                s=14,
                marker=marker,
                facecolors=fill,
                edgecolors=color,
                linewidths=0.7,
                label=f"{network}, {jacobian}",
            )
    axis.axhline(1, color="0.65", linewidth=0.6)
    axis.axvspan(1 / 1.15, 1.15, color="0.9", linewidth=0)
    axis.legend()
    return figure


def _problem(point: Point) -> tuple[ErrorFn, PyTree, PyTree, PyTree]:
    """Returns ``(error_fn, params, batches, direction)``."""
    if point.network == "resnet18":
        config = Config(width=point.width, batch_size=point.num_examples, num_batches=1)
        made = make_problem(config)
        return made.error_fn, made.params, made.batches, made.direction
    rng = np.random.default_rng(0)
    leading = (1, point.num_examples)
    batches = {
        "image": jnp.asarray(rng.normal(size=(*leading, 64)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, _CLASSES, leading), jnp.int32),
    }
    model = _MLP(point.width)
    params = model.init(jax.random.key(0), batches["image"][0])["params"]
    loss_fn = models.linen_loss_fn(model, {})
    direction = gradient_flow_direction(loss_fn, params, batches)
    return models.linen_error_fn(model, {}), params, batches, direction


def _timed(run: Any) -> float:
    """Returns the least time of several runs, after one that compiles."""
    jax.block_until_ready(run())
    times: list[float] = []
    while not times or (sum(times) < _SECONDS and len(times) < 10):
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return min(times)
