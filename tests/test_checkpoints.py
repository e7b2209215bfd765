import errno
import os
import signal
import subprocess
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grsd_jax import models
from grsd_jax.experiments.common import records
from grsd_jax.experiments.common.checkpoints import Checkpoints, restore_latest
from grsd_jax.experiments.common.config import UserError
from grsd_jax.experiments.common.networks import weights_template


class State(NamedTuple):
    step: jax.Array
    params: dict
    opt_state: tuple


def make_state(seed=0, width=3):
    kernel = jax.random.normal(jax.random.key(seed), (2, width), jnp.float32)
    params = {"layer": {"kernel": kernel, "bias": jnp.ones(width, jnp.float32)}}
    optimizer = optax.sgd(optax.constant_schedule(0.1), momentum=0.9)
    step = jnp.asarray(seed, jnp.int32)
    return State(step, params, optimizer.init(params))


def assert_same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


@pytest.fixture
def saved(tmp_path):
    """A folder with checkpoints of steps 1 and 2."""
    with Checkpoints(tmp_path / "run") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step))
    return tmp_path / "run"


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files}


def test_a_checkpoint_comes_back_bit_by_bit(saved):
    template = jax.eval_shape(make_state)
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.latest_step() == 2
        assert_same(checkpoints.restore(template), make_state(2))
        assert_same(checkpoints.restore(template, step=1), make_state(1))


def test_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_a_part_can_be_read_without_the_rest(saved):
    before = contents(saved)
    params = restore_latest(saved, {"params": make_state().params})
    assert_same(params, {"params": make_state(2).params})
    assert contents(saved) == before


def a_dead_process():
    """Returns the id of a process that is gone."""
    with subprocess.Popen(["true"]) as process:
        return process.pid


def test_reading_leaves_a_write_in_progress_alone(saved):
    unfinished = saved / f".9.{a_dead_process()}.grsd.tmp"
    unfinished.mkdir()
    (unfinished / "part").write_text("half")
    restored = restore_latest(saved, make_state())
    assert_same(restored, make_state(2))
    assert (unfinished / "part").exists()
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.latest_step() == 2
        checkpoints.save(3, make_state(3))
    assert_same(restore_latest(saved, make_state()), make_state(3))
    assert not unfinished.exists()


def sentence(caught):
    text = str(caught.value)
    assert text.startswith("checkpoint: expected ")
    assert ", got" in text
    assert "\n" not in text
    return text


def test_a_checkpoint_of_another_width_names_the_array(saved):
    with pytest.raises(UserError) as caught:
        restore_latest(saved, make_state(width=4))
    text = sentence(caught)
    assert "of shape [4]" in text or "of shape [2, 4]" in text
    assert str(saved) in text
    assert "params/layer" in text or "opt_state" in text


def test_a_checkpoint_of_another_tree_names_the_array(saved):
    template = {"params": {"other": jnp.zeros(3, jnp.float32)}}
    with pytest.raises(UserError) as caught:
        restore_latest(saved, template)
    assert "'params/other'" in sentence(caught)


def test_a_checkpoint_of_another_dtype_names_the_array(saved):
    template = {"step": jnp.zeros((), jnp.float32)}
    with pytest.raises(UserError, match=r"'step' of dtype float32 .* got int32"):
        restore_latest(saved, template)


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_a_folder_without_checkpoints_is_one_sentence(tmp_path, kind):
    folder = tmp_path / "run"
    if kind == "empty":
        folder.mkdir()
    elif kind == "file":
        folder.write_text("mine")
    with pytest.raises(UserError, match=f"'{folder}', got none") as caught:
        restore_latest(folder, make_state())
    sentence(caught)
    assert folder.exists() == (kind != "missing")


@pytest.mark.parametrize("damage", ["cut", "metadata", "manifest", "checksum"])
def test_a_damaged_checkpoint_is_one_sentence_and_the_older_one_stays(saved, damage):
    newest = saved / "2"
    if damage == "cut":
        for path in newest.rglob("d/*"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "metadata":
        (newest / "arrays" / "_METADATA").write_text("not JSON")
    elif damage == "manifest":
        (newest / "files.json").write_text("not JSON")
    else:
        manifest = records.read_json(newest / "files.json")
        records.write_json(newest / "files.json", dict.fromkeys(manifest, "0" * 64))
    with pytest.raises(UserError) as caught:
        restore_latest(saved, make_state())
    assert f"step 2 of '{saved}'" in sentence(caught)
    with Checkpoints(saved) as checkpoints:
        assert_same(checkpoints.restore(make_state(), step=1), make_state(1))


@pytest.mark.parametrize("missing", ["everything", "manifest", "arrays", "one file"])
def test_a_half_deleted_checkpoint_is_not_listed_and_is_written_again(saved, missing):
    newest = saved / "2"
    whole = [path for path in newest.rglob("*") if path.is_file()]
    gone = {
        "everything": whole,
        "manifest": [newest / "files.json"],
        "arrays": [path for path in whole if path.name != "files.json"],
        "one file": [newest / "arrays" / "manifest.ocdbt"],
    }
    for path in gone[missing]:
        path.unlink()
    assert_same(restore_latest(saved, make_state()), make_state(1))
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.all_steps() == [1]
        checkpoints.save(2, make_state(2))
        assert checkpoints.all_steps() == [1, 2]
    assert_same(restore_latest(saved, make_state()), make_state(2))


def test_nothing_but_incomplete_checkpoints_is_told(saved):
    for step in (1, 2):
        (saved / str(step) / "files.json").unlink()
    with pytest.raises(UserError, match=r"only ones that are incomplete .* \[1, 2\]"):
        restore_latest(saved, make_state())


def test_every_flipped_bit_of_a_checkpoint_is_noticed(saved):
    """One random bit in every 7th byte of every file, in turn."""
    rng, flips = np.random.default_rng(0), 0
    with Checkpoints(saved, read_only=True) as checkpoints:
        for path in [path for path in (saved / "2").rglob("*") if path.is_file()]:
            whole = path.read_bytes()
            for place in range(0, len(whole), 7):
                damaged = bytearray(whole)
                damaged[place] ^= 1 << int(rng.integers(8))
                path.write_bytes(damaged)
                with pytest.raises(UserError, match="expected a complete checkpoint"):
                    checkpoints.restore(make_state(), step=2)
                flips += 1
            path.write_bytes(whole)
        assert_same(checkpoints.restore(make_state(), step=2), make_state(2))
    assert flips > 200


def test_an_older_step_is_not_written_over(saved):
    before = contents(saved)
    with (
        Checkpoints(saved) as checkpoints,
        pytest.raises(UserError, match="--workdir: expected no checkpoint newer"),
    ):
        checkpoints.save(2, make_state(5))
    assert contents(saved) == before


def test_an_interrupt_waits_until_the_checkpoint_is_whole(saved, monkeypatch):
    with Checkpoints(saved) as checkpoints:
        save = checkpoints._orbax.save

        def interrupted(*args, **options):
            signal.raise_signal(signal.SIGINT)
            return save(*args, **options)

        monkeypatch.setattr(checkpoints._orbax, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(3, make_state(3))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_same(restore_latest(saved, make_state()), make_state(3))


@pytest.mark.parametrize("where", ["arrays", "manifest", "rename"])
def test_a_full_disk_keeps_the_older_checkpoints_and_leaves_nothing_else(
    saved, monkeypatch, where
):
    before = contents(saved)

    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Checkpoints(saved) as checkpoints, monkeypatch.context() as patch:
        if where == "arrays":
            patch.setattr(checkpoints._orbax, "save", full)
        elif where == "manifest":
            patch.setattr(records, "write_json", full)
        else:
            patch.setattr(os, "replace", full)
        with pytest.raises(UserError, match=r"able to write .* No space left"):
            checkpoints.save(3, make_state(3))
        assert contents(saved) == before
    assert_same(restore_latest(saved, make_state()), make_state(2))


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="checkpoint: expected a folder"):
        Checkpoints(tmp_path / "file" / "run")


def test_a_checkpoint_of_one_network_loads_into_the_other(tmp_path):
    resnet, plain = (
        weights_template(model(num_classes=10, width=1), (32, 32, 3))
        for model in (models.ResNet18, models.PlainNet18)
    )
    leaves, treedef = jax.tree.flatten(resnet)
    values = [np.full(leaf.shape, i, leaf.dtype) for i, leaf in enumerate(leaves)]
    state = treedef.unflatten([jnp.asarray(value) for value in values])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
    assert_same(restore_latest(tmp_path, plain), state)
    wider = models.PlainNet18(num_classes=10, width=2)
    with pytest.raises(UserError, match=r"'params/.* of shape \[16, 10\]"):
        restore_latest(tmp_path, weights_template(wider, (32, 32, 3)))
