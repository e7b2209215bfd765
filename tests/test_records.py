import errno
import json
import os
import resource
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax.experiments.common import files, records
from grsd_jax.experiments.common.config import UserError
from grsd_jax.experiments.common.runs import workdir_lock


def files_of(folder):
    return sorted(path.name for path in folder.iterdir())


def test_json_holds_numpy_and_jax_values_and_null_for_what_is_not_finite(tmp_path):
    path = tmp_path / "deep" / "value.json"
    value = {
        "b": np.float32(0.5),
        "a": [jnp.asarray(2, jnp.int32), np.bool_(True), float("nan")],
        "c": np.asarray([[1.0, np.inf]]),
        "d": (None, "text", path),
    }
    records.write_json(path, value)
    wanted = {
        "a": [2, True, None],
        "b": 0.5,
        "c": [[1.0, None]],
        "d": [None, "text", str(path)],
    }
    assert records.read_json(path) == wanted
    keys = ["a", "b", "c", "d", "file_format", "sha256"]
    assert list(json.loads(path.read_text())) == keys
    assert files_of(path.parent) == ["value.json"]


def test_npz_keeps_values_and_dtypes(tmp_path):
    arrays = {"net/values": jnp.arange(3.0), "net/mask": np.asarray([True, False])}
    records.write_npz(tmp_path / "a.npz", arrays)
    loaded = records.read_npz(tmp_path / "a.npz")
    assert set(loaded) == set(arrays)
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "value.json"
    records.write_json(path, {"old": 1})

    def fail_in_the_middle():
        with files.atomic_path(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_in_the_middle()
    with pytest.raises(TypeError):
        records.write_json(path, {"new": object()})
    assert records.read_json(path) == {"old": 1}
    assert files_of(tmp_path) == ["value.json"]


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    records.write_npz(path, {"x": np.ones(3)})

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for write in (
        lambda: records.write_npz(path, {"x": np.zeros(3)}),
        lambda: records.write_json(path, {}),
        lambda: records.append_jsonl(tmp_path / "lines", {}),
    ):
        with pytest.raises(UserError, match=r"--workdir: expected .* No space left"):
            write()
    np.testing.assert_array_equal(records.read_npz(path)["x"], np.ones(3))
    with (
        pytest.raises(UserError, match=r"--workdir: expected .* No space left"),
        workdir_lock(tmp_path / "run"),
    ):
        pass


def test_a_real_limit_on_file_size_is_one_sentence(tmp_path):
    """A file larger than the process may write, as on a full disk."""
    path = tmp_path / "a.npz"
    records.write_npz(path, {"x": np.ones(3)})
    program = f"""
        import resource, signal, numpy as np
        from grsd_jax.experiments.common import records
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, {resource.RLIM_INFINITY}))
        try:
            noise = np.random.default_rng(0).normal(size=10_000)
            records.write_npz({str(path)!r}, {{"x": noise}})
        except ValueError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("--workdir: expected to be able to write")
    np.testing.assert_array_equal(records.read_npz(path)["x"], np.ones(3))
    assert files_of(tmp_path) == ["a.npz"]


def test_a_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for workdir in (tmp_path / "file", tmp_path / "file" / "inside"):
        with (
            pytest.raises(UserError, match="--workdir: expected to be able to write"),
            workdir_lock(workdir),
        ):
            pass
        with pytest.raises(UserError, match="--workdir"):
            records.write_json(workdir / "value.json", {})
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("damage", ["missing", "garbage", "cut", "pickle", "npy"])
def test_a_bad_npz_is_one_sentence(tmp_path, damage):
    path = tmp_path / "a.npz"
    if damage == "garbage":
        path.write_bytes(b"no arrays here")
    elif damage == "cut":
        records.write_npz(path, {"x": np.arange(1000)})
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "pickle":
        with open(path, "wb") as file:
            np.savez(file, x=np.asarray([{}], dtype=object))
    elif damage == "npy":
        with open(path, "wb") as file:
            np.save(file, np.ones(3))
    with pytest.raises(UserError, match=r"expected an .npz file of arrays") as caught:
        records.read_npz(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_objects_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="x: expected an array of numbers"):
        records.write_npz(tmp_path / "a.npz", {"x": np.asarray([{}], dtype=object)})
    assert files_of(tmp_path) == []


def test_a_bad_json_is_one_sentence(tmp_path):
    path = tmp_path / "value.json"
    with pytest.raises(UserError, match=r"expected a JSON file, got: No such file"):
        records.read_json(path)
    path.write_text('{"half": ')
    with pytest.raises(UserError, match=r"value.json': expected a JSON file, got"):
        records.read_json(path)


def test_json_lines_survive_a_write_that_was_cut_short(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert records.read_jsonl(path) == []
    lines = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]
    records.append_jsonl(path, lines[0])
    records.append_jsonl(path, {"step": np.int32(2), "loss": np.float32(np.nan)})
    assert records.read_jsonl(path) == lines
    with open(path, "a") as file:
        file.write('{"step": 3, "lo')
    assert records.read_jsonl(path) == lines
    records.write_jsonl(path, lines[:1])
    assert records.read_jsonl(path) == lines[:1]
    path.write_text('garbage\n{"step": 1}\n')
    with pytest.raises(UserError, match="a JSON object on every line, got: line 1"):
        records.read_jsonl(path)


def test_files_are_set_aside_together_under_the_next_free_number(tmp_path):
    names = ("results.json", "arrays.npz")
    for number in (1, 2):
        records.write_json(tmp_path / "results.json", {"number": number})
        files.set_aside(tmp_path, names)
    assert files_of(tmp_path) == ["results-1.json", "results-2.json"]
    assert records.read_json(tmp_path / "results-2.json") == {"number": 2}
