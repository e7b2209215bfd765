"""Times the operations on an untrained network, each in a fresh process.

Prints a table: seconds (minimum of three), the first call with its compilation, units
of one gradient of the same batches, the rate of floating-point operations over that of
the forward pass, and the peak memory. The rows go to WORKDIR/benchmark.json too.

Example:
  grsd benchmark --workdir=runs/benchmark --width=16 --num_batches=1
"""

import json
import subprocess
import sys
from pathlib import Path

from absl import flags as absl_flags

from grsd_jax.experiments import commands
from grsd_jax.experiments.benchmark import run as benchmarking
from grsd_jax.experiments.benchmark.analyse import format_benchmark
from grsd_jax.experiments.common import flags, records
from grsd_jax.experiments.common.config import Config, UserError
from grsd_jax.experiments.common.runs import environment, workdir_lock

FIELDS = (
    "workdir",
    "seed",
    "model",
    "width",
    "activation",
    "batch_size",
    "num_batches",
    "solver",
    "block_size",
    "num_pairs",
    "precision",
)


def main(config: Config) -> None:
    """Runs the command with these settings."""
    case = absl_flags.FLAGS.case
    if case:
        print(json.dumps(benchmarking.run_case(case, config)))
        return
    with workdir_lock(Path(config.workdir)) as folder:
        rows = []
        for name in benchmarking.CASES:
            print(f"{name} ...", file=sys.stderr)
            command = [sys.executable, "-m", commands.__name__, "benchmark"]
            command += [*sys.argv[1:], f"--case={name}"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise UserError(
                    f"--case={name}: expected exit status 0, got {done.returncode}."
                )
            rows.append(json.loads(done.stdout.splitlines()[-1]))
        settings = {name: getattr(config, name) for name in FIELDS}
        made_on = environment(precision=config.precision)
        records.write_json(
            folder / "benchmark.json",
            {"config": settings, "environment": made_on, "rows": rows},
        )
    print(format_benchmark(rows))
    commands.say_end(folder / "benchmark.json", then=("grsd", "report", folder))


def define() -> None:
    """Defines the command's flags."""
    flags.define_flags(only=FIELDS, workdir="runs/benchmark")
    absl_flags.DEFINE_enum(
        "case",
        None,
        list(benchmarking.CASES),
        "Run only this case, in this process.",
        module_name=sys.argv[0],
    )
