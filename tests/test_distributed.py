"""The same script in one process and in several on the loopback interface."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
MODEL = "rescnn"
NETWORK = [f"--model={MODEL}", "--width=4", "--depth=2", "--activation=gelu"]
SETTINGS = [
    "--batch_size=4",
    "--num_batches=2",
    "--solver=lanczos",
    "--block_size=4",
    "--num_steps=4",
    "--num_shells=4",
    "--window=2",
]


def start(script, *flags):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, str(SCRIPTS / script), *NETWORK, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finish(process):
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    return out


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def read(folder):
    result = json.loads((folder / "results.json").read_text())
    with np.load(folder / "arrays.npz") as arrays:
        return result["model"], dict(arrays)


@pytest.mark.slow
def test_two_and_four_processes_measure_what_one_does(tmp_path):
    workdir = f"--workdir={tmp_path}"
    finish(start("train.py", workdir, "--epochs=1", "--train_batch_size=256"))
    finish(start("measure.py", workdir, *SETTINGS))
    folder = tmp_path / MODEL
    one, arrays = read(folder)
    for count in (2, 4):
        for name in ("results.json", "arrays.npz"):
            (folder / name).unlink()
        address = f"--coordinator_address=127.0.0.1:{free_port()}"
        flags = [
            *SETTINGS,
            workdir,
            "--distributed",
            address,
            f"--num_processes={count}",
        ]
        outs = [
            finish(process)
            for process in [
                start("measure.py", *flags, f"--process_id={index}")
                for index in range(count)
            ]
        ]
        assert f"shared by {count} devices" in outs[0]
        assert not any("written" in out or "n =" in out for out in outs[1:])
        many, found = read(folder)
        assert many["n"] == one["n"]
        assert many["num_resolved"] == one["num_resolved"]
        top = float(arrays[f"{MODEL}/values"][0])
        np.testing.assert_allclose(
            found[f"{MODEL}/values"], arrays[f"{MODEL}/values"], atol=1e-5 * top
        )
        exact = arrays[f"{MODEL}/coupling_diagonal"]
        np.testing.assert_allclose(
            found[f"{MODEL}/coupling_diagonal"][:4], exact[:4], rtol=1e-3
        )


@pytest.mark.slow
def test_an_address_without_the_rest_is_named():
    process = start("measure.py", "--workdir=unused", "--num_processes=2")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "--num_processes: expected --distributed, --coordinator_address" in err
    assert "Traceback" not in err
