"""What the three stages share: the header, the clock, times, and files that are whole.

Only the standard library is imported before a stage asks for more, so that a stage can
set JAX's environment first.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
for _folder in (ROOT / "src", ROOT / "benchmarks", ROOT / "tests"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

from comparison.machine import describe_machine, installed_versions  # noqa: E402

#: XLA tries out kernels of Triton for every product and fusion, which takes minutes;
#: at this precision those of cuBLAS and cuDNN are hardly beaten.
XLA_FLAGS = (
    "--xla_gpu_enable_triton_gemm=false "
    "--xla_gpu_experimental_enable_fusion_autotuner=false"
)

#: Lines of an error that are written down.
_ERROR_LINES = 12


def parser(description: str, minutes: float) -> argparse.ArgumentParser:
    """Returns a parser with the options that every stage has."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    made.add_argument("--out", required=True, type=Path, help="Folder of the results.")
    made.add_argument("--minutes", type=float, default=minutes)
    made.add_argument(
        "--rehearse",
        action="store_true",
        help="Tiny sizes, on whatever device there is.",
    )
    made.add_argument(
        "--xla_flags",
        default=XLA_FLAGS,
        help="XLA_FLAGS, given as --xla_flags='...'; empty for XLA's own defaults.",
    )
    return made


def set_xla_flags(flags: str) -> None:
    """Adds to XLA's flags, for this process, before JAX starts, and those it starts."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()


class Clock:
    """Tells how much of the time of a stage is left."""

    def __init__(self, minutes: float) -> None:
        self.started = time.monotonic()
        self.end = self.started + 60 * minutes

    def left(self) -> float:
        """Returns the seconds that are left, below zero if none."""
        return self.end - time.monotonic()

    def spent(self) -> float:
        """Returns the seconds since the start."""
        return time.monotonic() - self.started


def claim(folder: Path, stage: str, settings: dict[str, Any]) -> None:
    """Ends the program if a folder holds results of another kind of run.

    Args:
        folder: Where the stage writes.
        stage: Its name.
        settings: What all results there must have in common, beside the card.
    """
    path = folder / f"{stage}.settings.json"
    settings = {**settings, "card": card()}
    held = read_json(path)
    if held not in (None, settings):
        sys.exit(f"--out: {folder} holds a run with {held}, not {settings}")
    write_json(path, settings)


def card() -> str | None:
    """Returns what the driver says of the card, None without one."""
    return _output(
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm",
        "--format=csv,noheader",
    )


def problem_name(num_examples: int, *, rehearse: bool) -> str:
    """Returns the name of stage 2's problem, in the comparison's manner."""
    return f"{'mlp_w4' if rehearse else 'resnet18_w64'}_n{num_examples}"


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_text(json.dumps(value, indent=1, sort_keys=True, default=str) + "\n")
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    """Returns what a JSON file holds, None if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else None


def header(device: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the card, its driver, the versions, the command and the commit."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "nvidia_smi": card(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "machine": describe_machine(),
        "python": platform.python_version(),
        "versions": installed_versions(),
        "device": device,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def jax_device() -> dict[str, Any]:
    """Returns what JAX says of its default device."""
    import jax

    device = jax.local_devices()[0]
    return {
        "backend": jax.default_backend(),
        "kind": device.device_kind,
        "memory": device.memory_stats(),
    }


def summary(times: list[float]) -> dict[str, Any]:
    """Returns minimum, median and all of the times."""
    return {
        "minimum": min(times),
        "median": statistics.median(times),
        "repeats": times,
    }


def timed(
    call: Callable[[], Any], *, repeats: int = 5, seconds: float = 4.0
) -> tuple[Any, dict[str, Any]]:
    """Runs a call once to compile it, then as often as the time allows.

    Args:
        call: Returns once its result is there.
        repeats: The most repeats.
        seconds: The time for them; one is always made.

    Returns:
        The result, and ``first_seconds``, ``seconds`` and ``compile_seconds``, what the
        first call took longer than the shortest later one.
    """

    def once() -> tuple[float, Any]:
        started = time.perf_counter()
        result = call()
        return time.perf_counter() - started, result

    first, result = once()
    times: list[float] = []
    while not times or (len(times) < repeats and sum(times) + min(times) <= seconds):
        del result  # two results at once would raise the peak of memory
        taken, result = once()
        times.append(taken)
    return result, {
        "first_seconds": first,
        "compile_seconds": max(0.0, first - min(times)),
        "seconds": summary(times),
    }


def last_lines(text: str, count: int = _ERROR_LINES) -> list[str]:
    """Returns the last lines of a text, each cut to a readable length."""
    return [line[:400] for line in text.strip().splitlines()[-count:]]


class Results:
    """The measurements of a stage in a folder, one file each.

    What is there is not measured again. A failure is written down by its name, beside
    the measurements and in no way of a later attempt.
    """

    def __init__(self, folder: Path, clock: Clock) -> None:
        self.folder, self.clock = folder, clock
        self.left_out: list[str] = []

    def path(self, name: str) -> Path:
        """Returns the file of a measurement."""
        return self.folder / f"{name}.json"

    def measure(
        self, name: str, run: Callable[[], dict[str, Any]], *, needs: float = 5.0
    ) -> None:
        """Makes a measurement, unless it is there or the time is nearly up.

        Args:
            name: Its name.
            run: Returns what is written.
            needs: Seconds that must be left for it to be started.
        """
        if self.path(name).exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.clock.left() < needs:
            self.left_out.append(name)
            print(f"{name}: left out, the time is up", flush=True)
            return
        started, failure = time.monotonic(), self.folder / f"{name}.failed.json"
        marker = self.folder / f"{name}.running"
        if marker.exists():  # the process before this one did not survive it
            marker.unlink()
            write_json(failure, {"name": name, "error": "crash", "lines": []})
            return
        marker.touch()
        try:
            record = run()
        except Exception as error:
            lines = last_lines(traceback.format_exc())
            kind = type(error).__name__
            write_json(failure, {"name": name, "error": kind, "lines": lines})
            message = str(error).strip().splitlines() or [""]
            print(f"{name}: {kind}: {message[0][:200]}", flush=True)
            return
        finally:
            marker.unlink(missing_ok=True)
        failure.unlink(missing_ok=True)
        spent = time.monotonic() - started
        write_json(self.path(name), {"name": name, "stage_seconds": spent, **record})
        print(f"{name}: done in {spent:.1f} s", flush=True)


def _output(*command: str) -> str | None:
    """Returns what a command prints, None if it cannot be run."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
