"""Measures the shell coupling of one trained network at its newest checkpoint.

Reads the checkpoint that train.py left in WORKDIR/resnet18 (or in WORKDIR/plainnet18,
for --model=plainnet18 --protocol=own) and writes results.json and arrays.npz to
WORKDIR/MODEL; plot.py --workdir=WORKDIR/MODEL draws them. Give the settings of the
network (--width, --activation, --dataset) as in training.

Examples:
  python scripts/measure.py --workdir=runs/quick
  python scripts/measure.py --workdir=runs/quick --model=plainnet18 --protocol=shared
"""

from pathlib import Path

from grsd_jax.experiments import flags, pipeline, records
from grsd_jax.experiments.config import Config, UserError
from grsd_jax.experiments.data import load_dataset
from grsd_jax.experiments.tables import format_table


def main(config: Config) -> None:
    if len(config.protocol) > 1:
        raise UserError(
            "--protocol: expected one protocol, got "
            f"{','.join(config.protocol)}; reproduce.py takes a list."
        )
    protocol = "own" if config.model == "resnet18" else config.protocol[0]
    with records.workdir_lock(Path(config.workdir) / config.model) as folder:
        dataset = load_dataset(config)
        entry, arrays = pipeline.measure(config.model, protocol, dataset, config)
        results = pipeline.header(config) | {
            "model": entry | {"name": config.model, "arrays": config.model}
        }
        arrays = {f"{config.model}/{key}": array for key, array in arrays.items()}
        pipeline.write_results(folder, results, arrays)
    print(format_table(results))
    print(f"written to {folder}")


if __name__ == "__main__":
    flags.define_flags(protocol=("own",))
    flags.run_main(main)
