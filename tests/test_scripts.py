"""The scripts as a user runs them, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
SMALL = [
    "--width=2",
    "--epochs=1",
    "--train_batch_size=256",
    "--batch_size=4",
    "--num_batches=1",
    "--num_shells=4",
    "--window=2",
    "--protocol=shared",
]


def run(script, *flags):
    return subprocess.run(
        [sys.executable, str(SCRIPTS / script), *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*.py")))
def test_help_helps_and_unknown_values_are_named(script):
    shown = run(script, "--help")
    assert "Example" in shown.stdout
    wrong = run(script, "--workdir=")
    assert wrong.returncode != 0
    assert "workdir" in wrong.stderr + wrong.stdout
    assert "Traceback" not in wrong.stderr


@pytest.mark.slow
def test_reproduce_then_measure_then_plot(tmp_path):
    workdir = f"--workdir={tmp_path}"
    done = run("reproduce.py", workdir, *SMALL)
    assert done.returncode == 0, done.stderr
    assert "ResNet-18" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["protocols"]) == {"shared"}

    one = run("measure.py", workdir, *SMALL, "--model=plainnet18")
    assert one.returncode == 0, one.stderr
    measured = json.loads((tmp_path / "plainnet18" / "results.json").read_text())
    shared = results["models"]["plainnet18"]
    assert measured["model"]["lambda_max"] == pytest.approx(
        shared["lambda_max"], rel=1e-5
    )

    drawn = run("plot.py", f"--workdir={tmp_path / 'plainnet18'}")
    assert drawn.returncode == 0, drawn.stderr
    assert len(list((tmp_path / "plainnet18" / "figures").glob("*.pdf"))) == 5

    foreign = run("measure.py", workdir, *SMALL, "--model=plainnet18", "--width=3")
    assert foreign.returncode == 1
    assert "--width: expected 2 as in the run" in foreign.stderr
    assert "Traceback" not in foreign.stderr
