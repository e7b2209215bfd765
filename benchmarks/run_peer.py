"""Runs one measurement of one peer in this process; `compare.py` calls it.

It is run by the Python of the peer's own environment, and needs NumPy beside the peer.

Example:
  .venv-benchmarks/torch/bin/python benchmarks/run_peer.py --peer torch_func \
    --problem resnet18_w4_n4 --task dense --variant "whole batch" \
    --folder runs/peers/problems/resnet18_w4_n4 --out runs/measurement
"""

import time

_STARTED = time.perf_counter()

# What a user waits for begins with the imports.
# ruff: noqa: E402
import argparse
import importlib
import json
from pathlib import Path

import numpy as np

from comparison.grid import PEERS, parse_problem
from comparison.harness import Job, first_result_seconds, measure
from comparison.machine import installed_versions


def main() -> None:
    """Measures, and writes ``OUT.json`` and ``OUT.npz``, or with ``--first`` JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", required=True, choices=PEERS)
    parser.add_argument("--problem", required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--variant", required=True)
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--repeats", default=5, type=int)
    parser.add_argument("--seconds", default=15.0, type=float)
    parser.add_argument(
        "--first", action="store_true", help="Only the time to the first result."
    )
    options = parser.parse_args()

    with np.load(options.folder / "inputs.npz") as file:
        inputs = dict(file)
    job = Job(
        peer=options.peer,
        spec=parse_problem(options.problem),
        task=options.task,
        variant=options.variant,
        device=options.device,
        inputs=inputs,
        folder=options.folder,
    )
    peer = importlib.import_module(f"peers.{PEERS[options.peer].module}")
    case = peer.make_case(job)
    if options.first:
        seconds = first_result_seconds(case, _STARTED)
        options.out.with_suffix(".json").write_text(json.dumps(seconds))
        return
    record, arrays = measure(case, repeats=options.repeats, seconds=options.seconds)
    record["versions"] = installed_versions()
    np.savez(options.out.with_suffix(".npz"), **arrays)
    options.out.with_suffix(".json").write_text(json.dumps(record))


if __name__ == "__main__":
    main()
