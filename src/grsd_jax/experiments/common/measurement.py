"""The measurement of one network, and what files hold of it."""

import dataclasses
import shlex
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grsd_jax import Binning, Derivative, Lanczos, Problem, Window, measure_coupling
from grsd_jax._typing import PyTree
from grsd_jax.experiments.common.config import PROBE_FIELDS, Config, Settings, UserError
from grsd_jax.experiments.common.data import Dataset
from grsd_jax.experiments.common.networks import Weights
from grsd_jax.experiments.common.quantities import whole_residual, window_residuals
from grsd_jax.experiments.common.runs import environment, progress_bar, writes
from grsd_jax.kernel import choose_solver, default_step, shard_batches
from grsd_jax.kernel.solver import COLUMNS_A_PAIR
from grsd_jax.linalg import default_floor
from grsd_jax.models import linen_outputs
from grsd_jax.shells import (
    CouplingMeasurement,
    PowerLawFit,
    ToeplitzDiagnostics,
    toeplitz_degrees_of_freedom,
)

#: The step of every difference.
STEP = default_step(np.float32)

#: Settings of a `Config` that do not change what one measurement computes.
UNRELATED = (
    "data_dir",
    "workdir",
    "protocol",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    *PROBE_FIELDS,
)

Arrays = dict[str, np.ndarray]


#: The error and the direction of every measurement, as its results name them.
PROVENANCE = {
    "error_fn": "softmax_error",
    "direction": "minus the gradient of the mean cross-entropy, same batches",
}


def header(config: Any) -> dict[str, Any]:
    """Returns what every file of results begins with: how it was made.

    Args:
        config: The settings, a dataclass with ``precision``.

    Returns:
        ``{"command": ..., "config": ..., "environment": ...}``.
    """
    return {
        "command": f"{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}".rstrip(),
        "config": dataclasses.asdict(config),
        "environment": environment(precision=config.precision),
    }


def made_by(
    config: Settings, dataset: Dataset, without: Collection[str] = UNRELATED
) -> dict[str, Any]:
    """Returns all that a measurement depends on, for `runs.cached`.

    Args:
        config: The settings.
        dataset: The data.
        without: The settings that do not change what is computed.

    Returns:
        The other settings, the data and the environment.
    """
    settings = dataclasses.asdict(config)
    return {
        "settings": {k: v for k, v in settings.items() if k not in without},
        "data_fingerprint": dataset.fingerprint,
        "environment": environment(precision=config.precision),
    }


def network_problem(
    model: nn.Module, weights: Weights, batches: PyTree, config: Config
) -> Problem:
    """Returns the problem of a network on given batches: softmax cross-entropy.

    Args:
        model: The linen module.
        weights: Its weights, for the BatchNorm statistics.
        batches: ``{"image": [K, N, ...], "label": [K, N]}``.
        config: The settings, for the reduction.

    Returns:
        The problem.
    """
    outputs_fn = linen_outputs(model, {"batch_stats": weights.batch_stats})
    return Problem(outputs_fn, batches, reduction=config.reduction)


def measurement_options(
    problem: Problem, params: PyTree, config: Config
) -> dict[str, Any]:
    """Returns the settings as `measure_coupling` takes them.

    Args:
        problem: The problem, for the choice of the solver.
        params: Parameters, for their shapes.
        config: The settings.

    Returns:
        Keyword arguments.
    """
    window = Window(config.num_pairs, floor=default_floor(np.float32))
    solver: str | Lanczos = config.solver
    if solver == "auto":
        columns = min(COLUMNS_A_PAIR * config.num_pairs, problem.dimension(params))
        solver = choose_solver(problem, params, num_columns=columns)
    if solver == "lanczos":
        solver = Lanczos(config.block_size)
    return {
        "solver": solver,
        "window": window,
        "shells": Binning(config.num_shells, config.window),
        "derivative": Derivative(config.derivative, STEP, cross_checked=True),
    }


def measure_network(
    title: str,
    model: nn.Module,
    weights: Weights,
    batches: PyTree,
    config: Config,
    *,
    mesh: Mesh | None = None,
) -> CouplingMeasurement:
    """Measures a network along its gradient flow; says how, and shows progress.

    Args:
        title: What the line and the bar of progress call it.
        model: The linen module.
        weights: Its weights.
        batches: ``{"image": [K, N, ...], "label": [K, N]}``.
        config: The settings.
        mesh: Devices that share the examples, by Lanczos; one device if None.

    Returns:
        The measurement, on the host but for the vectors.

    Raises:
        UserError: If the network is not finite there.
    """
    if mesh is not None:
        weights = jax.device_put(weights, NamedSharding(mesh, PartitionSpec()))
        batches = shard_batches(batches, mesh)
        if config.solver == "auto":
            config = dataclasses.replace(config, solver="lanczos")
    problem = network_problem(model, weights, batches, config)
    options = measurement_options(problem, weights.params, config)
    if writes():
        print(f"{title}: {_how(problem.dimension(weights.params), options, mesh)}")
    with progress_bar(desc=title, unit="step") as bar:

        def progress(done: int) -> None:
            bar.update(done - bar.n)

        measured = measure_coupling(
            problem,
            weights.params,
            key=jax.random.key(config.seed),
            progress=progress,
            **options,
        )
        measured = _fetched(measured)
        bar.total = bar.n  # how many steps convergence takes is known only now
        bar.leave = bar.n > 0  # the dense solver takes none
    if not measured.finite:
        raise UserError(
            f"checkpoint of {title}: expected finite parameters, errors and products, "
            "got values that are not finite."
        )
    return measured


def _how(size: int, options: Mapping[str, Any], mesh: Mesh | None) -> str:
    """Says the dimension, the window and the solver of a measurement."""
    name = "lanczos" if isinstance(options["solver"], Lanczos) else "dense"
    pairs = min(options["window"].num_pairs, size)
    shared = "" if mesh is None else f", shared by {mesh.size} devices"
    return f"n = {size}, leading {pairs} pairs, {name}{shared}"


def _fetched(measured: CouplingMeasurement) -> CouplingMeasurement:
    """Brings a measurement to the host, except the vectors, which no file holds."""
    # They may lie on the devices of several processes; all the rest is on each.
    rest = dataclasses.replace(measured, vectors=measured.values)
    return dataclasses.replace(jax.device_get(rest), vectors=measured.vectors)


def measurement_entry(measured: CouplingMeasurement, config: Config) -> dict[str, Any]:
    """Returns the scalars of a measurement, as ``results.json`` holds them.

    Args:
        measured: The measurement.
        config: The settings, for the seed and the window.

    Returns:
        Its entry.
    """
    edges, window = np.asarray(measured.shells.edges), config.window
    size = measured.vectors.shape[0]
    return {
        "n": size,
        "num_pairs": min(measured.window.num_pairs or size, size),
        "num_resolved": int(np.sum(measured.resolved)),
        "num_missing": int(measured.num_missing),
        "unresolved_share": float(measured.unresolved_share),
        "complete": None if measured.complete is None else bool(measured.complete),
        "solver": measured.solver,
        "jacobian": measured.jacobian,
        "derivative": measured.derivative,
        "reduction": measured.reduction,
        "seed": config.seed,
        "spectral_window": dataclasses.asdict(measured.window),
        "step": STEP,
        "diagonal_fit": _fit(measured.diagonal_fit),
        "shell_fit": _fit(measured.shell_fit),
        "toeplitz": {
            "literal": _toeplitz(measured.literal, edges, window),
            "renormalized": _toeplitz(measured.renormalized, edges, window),
        },
        "secant_disagreement": float(measured.secant_disagreement),
        "operator_disagreement": float(measured.operator_disagreement),
        "lambda_max": float(measured.values[0]),
    }


def measurement_arrays(measured: CouplingMeasurement) -> Arrays:
    """Returns the arrays of a measurement, as ``arrays.npz`` holds them.

    Args:
        measured: The measurement.

    Returns:
        Its arrays by name.
    """
    literal, renormalized = measured.literal, measured.renormalized
    arrays = {
        "values": measured.values,
        "residuals": measured.residuals,
        "resolved": measured.resolved,
        "coupling": measured.coupling,
        "coupling_diagonal": np.abs(np.diag(measured.coupling)),
        "shell_edges": measured.shells.edges,
        "shell_centers": measured.shells.centers,
        "shell_counts": measured.shells.counts,
        "literal": literal.coupling.matrix,
        "literal_mask": literal.coupling.mask,
        "renormalized": renormalized.coupling.matrix,
        "renormalized_mask": renormalized.coupling.mask,
    }
    return {name: np.asarray(array) for name, array in arrays.items()}


def _fit(fit: PowerLawFit) -> dict[str, Any]:
    interval = fit.interval if fit.interval is not None else np.full(2, np.nan)
    return {
        "exponent": float(fit.exponent),
        "prefactor": float(fit.prefactor),
        "r_squared": float(fit.r_squared),
        "exponent_stderr": float(fit.exponent_stderr),
        "interval": [float(end) for end in interval],
        "num_points": int(fit.num_points),
    }


def _toeplitz(
    diagnostics: ToeplitzDiagnostics, edges: np.ndarray, window: int
) -> dict[str, Any]:
    """Returns the residuals; one that is zero by construction is NaN, a file's null."""
    residuals = window_residuals(diagnostics)
    last = len(residuals) - 1
    windows = [
        {
            "start": start,
            "stop": start + window,
            "lambda_center": float(np.sqrt(edges[start] * edges[start + window])),
            "position": start / last if last else 0.5,
            "residual": float(residual),
            "degrees_of_freedom": int(diagnostics.degrees_of_freedom[start]),
        }
        for start, residual in enumerate(residuals)
    ]
    return {
        "residual": whole_residual(diagnostics),
        "degrees_of_freedom": int(
            toeplitz_degrees_of_freedom(diagnostics.coupling.mask)
        ),
        "windows": windows,
    }
