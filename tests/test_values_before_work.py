"""Values that cannot work are told before the work, by the flag that has them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax.experiments.common import flags, sizes, training
from grsd_jax.experiments.common.config import Config, UserError, parse_schedule_args
from grsd_jax.experiments.common.networks import (
    make_model,
    weights_bytes,
    weights_template,
)
from running import run_script, small

CONSTANT, LINEAR = "--schedule=constant_schedule", "--schedule=linear_schedule"
LANCZOS = ("--solver=lanczos", "--block_size=2")


@pytest.fixture(autouse=True, scope="module")
def _small():
    with small():
        yield


@pytest.mark.parametrize(
    ("script", "arguments", "named"),
    [
        ("conditions.py", ["--max_growth=nan"], "--max_growth"),
        ("conditions.py", ["--max_tail_sum=inf"], "--max_tail_sum"),
        ("conditions.py", ["--max_drift=-1"], "--max_drift"),
        ("conditions.py", ["--influence_share=1.5"], "--influence_share"),
        ("conditions.py", ["--min_r_squared=nan"], "--min_r_squared"),
        ("train.py", [CONSTANT, '--schedule_args={"value": NaN}'], "--schedule_args"),
        ("train.py", [CONSTANT, '--schedule_args={"value": "a"}'], "--schedule_args"),
        ("train.py", [CONSTANT, '--schedule_args={"value": -1}'], "--schedule_args"),
        ("train.py", [CONSTANT, '--schedule_args={"value": [1, 2]}'], "--schedule_arg"),
        ("train.py", [CONSTANT, '--schedule_args={"rate": 1}'], "--schedule_args"),
        (
            "train.py",
            [LINEAR, '--schedule_args={"end_value": Infinity, "transition_steps": 5}'],
            "--schedule_args",
        ),
        (
            "train.py",
            [
                "--schedule=piecewise_constant_schedule",
                '--schedule_args={"boundaries_and_scales": {"²": 0.5}}',
            ],
            "--schedule_args",
        ),
        ("train.py", ["--epochs=99999999999"], "--epochs"),
        ("train.py", ["--width=10000000000"], "--width"),
        ("train.py", ["--model=mlp", "--depth=99999999999"], "--depth"),
        ("track.py", ["--record_every=1000", "--epochs=1"], "--record_every"),
        ("track.py", ["--num_shells=100000"], "--num_shells"),
        ("track.py", ["--models=mlp,mlp"], "--models"),
        ("track.py", ["--models=resnet"], "--models"),
        ("reproduce.py", ["--num_shells=100000"], "--num_shells"),
        ("reproduce.py", [*LANCZOS, "--num_pairs=6"], "--num_shells"),
        ("reproduce.py", ["--num_pairs=6"], "--num_shells"),
        ("conditions.py", ["--num_shells=100000"], "--num_shells"),
        ("study.py", ["--dataset=synthetic", "--num_shells=100000"], "--num_shells"),
        ("study.py", ["--seeds=0,0"], "--seeds"),
        ("study.py", ["--seeds=0,²"], "--seeds"),
        ("study.py", ["--seeds=4294967296"], "--seeds"),
        ("sweep.py", ["--seeds=4294967296"], "--seeds"),
        ("sweep.py", ["--widths=4000000000"], "--width"),
        ("sweep.py", ["--depths=4000000000"], "--depth"),
        ("sweep.py", ["--num_shells=100000"], "--num_shells"),
        ("sweep.py", ["--num_directions=999999999999"], "--num_directions"),
        ("sweep.py", ["--train_batch_size=99999"], "--train_batch_size"),
    ],
)
def test_a_value_that_cannot_work_is_told_by_its_flag(
    script, arguments, named, tmp_path
):
    done = run_script(script, f"--workdir={tmp_path}", *arguments)
    assert done.code == 1
    text = done.out + done.err
    assert named in text
    assert "expected" in text
    assert "Traceback" not in text
    assert not [*tmp_path.rglob("checkpoints"), *tmp_path.rglob("*.csv")]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("constant_schedule", "{}"),
        ("cosine_decay_schedule", "{}"),
        ("linear_schedule", '{"end_value": 0, "transition_steps": 50}'),
        ("warmup_cosine_decay_schedule", '{"init_value": 0, "warmup_steps": 10}'),
        (
            "piecewise_constant_schedule",
            '{"boundaries_and_scales": {"10": 0.1, "20": 0.5}}',
        ),
    ],
)
def test_schedules_that_work_are_let_through(name, arguments):
    config = Config(schedule=name, schedule_args=arguments)
    assert float(training.make_schedule(config, total_steps=100)(99)) >= 0


def test_a_rate_that_breaks_late_in_training_is_seen_before_it():
    config = Config(
        schedule="polynomial_schedule",
        schedule_args='{"end_value": -0.1, "power": 1, "transition_steps": 90}',
    )
    training.make_schedule(config, total_steps=20)
    with pytest.raises(UserError, match="learning rates >= 0 over the whole"):
        training.make_schedule(config, total_steps=100)


def test_digits_that_are_no_numbers_stay_text():
    assert parse_schedule_args('{"a": {"²": 1, "2": 1}}') == {"a": {"²": 1, 2: 1}}


@pytest.mark.parametrize("name", ["mlp", "resmlp", "cnn", "transformer", "ssm"])
@pytest.mark.parametrize("depth", [1, 6])
def test_bytes_of_the_weights_are_those_of_the_weights(name, depth):
    model = make_model(name, 10, Config(model=name, width=4, depth=depth))
    weights = jax.tree.leaves(weights_template(model, (32, 32, 3)))
    counted = sum(4 * int(np.prod(leaf.shape)) for leaf in weights)
    assert weights_bytes(model, (32, 32, 3)) == counted


def test_what_fits_exactly_is_let_through(monkeypatch):
    monkeypatch.setattr(sizes, "memory_bytes", lambda: 1000.0)
    sizes.check_fits("--width", 3, "weights", 1000)
    with pytest.raises(UserError, match=r"^--width: expected weights that fit .*got 3"):
        sizes.check_fits("--width", 3, "weights", 1001)
    config = Config(solver="dense", num_shells=5)
    sizes.check_measurement(config, 9)  # 3 matrices of 9 x 9 floats: 972 bytes
    with pytest.raises(UserError, match=r"^--batch_size or --num_batches: .*n = 10"):
        sizes.check_measurement(config, 10)


def test_memory_is_that_of_the_device_machine_or_container():
    assert 2**30 < sizes.memory_bytes() < 2**50


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_device_without_memory_names_what_to_lower(monkeypatch, capsys, asynchronous):
    """Where the array is made, or only where its value is asked for."""
    told = "RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.\nmore"

    class Late:
        def block_until_ready(self):
            raise jax.errors.JaxRuntimeError(told)

    def main(_config):
        if not asynchronous:
            raise jax.errors.JaxRuntimeError(told)
        jax.block_until_ready([jnp.zeros(1), Late()])

    error = run_to_the_end(monkeypatch, capsys, main)
    assert error.startswith("error: out of memory; lower one of: --batch_size, --num_b")
    assert "--width" in error
    assert "--widths" not in error
    assert error.count("\n") == 1


def test_a_script_without_memory_names_its_own_flags(monkeypatch, tmp_path):
    def fail(*_args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(training, "init_weights", fail)
    done = run_script("train.py", f"--workdir={tmp_path}")
    assert done.code == 1
    named = "error: out of memory; lower one of: --train_batch_size, --width, --depth. "
    assert done.err.startswith(named)


def test_a_host_without_memory_names_what_to_lower(monkeypatch, capsys):
    error = run_to_the_end(
        monkeypatch, capsys, lambda _config: np.empty(2**60, np.float32)
    )
    assert error.startswith("error: out of memory; lower one of: --batch_size, ")
    assert "Unable to allocate" in error


def test_other_errors_of_a_device_are_not_called_memory(monkeypatch, capsys):
    def main(_config):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        run_to_the_end(monkeypatch, capsys, main)


def run_to_the_end(monkeypatch, capsys, main):
    """Runs a body as `run_main` does, and returns what it printed as an error."""
    monkeypatch.setattr(flags.app, "run", lambda wrapped, **_: wrapped(["script"]))
    monkeypatch.setattr(flags, "config_from_flags", lambda *, settings, **_: settings())
    flags.flags.FLAGS(["script"], known_only=True)
    before = jax.config.jax_default_matmul_precision
    try:
        with pytest.raises(SystemExit) as stopped:
            flags.run_main(main)
    finally:
        jax.config.update("jax_default_matmul_precision", before)
    assert stopped.value.code == 1
    return capsys.readouterr().err
