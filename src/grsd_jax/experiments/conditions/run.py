"""The four conditions of a trained network, over the checkpoints of its run.

The result is one dictionary for ``conditions.json``, which holds every number that the
table and the figure page show.
"""

import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from grsd_jax import models
from grsd_jax.conditions.locality import influence_profile
from grsd_jax.conditions.propagation import propagation_report
from grsd_jax.conditions.report import ConditionReport, PathPoint, condition_report
from grsd_jax.conditions.verdicts import Thresholds
from grsd_jax.errors import squared_error
from grsd_jax.experiments.common import records
from grsd_jax.experiments.common.checkpoints import Checkpoints
from grsd_jax.experiments.common.config import TRAINING_FIELDS, Config, UserError
from grsd_jax.experiments.common.data import Dataset, measured_batches
from grsd_jax.experiments.common.networks import NETWORK_FIELDS, make_model
from grsd_jax.experiments.common.progress import progress_bar
from grsd_jax.experiments.common.steps import make_optimizer, state_template
from grsd_jax.experiments.common.training import (
    check_same_run,
    train,
)
from grsd_jax.experiments.common.weights import Weights, initial_weights
from grsd_jax.experiments.conditions.results import layers_entry, report_entry
from grsd_jax.experiments.reproduce.pipeline import header, measurement_options
from grsd_jax.kernel.derivative import gradient_flow_direction
from grsd_jax.models.state_space import LinearStateSpace
from grsd_jax.parameter_blocks import ParameterBlocks
from grsd_jax.shells.layers import LayerMeasurements, measure_layers

#: Training settings that the run in the workdir must share with the flags.
_SAME_RUN = ("dataset", "seed", "model", *NETWORK_FIELDS)

#: The tolerance of Proposition 2's range, as a share of its constant.
_INFLUENCE_SHARE = 0.1


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
        "propagation": _propagation(model, points[-1], batches, blocks, config),
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
    with progress_bar(total=len(points) + 3, leave=False) as bar:

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


def _propagation(
    model: Any,
    point: PathPoint,
    batches: Any,
    blocks: ParameterBlocks,
    config: Config,
) -> dict[str, Any] | None:
    """Holds a state-space model's influence against Proposition 2; None for others.

    Of the squared error, for which the constant is known, at the last point. The
    influence of K batches is bounded by the mean of their squared constants, or by
    their sum if they are stacked.
    """
    if not isinstance(model, LinearStateSpace):
        return None
    profile = influence_profile(
        models.linen_error_fn(model, {}, error=squared_error),
        point.params,
        batches,
        point.direction,
        blocks,
        num_probes=None,
        reduction=measurement_options(config)["reduction"],
    )
    squares = [
        float(model.influence_constant(point.direction, images)) ** 2
        for images in batches["image"]
    ]
    scale = len(squares) if config.reduction == "mean" else 1
    constant = (sum(squares) / scale) ** 0.5
    report = propagation_report(
        profile.influence,
        constant=constant,
        rho=model.rho,
        epsilon=_INFLUENCE_SHARE * constant,
    )
    return report._asdict() | {
        "step": int(point.time),
        "rho": model.rho,
        "constant": constant,
        "error_fn": "squared_error",
    }
