r"""Trains networks with the probe of the shell dynamics on, and draws what it records.

Every --record_every steps, one JSON line goes to WORKDIR/MODEL/records.jsonl: what the
shells of the spectrum of M = J J^T lost since the line before, what moved between them,
the flux over their edges with its error, its velocity beside the counting velocity, and
what the record cost. --over=1,4 adds lines for the first 1 and 4 steps after each. When
all networks are trained, WORKDIR/results.json and WORKDIR/figures (PNG and PDF) are
written. A killed run resumes when the same command is given again, and loses no record.

With --optimizer=sgd the time between records is the sum of learning rate over
(1 - momentum); for adamw and muon it is measured by gradients of the loss at both ends.

The defaults take an embedded data set of textures, and are made for 2 CPU cores.

Examples:
  grsd track
  grsd track --workdir=runs/track_mlp --models=mlp,resmlp --over=1,4
  grsd track --dataset=cifar10 --data_dir=DATA --workdir=runs/track_cifar \
      --train_batch_size=128 --epochs=3 --record_every=100 --over=1,10
"""

import sys
from pathlib import Path

from absl import flags as absl_flags

from grsd_jax.experiments.commands import say_end
from grsd_jax.experiments.common import flags, records
from grsd_jax.experiments.common.config import (
    MODELS,
    TRAINING_FLAGS,
    Config,
)
from grsd_jax.experiments.common.data import load_dataset
from grsd_jax.experiments.common.runs import workdir_lock
from grsd_jax.experiments.track import run as tracking
from grsd_jax.experiments.track.analyse import format_tracks
from grsd_jax.experiments.track.figures import write_tracking_figures

FIELDS = {*TRAINING_FLAGS, *tracking.SETTINGS} - {"model"}


def main(config: Config) -> None:
    """Runs the command with these settings."""
    models = flags.check_names("--models", absl_flags.FLAGS.models, MODELS)
    with workdir_lock(Path(config.workdir)) as folder:
        results, lines = tracking.track(load_dataset(config), config, models)
        records.write_json(folder / "results.json", results)
        write_tracking_figures(lines, folder / "figures")
    print(format_tracks(results["tracks"]))
    logs = [folder / name / "records.jsonl" for name in models]
    places = folder / "results.json", *logs, folder / "figures"
    say_end(*places, then=("grsd", "report", folder))


def define() -> None:
    """Defines the command's flags."""
    flags.define_flags(only=FIELDS, workdir="runs/track", num_batches=1)
    absl_flags.DEFINE_list(
        "models",
        ["resnet18", "plainnet18"],
        f"Networks to train, out of {', '.join(MODELS)}.",
        module_name=sys.argv[0],
    )
