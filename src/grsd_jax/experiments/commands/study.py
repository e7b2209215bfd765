r"""Do the paper's claims reproduce? Trains both networks from several seeds.

Trains ResNet-18 and PlainNet-18 on CIFAR-10 from every one of --seeds, and measures the
coupling at the end: over one stack of the batches, and over their mean as the paper
does. Writes one file per measurement to WORKDIR/cells, WORKDIR/claims.json, a figure in
WORKDIR/figures, and prints the quantities with paired intervals over the seeds. A
killed run resumes when the same command is given again. --report_only makes the table
and the figure from the claims.json that is there.

Examples:
  grsd study --data_dir=DATA
  grsd study --data_dir=DATA --seeds=0,1 --width=8 --epochs=1
"""

import sys
from pathlib import Path

from absl import flags as absl_flags

from grsd_jax.experiments.claims.analyse import format_claims
from grsd_jax.experiments.claims.figures import write_claims_figure
from grsd_jax.experiments.claims.run import run_claims
from grsd_jax.experiments.commands import say_end
from grsd_jax.experiments.common import files, flags, records
from grsd_jax.experiments.common.config import PROBE_FIELDS, Config
from grsd_jax.experiments.common.data import load_dataset
from grsd_jax.experiments.common.runs import workdir_lock

DEFAULTS = {
    "dataset": "cifar10",
    "workdir": "runs/claims",
    "width": 16,
    "epochs": 5,
    "train_batch_size": 128,
    "schedule": "cosine_decay_schedule",
    "num_batches": 4,
    "num_pairs": 1280,  # all of them: K N C
    "solver": "dense",
}
#: What the study sets by itself, and what its two networks do not take.
FIXED = (
    "model", "seed", "reduction", "protocol", "depth", "branch_scale", "rho",
    *PROBE_FIELDS,
)  # fmt: skip


def main(config: Config) -> None:
    """Runs the command with these settings."""
    folder = Path(config.workdir)
    seeds = flags.seeds_from_flags()
    if absl_flags.FLAGS.report_only:
        results = records.read_json(folder / "claims.json")
    else:
        with workdir_lock(folder):
            results = run_claims(load_dataset(config), config, seeds)
    with files.reading(folder / "claims.json", "the results of a study"):
        table = format_claims(results)
        write_claims_figure(results, folder / "figures")
    print(table)
    places = folder / "claims.json", folder / "figures"
    say_end(*places, then=("grsd", "report", folder))


def define() -> None:
    """Defines the command's flags."""
    flags.define_flags(only=flags.all_but(*FIXED), **DEFAULTS)
    flags.define_seeds()
    absl_flags.DEFINE_bool(
        "report_only",
        False,
        "Make the table and the figure of the WORKDIR/claims.json.",
        module_name=sys.argv[0],
    )
