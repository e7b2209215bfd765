"""Stage 1: the tests for an accelerator, then a part of the ordinary ones on it.

Every test is written down as it ends. Started again with the same folder, the stage
runs only what has not ended or has failed.

Example:
  python benchmarks/gpu/correctness.py --out runs/gpu
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import ROOT, Clock, claim, header, parser, set_xla_flags, write_json

#: Ordinary tests that need one device; they are for information.
ORDINARY = (
    "kernel",
    "factored",
    "lanczos",
    "eigenpairs",
    "derivative",
    "dense",
    "binning",
    "toeplitz",
    "power_law",
    "ritz",
    "density",
    "measurement",
    "probe",
    "layers",
    "balance",
    "problem",
    "errors",
    "architectures",
)

#: The ordinary tests that are run: those of the gate, and not only the fast ones.
_GATE = ("-m", "not scheduled and not gpu")

#: Share of the time that the tests for an accelerator may take.
_SHARE = 0.65

#: Seconds of one test.
_TEST_SECONDS = {"gpu": 90, "ordinary": 40}


def main() -> None:
    """Runs what the command line asks for."""
    options = parser(__doc__, minutes=3).parse_args()
    # Trying out algorithms would take most of the time, and changes no precision.
    flags = f"{options.xla_flags} --xla_gpu_autotune_level=0"
    set_xla_flags(flags if options.xla_flags else "")
    clock = Clock(options.minutes)
    options.out.mkdir(parents=True, exist_ok=True)
    device = find_device()
    on_accelerator = device["backend"] not in ("cpu", None)
    if not on_accelerator and not options.rehearse:
        sys.exit(f"no accelerator: JAX found {device}; --rehearse runs without one")
    settings = {"rehearse": options.rehearse, "xla_flags": options.xla_flags}
    claim(options.out, "correctness", settings)
    about = header(device)
    about["rehearsal"] = options.rehearse
    runs = {
        "gpu": ["-m", "gpu", "tests/test_gpu.py"],
        "ordinary": [*_GATE, *(f"tests/test_{name}.py" for name in ORDINARY)],
    }
    if options.rehearse:
        runs["gpu"] += ["-k", "statistics"]
        runs["ordinary"] = [*_GATE, "tests/test_ritz.py"]
    limits = {"gpu": _SHARE * 60 * options.minutes, "ordinary": 60 * options.minutes}
    results = {}
    for name, arguments in runs.items():
        seconds = limits[name] - clock.spent()
        record = options.out / f"tests_{name}.jsonl"
        ended = run_tests(name, arguments, record, seconds, on_accelerator)
        results[name] = {"complete": ended, "tests": read_tests(record)}
        write_json(options.out / "correctness.json", {"header": about, **results})
    for name, result in results.items():
        print(told(name, result))
    if any(test["outcome"] == "failed" for test in results["gpu"]["tests"].values()):
        sys.exit(1)


def find_device() -> dict[str, Any]:
    """Returns what JAX finds, asked in another process."""
    code = "import json, common; print(json.dumps(common.jax_device()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    if done.returncode:
        return {"backend": None, "error": done.stderr[-2000:]}
    return json.loads(done.stdout.splitlines()[-1])


def run_tests(
    name: str, arguments: list[str], record: Path, seconds: float, accelerated: bool
) -> bool:
    """Runs tests that have not passed yet, for so many seconds at most.

    Returns:
        Whether the run came to its end.
    """
    passed = [test for test, about in read_tests(record).items() if _is_passed(about)]
    if seconds < 10:
        return False
    here = Path(__file__).resolve().parent
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT / "src"), str(here), os.environ.get("PYTHONPATH", "")]
        ),
        "JAX_PLATFORMS": "cuda,cpu" if accelerated else "cpu",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        # The ordinary tests were written for a CPU, where there is no TF32.
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "GRSD_RECORD": str(record.resolve()),
        "GRSD_SECONDS": str(_TEST_SECONDS[name]),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "pytest_record"]
    # A warning of the accelerator's runtime is no failure of a test.
    command += ["-W", "default", "-p", "no:cacheprovider", "--tb", "short"]
    if importlib.util.find_spec("xdist"):
        most = 14 if name == "gpu" else 12
        workers = min(most, os.cpu_count() or 1) if accelerated else 0
        command += ["-n", str(workers)]
    for test in passed:
        command += ["--deselect", test]
    log = record.with_suffix(".log")
    with log.open("a") as file:
        process = subprocess.Popen(
            command + arguments,
            cwd=ROOT,
            env=environ,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return False
    return True


def read_tests(record: Path) -> dict[str, dict[str, Any]]:
    """Returns the last that was written of each test, by its name."""
    if not record.exists():
        return {}
    tests: dict[str, dict[str, Any]] = {}
    for line in record.read_text().splitlines():
        if line.endswith("}"):  # the last one may have been cut short
            about = json.loads(line)
            tests[about.pop("test")] = about
    return tests


def told(name: str, result: dict[str, Any]) -> str:
    """Returns the counts of a run, and the names of what failed."""
    tests = result["tests"]
    failed = [test for test, about in tests.items() if about["outcome"] == "failed"]
    passed = sum(map(_is_passed, tests.values()))
    lines = [
        f"{name}: {passed} passed, {len(failed)} failed of {len(tests)} that ended"
    ]
    if not result["complete"]:
        lines[0] += "; the time was up before the rest"
    for test in failed:
        lines += [f"  {test}", *(f"    {line}" for line in tests[test]["lines"][-2:])]
    return "\n".join(lines)


def _is_passed(about: dict[str, Any]) -> bool:
    return about["outcome"] in ("passed", "skipped")


if __name__ == "__main__":
    main()
