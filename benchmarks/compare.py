"""Compares this package with its peers: one fresh process for each measurement.

Weights, images and blocks are exported once for each problem; each result is checked
against a reference in float64 before its time counts. What is measured already with
the same inputs, code and settings is not measured again, unless the machine was busy
with something else at the time. All goes to OUT/results.json.

Example:
  python benchmarks/environments.py
  python benchmarks/compare.py --out runs/peers
  python benchmarks/compare.py --out runs/small --problems resnet18_w4_n12
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from comparison.agreement import disagreement, tolerance
from comparison.grid import (
    PEERS,
    PLAN,
    TASKS,
    ProblemSpec,
    entrants,
    parse_problem,
    task_kind,
    variants,
    why_not,
)
from comparison.machine import describe_machine, others_seconds
from environments import FOLDER, interpreter, requirements

HERE = Path(__file__).resolve().parent
Record = dict[str, Any]

#: Seconds after which a single measurement is given up.
TIME_LIMIT = 300

#: Share of the machine that other processes may take during a measurement.
OTHERS = 0.1


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--problems", nargs="+", default=list(PLAN))
    parser.add_argument("--tasks", nargs="+", choices=TASKS)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--environments", type=Path, default=FOLDER)
    options = parser.parse_args()
    try:
        specs = [parse_problem(name) for name in options.problems]
    except ValueError as error:
        parser.error(str(error))
    (options.out / "measurements").mkdir(parents=True, exist_ok=True)
    for spec in specs:
        tasks = options.tasks or PLAN.get(spec.name, TASKS)
        about = export(spec, tasks, options)
        for task in tasks:
            for peer in filter(options.peers.__contains__, entrants(task)):
                for row in measure_task(peer, spec, task, about, options):
                    write_row(options.out, row)
                    print(summary(row), flush=True)
    path = options.out / "results.json"
    machines = json.loads(path.read_text())["environment"] if path.exists() else {}
    machines[options.device] = environment(options)
    results = {"environment": machines, **collect(options.out)}
    path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def export(
    spec: ProblemSpec, tasks: tuple[str, ...], options: argparse.Namespace
) -> Record:
    """Writes inputs and reference of a problem, unless they are there.

    Returns:
        What `export.py` tells about the problem.
    """
    folder = problem_folder(spec, options)
    derivative = any(task_kind(t) in ("derivative", "measurement") for t in tasks)
    told = folder / "problem.json"
    if told.exists():
        about = json.loads(told.read_text())
        if about["derivative"] or not derivative:
            return about
    print(f"{spec.name}: inputs and reference ...", flush=True)
    python = interpreter("grsd_jax", options.environments)
    command = [python, HERE / "export.py", spec.name, folder]
    command += ["--derivative"] if derivative else []
    environ = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([str(part) for part in command], check=True, env=environ)
    return json.loads(told.read_text())


def measure_task(
    peer: str,
    spec: ProblemSpec,
    task: str,
    about: Record,
    options: argparse.Namespace,
) -> Iterator[Record]:
    """Yields the rows of a peer on a task, one for each variant, as they come."""
    row = {"peer": peer, "problem": spec.name, "task": task, "device": options.device}
    reason = why_not(peer, spec, task)
    if reason is not None:
        yield {**row, "variant": None, "status": reason[0], "reason": reason[1]}
        return
    for variant in variants(peer, spec, task):
        named = {**row, "variant": variant}
        named["identity"] = identity(named, about, options)
        old = read_row(options.out, named) or {"identity": None}
        current = old["identity"] == named["identity"]
        if current and old["status"] != "busy":
            yield old
        else:
            yield run_measurement(named, spec, options)


def identity(row: Record, about: Record, options: argparse.Namespace) -> str:
    """Returns a fingerprint of all that a measurement depends on.

    That is the inputs, the settings, the pinned environment, the code of this folder
    that runs in the peer's process and, where the peer uses it, this package's own.
    """
    peer = PEERS[row["peer"]]
    files = [requirements(peer.environment), HERE / "run_peer.py"]
    files += sorted((HERE / "peers").glob("*.py"))
    names = ["harness", "agreement"]
    if peer.environment == "grsd_jax":
        names.append("inputs")
        source = HERE.parent / "src" / "grsd_jax"
        files += sorted(
            set(source.rglob("*.py")) - set(source.glob("experiments/**/*"))
        )
    files += [HERE / "comparison" / f"{name}.py" for name in names]
    told = [about["inputs"], options.repeats, options.seconds, os.cpu_count()]
    total = hashlib.sha256(repr([row, *told]).encode())
    for file in files:
        total.update(file.read_bytes())
    return total.hexdigest()[:16]


def run_measurement(
    row: Record, spec: ProblemSpec, options: argparse.Namespace
) -> Record:
    """Runs one measurement in a process of its own, and checks its result."""
    out = options.out / "measurements" / "current"
    command = peer_command(row, spec, options, out)
    started, before = time.perf_counter(), others_seconds()
    failure = run_process(command, options)
    if failure is not None:
        return {**row, **failure}
    elapsed = time.perf_counter() - started
    told = {"process_seconds": elapsed, **first_results(command, options, out)}
    elapsed = time.perf_counter() - started
    told["others"] = (others_seconds() - before) / (elapsed * (os.cpu_count() or 1))
    folder = problem_folder(spec, options)
    return {**row, **told, **judged(row["task"], folder, out, told["others"])}


def peer_command(
    row: Record, spec: ProblemSpec, options: argparse.Namespace, out: Path
) -> list[str]:
    """Returns the command of a measurement, which writes to ``out``."""
    python = interpreter(PEERS[row["peer"]].environment, options.environments)
    command = [str(python), str(HERE / "run_peer.py")]
    for name in ("peer", "problem", "task", "variant", "device"):
        command += [f"--{name}", row[name]]
    for name in ("repeats", "seconds"):
        command += [f"--{name}", str(getattr(options, name))]
    folder = problem_folder(spec, options)
    return [*command, "--folder", str(folder), "--out", str(out)]


def run_process(
    command: list[str], options: argparse.Namespace, **environ: str
) -> Record | None:
    """Runs a measurement to its end.

    Returns:
        None, or the status and the reason of a failure.
    """
    environ = {
        **os.environ,
        "JAX_PLATFORMS": {"cpu": "cpu", "gpu": "cuda"}[options.device],
        "JAX_TRACEBACK_FILTERING": "off",  # the last line names the error
        **environ,
    }
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIME_LIMIT, env=environ
        )
    except subprocess.TimeoutExpired:
        return {"status": "timeout", "reason": f"over {TIME_LIMIT:g} s"}
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        reason = f"exit status {done.returncode}: {last[:200]}"
        return {"status": "failed", "reason": reason}
    return None


def first_results(
    command: list[str], options: argparse.Namespace, out: Path
) -> dict[str, float | None]:
    """Times a fresh process to its first result, twice.

    First JAX's compilation cache is empty, then it holds what the first process put
    there. A peer that is not in JAX knows nothing of it.

    Returns:
        Seconds from the start of the Python program; None where it failed.
    """
    path = out.with_name(f"{out.name}_first")
    first = [*command[:-1], str(path), "--first"]
    found: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory() as cache:
        settings = {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        for name in ("first_result_seconds", "first_result_seconds_cached"):
            failure = run_process(first, options, **settings)
            told = path.with_suffix(".json")
            found[name] = None if failure else json.loads(told.read_text())
    return found


def judged(task: str, folder: Path, out: Path, others: float) -> Record:
    """Returns what a process recorded, with its status and its error.

    Args:
        task: What was measured.
        folder: That of the inputs and the reference.
        out: Where the process wrote, without the suffix.
        others: The share of the machine that other processes took.
    """
    with (
        np.load(out.with_suffix(".npz")) as result,
        np.load(folder / "inputs.npz") as inputs,
        np.load(folder / "reference.npz") as reference,
    ):
        error = disagreement(task, result, inputs, reference)
    status = "ok" if error <= tolerance(task) else "disagrees"
    if status == "ok" and others > OTHERS:
        status = "busy"
    return {
        "status": status,
        "error": error if np.isfinite(error) else None,
        "tolerance": tolerance(task),
        **json.loads(out.with_suffix(".json").read_text()),
    }


def environment(options: argparse.Namespace) -> Record:
    """Describes the machine and the settings."""
    settings = {"repeats": options.repeats, "seconds": options.seconds}
    return {**describe_machine(), "threads": os.cpu_count(), **settings}


def problem_folder(spec: ProblemSpec, options: argparse.Namespace) -> Path:
    """Returns the folder of a problem's inputs and reference."""
    return options.out / "problems" / spec.name


def row_path(out: Path, row: Record) -> Path:
    """Returns the file of a row."""
    names = (row["problem"], row["task"], row["peer"], row["variant"], row["device"])
    label = "-".join(str(name).replace(" ", "_") for name in names)
    return out / "measurements" / f"{label}.json"


def read_row(out: Path, row: Record) -> Record | None:
    """Returns the row as it was written, or None."""
    path = row_path(out, row)
    return json.loads(path.read_text()) if path.exists() else None


def write_row(out: Path, row: Record) -> None:
    """Writes a row, whole or not at all."""
    path = row_path(out, row)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(row, indent=1, sort_keys=True))
    part.replace(path)


def collect(out: Path) -> Record:
    """Returns the problems and the rows in a folder, in the order of the grid."""
    order = {"problem": list(PLAN), "task": list(TASKS), "peer": list(PEERS)}

    def place(row: Record) -> tuple[Any, ...]:
        places = [
            (known.index(row[name]) if row[name] in known else len(known), row[name])
            for name, known in order.items()
        ]
        return (*places, str(row["variant"]))

    files = sorted((out / "measurements").glob("*-*.json"))
    told = {
        path.parent.name: json.loads(path.read_text())
        for path in sorted((out / "problems").glob("*/problem.json"))
    }
    rows = [json.loads(path.read_text()) for path in files]
    return {"problems": told, "rows": sorted(rows, key=place)}


def summary(row: Record) -> str:
    """Returns the progress line of a row."""
    name = f"{row['problem']} {row['task']} {row['peer']}"
    if row["variant"]:
        name += f" ({row['variant']})"
    if "seconds" not in row:
        return f"{name}: {row['status']}, {row['reason']}"
    seconds = row["seconds"]["minimum"]
    error = "not finite" if row["error"] is None else f"{row['error']:.1e}"
    return f"{name}: {row['status']}, {seconds:.3f} s, error {error}"


if __name__ == "__main__":
    main()
