"""Draws the figures of a measurement from its results.json and arrays.npz alone.

Reads both in WORKDIR and writes WORKDIR/figures: Figure 1 (diagonal scaling), Figure 2
(Toeplitz residual against window position), heat maps of the literal and renormalized
coupling, and the spectrum with its shells, each as PNG and PDF. In the workdir of
`grsd track` it draws the figures of the tracking, from its records.jsonl. It needs no
model, data set or accelerator.

Examples:
  grsd plot runs/default
  grsd plot runs/quick/resnet18
  grsd plot runs/track
"""

from pathlib import Path

from grsd_jax.experiments.commands import say_end
from grsd_jax.experiments.common import files, flags, records
from grsd_jax.experiments.common.config import Config
from grsd_jax.experiments.reproduce import figures
from grsd_jax.experiments.reproduce.analyse import read_results
from grsd_jax.experiments.track import figures as tracking_figures
from grsd_jax.experiments.track.log import read_tracks

POSITIONAL = "workdir"


def main(config: Config) -> None:
    """Runs the command with these settings."""
    workdir = Path(config.workdir)
    about = workdir / "results.json"
    if "tracks" in records.read_json(about):
        tracks = read_tracks(workdir)
        with files.reading(about, "a tracked training's, with its records.jsonl"):
            paths = tracking_figures.write_tracking_figures(tracks, workdir / "figures")
    else:
        results, arrays = read_results(workdir)
        with files.reading(about, "the results of a measurement"):
            paths = figures.write_figures(results, arrays, workdir / "figures")
    say_end(*paths, then=f"grsd report {workdir}")


def define() -> None:
    """Defines the command's flags."""
    flags.define_flags(only=["workdir"])
