"""Draws the figures of a measurement from its results.json and arrays.npz alone.

Reads both in WORKDIR and writes WORKDIR/figures: Figure 1 (diagonal scaling), Figure 2
(Toeplitz residual against window position), heat maps of the literal and renormalised
coupling, and the spectrum with its shells, each as PNG and PDF. In the workdir of
`grsd track` it draws the figures of the tracking, from its records.jsonl. No model,
data set or accelerator is needed; it takes a few seconds.

Examples:
  grsd plot --workdir=runs/default
  grsd plot --workdir=runs/quick/resnet18
"""

from pathlib import Path

from grsd_jax.experiments.common import flags, records
from grsd_jax.experiments.common.config import Config
from grsd_jax.experiments.reproduce import figures
from grsd_jax.experiments.track import figures as tracking_figures

POSITIONAL = "workdir"


def main(config: Config) -> None:
    """Runs the command with these settings."""
    workdir = Path(config.workdir)
    results = records.read_json(workdir / "results.json")
    if "tracks" in results:
        files = {name: workdir / name / "records.jsonl" for name in results["tracks"]}
        tracks = {name: records.read_jsonl(file) for name, file in files.items()}
        paths = tracking_figures.write_tracking_figures(tracks, workdir / "figures")
    else:
        arrays = records.read_npz(workdir / "arrays.npz")
        paths = figures.write_figures(results, arrays, workdir / "figures")
    print(*paths, sep="\n")


def define() -> None:
    """Defines the command's flags."""
    flags.define_flags(only=["workdir"])
