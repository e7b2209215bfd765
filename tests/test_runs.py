"""A run: results that are computed once, its lock, and its progress."""

import contextlib
import io
import json
import math
import os
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax.experiments.common import records, runs
from grsd_jax.experiments.common.config import UserError
from grsd_jax.experiments.common.runs import cached, workdir_lock

MADE_BY = {"width": 2, "shells": (1, 2), "rate": np.float32(0.5)}


class Computation:
    """Counts its calls; every call returns another number."""

    def __init__(self, arrays=True):
        self.calls, self._arrays = 0, arrays

    def __call__(self):
        self.calls += 1
        arrays = {"x": jnp.arange(3) + self.calls, "mask": np.ones(2, bool)}
        entry = {"calls": self.calls, "nan": math.nan, "pair": (1, 2)}
        return entry, arrays if self._arrays else {}


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("arrays", [True, False])
def test_a_result_is_computed_once_and_read_back_alike(tmp_path, arrays):
    compute = Computation(arrays)
    first = cached(tmp_path / "deep" / "cell-s0.1", MADE_BY, compute)
    again = cached(tmp_path / "deep" / "cell-s0.1", MADE_BY, compute)
    assert compute.calls == 1
    assert first[0] == again[0] == {"calls": 1, "nan": None, "pair": [1, 2]}
    names = {"cell-s0.1.json"} | ({"cell-s0.1.npz"} if arrays else set())
    assert set(files_of(tmp_path / "deep")) == names
    assert set(first[1]) == set(again[1]) == ({"x", "mask"} if arrays else set())
    for name, array in first[1].items():
        assert isinstance(array, np.ndarray)
        assert array.dtype == again[1][name].dtype
        np.testing.assert_array_equal(array, again[1][name])


@pytest.mark.parametrize(
    "other", [{"width": 3}, {"shells": (1,)}, {"rate": math.nan}, {"more": None}]
)
def test_another_made_by_is_computed_again(tmp_path, other):
    compute = Computation()
    cached(tmp_path / "a", MADE_BY, compute)
    entry, arrays = cached(tmp_path / "a", MADE_BY | other, compute)
    assert entry["calls"] == 2
    np.testing.assert_array_equal(arrays["x"], np.arange(3) + 2)
    assert cached(tmp_path / "a", MADE_BY | other, compute)[0]["calls"] == 2
    assert cached(tmp_path / "a", MADE_BY, compute)[0]["calls"] == 3


def test_no_arrays_of_an_earlier_result_stay(tmp_path):
    cached(tmp_path / "a", MADE_BY, Computation())
    cached(tmp_path / "a", {}, Computation(arrays=False))
    assert set(files_of(tmp_path)) == {"a.json"}


@pytest.mark.parametrize("earlier", [False, True])
def test_a_kill_between_the_two_files_leaves_no_result(tmp_path, monkeypatch, earlier):
    compute = Computation()
    if earlier:
        cached(tmp_path / "a", {"other": 1}, compute)
    with monkeypatch.context() as patched:
        patched.setattr(records, "write_json", lambda *_args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cached(tmp_path / "a", MADE_BY, compute)
    assert set(files_of(tmp_path)) == {"a.npz"}  # the earlier json is gone
    calls = compute.calls
    entry, arrays = cached(tmp_path / "a", MADE_BY, compute)
    assert entry["calls"] == compute.calls == calls + 1
    np.testing.assert_array_equal(arrays["x"], np.arange(3) + compute.calls)


def test_a_failed_computation_keeps_the_earlier_result(tmp_path):
    cached(tmp_path / "a", MADE_BY, Computation())
    before = files_of(tmp_path)
    with pytest.raises(ZeroDivisionError):
        cached(tmp_path / "a", {}, lambda: 1 / 0)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("name", ["a.json", "a.npz"])
@pytest.mark.parametrize("damage", ["missing", "garbage", "cut", "list"])
def test_a_damaged_file_is_computed_again(tmp_path, name, damage):
    compute, path = Computation(), tmp_path / name
    cached(tmp_path / "a", MADE_BY, compute)
    whole = path.read_bytes()
    match damage:
        case "missing":
            path.unlink()
        case "garbage":
            path.write_bytes(b"\xff no such file")
        case "cut":
            path.write_bytes(whole[: len(whole) // 2])
        case "list":
            path.write_bytes(b"[]")
    assert cached(tmp_path / "a", MADE_BY, compute)[0]["calls"] == 2
    assert cached(tmp_path / "a", MADE_BY, compute)[0]["calls"] == 2


def test_arrays_of_another_result_do_not_count(tmp_path):
    compute = Computation()
    cached(tmp_path / "a", MADE_BY, compute)
    records.write_npz(tmp_path / "a.npz", {"other": np.ones(2)})
    assert cached(tmp_path / "a", MADE_BY, compute)[0]["calls"] == 2


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="--workdir: expected to be able to write"):
        cached(tmp_path / "file" / "a", MADE_BY, Computation())


def test_a_second_run_is_kept_out_while_the_first_lasts(tmp_path):
    workdir = tmp_path / "run"
    with workdir_lock(workdir) as folder:
        assert folder == workdir
        with (
            pytest.raises(UserError, match=f"no other run in .* pid {os.getpid()}"),
            workdir_lock(workdir),
        ):
            pass
    with workdir_lock(workdir):
        assert set(files_of(workdir)) == {".lock"}


def test_a_run_that_fails_leaves_no_empty_folder(tmp_path):
    def fail(folder, *, after=None):
        with contextlib.suppress(ZeroDivisionError), workdir_lock(folder):
            if after:
                (folder / after).write_text("done")
            raise ZeroDivisionError

    fail(tmp_path / "made")
    assert list(tmp_path.iterdir()) == []
    fail(tmp_path / "used", after="metrics.jsonl")
    assert set(files_of(tmp_path / "used")) == {".lock", "metrics.jsonl"}
    (tmp_path / "there").mkdir()
    fail(tmp_path / "there")
    assert set(files_of(tmp_path / "there")) == {".lock"}


def test_a_lock_file_of_anyones_does_not_matter(tmp_path):
    (tmp_path / ".lock").write_bytes(b"\xff\xfe")
    with workdir_lock(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
        (tmp_path / ".lock").write_bytes(b"\xff\xfe")
        with pytest.raises(UserError, match="no other run"), workdir_lock(tmp_path):
            pass


def test_the_environment_says_what_a_result_depends_on():
    found = runs.environment(precision="high")
    assert found["precision"] == "high"
    assert found["platform"] == "cpu"
    assert {"jax", "jaxlib", "numpy", "flax", "grsd_jax"} <= set(found["versions"])
    json.dumps(found)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def progress(monkeypatch, *, seconds, to=None, first=True):
    stream = io.StringIO() if to is None else to
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(runs, "LOG_SECONDS", seconds)
    monkeypatch.setattr(runs, "writes", lambda: first)
    with runs.progress_bar(total=3, desc="work", unit="step") as bar:
        for _ in range(3):
            bar.update()
    return stream.getvalue()


def test_a_log_gets_whole_lines(monkeypatch):
    lines = progress(monkeypatch, seconds=0.0).splitlines()
    assert lines[-1].startswith("work: 100%")
    assert "3/3" in lines[-1]
    assert len(lines) >= 3


def test_the_last_line_is_at_the_end_though_it_comes_early(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(runs, "LOG_SECONDS", 0.05)
    with runs.progress_bar(total=3, desc="work") as bar:
        bar.update()
        time.sleep(0.06)
        bar.update()
        bar.update()  # within an interval of the line before
    lines = sys.stderr.getvalue().splitlines()
    assert ["100%" in line for line in lines] == [False, True]


def test_a_bar_within_a_bar_moves_no_cursor(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(runs, "LOG_SECONDS", 0.0)
    for _ in runs.progress_bar(range(2), desc="outer"):
        for _ in runs.progress_bar(range(2), desc="inner"):
            pass
    assert "inner: 100%" in stream.getvalue()
    assert chr(27) not in stream.getvalue()


def test_short_work_leaves_no_line(monkeypatch):
    assert progress(monkeypatch, seconds=60.0) == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    assert "\r" in progress(monkeypatch, seconds=60.0, to=Terminal())


def test_other_processes_are_silent(monkeypatch):
    assert progress(monkeypatch, seconds=0.0, first=False) == ""


def test_an_iterable_passes_through():
    assert list(runs.progress_bar(range(4))) == [0, 1, 2, 3]


@pytest.mark.parametrize("text", ["\r", "   \r", ""])
def test_blank_redraws_leave_no_line(text, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    runs._Lines().write(text)
    assert stream.getvalue() == ""
