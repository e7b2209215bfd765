"""Tests the four conditions of the theory on a network along its training.

Reads the checkpoints that `grsd train` left in WORKDIR/MODEL, and trains a small
network there first if there are none. Writes WORKDIR/MODEL/conditions.json (condition1
to condition4, each with a verdict that shows its numbers and thresholds), a page of
figures in WORKDIR/MODEL/figures, and a table on the terminal. The thresholds are
conventions; set them as you like. Keep several checkpoints in training:
--checkpoint_every and --keep_checkpoints.

Examples:
  grsd conditions
  grsd conditions --workdir=runs/long --width=16 --max_tail_sum=2
"""

import sys
from pathlib import Path

from absl import flags as absl_flags

from grsd_jax.experiments.commands import say_end
from grsd_jax.experiments.common import flags
from grsd_jax.experiments.common.config import PROBE_FIELDS, Config
from grsd_jax.experiments.common.data import load_dataset
from grsd_jax.experiments.common.runs import workdir_lock
from grsd_jax.experiments.conditions.analyse import format_conditions
from grsd_jax.experiments.conditions.figures import write_condition_page
from grsd_jax.experiments.conditions.run import Options, run_conditions

DEFAULTS = {
    "workdir": "runs/conditions",
    "batch_size": 16,
    "num_batches": 1,
    "checkpoint_every": 24,
    "keep_checkpoints": 100,
}
POSITIONAL = "workdir"
READS_RUN = True


def main(config: Config) -> None:
    """Runs the command with these settings."""
    options = Options(
        thresholds=flags.thresholds_from_flags(),
        num_probes=absl_flags.FLAGS.num_probes or None,
        num_points=absl_flags.FLAGS.num_points,
    )
    folder = Path(config.workdir) / config.model
    found = run_conditions(load_dataset(config), config, options)
    with workdir_lock(folder):
        write_condition_page(found, folder / "figures")
    print(format_conditions(found))
    print(f"{found['seconds']:.0f} s")
    places = folder / "conditions.json", folder / "figures"
    say_end(*places, then=("grsd", "report", folder))


def define() -> None:
    """Defines the command's flags."""
    flags.define_flags(only=flags.all_but("protocol", *PROBE_FIELDS), **DEFAULTS)
    flags.define_threshold_flags()
    absl_flags.DEFINE_integer(
        "num_probes",
        16,
        "Random sign vectors behind the influence; 0 for the exact influence.",
        lower_bound=0,
        module_name=sys.argv[0],
    )
    absl_flags.DEFINE_integer(
        "num_points",
        5,
        "Points of the path at most, the initialization included.",
        lower_bound=2,
        module_name=sys.argv[0],
    )
