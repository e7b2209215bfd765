"""Sweeps networks over depth, width, activation, branch scale and seed.

Every cell of the grid is trained for some steps and measured: Toeplitz residual, slope
and R^2 of the shell coupling, and the increments and memory of its state Jacobians.
Writes WORKDIR/sweep.csv (one row per cell), sweep.json (how they were made) and the
figures against depth in WORKDIR/figures. A sweep that was killed goes on when the same
command is given again, and cells that are there are not computed twice.

Examples:
  python scripts/sweep.py
  python scripts/sweep.py --models=resmlp --depths=2,8,32 --branch_scales=0.1,0.3,1
  python scripts/sweep.py --workdir=runs/sweep --figures_only
"""

from pathlib import Path

from absl import flags as absl_flags

from grsd_jax.experiments.common import files, flags
from grsd_jax.experiments.common.data import load_dataset
from grsd_jax.experiments.common.runs import workdir_lock
from grsd_jax.experiments.sweep.analyse import format_sweep, read_rows
from grsd_jax.experiments.sweep.config import SweepConfig
from grsd_jax.experiments.sweep.figures import write_sweep_figures
from grsd_jax.experiments.sweep.run import run_sweep

FIGURES_ONLY = absl_flags.DEFINE_bool(
    "figures_only", False, "Draw the figures of the sweep.csv that is in WORKDIR."
)


def main(config: SweepConfig) -> None:
    workdir = Path(config.workdir)
    if not FIGURES_ONLY.value:
        with workdir_lock(workdir):
            run_sweep(load_dataset(config), config)
    rows = read_rows(workdir / "sweep.csv")
    with files.reading(workdir / "sweep.csv", "the rows of a sweep"):
        table = format_sweep(rows)
        paths = write_sweep_figures(rows, workdir / "figures")
    print(table, *paths, sep="\n")


if __name__ == "__main__":
    flags.define_flags(settings=SweepConfig)
    flags.run_main(main, settings=SweepConfig)
