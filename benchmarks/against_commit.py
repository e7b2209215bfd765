"""Compares the speed and the numbers of this tree with another commit, in turn.

One process for each tree makes the same kernel of a ResNet-18 on 32 x 32 images. After
compilation they take turns, operation by operation, so that a machine that slows down
slows both. A time is the median over the turns; a turn of a short operation takes the
fastest of its calls. The ratio is this tree's time over the other's, below one if this
tree is faster; the range is that of the ratios of neighboring turns. The difference of
the results is relative, in the Frobenius norm.

Example:
  python benchmarks/against_commit.py --commit 3397523
  python benchmarks/against_commit.py --other ../checkout --width 2 --num_examples 4 \
    --repeats 2 --out runs/against.json
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from comparison.grid import NUM_CLASSES
from comparison.machine import describe_machine, others_seconds

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
Record = dict[str, Any]

#: Ratio of the medians up to which this tree counts as fast as the other.
LIMIT = 1.05

#: Columns of the widest block.
_WIDEST = 32


class Worker:
    """A process that times the operations of one tree, see `against_worker.py`.

    Attributes:
        about: What it says of itself once it is ready.
    """

    def __init__(self, process: subprocess.Popen, tree: Path) -> None:
        self._process = process
        self.about = self._answer()
        library = Path(self.about["library"])
        if not library.is_relative_to(tree / "src"):
            raise RuntimeError(f"expected the library of {tree}, got {library}.")

    def seconds(self, operation: str) -> float:
        """Returns the seconds that one turn of an operation took."""
        self._process.stdin.write(f"{operation}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with status {self._process.wait()}.")
        return json.loads(line)


@contextlib.contextmanager
def started(command: list[str], tree: Path) -> Iterator[Worker]:
    """Yields a worker that has compiled everything, and ends its process at last."""
    environ = {
        **os.environ,
        "PYTHONPATH": str(tree / "src"),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # two share a GPU
    }
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environ, **pipes) as process:
        yield Worker(process, tree)


def main() -> None:
    """Compares, prints the table, and writes JSON if asked."""
    options = parse_options()
    name = f"resnet18_w{options.width}_n{options.num_examples}"
    started, before = time.perf_counter(), others_seconds()
    with tempfile.TemporaryDirectory() as folder:
        other = options.other or unpacked(options.commit, Path(folder, "other"))
        trees = {"this": ROOT, "other": Path(other).resolve()}
        result = compare(trees, name, options.repeats, Path(folder))
    elapsed = time.perf_counter() - started
    share = (others_seconds() - before) / (elapsed * (os.cpu_count() or 1))
    result["this"]["commit"] = describe_commit(ROOT)
    result["other"]["commit"] = options.commit or describe_commit(options.other)
    result |= {"problem": name, "repeats": options.repeats, "others": share}
    result["machine"] = describe_machine()
    print(render(result))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


def parse_options() -> argparse.Namespace:
    """Returns what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    other = parser.add_mutually_exclusive_group(required=True)
    other.add_argument("--commit", help="the commit of this repository to compare with")
    other.add_argument("--other", type=Path, help="another checkout, for a commit")
    parser.add_argument(
        "--repeats", type=int, default=7, help="turns of each tree (default: 7)"
    )
    parser.add_argument(
        "--width", type=int, default=16, help="channels of the first stage (16)"
    )
    parser.add_argument(
        "--num_examples", type=int, default=32, help="images, at least 4 (32)"
    )
    parser.add_argument("--out", type=Path, help="write all of it to this JSON file")
    options = parser.parse_args()
    fewest = -(-_WIDEST // NUM_CLASSES)
    for name, least in (("repeats", 1), ("width", 1), ("num_examples", fewest)):
        if getattr(options, name) < least:
            parser.error(f"--{name}: expected at least {least}.")
    return options


def compare(trees: dict[str, Path], problem: str, repeats: int, folder: Path) -> Record:
    """Runs the workers of two trees in turn.

    Args:
        trees: The checkouts, this one first; it makes the inputs of both.
        problem: The problem's name.
        repeats: Turns of each tree.
        folder: Where inputs and results are written.

    Returns:
        What each worker says of itself, and a row for every operation.
    """

    def start(name: str) -> contextlib.AbstractContextManager[Worker]:
        print(f"{name}: compiling ...", file=sys.stderr, flush=True)
        command = [sys.executable, HERE / "against_worker.py", problem]
        command += ["--inputs", folder / "inputs.npz"]
        command += ["--results", folder / f"{name}.npz"]
        return started([str(part) for part in command], trees[name])

    with start("this") as this, start("other") as other:
        operations = list(this.about["first_seconds"])
        times = {operation: [] for operation in operations}
        for turn in range(repeats):
            print(f"turn {turn + 1} of {repeats} ...", file=sys.stderr, flush=True)
            for operation in operations:
                pair = [worker.seconds(operation) for worker in (this, other)]
                times[operation].append(pair)
    with np.load(folder / "this.npz") as ours, np.load(folder / "other.npz") as theirs:
        differences = largest_differences(ours, theirs)
    about = {"this": this.about, "other": other.about}
    for told in about.values():
        del told["library"]
    rows = [make_row(name, times[name], differences.get(name)) for name in times]
    return {**about, "rows": rows}


def largest_differences(
    ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]
) -> dict[str, float]:
    """Returns the largest relative difference of each operation's arrays."""
    found: dict[str, float] = {}
    for key in ours:
        operation = key.rpartition("/")[0]
        a, b = (np.asarray(arrays[key], np.float64) for arrays in (ours, theirs))
        difference = float(np.linalg.norm(a - b) / np.linalg.norm(b))
        found[operation] = max(difference, found.get(operation, 0.0))
    return found


def make_row(
    operation: str, times: list[list[float]], difference: float | None
) -> Record:
    """Returns the row of an operation.

    Args:
        operation: Its name.
        times: A pair of seconds for each turn, of this tree and of the other.
        difference: The relative difference of the results; None if there is none.
    """
    this, other = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = [a / b for a, b in times]
    return {
        "operation": operation,
        "this_seconds": this,
        "other_seconds": other,
        "ratio": this / other,
        "ratio_range": [min(ratios), max(ratios)],
        "within_limit": this / other <= LIMIT,
        "difference": difference,
        "turns": times,
    }


def render(result: Record) -> str:
    """Returns the comparison as Markdown."""
    lines = [
        f"{result['problem']}: this tree ({result['this']['commit']}) against "
        f"{result['other']['commit']}, {result['repeats']} turns",
        "",
        "| operation | this s | other s | ratio | range | "
        f"at most {LIMIT:g} | difference |",
        "| :--- | ---: | ---: | ---: | :---: | :--- | ---: |",
    ]
    for row in result["rows"]:
        low, high = row["ratio_range"]
        difference = row["difference"]
        cells = (
            row["operation"],
            f"{row['this_seconds']:.4f}",
            f"{row['other_seconds']:.4f}",
            f"{row['ratio']:.3f}",
            f"{low:.3f} to {high:.3f}",
            "yes" if row["within_limit"] else "**no**",
            "" if difference is None else f"{difference:.0e}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    machine = result["machine"]
    lines += [
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:g} GiB; "
        f"other processes took {result['others']:.0%} of it.",
    ]
    for name in ("this", "other"):
        versions = result[name]["versions"].items()
        lines.append(f"{name}: {', '.join(f'{p} {v}' for p, v in versions)}.")
    return "\n".join(lines)


def unpacked(commit: str, folder: Path) -> Path:
    """Returns the folder, with the sources of a commit in it."""
    command = ["git", "archive", commit, "src"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def describe_commit(tree: Path) -> str:
    """Returns the commit of a checkout, marked if files have been changed since."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=tree, check=True, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
