r"""Does energy move along the spectrum as the theory says? Trains and compares.

Trains a residual network and its plain twin from every one of --seeds under every one
of --arms, the same order of data for both. At chosen steps it keeps all eigenpairs of
the kernel of some test images, and takes the exact balance between them: the velocity
of energy beyond that of a growing kernel, times the effective time, (v - v^N) tau, over
the edges of the shells and over intervals of doubling time. The theory asks for one
constant. Its size and its spreads over edges and intervals are the statistic, which was
chosen before the first run, and so were the shells and steps (docs/transport_study.md).
It also compares over h = 1, 2, 4, ..., 64 training steps: what share moves between
shells that are not neighbors, how much moves, and the flux.

Arms: main (the settings as given), momentum (0.9, at a rate that keeps the effective
time of a step), decay (a cosine to 0), wide (twice the width), images (twice as many
measured images).

Writes WORKDIR/transport.json, one file a network in WORKDIR/cells, figures, and prints
the quantities with paired intervals over the seeds. A killed run resumes when the same
command is given again; finished runs are not computed again, and more seeds and arms
may be added. --report_only makes the tables and figures of the pairs that are finished.

Examples:
  grsd transport --data_dir=DATA
  grsd transport --data_dir=DATA --arms=main,momentum --seeds=0,1
  grsd transport --workdir=runs/transport --report_only
  grsd transport --dataset=synthetic --networks=resmlp,mlp --width=16 --depth=2 \
      --train_batch_size=64 --epochs=4 --batch_size=8 --seeds=0,1 --workdir=runs/quick
"""

import sys
from pathlib import Path

from absl import flags as absl_flags

from grsd_jax.experiments.commands import say_end
from grsd_jax.experiments.common import files, flags, records
from grsd_jax.experiments.common.config import (
    MODELS,
    TRAINING_FLAGS,
    Config,
    UserError,
)
from grsd_jax.experiments.common.data import load_dataset
from grsd_jax.experiments.common.runs import workdir_lock
from grsd_jax.experiments.transport.analyse import format_transport
from grsd_jax.experiments.transport.figures import write_transport_figures
from grsd_jax.experiments.transport.protocol import ARMS, Protocol
from grsd_jax.experiments.transport.run import RESULTS, run_transport

DEFAULTS = {
    "dataset": "cifar10",
    "workdir": "runs/transport",
    "activation": "gelu",
    "learning_rate": 0.02,
    "momentum": 0.0,
    "epochs": 1,
    "train_batch_size": 96,  # 520 steps an epoch: intervals up to 256 to 512
    "num_batches": 1,
    "checkpoint_every": 64,
    "keep_checkpoints": 1,
}
FIELDS = {*TRAINING_FLAGS, "batch_size", "num_batches"} - {"model", "seed"}


def main(config: Config) -> None:
    """Runs the command with these settings."""
    given = absl_flags.FLAGS
    folder = Path(config.workdir)
    seeds = flags.seeds_from_flags()
    arms = flags.check_names("--arms", given.arms, ARMS)
    networks = flags.check_names("--networks", given.networks, MODELS)
    if len(networks) != 2:
        raise UserError(
            "--networks: expected two, the residual network and its plain twin, got "
            f"{','.join(networks)!r}."
        )
    if given.report_only:
        results = records.read_json(folder / RESULTS)
    else:
        with workdir_lock(folder):
            results = run_transport(
                load_dataset(config),
                config,
                arms=arms,
                seeds=seeds,
                networks=networks,
                protocol=Protocol(),
            )
    with files.reading(folder / RESULTS, "the results of a study of transport"):
        text = format_transport(results)
        write_transport_figures(results, folder / "figures")
    print(text)
    places = folder / RESULTS, folder / "figures"
    say_end(*places, then=("grsd", "report", folder))


def define() -> None:
    """Defines the command's flags."""
    flags.define_flags(only=FIELDS, **DEFAULTS)
    flags.define_seeds()
    module = {"module_name": sys.argv[0]}
    absl_flags.DEFINE_list(
        "arms", ["main"], f"What to run, out of {', '.join(ARMS)}.", **module
    )
    absl_flags.DEFINE_list(
        "networks",
        ["resnet18", "plainnet18"],
        "The residual network and its plain twin.",
        **module,
    )
    absl_flags.DEFINE_bool(
        "report_only",
        False,
        "Make the tables and figures of the WORKDIR/transport.json.",
        **module,
    )
