"""Times one checkout of the library on request; `against_commit.py` starts it.

The checkout is the ``grsd_jax`` that Python finds, before or after `Problem`. When each
operation has been compiled and its result is saved, a line of JSON says so. Then each
line read is the name of an operation, and the answer is its seconds.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import grsd_jax
import jax
import numpy as np

from comparison.grid import ProblemSpec, parse_problem
from comparison.inputs import Loaded, load, make_inputs
from comparison.machine import installed_versions

Operations = dict[str, Callable[[], Any]]

#: A turn repeats a short operation for this long, at most so many times.
TURN_SECONDS, TURN_CALLS = 0.5, 20

PREPARE = "prepare"


def make_operations(loaded: Loaded) -> Operations:
    """Returns the operations to time, by name, each on the mean over the one batch."""
    if hasattr(grsd_jax, "Problem"):
        arguments = (loaded.problem().replace(reduction="mean"), loaded.params)
        with_derivative = grsd_jax.kernel_dense
    else:
        error_fn = grsd_jax.models.linen_error_fn(loaded.model, loaded.state)
        arguments = (error_fn, loaded.params, loaded.batches)  # the mean by default
        with_derivative = grsd_jax.kernel_with_derivative_dense
    narrow, wide = loaded.block[:, :8], loaded.block[:, :32]
    prepared = functools.cache(lambda: grsd_jax.linearize_kernel(*arguments))
    return {
        "dense M": lambda: grsd_jax.kernel_dense(*arguments),
        "dense M and Mdot": lambda: with_derivative(*arguments, loaded.direction),
        PREPARE: lambda: grsd_jax.linearize_kernel(*arguments),
        "M V, b = 8": lambda: prepared().matmat(narrow),
        "M V, b = 32": lambda: prepared().matmat(wide),
        "V^T Mdot V, r = 32": lambda: grsd_jax.kernel_derivative(
            *arguments, loaded.direction, wide
        ),
    }


def first_calls(operations: Operations) -> tuple[dict[str, float], dict[str, Any]]:
    """Returns the seconds of every operation's first call, and the results by name."""
    seconds, results = {}, {}
    for name, operation in operations.items():
        seconds[name], result = _timed(operation)
        if name != PREPARE:  # a kernel, not a number
            for index, array in enumerate(jax.tree.leaves(result)):
                results[f"{name}/{index}"] = np.asarray(array)
    return seconds, results


def turn(operation: Callable[[], Any]) -> float:
    """Returns the seconds of the fastest call in one turn."""
    times = [_timed(operation)[0]]
    while sum(times) < TURN_SECONDS and len(times) < TURN_CALLS:
        times.append(_timed(operation)[0])
    return min(times)


def serve(operations: Operations, requests: Iterable[str], answers: TextIO) -> None:
    """Answers every line that names an operation with its seconds."""
    for line in requests:
        print(json.dumps(turn(operations[line.strip()])), file=answers, flush=True)


def inputs_at(path: Path, spec: ProblemSpec) -> Mapping[str, np.ndarray]:
    """Returns the arrays of a problem from a file, which is made if it is not there."""
    if not path.exists():
        np.savez(path, **make_inputs(spec))
    with np.load(path) as file:
        return dict(file)


def main() -> None:
    """Prepares everything, says so, and serves until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("problem", help="for example resnet18_w16_n32")
    parser.add_argument(
        "--inputs", required=True, type=Path, help="NPZ, made if absent"
    )
    parser.add_argument("--results", required=True, type=Path, help="NPZ to write")
    options = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing else may print an answer
    spec = parse_problem(options.problem)
    operations = make_operations(load(spec, inputs_at(options.inputs, spec)))
    seconds, results = first_calls(operations)
    np.savez(options.results, **results)
    about = {
        "library": grsd_jax.__file__,
        "versions": installed_versions(),
        "first_seconds": seconds,
    }
    print(json.dumps(about), file=answers, flush=True)
    serve(operations, sys.stdin, answers)


def _timed(operation: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = jax.block_until_ready(operation())
    return time.perf_counter() - started, result


if __name__ == "__main__":
    main()
