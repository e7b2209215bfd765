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

from grsd_jax.experiments.common import flags
from grsd_jax.experiments.common.config import TRAINING_FLAGS, Config
from grsd_jax.experiments.common.data import load_dataset
from grsd_jax.experiments.common.networks import make_model
from grsd_jax.experiments.common.training import train


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
    print(f"{config.model}: test accuracy {result.test_accuracy:.4f}")
    print(f"{config.model}: checkpoints in {result.checkpoint_dir}")
    print(f"next: grsd measure {config.workdir} --model={config.model}")


def define() -> None:
    """Defines the command's flags."""
    flags.define_flags(only=TRAINING_FLAGS)
