import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from grsd_jax.experiments.common import data, networks, records, training
from grsd_jax.experiments.common.checkpoints import Checkpoints
from grsd_jax.experiments.common.config import Config, UserError
from grsd_jax.experiments.common.networks import Weights, recalibrate_batch_stats
from grsd_jax.experiments.common.runs import workdir_lock


class TinyNet(nn.Module):
    """Two convolutions with BatchNorm of different momentum."""

    width: int = 8

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(self.width, (3, 3), strides=2, use_bias=False, name="conv1")(x)
        x = jax.nn.relu(nn.BatchNorm(not train, momentum=0.9, name="norm1")(x))
        x = nn.Conv(self.width, (3, 3), strides=2, use_bias=False, name="conv2")(x)
        x = jax.nn.relu(nn.BatchNorm(not train, momentum=0.6, name="norm2")(x))
        return nn.Dense(10)(jnp.mean(x, axis=(1, 2)))


CONFIG = Config(
    train_batch_size=16,
    epochs=3,
    checkpoint_every=5,
    log_every=4,
    schedule="cosine_decay_schedule",
)
STEPS = 18  # 100 // 16 steps in each of 3 epochs


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's schedules divide an integer count by a float."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True)
def one_optimizer(monkeypatch):
    """Gives equal settings one optimizer, so that a test compiles nothing again."""
    monkeypatch.setattr(training, "make_optimizer", cached_optimizer)


cached_optimizer = functools.cache(training.make_optimizer)


@pytest.fixture(scope="module")
def dataset():
    return data.synthetic_textures(num_train=100, num_test=30)


def train(dataset, workdir, config=CONFIG, model=None):
    model = model or TinyNet()
    return training.train(model, dataset, config, workdir, name="tiny")


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """A run without interruption: its result and its folder."""
    workdir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_optimizer", cached_optimizer)
        with jax.numpy_dtype_promotion("standard"):
            return train(dataset, workdir), workdir / "tiny"


def weights_of(state):
    return Weights(state.params, state.batch_stats)


def metrics_of(folder):
    lines = records.read_jsonl(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def assert_same_bits(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(left, right)


def interrupt(monkeypatch, step):
    """Stops the process, as a kill would, when the metrics of ``step`` are written."""
    append = records.append_jsonl

    def append_or_stop(path, line):
        append(path, line)
        if line["step"] == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(records, "append_jsonl", append_or_stop)


def test_a_run_leaves_settings_metrics_and_checkpoints(whole, dataset):
    result, folder = whole
    assert int(result.state.step) == STEPS
    assert result.resumed_from == 0
    assert result.checkpoint_dir == folder / "checkpoints"
    settings = records.read_json(folder / "config.json")
    assert settings["data_fingerprint"] == dataset.fingerprint
    assert settings["train_batch_size"] == 16
    lines = records.read_jsonl(folder / "metrics.jsonl")
    # Every 4th step, every checkpoint (5th step) and every end of an epoch (6th).
    assert [line["step"] for line in lines] == [4, 5, 6, 8, 10, 12, 15, 16, 18]
    assert [line["epoch"] for line in lines] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [line["step"] for line in lines if "test_accuracy" in line] == [6, 12, 18]
    assert lines[-1]["test_accuracy"] == result.test_accuracy
    for line in lines:
        rate = 0.05 * (1 + math.cos(math.pi * (line["step"] - 1) / STEPS)) / 2
        assert line["learning_rate"] == pytest.approx(rate, rel=1e-5)
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        assert_same_bits(checkpoints.restore(result.state), result.state)


# 4: before any checkpoint; 8: between two; 15: metrics written, checkpoint not yet;
# 16: one after a checkpoint; 18: the last line, before the last checkpoint.
@pytest.mark.parametrize("step", [4, 8, 15, 16, 18])
def test_a_resumed_run_ends_with_the_same_bits(
    whole, dataset, tmp_path, monkeypatch, step
):
    with monkeypatch.context() as patch:
        interrupt(patch, step)
        with pytest.raises(KeyboardInterrupt):
            train(dataset, tmp_path)
    result = train(dataset, tmp_path)
    assert result.resumed_from == (step - 1) // 5 * 5
    assert_same_bits(result.state, whole[0].state)
    assert result.test_accuracy == whole[0].test_accuracy
    assert metrics_of(tmp_path / "tiny") == metrics_of(whole[1])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_run_of_another_optimizer_resumes_too(name, dataset, tmp_path, monkeypatch):
    config = dataclasses.replace(
        CONFIG, optimizer=name, learning_rate=1e-3, epochs=1, checkpoint_every=3
    )
    whole = train(dataset, tmp_path / "whole", config)
    with monkeypatch.context() as patch:
        interrupt(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            train(dataset, tmp_path / "cut", config)
    result = train(dataset, tmp_path / "cut", config)
    assert result.resumed_from == 3
    assert_same_bits(result.state, whole.state)


def test_the_first_updates_of_the_optimizers_in_closed_form():
    weights = {"w": jnp.asarray([[3.0, 0.0], [0.0, -0.5]]), "b": jnp.asarray([1.0])}
    gradient = {"w": jnp.asarray([[0.2, 0.0], [0.0, -4.0]]), "b": jnp.asarray([-7.0])}
    signs = {"w": [[1.0, 0.0], [0.0, -1.0]], "b": [-1.0]}
    rate = 0.01
    for name, decay, tolerance in (("adamw", 1e-4, 1e-5), ("muon", 0.0, 0.5)):
        config = dataclasses.replace(
            CONFIG,
            optimizer=name,
            learning_rate=rate,
            schedule="constant_schedule",
        )
        optimizer = cached_optimizer(config, total_steps=3)
        updates, _ = optimizer.update(gradient, optimizer.init(weights), weights)
        for leaf, update in updates.items():
            # Adam's first step has size eta; muon's orthogonal factor of a diagonal
            # matrix is that of its signs, up to five Newton-Schulz steps and Nesterov.
            expected = -rate * (np.asarray(signs[leaf]) + decay * weights[leaf])
            np.testing.assert_allclose(update, expected, atol=tolerance * rate)


def test_a_complete_run_is_returned_as_it_is(whole, dataset):
    before = (whole[1] / "metrics.jsonl").read_text()
    result = train(dataset, whole[1].parent)
    assert result.resumed_from == STEPS
    assert_same_bits(result.state, whole[0].state)
    assert (whole[1] / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", 1), ("epochs", 4), ("learning_rate", 0.1), ("width", 9)],
)
def test_other_settings_in_the_same_folder_are_refused(whole, dataset, name, value):
    config = dataclasses.replace(CONFIG, **{name: value})
    before = (whole[1] / "metrics.jsonl").read_text()
    wanted = f"--{name}: expected {getattr(CONFIG, name)!r} as in .* got {value!r}"
    with pytest.raises(UserError, match=wanted):
        train(dataset, whole[1].parent, config)
    assert (whole[1] / "metrics.jsonl").read_text() == before


def test_settings_that_change_no_result_may_differ(whole, dataset):
    config = dataclasses.replace(CONFIG, log_every=7, batch_size=3, workdir="other")
    assert train(dataset, whole[1].parent, config).resumed_from == STEPS


def test_other_data_in_the_same_folder_is_refused(whole):
    other = data.synthetic_textures(seed=1, num_train=100, num_test=30)
    with pytest.raises(UserError, match="--data_fingerprint: expected"):
        train(other, whole[1].parent)


def test_another_network_in_the_same_folder_is_refused(whole, dataset):
    with pytest.raises(UserError, match=r"checkpoint: expected 'params/.* of shape"):
        train(dataset, whole[1].parent, model=TinyNet(width=7))


def test_checkpoints_without_settings_are_refused(dataset, tmp_path):
    with Checkpoints(tmp_path / "tiny" / "checkpoints"):
        pass
    with pytest.raises(UserError, match=r"--workdir: expected config.json beside"):
        train(dataset, tmp_path)


def test_a_second_run_at_the_same_time_is_refused(dataset, tmp_path):
    with (
        workdir_lock(tmp_path / "tiny"),
        pytest.raises(UserError, match="--workdir: expected no other run"),
    ):
        train(dataset, tmp_path)


def test_a_batch_larger_than_the_data_is_refused(dataset, tmp_path):
    config = dataclasses.replace(CONFIG, train_batch_size=101)
    with pytest.raises(UserError, match="--train_batch_size: expected at most the 100"):
        train(dataset, tmp_path, config)


def test_a_loss_that_is_not_finite_stops_at_its_step(dataset, tmp_path, monkeypatch):
    step_fn, first = training.train_step, []

    def poisoned(model, optimizer, state, images, labels):
        first.append(int(state.step))
        images = images * np.float32(np.nan) if first[-1] == 6 else images
        return step_fn(model, optimizer, state, images, labels)

    monkeypatch.setattr(training, "train_step", poisoned)
    with pytest.raises(UserError, match=r"training: expected a finite .* at step 7"):
        train(dataset, tmp_path)
    assert first[-1] == 7  # found at the next line of metrics, step 8
    assert metrics_of(tmp_path / "tiny")[-1]["step"] == 6
    with Checkpoints(tmp_path / "tiny" / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 5


def test_every_epoch_is_another_order_without_repetition(
    dataset, tmp_path, monkeypatch
):
    numbered = dataset._replace(train_labels=np.arange(100, dtype=np.int32))
    seen = []

    def record(model, optimizer, state, images, labels):
        np.testing.assert_array_equal(images, dataset.train_images[labels])
        seen.append(labels)
        zero = jnp.zeros((), jnp.float32)
        return state, {"loss": zero, "accuracy": zero, "finite": True}

    monkeypatch.setattr(training, "train_step", record)
    train(numbered, tmp_path)
    epochs = np.asarray(seen).reshape(3, 6 * 16)
    for epoch in epochs:
        assert len(np.unique(epoch)) == 96
    assert not np.array_equal(epochs[0], epochs[1])
    order, seen = epochs, []
    seed = dataclasses.replace(CONFIG, seed=1)
    train(numbered, tmp_path / "other", seed)
    assert not np.array_equal(np.asarray(seen).reshape(3, -1), order)


def test_metrics_are_averages_of_the_steps_since_the_last_line(
    dataset, tmp_path, monkeypatch
):
    def count(model, optimizer, state, images, labels):
        step = state.step + 1
        value = jnp.asarray(step, jnp.float32)
        metrics = {"loss": value, "accuracy": value / 100, "finite": True}
        return state._replace(step=step), metrics

    monkeypatch.setattr(training, "train_step", count)
    train(dataset, tmp_path)
    lines, last = metrics_of(tmp_path / "tiny"), 0
    for line in lines:
        mean = np.mean(np.arange(last + 1, line["step"] + 1))
        assert line["loss"] == pytest.approx(mean)
        assert line["accuracy"] == pytest.approx(mean / 100)
        last = line["step"]


def test_a_cut_line_of_metrics_does_not_stop_a_resume(dataset, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 8)
        with pytest.raises(KeyboardInterrupt):
            train(dataset, tmp_path)
    with open(tmp_path / "tiny" / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    train(dataset, tmp_path)
    text = (tmp_path / "tiny" / "metrics.jsonl").read_text()
    steps = [json.loads(line)["step"] for line in text.splitlines()]
    assert steps == [4, 5, 6, 8, 10, 12, 15, 16, 18]


def drop_last_line(path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))


def test_metrics_lost_before_a_checkpoint_are_noticed(dataset, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            train(dataset, tmp_path)
    metrics = tmp_path / "tiny" / "metrics.jsonl"
    drop_last_line(metrics)  # of step 6, after the checkpoint, which is made again
    drop_last_line(metrics)  # of step 5
    with pytest.raises(UserError, match=r"metrics.jsonl': .* at every checkpoint.* 5"):
        train(dataset, tmp_path)


def test_a_newest_checkpoint_that_is_half_deleted_is_made_again(
    whole, dataset, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        interrupt(patch, 16)
        with pytest.raises(KeyboardInterrupt):
            train(dataset, tmp_path)
    (tmp_path / "tiny" / "checkpoints" / "15" / "files.json").unlink()
    result = train(dataset, tmp_path)
    assert result.resumed_from == 10
    assert_same_bits(result.state, whole[0].state)
    assert metrics_of(tmp_path / "tiny") == metrics_of(whole[1])


def test_a_small_net_learns_the_textures(tmp_path):
    textures = data.synthetic_textures(num_train=1000, num_test=300)
    config = Config(train_batch_size=50, epochs=4, learning_rate=0.1)
    result = training.train(TinyNet(), textures, config, tmp_path, name="learner")
    assert 0.35 < result.test_accuracy < 1.0


@pytest.mark.parametrize("batch_size", [1, 7, 30, 64])
def test_accuracy_counts_the_last_batch_right(whole, dataset, batch_size):
    state, model = whole[0].state, TinyNet()
    logits = model.apply(
        {"params": state.params, "batch_stats": state.batch_stats},
        dataset.test_images,
        train=False,
    )
    wanted = np.mean(np.argmax(logits, axis=-1) == dataset.test_labels)
    found = training.evaluate(
        model,
        weights_of(state),
        dataset.test_images,
        dataset.test_labels,
        batch_size=batch_size,
    )
    assert found == pytest.approx(wanted)
    assert found == whole[0].test_accuracy


def test_the_accuracy_of_a_network_that_is_not_finite_is_undefined(dataset):
    """As the largest of NaN outputs, the first class would be right where it occurs."""
    assert np.mean(dataset.test_labels == 0) > 0
    shape = dataset.train_images.shape[1:]
    weights = networks.init_weights(TinyNet(), shape, 0)
    broken = jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), weights)
    images, labels = dataset.test_images, dataset.test_labels
    assert np.isnan(training.evaluate(TinyNet(), broken, images, labels))
    optimizer = optax.sgd(0.1)
    state = training.init_state(broken, optimizer)
    _, metrics = training.train_step(TinyNet(), optimizer, state, images, labels)
    assert np.isnan(metrics["accuracy"])


def test_accuracy_of_nothing_is_refused(whole, dataset):
    state = whole[0].state
    with pytest.raises(ValueError, match=r"len.images.: expected an integer >= 1"):
        training.evaluate(
            TinyNet(),
            weights_of(state),
            dataset.test_images[:0],
            dataset.test_labels[:0],
        )


def test_recalibration_averages_the_statistics_of_the_batches(whole, dataset):
    """Against the moments of each normalization's input, computed directly."""
    state, model = whole[0].state, TinyNet()
    images = dataset.train_images
    found = recalibrate_batch_stats(
        model, weights_of(state), images, batch_size=20, num_batches=4
    )
    wanted = jax.tree.map(np.zeros_like, state.batch_stats)
    for start in range(0, 80, 20):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        _, captured = model.apply(
            variables,
            images[start : start + 20],
            train=True,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=lambda m, _: isinstance(m, nn.Conv),
        )
        for layer in ("1", "2"):
            conv = captured["intermediates"][f"conv{layer}"]["__call__"][0]
            values = np.asarray(conv, np.float64)
            wanted[f"norm{layer}"]["mean"] += values.mean(axis=(0, 1, 2)) / 4
            wanted[f"norm{layer}"]["var"] += values.var(axis=(0, 1, 2)) / 4
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, two, rtol=2e-5, atol=1e-6)


def test_recalibration_does_not_depend_on_the_old_statistics(whole, dataset):
    state = whole[0].state
    options = {"batch_size": 20, "num_batches": 2}
    strange = jax.tree.map(lambda x: x * 100 + 5, state.batch_stats)
    one, two = (
        recalibrate_batch_stats(
            TinyNet(), Weights(state.params, old), dataset.train_images, **options
        )
        for old in (state.batch_stats, strange)
    )
    assert_same_bits(one, two)


def test_recalibration_needs_enough_images(whole, dataset):
    state = whole[0].state
    with pytest.raises(ValueError, match="expected at most the 100 images, got 102"):
        recalibrate_batch_stats(
            TinyNet(),
            weights_of(state),
            dataset.train_images,
            batch_size=51,
            num_batches=2,
        )
