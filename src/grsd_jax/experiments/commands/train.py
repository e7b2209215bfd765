r"""Trains a network: ResNet-18, PlainNet-18 or one of any depth.

Writes to WORKDIR/MODEL: config.json, metrics.jsonl (one JSON object a line) and Orbax
checkpoints. A killed run resumes when the same command is given again, and loses at
most the steps since its last checkpoint.

The defaults (embedded textures, width 8, 3 epochs) are made for 2 CPU cores; the lines
of metrics.jsonl say how many seconds a step takes on the machine at hand.

Examples:
  grsd train --workdir=runs/quick
  grsd train --workdir=runs/cifar --dataset=cifar10 --data_dir=DATA \
      --width=16 --train_batch_size=128 --epochs=10 --schedule=cosine_decay_schedule
"""

from collections.abc import Mapping, Sequence
from typing import Any

from grsd_jax.experiments.commands import say_end
from grsd_jax.experiments.common import files, flags, records
from grsd_jax.experiments.common.config import TITLES, TRAINING_FLAGS, Config
from grsd_jax.experiments.common.data import load_dataset
from grsd_jax.experiments.common.networks import make_model
from grsd_jax.experiments.common.tables import Legend, number, with_legend
from grsd_jax.experiments.common.training import TrainResult, train

#: What the columns of the table mean.
LEGEND: Legend = (
    "Loss and accuracy: means over the steps of the last line of metrics.jsonl.",
    "Test accuracy: at the last step, over the whole test set.",
)


def main(config: Config) -> None:
    """Runs the command with these settings."""
    dataset = load_dataset(config)
    model = make_model(config.model, dataset.num_classes, config)
    result = train(model, dataset, config, config.workdir, name=config.model)
    steps = int(result.state.step)
    if result.resumed_from == steps:
        print(f"{config.model}: complete already, {steps} steps")
    elif result.resumed_from:
        print(f"{config.model}: {steps} steps, resumed from {result.resumed_from}")
    folder = result.checkpoint_dir.parent
    metrics = folder / "metrics.jsonl"
    with files.reading(metrics, "the metrics of a training"):
        text = _format_training(config.model, records.read_jsonl(metrics), result)
    print(text)
    places = metrics, result.checkpoint_dir
    then = ("grsd", "measure", config.workdir, f"--model={config.model}")
    say_end(*places, then=then)


def _format_training(
    name: str, metrics: Sequence[Mapping[str, Any]], result: TrainResult
) -> str:
    """Returns how a training ended, as a table with its legend."""
    last = metrics[-1] if metrics else {}
    rows = [
        ["model", "steps", "loss", "accuracy", "test accuracy", "seconds"],
        [
            TITLES[name],
            str(int(result.state.step)),
            number(last.get("loss")),
            number(last.get("accuracy"), ".4f"),
            number(result.test_accuracy, ".4f"),
            number(last.get("seconds"), ".1f"),
        ],
    ]
    return with_legend([rows], LEGEND)


def define() -> None:
    """Defines the command's flags."""
    flags.define_flags(only=TRAINING_FLAGS)
