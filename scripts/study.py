r"""Runs the study: do the paper's claims reproduce?

Trains ResNet-18 and PlainNet-18 on CIFAR-10 from every one of --seeds, measures the
coupling at the end under the base's settings and with every choice varied one at a
time, adds the controls, and holds the claims against the numbers. Writes study.json and
study.npz to WORKDIR, the tables to WORKDIR/study.txt and the figures to
WORKDIR/figures. A study that was killed goes on when the same command is given again.
--report_only makes tables and figures from the two files that are there.

Examples:
  python scripts/study.py --data_dir=DATA --seeds=0,1,2
  python scripts/study.py --workdir=docs/results/study_w16 --report_only
"""

from pathlib import Path

from absl import flags as absl_flags

from grsd_jax.experiments.claims import run as study
from grsd_jax.experiments.claims.claims import read_study
from grsd_jax.experiments.claims.depth import depth_rows
from grsd_jax.experiments.claims.figures import write_study_figures
from grsd_jax.experiments.claims.tables import format_study
from grsd_jax.experiments.common import flags, records
from grsd_jax.experiments.common.config import Config, UserError
from grsd_jax.experiments.common.data import load_dataset
from grsd_jax.experiments.reproduce.tables import aligned

DEFAULTS = {
    "dataset": "cifar10",
    "workdir": "runs/study",
    "width": 16,
    "epochs": 5,
    "train_batch_size": 128,
    "schedule": "cosine_decay_schedule",
    "num_batches": 4,
    "solver": "dense",
}
#: What the study sets by itself, and what its two networks do not take.
FIXED = ("model", "seed", "protocol", "depth", "branch_scale", "rho", "record_every")
SEEDS = absl_flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of the trainings.")
REPORT_ONLY = absl_flags.DEFINE_bool(
    "report_only", False, "Make tables and figures of the study that is in WORKDIR."
)
SWEEP = absl_flags.DEFINE_string(
    "sweep", None, "A sweep.json, for the table of the effect of depth."
)


def main(config: Config) -> None:
    folder = Path(config.workdir)
    if not all(seed.isdigit() for seed in SEEDS.value) or not SEEDS.value:
        given = ",".join(SEEDS.value)
        raise UserError(f"--seeds: expected a list of integers >= 0, got {given!r}.")
    if not REPORT_ONLY.value:
        with records.workdir_lock(folder):
            seeds = [int(seed) for seed in SEEDS.value]
            study.run_study(load_dataset(config), config, seeds)
    found = read_study(folder)
    text = format_study(found)
    if SWEEP.value is not None:
        text += "\n\n" + aligned(depth_rows(records.read_json(SWEEP.value)))
    with records.atomic_path(folder / "study.txt") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    paths = write_study_figures(found, folder / "figures")
    print(text)
    print(f"{len(paths)} figures in {folder / 'figures'}")


if __name__ == "__main__":
    flags.define_flags(only=flags.all_but(*FIXED), **DEFAULTS)
    flags.run_main(main)
