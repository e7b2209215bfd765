"""Stage 2: how fast a card is used, with the error of each result against float64.

The parts run in processes of their own, the most important first; each measurement is
written as it is done, so that a time limit cuts the least important. `speed.json`
collects them with shares of the measured peak and errors.

Example:
  python benchmarks/gpu/speed.py --out runs/gpu
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common

PARTS = ("first", "torch", "second", "torch_widest", "torch_tf32")

#: Seconds past the end that a measurement under way may take.
_GRACE = 15.0

#: Outputs of an image.
_CLASSES = 10

#: What is used is allocated, up to nearly all of the card's memory.
_MEMORY = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
}


def main() -> None:
    """Runs what the command line asks for."""
    parser = common.parser(__doc__, minutes=3)
    parser.add_argument("--part", choices=(*PARTS, "operations"), help="For itself.")
    options = parser.parse_args()
    folder = options.out / "speed"
    folder.mkdir(parents=True, exist_ok=True)
    clock = common.Clock(options.minutes)
    common.set_xla_flags(options.xla_flags)
    if options.part:
        run_part(options.part, folder, clock, options.rehearse)
        return
    settings = {"rehearse": options.rehearse, "xla_flags": options.xla_flags}
    common.claim(options.out, "speed", settings)
    # Counting needs no device, and runs beside the parts.
    counting = start("operations", options, clock, JAX_PLATFORMS="cpu")
    left_out = []
    for part in PARTS:
        if part.startswith("torch") and importlib.util.find_spec("torch") is None:
            left_out.append(f"{part}: not installed")
            continue
        left_out += finish(part, options, clock)
    try:
        counting.wait(max(1.0, clock.left() + _GRACE))
    except subprocess.TimeoutExpired:
        stop(counting)
    report = collect(folder)
    report["left_out"] = left_out
    report["header"] = common.header(common.read_json(folder / "device.json"))
    report["header"]["rehearsal"] = options.rehearse
    common.write_json(options.out / "speed.json", report)
    print(table(report))


def run_part(part: str, folder: Path, clock: common.Clock, rehearse: bool) -> None:
    """Makes the measurements of a part in this process."""
    if part.startswith("torch"):
        import speed_torch

        precision = "tf32" if part == "torch_tf32" else "highest"
        wide = part != "torch"
        left_out = speed_torch.run(folder, clock, precision, rehearse, wide=wide)
    else:
        import speed_jax

        made = speed_jax.Part(folder, clock, rehearse)
        if part == "operations":
            wait_for(folder / "inputs.npz", clock)
        else:
            common.write_json(folder / "device.json", common.jax_device())
        speed_jax.PARTS[part](made)
        left_out = made.results.left_out
    common.write_json(folder / f"left_out_{part}.txt", left_out)


def wait_for(path: Path, clock: common.Clock) -> None:
    """Waits until another part has made a file."""
    while not path.exists() and clock.left() > 0:
        time.sleep(0.5)


def start(
    part: str, options: Any, clock: common.Clock, **environ: str
) -> subprocess.Popen[bytes]:
    """Starts a part in a process of its own, with its output in a log."""
    command = [sys.executable, __file__, "--part", part, "--out", str(options.out)]
    command += ["--minutes", str(max(0.0, clock.left() / 60))]
    command += ["--xla_flags="]  # they are in the environment by now
    command += ["--rehearse"] if options.rehearse else []
    with (options.out / f"speed_{part}.log").open("a") as log:
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**_MEMORY, **os.environ, **environ},
            start_new_session=True,
        )


def finish(part: str, options: Any, clock: common.Clock) -> list[str]:
    """Runs a part to its end, and again without what made it crash.

    Returns:
        What it left out.
    """
    folder = options.out / "speed"
    told = folder / f"left_out_{part}.txt"
    for _ in range(3):
        if clock.left() < 5:
            break
        told.unlink(missing_ok=True)
        process = start(part, options, clock)
        try:
            code = process.wait(clock.left() + _GRACE)
        except subprocess.TimeoutExpired:
            stop(process)
            for marker in folder.glob("*.running"):
                marker.unlink()
            return [f"{part}: stopped at the end of the time"]
        if code == 0:
            return common.read_json(told) or []
        print(f"{part}: ended with {code}, see speed_{part}.log", flush=True)
    return [f"{part}: no time, or ended early"]


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a part and what it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def collect(folder: Path) -> dict[str, Any]:
    """Reads all measurements, and adds errors, operations and shares of the peak."""
    read = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    read.pop("device", None)
    counts = {
        name.removeprefix("operations_"): read.pop(name)
        for name in list(read)
        if name.startswith("operations_")
    }
    failures = {n: read.pop(n) for n in list(read) if n.endswith(".failed")}
    rates = {
        precision: made["operations"] / made["seconds"]["minimum"]
        for precision in ("highest", "tf32", "bf16")
        if (made := read.get(f"matmul_{precision}"))
    }
    forward = next((c for n, c in counts.items() if n.endswith("_forward")), None)
    for name, record in read.items():
        work, precision = split_name(name)
        if work in counts:
            record["operations"] = counts[work]["operations"]
            record["bytes_before_fusion"] = counts[work]["bytes_before_fusion"]
        plain = plain_operations(work, forward, counts.get("parameters"))
        if plain is not None:
            record["operations_of_plain_differentiation"] = plain
        for key in ("operations", "operations_of_plain_differentiation"):
            if record.get(key) and precision in rates and "seconds" in record:
                rate = record[key] / record["seconds"]["minimum"]
                share = key.replace("operations", "share_of_peak")
                record[share] = rate / rates[precision]
        error = error_of(folder, name, work)
        if error is not None:
            record["error"] = error
    return {
        "measurements": read,
        "failures": failures,
        "peak_operations_per_second": rates,
        "counts": counts,
    }


def split_name(name: str) -> tuple[str, str]:
    """Cuts a measurement's name into the work and the precision."""
    work, _, precision = name.rpartition("_")
    return re.sub(r"_chunk\d+", "", work), precision


def plain_operations(
    work: str, forward: dict[str, Any] | None, parameters: dict[str, Any] | None
) -> float | None:
    """Returns the operations of plain differentiation, in closed form.

    With f those of a forward pass: 4 f for each column of a product, 6 f for one of a
    derivative, 2 f for each output's rows of J and twice their inner products.
    """
    found = re.match(
        r"(?:resnet|mlp|torch)_k(\d+)n(\d+)_(dense|block_?|derivative)", work
    )
    if found is None or parameters is None or not (forward or {}).get("operations"):
        return None
    assert forward is not None
    whole = re.match(r"(?:resnet|mlp)_k(\d+)n(\d+)", forward["name"].partition("_")[2])
    assert whole is not None
    one_image = forward["operations"] / int(whole[2])
    passes = one_image * int(found[1]) * int(found[2])
    if found[3] == "dense":
        size = _CLASSES * int(found[1]) * int(found[2])
        return 2 * _CLASSES * passes + 2 * size**2 * parameters["operations"]
    width = int(re.findall(r"(?:block|derivative)_?(\d+)", work)[0])
    return (6 if found[3] == "derivative" else 4) * passes * width


def error_of(folder: Path, name: str, work: str) -> float | None:
    """Returns the largest error of the kept columns, over the largest entry."""
    import numpy as np

    def columns(stem: str) -> Any:
        path = folder / f"{stem}.npz"
        if not path.exists():
            return None
        with np.load(path) as file:
            return file["columns"].astype(np.float64)

    got = columns(name)
    if got is None or "reference" in name:
        return None
    kind = work.partition("_")[0]
    if kind.startswith("gpt"):
        expected = columns(f"{kind}_reference")
    elif "derivative" in work:
        expected = columns("reference_derivative")
    else:
        expected = columns("reference")
        if expected is not None:
            dense, product = np.split(expected, 2, axis=1)
            # M of the first images is a corner of that of all.
            expected = dense[: len(got)] if "dense" in work else product
            got = got[:, : expected.shape[1]]
            expected = expected[:, : got.shape[1]]
    if expected is None or got.shape != expected.shape:
        return None
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def table(report: dict[str, Any]) -> str:
    """Returns a short table of the measurements.

    Shares of the measured peak: by the operations that XLA counts, and by those of
    plain differentiation.
    """
    heads = f"{'seconds':>9} {'first':>7} {'share':>6} {'plain':>6} {'error':>8}"
    lines = [f"{'measurement':48} {heads}"]
    for name, record in sorted(report["measurements"].items()):
        if "seconds" not in record:
            continue
        cells = [
            format(record["seconds"]["minimum"], "9.4f"),
            _cell(record.get("first_seconds"), "7.2f"),
            _cell(record.get("share_of_peak"), "6.2f"),
            _cell(record.get("share_of_peak_of_plain_differentiation"), "6.2f"),
            _cell(record.get("error"), "8.1e"),
        ]
        lines.append(f"{name:48} {' '.join(cells)}")
    lines += [f"failed: {name}" for name in sorted(report["failures"])]
    lines += [f"left out: {name}" for name in report["left_out"]]
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    width = int(form.partition(".")[0])
    return " " * width if value is None else format(value, form)


if __name__ == "__main__":
    main()
