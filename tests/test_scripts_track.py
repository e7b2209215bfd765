"""scripts/track.py as a user runs it, in a process of its own, and its figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grsd_jax.experiments.common import records

SCRIPTS = Path(__file__).parents[1] / "scripts"


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPTS / script), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


def test_help_says_what_it_does_and_how():
    shown = run("track.py", "--help").stdout
    for word in ("records.jsonl", "Example", "--record_every", "--models"):
        assert word in shown


@pytest.mark.slow
def test_track_then_plot(tmp_path):
    workdir = f"--workdir={tmp_path}"
    options = (
        "--width=1",
        "--epochs=1",
        "--train_batch_size=512",
        "--batch_size=3",
        "--record_every=2",
        "--num_shells=5",
        "--models=plainnet18",
        "--models=resmlp",
    )
    done = run("track.py", workdir, *options)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"config", "environment", "tracks"}
    assert set(results["tracks"]) == {"plainnet18", "resmlp"}
    for name, track in results["tracks"].items():
        lines = records.read_jsonl(tmp_path / name / "records.jsonl")
        assert [line["step"] for line in lines] == [0, 2, 4]
        assert track["num_records"] == 3
    assert len(list((tmp_path / "figures").glob("*.pdf"))) == 6

    drawn = run("plot.py", workdir)
    assert drawn.returncode == 0, drawn.stderr
    assert drawn.stdout.count(".png") == 6
    wrong = run("track.py", workdir, *options, "--record_every=3")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: --record_every: expected 2")
