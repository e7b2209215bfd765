"""Measures the shell coupling of one trained network at its newest checkpoint.

Reads the checkpoint that `grsd train` left in WORKDIR/MODEL (of the ResNet-18 if the
plain network is measured under another --protocol) and writes results.json and
arrays.npz to WORKDIR/MODEL; `grsd plot WORKDIR/MODEL` draws them. The settings of the
network and of its data are read from the config.json of the training. A second
measurement replaces the first; if that had other settings, it is kept beside the new
one. --reduction=mean measures as `grsd reproduce` does. Several devices share the
examples of each batch. --distributed joins several processes: all must see WORKDIR, and
the first writes.

Examples:
  grsd measure runs/quick
  grsd measure runs/quick --num_pairs=200
  grsd measure runs/quick --model=plainnet18 --protocol=shared
  srun grsd measure runs/quick --distributed
"""

from pathlib import Path

from grsd_jax.experiments.commands import say_end
from grsd_jax.experiments.common import flags, runs
from grsd_jax.experiments.common.config import PROBE_FIELDS, Config, UserError
from grsd_jax.experiments.common.data import load_dataset
from grsd_jax.experiments.common.measurement import header
from grsd_jax.experiments.reproduce.analyse import format_table
from grsd_jax.experiments.reproduce.run import measure, write_results

POSITIONAL = "workdir"
READS_RUN = True

#: What concerns a training while it runs, and not what it computes.
WITHOUT_EFFECT = ("checkpoint_every", "keep_checkpoints", "log_every")


def main(config: Config) -> None:
    """Runs the command with these settings."""
    if len(config.protocol) > 1:
        raise UserError(
            "--protocol: expected one protocol, got "
            f"{','.join(config.protocol)}; reproduce takes a list."
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
            "--workdir: expected a folder with a training, got "
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
    places = folder / "results.json", folder / "arrays.npz"
    say_end(*places, then=("grsd", "plot", folder))


def define() -> None:
    """Defines the command's flags."""
    fields = flags.all_but(*PROBE_FIELDS, *WITHOUT_EFFECT)
    flags.define_flags(only=fields, protocol=("own",))
    runs.define_process_flags()
