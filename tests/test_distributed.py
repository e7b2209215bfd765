"""The same script in one process and in several on the loopback interface."""

import json
import os
import socket

import numpy as np
import pytest

from running import finish, run_script, small, start_script

NETWORK = ("--model=mlp", "--width=4", "--depth=1", "--activation=gelu")
SETTINGS = (
    "--batch_size=4",
    "--num_batches=2",
    "--solver=lanczos",
    "--block_size=4",
    "--num_pairs=8",
    "--num_shells=4",
    "--window=2",
)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def read(folder):
    result = json.loads((folder / "results.json").read_text())
    with np.load(folder / "arrays.npz") as arrays:
        return result["model"], dict(arrays)


@pytest.mark.slow
def test_two_processes_of_two_devices_measure_what_one_device_does(tmp_path):
    flags = (*NETWORK, f"--workdir={tmp_path}")
    training = ("--epochs=1", "--train_batch_size=512")
    with small(textures=False):
        trained = run_script("train.py", *flags, *training)
        assert trained.code == 0, trained.err
        done = run_script("measure.py", *flags, *SETTINGS)
        assert done.code == 0, done.err
    folder = tmp_path / "mlp"
    one, arrays = read(folder)
    for name in ("results.json", "arrays.npz"):
        (folder / name).unlink()
    flags += (
        *SETTINGS,
        "--distributed",
        f"--coordinator_address=127.0.0.1:{free_port()}",
        "--num_processes=2",
    )
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    processes = [
        start_script("measure.py", *flags, f"--process_id={k}", env=environment)
        for k in range(2)
    ]
    first, second = [finish(process) for process in processes]
    assert first.code == second.code == 0, first.err + second.err
    assert "shared by 4 devices" in first.out
    assert "next:" not in second.out
    assert "n =" not in second.out
    many, found = read(folder)
    assert many["n"] == one["n"] == 80
    assert many["num_resolved"] == one["num_resolved"]
    top = float(arrays["mlp/values"][0])
    np.testing.assert_allclose(
        found["mlp/values"], arrays["mlp/values"], atol=1e-5 * top
    )
    exact = arrays["mlp/coupling_diagonal"]
    np.testing.assert_allclose(found["mlp/coupling_diagonal"][:4], exact[:4], rtol=1e-3)
