"""Sweeps networks over depth, width, activation, branch scale and seed.

Every cell of the grid is trained for some steps and measured: Toeplitz residual, slope
and R^2 of the shell coupling, and the increments and memory of its state Jacobians.
Writes WORKDIR/sweep.csv (one row per cell), sweep.json (how they were made) and the
figures against depth in WORKDIR/figures. A killed sweep resumes when the same command
is given again, without computing a cell twice.

Examples:
  grsd sweep
  grsd sweep --models=resmlp --depths=2,8,32 --branch_scales=0.1,0.3,1
  grsd sweep --workdir=runs/sweep --figures_only
"""

import sys
from pathlib import Path

from absl import flags as absl_flags

from grsd_jax.experiments.commands import say_end
from grsd_jax.experiments.common import files, flags
from grsd_jax.experiments.common.data import load_dataset
from grsd_jax.experiments.common.runs import workdir_lock
from grsd_jax.experiments.sweep.analyse import format_sweep, read_rows
from grsd_jax.experiments.sweep.config import SweepConfig
from grsd_jax.experiments.sweep.figures import write_sweep_figures
from grsd_jax.experiments.sweep.run import run_sweep

SETTINGS = SweepConfig


def main(config: SweepConfig) -> None:
    """Runs the command with these settings."""
    workdir = Path(config.workdir)
    if not absl_flags.FLAGS.figures_only:
        with workdir_lock(workdir):
            run_sweep(load_dataset(config), config)
    rows = read_rows(workdir / "sweep.csv")
    with files.reading(workdir / "sweep.csv", "the rows of a sweep"):
        table = format_sweep(rows)
        write_sweep_figures(rows, workdir / "figures")
    print(table)
    places = workdir / "sweep.csv", workdir / "figures"
    say_end(*places, then=("grsd", "report", workdir))


def define() -> None:
    """Defines the command's flags."""
    flags.define_flags(settings=SweepConfig)
    absl_flags.DEFINE_bool(
        "figures_only",
        False,
        "Draw the figures of the sweep.csv that is in WORKDIR.",
        module_name=sys.argv[0],
    )
