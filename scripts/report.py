"""Makes one self-contained HTML page of any run: figures, tables, settings.

Reads the JSON, CSV and PNG files in WORKDIR and writes WORKDIR/report.html, with the
figures inside it: it opens without a network, and prints. Nothing is computed.

Examples:
  python scripts/report.py runs/default
  python scripts/report.py --workdir=runs/default
"""

from grsd_jax.experiments.common import flags
from grsd_jax.experiments.common.config import Config
from grsd_jax.experiments.report.page import write_report


def main(config: Config) -> None:
    print(write_report(config.workdir))


if __name__ == "__main__":
    flags.define_flags(only=["workdir"])
    flags.run_main(main, positional="workdir")
