"""A training in a process of its own: killed, interrupted, and kept to itself."""

import signal
import time

import jax
import numpy as np

from grsd_jax.experiments.common import records
from grsd_jax.experiments.common.checkpoints import restore_latest
from grsd_jax.experiments.common.networks import weights_template
from grsd_jax.models import MLP
from running import finish, run_script, start_script

FLAGS = (
    "--model=mlp",
    "--depth=1",
    "--width=2",
    "--epochs=12",  # 384 steps
    "--log_every=1",
    "--checkpoint_every=20",
)


def wait_for_step(path, step, process, seconds=240):
    """Waits until the metrics have a line of the step or of a later one."""
    deadline = time.monotonic() + seconds
    while True:
        lines = records.read_jsonl(path)
        if lines and lines[-1]["step"] >= step:
            return
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_and_an_interrupted_process_resume_with_the_same_bits(tmp_path):
    workdir = tmp_path / "broken"
    metrics = workdir / "mlp" / "metrics.jsonl"
    first = start_script("train.py", *FLAGS, f"--workdir={workdir}")
    wait_for_step(metrics, 25, first)
    first.send_signal(signal.SIGSTOP)  # so that it cannot finish first
    kept_out = run_script("train.py", *FLAGS, f"--workdir={workdir}")
    assert kept_out.code == 1
    assert kept_out.err.startswith("error: --workdir: expected no other run in")
    assert str(first.pid) in kept_out.err
    first.send_signal(signal.SIGKILL)
    first.communicate()
    reached = records.read_jsonl(metrics)[-1]["step"]

    second = start_script("train.py", *FLAGS, f"--workdir={workdir}")
    wait_for_step(metrics, reached + 25, second)
    second.send_signal(signal.SIGINT)
    stopped = finish(second)
    assert (stopped.code, stopped.err) == (130, "error: interrupted.\n")

    resumed = run_script("train.py", *FLAGS, f"--workdir={workdir}")
    assert resumed.code == 0, resumed.err
    assert "mlp: 384 steps, resumed from" in resumed.out
    whole = tmp_path / "whole"
    assert run_script("train.py", *FLAGS, f"--workdir={whole}").code == 0
    template = weights_template(MLP(10, 1, 2, "relu"), (32, 32, 3))
    found, lines = [], []
    for folder in (whole / "mlp", workdir / "mlp"):
        found.append(restore_latest(folder / "checkpoints", template))
        rows = records.read_jsonl(folder / "metrics.jsonl")
        lines.append([row | {"seconds": 0} for row in rows])
    for one, two in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(one, two)
    assert lines[0] == lines[1]
