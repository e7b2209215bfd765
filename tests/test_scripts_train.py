"""scripts/train.py as a user runs it, in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from grsd_jax import models
from grsd_jax.experiments.common import records
from grsd_jax.experiments.common.checkpoints import restore_latest
from grsd_jax.experiments.common.config import Config
from grsd_jax.experiments.common.steps import make_optimizer, state_template

SCRIPT = Path(__file__).parents[1] / "scripts" / "train.py"
TINY = ("--width=1", "--epochs=1", "--train_batch_size=128", "--log_every=2")


def start(*arguments):
    command = [sys.executable, str(SCRIPT), *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def run(*arguments):
    process = start(*arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def test_help_says_what_it_does_what_it_costs_and_how():
    _, out, _ = run("--help")
    for word in ("ResNet-18", "seconds", "Example", "--workdir", "--schedule_args"):
        assert word in out


@pytest.mark.parametrize(
    ("argument", "named"),
    [("--width=0", "--width"), ("--solver=magic", "solver"), ("extra", "'extra'")],
)
def test_a_bad_command_line_is_told_without_a_traceback(argument, named):
    code, out, err = run(argument)
    assert code == 1
    assert out == ""
    assert named in err
    assert "Traceback" not in err


def test_a_missing_data_set_is_one_sentence(tmp_path):
    workdir = tmp_path / "run"
    code, out, err = run(
        "--dataset=cifar10", f"--data_dir={tmp_path}", f"--workdir={workdir}"
    )
    assert (code, out) == (1, "")
    assert err.startswith("error: --data_dir: expected prepared CIFAR-10")
    assert err.count("\n") == 1
    assert not workdir.exists()


def test_a_run_trains_and_says_where_everything_is(tmp_path):
    code, out, err = run(*TINY, f"--workdir={tmp_path}", "--model=plainnet18")
    assert code == 0, err
    assert err == ""
    assert "plainnet18: test accuracy 0." in out
    folder = tmp_path / "plainnet18"
    lines = records.read_jsonl(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(2, 17, 2))
    # What it wrote is the ResNet's checkpoint as well.
    model = models.ResNet18(num_classes=10, width=1)
    optimizer = make_optimizer(Config(), total_steps=1)
    template = state_template(model, optimizer, np.zeros((32, 32, 3), np.float32))
    assert int(restore_latest(folder / "checkpoints", template).step) == 16


def wait_for(condition, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_run_resumes_and_ends_with_the_same_bits(tmp_path):
    options = (*TINY, "--checkpoint_every=3")
    assert run(*options, f"--workdir={tmp_path / 'whole'}")[0] == 0
    workdir = tmp_path / "killed"
    lines = workdir / "resnet18" / "metrics.jsonl"
    for step in (4, 9, 14):
        process = start(*options, f"--workdir={workdir}")

        def reached(step=step):
            done = records.read_jsonl(lines)
            return bool(done) and done[-1]["step"] >= step

        wait_for(reached, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    code, out, err = run(*options, f"--workdir={workdir}")
    assert code == 0, err
    assert "resumed from" in out or "complete already" in out
    optimizer = make_optimizer(Config(), total_steps=1)
    model = models.ResNet18(num_classes=10, width=1)
    template = state_template(model, optimizer, np.zeros((32, 32, 3), np.float32))
    whole, killed = (
        restore_latest(folder / "resnet18" / "checkpoints", template)
        for folder in (tmp_path / "whole", workdir)
    )
    for one, two in zip(jax.tree.leaves(whole), jax.tree.leaves(killed), strict=True):
        np.testing.assert_array_equal(one, two)
    found = []
    for folder in (tmp_path / "whole", workdir):
        path = folder / "resnet18" / "metrics.jsonl"
        found.append([{**r, "seconds": 0} for r in records.read_jsonl(path)])
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_second_process_is_kept_out(tmp_path):
    first = start(*TINY, "--epochs=50", f"--workdir={tmp_path}")
    try:
        lock = tmp_path / "resnet18" / ".lock"
        wait_for(lambda: lock.exists() and lock.read_text(), first)
        code, _, err = run(*TINY, "--epochs=50", f"--workdir={tmp_path}")
        assert code == 1
        assert err.startswith("error: --workdir: expected no other run in")
        assert str(first.pid) in err
    finally:
        first.kill()
        first.communicate()
