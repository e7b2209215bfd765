"""Times one case in this process: preparation, first call, repeats, peak memory.

NumPy and the standard library alone, so that every peer's environment can run it.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from comparison.grid import ProblemSpec, block_width, task_kind

#: A call longer than this counts as a repeat itself if nothing was left to compile.
LONG_SECONDS = 20.0

Inputs = Mapping[str, np.ndarray]


class Job(NamedTuple):
    """One measurement: what a peer is to do, and on what.

    Attributes:
        peer: Its key in `comparison.grid.PEERS`.
        spec: The problem.
        task: One of the tasks.
        variant: The way the peer is to do it.
        device: ``cpu`` or ``gpu``.
        inputs: The arrays of the problem.
        folder: Where they and the reference are.
    """

    peer: str
    spec: ProblemSpec
    task: str
    variant: str
    device: str
    inputs: Inputs
    folder: Path

    @property
    def kind(self) -> str:
        """The kind of task, without its width."""
        return task_kind(self.task)

    @property
    def block(self) -> np.ndarray:
        """The columns of a task for a block, ``[n, b]``."""
        return self.inputs["block"][:, : block_width(self.task)]


def matrix(result: Any) -> dict[str, np.ndarray]:
    """Returns the arrays of a task whose result is one matrix."""
    return {"matrix": np.asarray(result)}


class Case(NamedTuple):
    """One way to do one task, ready to be timed.

    Attributes:
        run: ``run(state)``, what is timed; returns once the result is there.
        arrays: Turns what ``run`` returned into named arrays, for the check.
        prepare: Makes the state, once for many runs; timed apart. None if there is
            nothing to prepare.
        compile: Compiles what ``run`` needs, where that can be done apart.
        warm: Whether the first run has nothing of weight left to compile.
        beside: Another function of the state, timed in turn with ``run``.
        details: What else to record, asked after the last run.
        compilations: Tells how many programs were compiled so far in this process.
        other_weights: Prepares and runs once more at other weights of the same shapes.
        peak_device_bytes: Tells the peak memory of an accelerator.
    """

    run: Callable[[Any], Any]
    arrays: Callable[[Any], dict[str, np.ndarray]] = matrix
    prepare: Callable[[], Any] | None = None
    compile: Callable[[], None] | None = None
    warm: bool = False
    beside: Callable[[Any], Any] | None = None
    details: Callable[[], dict[str, Any]] | None = None
    compilations: Callable[[], int] | None = None
    other_weights: Callable[[], Any] | None = None
    peak_device_bytes: Callable[[], int] | None = None


def measure(
    case: Case, *, repeats: int, seconds: float
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Runs a case and returns its times and its result.

    The first call is apart: it compiles. After it come as many repeats as the time
    allows by the shortest of them, at least one. A first call of more than
    `LONG_SECONDS` that had nothing to compile is a repeat itself, and the only one.

    Args:
        case: The case.
        repeats: The most repeats.
        seconds: The time for them; a single call may be longer.

    Returns:
        The record and the result's arrays. Times are seconds; ``compile_seconds`` is
        what the first preparation and run took over the later ones, or the time of
        ``compile`` if it can be done apart.
    """
    base = peak_mib()
    compiling = _timed(case.compile)[0] if case.compile else None
    state, first_prepare, prepare = None, 0.0, 0.0
    if case.prepare:
        first_prepare, state = _timed(case.prepare)
        state = None  # two states at once would double the peak memory
        prepare, state = _timed(case.prepare)
    first, result = _timed(lambda: case.run(state))
    times, beside = [], []
    if first > LONG_SECONDS and (case.warm or case.compile):
        times, repeats = [first], 1
    if case.beside:
        case.beside(state)  # compiles
    while not times or (
        len(times) < repeats and sum(times) + min(times) + sum(beside) <= seconds
    ):
        times.append(_timed(lambda: case.run(state))[0])
        if case.beside:
            beside.append(_timed(lambda: case.beside(state))[0])
    if compiling is None:
        compiling = max(0.0, first_prepare + first - prepare - min(times))
    record: dict[str, Any] = {
        "seconds": _summary(times),
        "prepare_seconds": prepare if case.prepare else None,
        "first_seconds": first_prepare + first,
        "compile_seconds": compiling,
        "base_mib": base,
        "peak_mib": peak_mib(),
    }
    if case.peak_device_bytes:
        record["peak_device_mib"] = case.peak_device_bytes() / 2**20
    if beside:
        record["beside_seconds"] = _summary(beside)
    if case.details:
        record["details"] = case.details()
    if case.compilations:
        record["programs"] = case.compilations()
        if case.other_weights:
            case.other_weights()
            record["recompilations"] = case.compilations() - record["programs"]
    return record, case.arrays(result)


def first_result_seconds(case: Case, started: float) -> float:
    """Returns the seconds from ``started`` to the first result, imports included.

    Args:
        case: The case, of which nothing has run yet in this process.
        started: `time.perf_counter` when the process began.
    """
    if case.compile:
        case.compile()
    state = case.prepare() if case.prepare else None
    case.run(state)
    return time.perf_counter() - started


def peak_mib() -> float:
    """Returns the peak resident memory of this process so far.

    As `grsd_jax._memory.peak_bytes`, which the peers' environments lack: the resource
    module's maximum would count the process that started this one too.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def subtree(inputs: Inputs, prefix: str) -> dict[str, np.ndarray]:
    """Returns the arrays under a prefix, by the rest of their names."""
    start = prefix + "/"
    return {
        name.removeprefix(start): array
        for name, array in inputs.items()
        if name.startswith(start)
    }


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def _summary(times: list[float]) -> dict[str, Any]:
    return {
        "minimum": min(times),
        "median": statistics.median(times),
        "repeats": times,
    }
