"""Sweeps networks over depth, width, activation, branch scale and seed.

Every cell of the grid is trained for some steps and measured: Toeplitz residual, slope
and R^2 of the shell coupling, and the increments and memory of its state Jacobians.
Writes WORKDIR/sweep.csv and sweep.json (one row per cell) and the figures against depth
in WORKDIR/figures. A sweep that was killed goes on when the same command is given
again, and cells that are there are not computed twice.

Examples:
  python scripts/sweep.py
  python scripts/sweep.py --models=resmlp --depths=2,8,32 --branch_scales=0.1,0.3,1
  python scripts/sweep.py --workdir=runs/sweep --figures_only
"""

from pathlib import Path

from absl import flags as absl_flags

from grsd_jax.experiments.common import flags, records
from grsd_jax.experiments.common.data import load_dataset
from grsd_jax.experiments.sweep import figures as sweep_figures
from grsd_jax.experiments.sweep import run as sweeping
from grsd_jax.experiments.sweep.config import SweepConfig

FIGURES_ONLY = absl_flags.DEFINE_bool(
    "figures_only", False, "Draw the figures of the sweep.json that is in WORKDIR."
)


def main(config: SweepConfig) -> None:
    workdir = Path(config.workdir)
    if FIGURES_ONLY.value:
        results = records.read_json(workdir / "sweep.json")
    else:
        with records.workdir_lock(workdir):
            results = sweeping.run_sweep(load_dataset(config), config)
        print(sweep_figures.format_sweep(results))
    for path in sweep_figures.write_sweep_figures(results, workdir / "figures"):
        print(path)


if __name__ == "__main__":
    flags.define_flags(settings=SweepConfig)
    flags.run_main(main, settings=SweepConfig)
