"""Makes one self-contained HTML page of any run: figures, tables, settings.

Reads the JSON, CSV and PNG files in WORKDIR and writes WORKDIR/report.html, with the
figures inside it: it needs no internet, and can be printed. Nothing is computed. The
records.jsonl of a loop of your own, or a folder with it, gets its figures drawn.

Examples:
  grsd report runs/default
  grsd report runs/quick/resnet18
  grsd report my_run/records.jsonl
"""

from grsd_jax.experiments.commands import say_end
from grsd_jax.experiments.common import flags
from grsd_jax.experiments.common.config import Config
from grsd_jax.experiments.report.page import write_report

POSITIONAL = "workdir"


def main(config: Config) -> None:
    """Runs the command with these settings."""
    page = write_report(config.workdir)
    say_end(page, then=f"open {page} in a browser")


def define() -> None:
    """Defines the command's flags."""
    flags.define_flags(only=["workdir"])
