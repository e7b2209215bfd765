"""Shell couplings of the whole spectrum of two networks, and their Toeplitz residuals.

Reads the ResNet-18 and the PlainNet-18 that `grsd reproduce --protocol=own` or
`grsd track` left in WORKDIR, and measures both on the same test images, all outputs
unreduced: n = 10 K N errors. Leading pairs are exact, the rest is by random signs. M
and Mdot are formed once where that takes fewer operations than multiplying by so many
columns. Writes whole_spectrum.json with time and the peak memory so far, and a figure
of both networks; a network that OUT already has is not measured again.

Examples:
  python benchmarks/whole_spectrum.py --workdir runs/track_cifar10 --data_dir PATH \
      --out docs/results/whole_spectrum
  python benchmarks/whole_spectrum.py --rehearse
"""

import argparse
import dataclasses
import hashlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grsd_jax as grsd
import jax
import numpy as np
from grsd_jax import plotting
from grsd_jax.experiments.common import plotting as common_plotting
from grsd_jax.experiments.common import records, runs
from grsd_jax.experiments.common.config import TITLES, Config
from grsd_jax.experiments.common.data import Dataset, evaluation_batches, load_dataset
from grsd_jax.experiments.common.measurement import network_problem
from grsd_jax.experiments.common.networks import (
    NETWORK_FIELDS,
    Weights,
    initial_weights,
    load_weights,
    make_model,
)
from grsd_jax.experiments.common.runs import environment
from grsd_jax.experiments.common.tables import aligned, number
from grsd_jax.shells import Signs, StochasticCoupling, ToeplitzEstimate

from comparison.harness import peak_mib
from comparison.machine import describe_machine

NETWORKS = ("resnet18", "plainnet18")

#: Small networks at their first weights: shows that everything runs, means nothing.
_REHEARSAL = {
    "dataset": "synthetic",
    "num_batches": 2,
    "batch_size": 8,
    "num_pairs": 8,
    "num_signs": 2,
    "num_steps": 8,
}
_REHEARSED = ("resmlp", "mlp")

#: Options that say where files lie, not what is measured.
_PLACES = ("workdir", "data_dir", "out")

#: Shells of one window, as in the paper.
_WINDOW = 5


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures both networks, and writes what was found."""
    options = parsed(arguments)
    with tempfile.TemporaryDirectory() as nowhere:
        folder = options.out or Path(nowhere)
        found = {name: measured(name, options, folder) for name in names_of(options)}
    report = {
        "settings": settings_of(options),
        "networks": {
            name: {**entry, "noise_floor": floor_of(coupling)}
            for name, (entry, coupling) in found.items()
        },
    }
    print(table(report["networks"]))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        records.write_json(options.out / "whole_spectrum.json", report)
        couplings = {name: coupling for name, (_, coupling) in found.items()}
        draw = {"whole_spectrum": lambda: figure(couplings)}
        for path in common_plotting.save_figures(draw, options.out):
            print(path)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options of the command line, those of a rehearsal if it is one."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--workdir", help="The folder with both trained networks.")
    add("--dataset", default="cifar10", help="What they were trained on.")
    add("--data_dir", help="The folder of the TFDS data.")
    add("--num_batches", type=int, default=32, help="Batches K.")
    add("--batch_size", type=int, default=32, help="Test images N of a batch.")
    add("--num_pairs", type=int, default=32, help="Leading pairs taken exactly.")
    add("--num_signs", type=int, default=8, help="Sign vectors q.")
    add("--num_steps", type=int, default=20, help="Lanczos steps m.")
    add("--seed", type=int, default=0, help="Of the images and the signs.")
    add("--rehearse", action="store_true", help="Run tiny sizes, for a test.")
    add("--out", type=Path, help="The folder for the JSON and the figure.")
    options = parser.parse_args(arguments)
    if options.rehearse:
        vars(options).update(_REHEARSAL)
    elif not options.workdir:
        parser.error("--workdir: expected the folder with both networks, got none")
    return options


def names_of(options: argparse.Namespace) -> tuple[str, str]:
    """Returns the two networks, residual and plain."""
    return _REHEARSED if options.rehearse else NETWORKS


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the options that say what is measured."""
    return {k: v for k, v in vars(options).items() if k not in _PLACES}


def measured(
    name: str, options: argparse.Namespace, folder: Path
) -> tuple[dict[str, Any], StochasticCoupling]:
    """Returns what `measure` does, from files in a folder if they are there."""
    dataset, config, weights = network(name, options)
    made_by = {
        "settings": settings_of(options),
        "network": name,
        "weights": fingerprint(weights),
        "environment": environment(precision="default"),
    }

    def compute() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        entry, coupling = measure(name, options, (dataset, config, weights))
        return entry, {k: np.asarray(v) for k, v in coupling._asdict().items()}

    entry, arrays = runs.cached(folder / name, made_by, compute)
    return entry, StochasticCoupling(**arrays)


def fingerprint(weights: Weights) -> str:
    """Returns a checksum of the parameters and of the statistics beside them."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tuple(weights))]
    return hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()


def measure(
    name: str,
    options: argparse.Namespace,
    trained: tuple[Dataset, Config, Weights],
) -> tuple[dict[str, Any], StochasticCoupling]:
    """Returns what was found for one network, with its cost, and the coupling."""
    dataset, config, weights = trained
    batches = evaluation_batches(
        dataset.test_images,
        dataset.test_labels,
        num_batches=options.num_batches,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    model = make_model(name, dataset.num_classes, config)
    problem = network_problem(model, weights, batches, config)
    print(f"{name}: n = {problem.dimension(weights.params)}", flush=True)
    started, used = time.perf_counter(), time.process_time()
    coupling = jax.block_until_ready(
        grsd.shells.measure_stochastic_coupling(
            problem,
            weights.params,
            key=jax.random.key(options.seed),
            num_pairs=options.num_pairs,
            signs=Signs(options.num_signs, options.num_steps),
        )
    )
    cost = {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - used,
        "peak_memory_gib": peak_mib() / 2**10,
    }
    print(coupling, flush=True)
    entry = {
        "machine": describe_machine(),
        "environment": environment(precision="default"),
        "dimension": problem.dimension(weights.params),
        "loss": float(problem.loss(weights.params)),
        "network": {field: getattr(config, field) for field in NETWORK_FIELDS},
        **cost,
        **arrays_of(coupling),
        "toeplitz": arrays_of(coupling.toeplitz(_WINDOW)),
    }
    return entry, coupling


def network(name: str, options: argparse.Namespace) -> tuple[Dataset, Config, Weights]:
    """Returns the data, the settings of the training, and the network's weights."""
    config = Config(
        workdir=options.workdir or ".",
        dataset=options.dataset,
        data_dir=options.data_dir,
    )
    if not options.rehearse:
        written = records.read_json(Path(options.workdir) / name / "config.json")
        trained = {field: written[field] for field in NETWORK_FIELDS}
        config = dataclasses.replace(config, **trained)
    dataset = load_dataset(config)
    if options.rehearse:
        model = make_model(name, dataset.num_classes, config)
        return dataset, config, initial_weights(model, dataset, config)
    return dataset, config, load_weights(name, dataset, config)


def arrays_of(found: StochasticCoupling | ToeplitzEstimate) -> dict[str, Any]:
    """Returns the arrays of a result but the replicates, for JSON."""
    fields = {k: np.asarray(v) for k, v in found._asdict().items()}
    return {k: v.tolist() for k, v in fields.items() if k != "replicates"}


def floor_of(coupling: StochasticCoupling) -> list[float]:
    """Returns the residual of every window that sampling alone would make."""
    return plotting.noise_floor_of(coupling, window=_WINDOW).tolist()


def table(networks: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a row a network."""
    headings = ["network", "n", "residual", "lowest window", "noise floor"]
    headings += ["top window", "noise floor"]
    rows = [
        [
            name,
            str(entry["dimension"]),
            _pair(entry["toeplitz"], "residual"),
            _pair(entry["toeplitz"], "windows", 0),
            number(entry["noise_floor"][0]),
            _pair(entry["toeplitz"], "windows", -1),
            number(entry["noise_floor"][-1]),
            number(np.max(np.array(entry["lanczos_error"], float)).item(), ".2g"),
            f"{entry['seconds']:.0f}",
            f"{entry['peak_memory_gib']:.1f}",
        ]
        for name, entry in networks.items()
    ]
    return aligned([[*headings, "Lanczos error", "s", "GiB"], *rows])


def _pair(toeplitz: Mapping[str, Any], name: str, place: int | None = None) -> str:
    both = toeplitz[name], toeplitz[f"{name}_error"]
    value, error = both if place is None else (part[place] for part in both)
    return f"{number(value)} ± {number(error)}"


def figure(couplings: Mapping[str, StochasticCoupling]) -> Any:
    """Draws the couplings of all networks, and their windows with errors."""
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplot_mosaic(
        [[*couplings], ["windows"] * len(couplings)],
        figsize=(common_plotting.PAGE_WIDTH, 5.4),
        layout="constrained",
    )
    limits = plotting.coupling_limits(couplings.values())
    below = axes["windows"]
    for name, coupling in couplings.items():
        plotting.coupling(coupling, axes[name], limits=limits)
        axes[name].set_title(TITLES[name])
        found, look = coupling.toeplitz(_WINDOW), common_plotting.look_of(name)
        below.errorbar(
            np.arange(len(found.windows)),
            found.windows,
            found.windows_error,
            color=look.color,
            marker=look.marker,
            linestyle=look.linestyle,
            label=TITLES[name],
        )
        label = f"noise floor of {TITLES[name]}"
        below.plot(floor_of(coupling), ":", color=look.color, label=label)
    below.set(xlabel="lowest shell of the window", ylabel="Toeplitz residual")
    below.xaxis.get_major_locator().set_params(integer=True)
    below.set_ylim(bottom=0)
    below.legend()
    return drawn


if __name__ == "__main__":
    main()
