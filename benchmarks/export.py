"""Writes the inputs of a problem and its reference; `compare.py` calls it.

It runs in the environment of this package.

Example:
  python benchmarks/export.py resnet18_w4_n4 runs/peers/problems/resnet18_w4_n4
"""

import argparse
import json
from pathlib import Path

import numpy as np

from comparison.grid import PLAN, parse_problem
from comparison.inputs import digest, make_inputs, make_reference


def main() -> None:
    """Exports one problem."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("problem", help=f"for example {next(iter(PLAN))}")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--derivative", action="store_true")
    options = parser.parse_args()
    spec = parse_problem(options.problem)
    options.folder.mkdir(parents=True, exist_ok=True)
    inputs = make_inputs(spec)
    reference = make_reference(spec, inputs, derivative=options.derivative)
    np.savez(options.folder / "inputs.npz", **inputs)
    np.savez(options.folder / "reference.npz", **reference)
    parameters = [v for k, v in inputs.items() if k.startswith("params/")]
    about = {
        "inputs": digest(inputs),
        "dimension": spec.size,
        "parameters": sum(array.size for array in parameters),
        "derivative": options.derivative,
    }
    (options.folder / "problem.json").write_text(json.dumps(about))


if __name__ == "__main__":
    main()
