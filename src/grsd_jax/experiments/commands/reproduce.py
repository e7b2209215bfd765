r"""Runs the main job: is a trained ResNet log-shift invariant, and is its plain twin?

Trains ResNet-18 (and PlainNet-18, for the protocol "own"), measures the coupling
between logarithmic shells of the spectrum of M = J J^T for both, and ends with a table
on the terminal, results.json and arrays.npz in the workdir, and the figures in
WORKDIR/figures. A killed run resumes when the same command is given again.

The defaults take an embedded data set of textures, and are made for 2 CPU cores.

Examples:
  grsd reproduce
  grsd reproduce --dataset=cifar10 --data_dir=DATA --workdir=runs/cifar10 \
      --width=16 --train_batch_size=128 --epochs=3
"""

import time
from pathlib import Path

from grsd_jax.experiments.commands import say_end
from grsd_jax.experiments.common import flags
from grsd_jax.experiments.common.config import PROBE_FIELDS, Config
from grsd_jax.experiments.common.data import load_dataset
from grsd_jax.experiments.common.runs import workdir_lock
from grsd_jax.experiments.reproduce.analyse import format_table
from grsd_jax.experiments.reproduce.figures import write_figures
from grsd_jax.experiments.reproduce.run import reproduce, write_results

#: What the two networks of the comparison do not take.
FIXED = ("model", "depth", "branch_scale", "rho", *PROBE_FIELDS)


def main(config: Config) -> None:
    """Runs the command with these settings."""
    started = time.monotonic()
    with workdir_lock(Path(config.workdir)) as folder:
        results, arrays = reproduce(load_dataset(config), config)
        write_results(folder, results, arrays)
        write_figures(results, arrays, folder / "figures")
    print(format_table(results))
    print(f"{time.monotonic() - started:.0f} s")
    places = folder / "results.json", folder / "arrays.npz", folder / "figures"
    say_end(*places, then=("grsd", "report", folder))


def define() -> None:
    """Defines the command's flags."""
    # The paper averages the kernels of the batches.
    flags.define_flags(only=flags.all_but(*FIXED), reduction="mean")
