"""The four conditions of a trained network, over the checkpoints of its run.

``conditions.json`` holds every number that the table and the figure page show.
"""

import itertools
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from grsd_jax import PathPoint, condition_report
from grsd_jax.conditions import (
    ConditionReport,
    ParameterBlocks,
    Thresholds,
    influence_profile,
    propagation_report,
)
from grsd_jax.experiments.common import records
from grsd_jax.experiments.common.checkpoints import Checkpoints
from grsd_jax.experiments.common.config import TRAINING_FIELDS, Config, UserError
from grsd_jax.experiments.common.data import Dataset, measured_batches
from grsd_jax.experiments.common.measurement import (
    PROVENANCE,
    header,
    made_by,
    measurement_entry,
    measurement_options,
    network_problem,
)
from grsd_jax.experiments.common.networks import (
    NETWORK_FIELDS,
    Weights,
    initial_weights,
    make_model,
    weights_template,
)
from grsd_jax.experiments.common.runs import (
    cached,
    check_same_run,
    progress_bar,
    workdir_lock,
)
from grsd_jax.experiments.common.training import train
from grsd_jax.experiments.conditions.analyse import layers_entry, report_entry
from grsd_jax.kernel import gradient_flow_direction
from grsd_jax.models import LinearStateSpace, depth_blocks
from grsd_jax.shells import LayerMeasurements, measure_layers

#: Training settings that the run in the workdir must share with the flags.
_SAME_RUN = ("dataset", "seed", "model", *NETWORK_FIELDS)

#: What the last point's measurement says of all of them.
_MEASURED = (
    "n",
    "num_pairs",
    "solver",
    "jacobian",
    "derivative",
    "reduction",
    "spectral_window",
    "step",
)

#: The tolerance of Proposition 2's range, as a share of its constant.
_INFLUENCE_SHARE = 0.1


class Options(NamedTuple):
    """What the measurement of the conditions takes beside `Config`.

    Attributes:
        thresholds: What the numbers are held against.
        num_probes: Random probes of the influence; None for the exact influence.
        num_points: Points of the path at most: the initialization, and checkpoints
            evenly spaced, the newest among them.
    """

    thresholds: Thresholds = Thresholds()
    num_probes: int | None = 16
    num_points: int = 5


def run_conditions(
    dataset: Dataset, config: Config, options: Options
) -> dict[str, Any]:
    """Measures the conditions over the checkpoints of a run, training one if need be.

    Without a run in the workdir, or with one under the same settings that was cut
    short, the network is trained first; a run that was trained otherwise (longer, say)
    is measured as it stands.

    The path begins at the initialization, which is rebuilt from the seed, with
    BatchNorm statistics gathered from training batches: the stored ones are then still
    those of no data. The direction is the gradient flow of the mean cross-entropy on
    the measured batches.

    Args:
        dataset: The data.
        config: The settings; ``model`` in ``workdir`` is measured.
        options: Thresholds and extents.

    Returns:
        The contents of ``conditions.json``, which is written.

    Raises:
        UserError: If the workdir holds another run, a checkpoint cannot be read, or a
            network is not finite there.
    """
    folder = Path(config.workdir) / config.model
    model = make_model(config.model, dataset.num_classes, config)
    measured_batches(dataset, config)  # complains before the training
    if starts_here(folder, config):
        train(model, dataset, config, config.workdir, name=config.model)
    network = {name: getattr(config, name) for name in _SAME_RUN}
    check_same_run(folder, network | {"data_fingerprint": dataset.fingerprint})
    steps = _spaced_steps(folder, options.num_points)
    about = {
        "options": options._asdict() | {"thresholds": options.thresholds._asdict()},
        "steps": [0, *steps],
    }
    origin = about | made_by(config, dataset)
    origin["training"] = records.read_json(folder / "config.json")
    with workdir_lock(folder):
        entry, _ = cached(
            folder / "measurements" / "conditions",
            origin,
            lambda: (_measure(model, dataset, config, options, steps), {}),
        )
        about |= header(config) | PROVENANCE
        about["data_fingerprint"] = dataset.fingerprint
        records.write_json(folder / "conditions.json", about | entry)
    return records.read_json(folder / "conditions.json")


def _measure(
    model: Any, dataset: Dataset, config: Config, options: Options, steps: list[int]
) -> dict[str, Any]:
    """Measures everything at the initialization and the given checkpoints."""
    started = time.monotonic()
    batches = measured_batches(dataset, config)
    points = []
    for step, weights in _path(model, dataset, config, steps):
        problem = network_problem(model, weights, batches, config)
        flow = gradient_flow_direction(problem, weights.params)
        points.append(PathPoint(float(step), problem, weights.params, flow))
    blocks = depth_blocks(model, points[0].params)
    report, layers = _measured(points, blocks, config, options)
    measurements = report.condition4.measurements
    for point, measured in zip(points, measurements, strict=True):
        if not measured.finite:
            raise UserError(
                f"checkpoint of {config.model}: expected finite parameters, errors and "
                f"products, got others at step {point.time:g}."
            )
    measured = measurement_entry(measurements[-1], config)
    return {
        "measured": {name: measured[name] for name in _MEASURED},
        "blocks": list(blocks.names),
        **report_entry(report),
        "layers": layers_entry(layers, blocks),
        "propagation": _propagation(model, points[-1], blocks),
        "seconds": round(time.monotonic() - started, 1),
    }


def _measured(
    points: list[PathPoint], blocks: ParameterBlocks, config: Config, options: Options
) -> tuple[ConditionReport, LayerMeasurements]:
    """Measures the conditions along the path, and the layers at its end."""
    key, layers_key = jax.random.split(jax.random.key(config.seed))
    last = points[-1]
    how = measurement_options(last.problem, last.params, config)
    del how["derivative"]  # the exact one
    with progress_bar(total=len(points) + 3, desc=config.model) as bar:
        pieces = itertools.count()

        def progress(text: str) -> None:
            """Counts the pieces before this one, which only begins."""
            bar.n = next(pieces)
            bar.set_description(f"{config.model}: {text}")

        report = condition_report(
            points,
            blocks,
            key=key,
            thresholds=options.thresholds,
            num_probes=options.num_probes,
            progress=progress,
            **how,
        )
        progress("every layer's own coupling")
        layers = measure_layers(
            last.problem,
            last.params,
            last.direction,
            key=layers_key,
            layer_of=blocks.block_of,
            window=how["window"],
            shells=how["shells"],
        )
        bar.update()
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


def _spaced_steps(folder: Path, num_points: int) -> list[int]:
    """Returns the steps of evenly spaced checkpoints, after the initialization."""
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        steps = checkpoints.all_steps()
    if not steps:
        raise UserError(f"'{folder}': expected checkpoints of a training, got none.")
    spaced = np.linspace(-1, len(steps) - 1, min(num_points - 1, len(steps)) + 1)
    return [steps[index] for index in spaced.round().astype(int).tolist() if index >= 0]


def _path(
    model: Any, dataset: Dataset, config: Config, steps: list[int]
) -> list[tuple[int, Weights]]:
    """Returns the weights at the initialization and at the checkpoints, by step."""
    path = [(0, initial_weights(model, dataset, config))]
    template = weights_template(model, dataset.train_images.shape[1:])
    folder = Path(config.workdir) / config.model / "checkpoints"
    with Checkpoints(folder, read_only=True) as checkpoints:
        for step in steps:
            path.append((step, checkpoints.restore(template, step=step)))
    return path


def _propagation(
    model: Any, point: PathPoint, blocks: ParameterBlocks
) -> dict[str, Any] | None:
    """Holds a state-space model's influence against Proposition 2; None for others.

    Of the squared error, for which the constant is known, at the last point. The
    influence of K batches is bounded by the mean of their squared constants, or by
    their sum if they are stacked.
    """
    if not isinstance(model, LinearStateSpace):
        return None
    profile = influence_profile(
        point.problem.replace(loss="squared"),
        point.params,
        point.direction,
        blocks,
        num_probes=None,
    )
    squares = [
        float(model.influence_constant(point.direction, images)) ** 2
        for images in point.problem.batches["image"]
    ]
    scale = len(squares) if point.problem.reduction == "mean" else 1
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
