"""Measures the shell coupling of one trained network at its newest checkpoint.

Reads the checkpoint that train.py left in WORKDIR/MODEL (of the ResNet-18 if the plain
network is measured under another --protocol) and writes results.json and arrays.npz to
WORKDIR/MODEL; plot.py --workdir=WORKDIR/MODEL draws them. Give the settings of the
network (--width, --activation, --dataset) as in training; --reduction=mean measures as
reproduce.py does. Several devices share the examples of each batch. --distributed joins
several processes: all must see WORKDIR, and the first writes.

Examples:
  python scripts/measure.py --workdir=runs/quick
  python scripts/measure.py --workdir=runs/quick --model=plainnet18 --protocol=shared
  srun python scripts/measure.py --workdir=runs/quick --distributed
"""

from pathlib import Path

from grsd_jax.experiments.common import flags, runs
from grsd_jax.experiments.common.config import Config, UserError
from grsd_jax.experiments.common.data import load_dataset
from grsd_jax.experiments.common.measurement import header
from grsd_jax.experiments.reproduce.analyse import format_table
from grsd_jax.experiments.reproduce.run import measure, write_results


def main(config: Config) -> None:
    if len(config.protocol) > 1:
        raise UserError(
            "--protocol: expected one protocol, got "
            f"{','.join(config.protocol)}; reproduce.py takes a list."
        )
    (protocol,) = config.protocol
    if config.model != "plainnet18" and protocol != "own":
        raise UserError(
            f"--protocol: expected own for --model={config.model}, got {protocol}; the "
            "others are of --model=plainnet18."
        )
    mesh = runs.join_processes()
    if not Path(config.workdir).is_dir():
        raise UserError(
            "--workdir: expected a folder in which train.py trained, got "
            f"'{config.workdir}', which does not exist."
        )
    with runs.workdir_lock(Path(config.workdir) / config.model) as folder:
        dataset = load_dataset(config)
        entry, arrays = measure(config.model, protocol, dataset, config, mesh=mesh)
        if not runs.writes():
            return
        results = header(config) | {
            "model": entry | {"name": config.model, "arrays": config.model}
        }
        arrays = {f"{config.model}/{key}": array for key, array in arrays.items()}
        write_results(folder, results, arrays)
    print(format_table(results))
    print(f"written to {folder}")


if __name__ == "__main__":
    flags.define_flags(only=flags.all_but("record_every"), protocol=("own",))
    runs.define_process_flags()
    flags.run_main(main)
