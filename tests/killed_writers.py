"""Writers that are killed at random moments, and what they leave: a program of its own.

Run with a folder and the number of kills, it forks a writer, kills it, checks every
file, and lets the next writer go on. It imports JAX and computes nothing with it.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from grsd_jax.experiments.common import files, records
from grsd_jax.experiments.common.runs import workdir_lock

NAMES = ("results.json", "arrays.npz")


def write(folder, pipe, rng):
    """Writes records, results and arrays for ever, and tells every record it wrote."""
    with workdir_lock(folder):
        assert not list(folder.glob(".*.tmp")), "a temporary file of the one before"
        lines, (results, arrays) = folder / "lines.jsonl", map(folder.joinpath, NAMES)
        number = len(records.read_jsonl(lines))
        os.write(pipe, b"!")
        while True:
            match rng.choice(["record", "record", "results", "aside", "rewind"]):
                case "record":
                    number += 1
                    records.append_jsonl(lines, {"step": number, "x": "y" * 99})
                    os.write(pipe, b".")
                case "results":
                    records.write_npz(arrays, {"x": np.full(40, number)})
                    records.write_json(results, {"number": number})
                case "aside" if results.exists() and arrays.exists():
                    files.set_aside(folder, NAMES)
                case "rewind":
                    records.rewind_jsonl(lines, number)


def check(folder, told):
    """Checks that every file is whole, and that no record that was told is lost."""
    lines = records.read_jsonl(folder / "lines.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert len(lines) - told in (0, 1), (len(lines), told)
    for path in folder.glob("*.json"):
        records.read_json(path)
    for path in folder.glob("*.npz"):
        assert len(np.unique(records.read_npz(path)["x"])) == 1
    here = all((folder / name).exists() for name in NAMES)
    # A kill between two second names leaves one of them alone beside the originals, for
    # good; what was set aside last, when these are gone, is whole.
    last = [
        max((int(x.stem.partition("-")[2]) for x in folder.glob(y)), default=0)
        for y in ("*-*.json", "*-*.npz")
    ]
    assert here or last[0] == last[1]


def main(folder, kills):
    rng, told = random.Random(0), 0
    for kill in range(kills):
        out, into = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                write(folder, into, random.Random(kill))
            finally:
                os._exit(1)
        os.close(into)
        assert os.read(out, 1) == b"!", "the writer did not begin"
        time.sleep(rng.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the writer failed by itself"
        with os.fdopen(out, "rb") as pipe:
            told += len(pipe.read())
        check(folder, told)
        told = len(records.read_jsonl(folder / "lines.jsonl"))
    print(f"{told} records, {len(list(folder.iterdir()))} files")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
