"""Draws the figures of a measurement from its results.json and arrays.npz alone.

Reads both in WORKDIR and writes WORKDIR/figures: Figure 1 (diagonal scaling), Figure 2
(Toeplitz residual against window position), heat maps of the literal and renormalized
coupling, and the spectrum with its shells, each as PNG and PDF. In the workdir of
`grsd track` it draws the figures of the tracking, from its records.jsonl. A file of
records that a loop of your own wrote by ProbeLog, or the folder of its records.jsonl,
is drawn too: energies, flux, velocity and eigenvalues, in figures beside the file. It
needs no model, data set or accelerator.

Examples:
  grsd plot runs/default
  grsd plot runs/quick/resnet18
  grsd plot runs/track
  grsd plot my_run/records.jsonl
"""

from pathlib import Path

from grsd_jax.experiments.commands import say_end
from grsd_jax.experiments.common import files, flags, records
from grsd_jax.experiments.common.config import Config, UserError
from grsd_jax.experiments.reproduce import figures
from grsd_jax.experiments.reproduce.analyse import read_results
from grsd_jax.experiments.track import figures as tracking_figures
from grsd_jax.experiments.track.log import find_log, read_log, read_tracks

POSITIONAL = "workdir"


def main(config: Config) -> None:
    """Runs the command with these settings."""
    workdir = Path(config.workdir)
    log = find_log(workdir)
    paths = _draw_run(workdir) if log is None else _draw_log(log)
    say_end(*paths, then=("grsd", "report", workdir))


def _draw_log(log: Path) -> list[Path]:
    lines, folder = read_log(log), log.resolve().parent
    with files.reading(log, "the records of a probe"):
        return tracking_figures.write_log_figures(
            lines, folder.name, log.parent / "figures"
        )


def _draw_run(workdir: Path) -> list[Path]:
    about = workdir / "results.json"
    if not about.exists():
        raise UserError(_nothing_to_draw(workdir))
    if "tracks" in records.read_json(about):
        tracks = read_tracks(workdir)
        with files.reading(about, "a tracked training's, with its records.jsonl"):
            return tracking_figures.write_tracking_figures(tracks, workdir / "figures")
    results, arrays = read_results(workdir)
    with files.reading(about, "the results of a measurement"):
        return figures.write_figures(results, arrays, workdir / "figures")


def _nothing_to_draw(workdir: Path) -> str:
    """Returns that a folder has no results, and the first one inside it that has."""
    if not workdir.exists():
        return (
            f"--workdir: expected a folder or a file of records, got '{workdir}', "
            "which does not exist."
        )
    inside = sorted([*workdir.glob("*/results.json"), *workdir.glob("*/records.jsonl")])
    hint = f"; did you mean '{inside[0].parent}'?" if inside else "."
    return (
        "--workdir: expected a folder with results.json or records.jsonl, got "
        f"'{workdir}'{hint}"
    )


def define() -> None:
    """Defines the command's flags."""
    flags.define_flags(only=["workdir"])
