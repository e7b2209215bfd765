"""The four conditions of a trained network, over the checkpoints of its run.

The result is one dictionary for ``conditions.json``, which holds every number that the
table and the figure page show.
"""

import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from grsd_jax import models
from grsd_jax.additive import LayerMeasurements, measure_layers
from grsd_jax.blocks import ParameterBlocks
from grsd_jax.conditions import ConditionReport, PathPoint, condition_report
from grsd_jax.derivative import gradient_flow_direction
from grsd_jax.experiments import records
from grsd_jax.experiments.checkpoints import Checkpoints
from grsd_jax.experiments.config import TRAINING_FIELDS, Config, UserError
from grsd_jax.experiments.data import Dataset, measured_batches
from grsd_jax.experiments.networks import NETWORK_FIELDS, make_model
from grsd_jax.experiments.pipeline import (
    header,
    measurement_entry,
    measurement_options,
)
from grsd_jax.experiments.steps import make_optimizer, state_template
from grsd_jax.experiments.tables import aligned
from grsd_jax.experiments.training import (
    check_same_run,
    train,
)
from grsd_jax.experiments.weights import Weights, initial_weights
from grsd_jax.verdicts import Thresholds, Verdict

#: Training settings that the run in the workdir must share with the flags.
_SAME_RUN = ("dataset", "seed", "model", *NETWORK_FIELDS)

TITLES = {
    "condition1": "1 locality",
    "condition2": "2 incoherence",
    "condition3": "3 stability",
    "condition4": "4 log-shift invariance",
}


class Options(NamedTuple):
    """What the measurement of the conditions takes beside `Config`.

    Attributes:
        thresholds: What the numbers are held against.
        num_probes: Random probes of the influence; None for the exact influence.
        num_points: Points of the path at most: the initialisation, and checkpoints
            evenly spaced, the newest among them.
        method: Of `block_coherence`.
    """

    thresholds: Thresholds = Thresholds()
    num_probes: int | None = 16
    num_points: int = 5
    method: str = "auto"


def measure_conditions(
    dataset: Dataset, config: Config, options: Options
) -> dict[str, Any]:
    """Measures the conditions over the checkpoints of a run, training one if need be.

    Without a run in the workdir, or with one under the same settings that was cut
    short, the network is trained first; a run that was trained otherwise (longer, say)
    is measured as it stands.

    The path begins at the initialisation, which is made anew from the seed, with
    BatchNorm statistics gathered from training batches: the stored ones are then still
    those of no data. The direction is the gradient flow of the mean cross-entropy on
    the measured batches.

    Args:
        dataset: The data.
        config: The settings; ``model`` in ``workdir`` is measured.
        options: Thresholds and extents.

    Returns:
        The contents of ``conditions.json``.

    Raises:
        UserError: If the workdir holds another run, a checkpoint cannot be read, or a
            network is not finite there.
    """
    started = time.monotonic()
    folder = Path(config.workdir) / config.model
    model = make_model(config.model, dataset.num_classes, config)
    batches = measured_batches(dataset, config)  # complains before the training
    if starts_here(folder, config):
        train(model, dataset, config, config.workdir, name=config.model)
    network = {name: getattr(config, name) for name in _SAME_RUN}
    check_same_run(folder, network | {"data_fingerprint": dataset.fingerprint})
    points = [
        _point(model, step, weights, batches)
        for step, weights in _path(model, dataset, config, folder, options.num_points)
    ]
    blocks = models.depth_blocks(model, points[0].params)
    report, layers = _measured(points, batches, blocks, config, options)
    finite = [bool(m.finite) for m in report.condition4.measurements]
    if not all(finite):
        raise UserError(
            f"checkpoint of {config.model}: expected finite parameters, errors and "
            f"products, got others at step {points[finite.index(False)].time:g}."
        )
    return header(config) | {
        "options": options._asdict() | {"thresholds": options.thresholds._asdict()},
        "data_fingerprint": dataset.fingerprint,
        "error_fn": "softmax_error",
        "direction": "minus the gradient of the mean cross-entropy, same batches",
        "blocks": list(blocks.names),
        "steps": [int(step) for step in report.times],
        **report_entry(report, config),
        "layers": layers_entry(layers, blocks, config),
        "seconds": round(time.monotonic() - started, 1),
    }


def _measured(
    points: list[PathPoint],
    batches: Any,
    blocks: ParameterBlocks,
    config: Config,
    options: Options,
) -> tuple[ConditionReport, LayerMeasurements]:
    """Measures the conditions along the path, and the layers at its end."""
    key, layers_key = jax.random.split(jax.random.key(config.seed))
    shells = {"num_shells": config.num_shells, "window": config.window}
    coupling = measurement_options(config)
    reduction = coupling.pop("reduction")
    with tqdm(total=len(points) + 3, disable=None, leave=False) as bar:

        def progress(text: str) -> None:
            bar.set_description(text, refresh=True)
            bar.update()

        report = condition_report(
            points,
            batches,
            blocks,
            key=key,
            thresholds=options.thresholds,
            reduction=reduction,
            num_probes=options.num_probes,
            coherence_options={"method": options.method},
            coupling_options=coupling | shells,
            progress=progress,
        )
        progress("every layer's own coupling")
        last = points[-1]
        layers = measure_layers(
            last.error_fn,
            last.params,
            batches,
            last.direction,
            key=layers_key,
            layer_of=blocks.block_of,
            reduction=reduction,
            **shells,
        )
    return report, layers


def starts_here(folder: Path, config: Config) -> bool:
    """Whether the run is to be started, or gone on with, under these settings.

    Args:
        folder: The run's folder.
        config: The settings.

    Returns:
        False for a run under other settings, which is measured as it stands.
    """
    path = folder / "config.json"
    if not path.exists():
        return True
    written = records.read_json(path)
    return all(written.get(name) == getattr(config, name) for name in TRAINING_FIELDS)


def _path(
    model: Any, dataset: Dataset, config: Config, folder: Path, num_points: int
) -> list[tuple[int, Weights]]:
    """Returns the initialisation and evenly spaced checkpoints, by step."""
    path = [(0, initial_weights(model, dataset, config))]
    optimizer = make_optimizer(config, total_steps=1)
    template = state_template(model, optimizer, dataset.train_images[0])
    wanted = {"params": template.params, "batch_stats": template.batch_stats}
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        steps = checkpoints.all_steps()
        if not steps:
            checkpoints.restore(wanted)  # says what is missing
        # Evenly spaced, the initialisation standing before the first checkpoint.
        spaced = np.linspace(-1, len(steps) - 1, min(num_points - 1, len(steps)) + 1)
        for index in spaced.round().astype(int)[1:].tolist():
            loaded = checkpoints.restore(wanted, step=steps[index])
            weights = Weights(loaded["params"], loaded["batch_stats"])
            path.append((steps[index], weights))
    return path


def _point(model: Any, step: int, weights: Weights, batches: Any) -> PathPoint:
    state = {"batch_stats": weights.batch_stats}
    loss_fn = models.linen_loss_fn(model, state)
    return PathPoint(
        float(step),
        models.linen_error_fn(model, state),
        weights.params,
        gradient_flow_direction(loss_fn, weights.params, batches),
    )


def report_entry(report: ConditionReport, config: Config) -> dict[str, Any]:
    """Returns the four conditions as ``conditions.json`` holds them.

    Args:
        report: The report.
        config: The settings, for the seed and the window.

    Returns:
        ``condition1`` to ``condition4``, each with its ``verdict``.
    """
    locality, incoherence = report.condition1, report.condition2
    stability, invariance = report.condition3, report.condition4
    return {
        "condition1": _verdict(locality.verdict)
        | {
            "steps": [int(step) for step in locality.times],
            "influence": [profile.influence for profile in locality.profiles],
            "stderr": [profile.stderr for profile in locality.profiles],
            "num_probes": locality.profiles[0].num_probes,
            "share_by_distance": locality.shares,
            "bands": locality.bands,
        },
        "condition2": _verdict(incoherence.verdict)
        | {
            name: getattr(incoherence.coherence, name)
            for name in (
                "products",
                "norms",
                "coherence",
                "residuals",
                "converged",
                "num_iterations",
                "profile",
                "tail_sum",
            )
        }
        | {
            "flagged": [
                [report.blocks.names[i], report.blocks.names[j], value]
                for i, j, value in incoherence.flagged
            ]
        },
        "condition3": _verdict(stability.verdict)
        | {
            "norms": [found._asdict() for found in stability.norms],
            "leading_drift": [found._asdict() for found in stability.leading_drift],
            "shell_drift": stability.shell_drift._asdict(),
            "lipschitz": stability.lipschitz,
        },
        "condition4": _verdict(invariance.verdict)
        | {
            "central_residuals": invariance.central_residuals,
            "measurements": [
                measurement_entry(measured, config)
                for measured in invariance.measurements
            ],
        },
    }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    checks = [check._asdict() | {"holds": check.holds} for check in verdict.checks]
    return {"verdict": {"holds": verdict.holds, "checks": checks}}


def layers_entry(
    layers: LayerMeasurements, blocks: ParameterBlocks, config: Config
) -> dict[str, Any]:
    """Returns the additive structure as ``conditions.json`` holds it.

    Args:
        layers: The layers' measurements, by the names of the blocks.
        blocks: The partition.
        config: The settings, for the seed and the window.

    Returns:
        An entry for each block in order of depth, for the total, and the average.
    """
    return {
        "blocks": [
            measurement_entry(layers.layers[name], config) | {"name": name}
            for name in blocks.names
        ],
        "total": measurement_entry(layers.total, config),
        "depth_average": {
            "coupling": layers.average.coupling.matrix,
            "mask": layers.average.coupling.mask,
            "residual": layers.average.residual,
            "windows": layers.average.windows,
        },
    }


def format_conditions(found: dict[str, Any]) -> str:
    """Writes the verdicts as a table, one row for each check.

    Args:
        found: The contents of ``conditions.json``.

    Returns:
        The table; what is undefined is "n/a".
    """
    rows = [["condition", "check", "number", "threshold", "verdict"]]
    for name, title in TITLES.items():
        for check in found[name]["verdict"]["checks"]:
            number = check["number"]
            defined = number is not None and np.isfinite(number)
            rows.append(
                [
                    title,
                    check["name"],
                    f"{number:.3g}" if defined else "n/a",
                    f"{check['relation']} {check['threshold']:.3g}",
                    "holds" if check["holds"] else "fails",
                ]
            )
    return aligned(rows)


def write_conditions(folder: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Writes ``conditions.json``, whole or not at all.

    Args:
        folder: The folder.
        found: The contents.

    Returns:
        The contents as they are read back, for the table and the figures.

    Raises:
        UserError: If the folder cannot be written.
    """
    records.write_json(folder / "conditions.json", found)
    return records.read_json(folder / "conditions.json")
