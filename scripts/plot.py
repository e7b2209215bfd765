"""Draws the figures of a measurement from its results.json and arrays.npz alone.

Reads both in WORKDIR and writes WORKDIR/figures: Figure 1 (diagonal scaling), Figure 2
(Toeplitz residual against window position), heat maps of the literal and renormalised
coupling, and the spectrum with its shells, each as PNG and PDF. No model, data set or
accelerator is needed; it takes a few seconds.

Examples:
  python scripts/plot.py --workdir=runs/default
  python scripts/plot.py --workdir=runs/quick/resnet18
"""

from pathlib import Path

from grsd_jax.experiments import figures, flags, records
from grsd_jax.experiments.config import Config


def main(config: Config) -> None:
    workdir = Path(config.workdir)
    results = records.read_json(workdir / "results.json")
    arrays = records.read_npz(workdir / "arrays.npz")
    for path in figures.write_figures(results, arrays, workdir / "figures"):
        print(path)


if __name__ == "__main__":
    flags.define_flags(only=["workdir"])
    flags.run_main(main)
