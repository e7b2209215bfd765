"""What becomes of files that are damaged, foreign, cut, killed or without room."""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grsd_jax as grsd
from example_results import one_model
from grsd_jax.experiments.commands import train
from grsd_jax.experiments.common import files, flags, records, runs
from grsd_jax.experiments.common.checkpoints import Checkpoints, restore_latest
from grsd_jax.experiments.common.config import Config, UserError
from grsd_jax.experiments.common.networks import make_model, weights_template
from grsd_jax.experiments.conditions.run import starts_here
from grsd_jax.experiments.sweep.analyse import COLUMNS, read_rows
from grsd_jax.experiments.track import run as track
from grsd_jax.experiments.track.log import ProbeLog, read_tracks
from grsd_jax.experiments.transport import run as transport
from grsd_jax.experiments.transport.snapshots import read_snapshot
from grsd_jax.shells import log_shells
from running import finish, run_script, small, start_script

ROOT = Path(__file__).parents[1]
VALUE = {"slope": 0.1, "shells": [1, 2, None], "about": {"seed": 3, "name": "net"}}
ARRAYS = {"net/values": np.arange(3.0), "net/mask": np.asarray([True, False])}
LINES = [{"step": step, "loss": 0.5**step} for step in range(3)]


def write_lines(path, lines):
    for line in lines:
        records.append_jsonl(path, line)


KINDS = {
    "json": (records.write_json, records.read_json, VALUE),
    "npz": (records.write_npz, records.read_npz, ARRAYS),
    "jsonl": (write_lines, records.read_jsonl, LINES),
}


def same(one, two):
    if isinstance(two, dict) and any(isinstance(x, np.ndarray) for x in two.values()):
        return set(one) == set(two) and all(
            np.array_equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in two
        )
    return one == two


@pytest.fixture(params=KINDS)
def written(request, tmp_path):
    """A file of each kind: its path, how to read it, and what it holds."""
    write, read, held = KINDS[request.param]
    path = tmp_path / f"file.{request.param}"
    write(path, held)
    assert same(read(path), held)
    return path, read, held


def outcome(path, read):
    """Returns what is read, or None with a sentence that names the file."""
    text = None
    try:
        return read(path)
    except UserError as error:
        text = str(error)
    assert text.startswith(f"'{path}': expected ")
    assert "\n" not in text
    return None


def test_a_flipped_bit_in_any_byte_is_noticed_or_changes_nothing(written):
    path, read, held = written
    whole, noticed = path.read_bytes(), 0
    bits = np.random.default_rng(0).integers(8, size=len(whole))
    for place, bit in enumerate(bits.tolist()):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        found = outcome(path, read)
        if found is None:
            noticed += 1
        elif path.suffix == ".jsonl" and place == len(whole) - 1:
            assert found == held[:-1]  # the end of a line that was cut short
        else:
            assert same(found, held), place
    assert noticed > 0.8 * len(whole)


def test_a_file_cut_at_any_byte_is_noticed_or_ends_with_a_whole_line(written):
    path, read, held = written
    whole = path.read_bytes()
    for length in range(len(whole) - 1):
        path.write_bytes(whole[:length])
        found = outcome(path, read)
        if path.suffix == ".jsonl":
            assert found == held[: len(found)]
            assert len(found) == whole[: length + 1].count(b"\n")
        else:  # the last byte of JSON is a newline, which changes nothing
            assert found is None or same(found, held), length
    path.write_bytes(whole)
    assert same(read(path), held)


def test_a_path_with_a_null_byte_is_refused():
    tried = (
        log_shells(jnp.ones(3), 2).save,
        grsd.load,
        ProbeLog,
        lambda path: records.write_json(path, VALUE),
        records.read_json,
    )
    for use in tried:
        with pytest.raises(
            ValueError, match=r"path: expected no null byte, got 'a\\x00"
        ):
            use("a\0b")


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[:1] + lines[2:],
        lambda lines: lines[1:],
        lambda lines: lines[:2] + lines[1:],
        lambda lines: [lines[1], lines[0], lines[2]],
        lambda lines: [*lines, b'{"step": 9}\n'],
        lambda lines: [b'{"step": 0}\n', *lines[1:]],
    ],
    ids=["lost", "first lost", "doubled", "swapped", "foreign", "foreign first"],
)
def test_a_line_lost_doubled_or_added_is_noticed(tmp_path, change):
    path = tmp_path / "lines.jsonl"
    write_lines(path, LINES)
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(UserError, match=f"'{path}': expected lines numbered one by on"):
        records.read_jsonl(path)


def test_a_last_line_cut_anywhere_is_completed_or_dropped_before_the_next(tmp_path):
    path = tmp_path / "lines.jsonl"
    write_lines(path, LINES)
    whole = path.read_bytes()
    start = whole[:-1].rfind(b"\n") + 1
    for length in range(start, len(whole) + 1):
        path.write_bytes(whole[:length])
        kept = LINES if length >= len(whole) - 1 else LINES[:-1]
        assert records.read_jsonl(path) == kept
        records.append_jsonl(path, {"step": 7})
        assert records.read_jsonl(path) == [*kept, {"step": 7}]


def test_lines_longer_than_what_is_read_at_a_time_are_numbered_on(tmp_path):
    path = tmp_path / "lines.jsonl"
    lines = [{"step": step, "text": "x" * 20_000 * step} for step in range(4)]
    write_lines(path, lines)
    with open(path, "ab") as file:
        file.write(b'{"step": 5' + b" " * 70_000)
    records.append_jsonl(path, {"step": 5})
    assert records.read_jsonl(path) == [*lines, {"step": 5}]


def test_nothing_is_appended_to_lines_that_are_not_ours(tmp_path):
    path = tmp_path / "lines.jsonl"
    for text, named in (('{"step": 1}\n', "numbered lines"), ("mine\n", "a JSON obj")):
        path.write_text(text)
        with pytest.raises(UserError, match=named):
            records.append_jsonl(path, {"step": 2})
        assert path.read_text() == text


def test_files_from_before_checksums_are_read_as_they_are(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(VALUE))
    np.savez_compressed(tmp_path / "a.npz", **ARRAYS)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(x) + "\n" for x in LINES))
    for kind, (_, read, held) in KINDS.items():
        assert same(read(tmp_path / f"a.{kind}"), held)
    records.rewind_jsonl(tmp_path / "a.jsonl", 1)
    records.append_jsonl(tmp_path / "a.jsonl", LINES[2])
    assert records.read_jsonl(tmp_path / "a.jsonl") == LINES


def test_every_committed_result_can_be_read():
    results = ROOT / "docs" / "results"
    assert [records.read_json(path) for path in results.rglob("*.json")]
    assert [records.read_jsonl(path) for path in results.rglob("*.jsonl")]
    assert [read_rows(path) for path in results.rglob("sweep.csv")]
    assert set(read_tracks(results / "track_cifar10_w16")) == {"resnet18", "plainnet18"}


def test_a_key_of_the_file_itself_is_refused(tmp_path):
    for write, keys in (
        (records.write_json, ("file_format", "sha256")),
        (records.append_jsonl, ("line", "crc32")),
    ):
        for key in keys:
            with pytest.raises(ValueError, match=f"{key}: expected no such key"):
                write(tmp_path / "file", {key: 1})
    assert not [path for path in tmp_path.iterdir() if path.read_bytes()]


def failing(number):
    def fail(*_args, **_options):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_sync_is_written_all_the_same(
    tmp_path, monkeypatch, number
):
    monkeypatch.setattr(os, "fsync", failing(number))
    for kind, (write, read, held) in KINDS.items():
        write(tmp_path / f"a.{kind}", held)
        assert same(read(tmp_path / f"a.{kind}"), held)
    with runs.workdir_lock(tmp_path / "run"):
        pass


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails_is_told_and_keeps_what_was_there(
    tmp_path, monkeypatch, number
):
    for kind, (write, _, held) in KINDS.items():
        write(tmp_path / f"a.{kind}", held)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(number))
        patch.setattr(os, "link", failing(number))
        for kind in ("json", "npz"):
            with pytest.raises(UserError, match=os.strerror(number)):
                KINDS[kind][0](tmp_path / f"a.{kind}", {"x": 1})
        with pytest.raises(UserError, match=os.strerror(number)):
            records.append_jsonl(tmp_path / "a.jsonl", {"step": 3})
        with pytest.raises(UserError, match=os.strerror(number)):
            files.set_aside(tmp_path, ("a.json", "a.npz"))
    assert {path.name for path in tmp_path.iterdir()} == {f"a.{kind}" for kind in KINDS}
    for kind in ("json", "npz"):
        assert same(KINDS[kind][1](tmp_path / f"a.{kind}"), KINDS[kind][2])
    assert records.read_jsonl(tmp_path / "a.jsonl")[:3] == LINES


def test_a_line_that_the_disk_has_no_room_for_is_mended_by_the_next(tmp_path):
    """A limit on the size of files cuts the write in the middle of a line."""
    path = tmp_path / "lines.jsonl"
    write_lines(path, LINES)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        room = path.stat().st_size + 10
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        with pytest.raises(UserError, match="expected to be able to write"):
            records.append_jsonl(path, {"step": 3, "text": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert records.read_jsonl(path) == LINES
    records.append_jsonl(path, {"step": 4})
    assert records.read_jsonl(path) == [*LINES, {"step": 4}]


@pytest.mark.parametrize("links", [True, False])
def test_files_are_set_aside_all_or_none(tmp_path, monkeypatch, links):
    names = ("a.json", "a.npz")
    for name in names:
        (tmp_path / name).write_text(name)
    duplicate = files._duplicate

    def fails_at_the_second(path, other):
        if path.suffix == ".npz":
            raise OSError(errno.ENOSPC, "No space left")
        duplicate(path, other)

    if not links:
        monkeypatch.setattr(os, "link", failing(errno.EPERM))
    with monkeypatch.context() as patch:
        patch.setattr(files, "_duplicate", fails_at_the_second)
        with pytest.raises(UserError, match="No space left"):
            files.set_aside(tmp_path, names)
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    files.set_aside(tmp_path, (*names, "missing.csv"))
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"a-1.json": "a.json", "a-1.npz": "a.npz"}


def test_what_a_killed_run_left_half_written_is_removed_by_the_next(tmp_path):
    with subprocess.Popen(["true"]) as gone:
        pass
    alive = os.getppid()
    left = [f".a.json.{gone.pid}.grsd.tmp", f"cells/.b.npz.{gone.pid}.grsd.tmp"]
    left += [f".c.json.{os.getpid()}.grsd.tmp"]  # an earlier one by its number
    kept = [f".a.json.{alive}.grsd.tmp", f".a.json.{gone.pid}.tmp", "cells/b.npz"]
    kept += [
        "other/.lock",
        f"other/.d.json.{gone.pid}.grsd.tmp",
    ]  # another run
    for name in (*left, *kept):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
    folder = tmp_path / f".7.{gone.pid}.grsd.tmp" / "arrays"
    folder.mkdir(parents=True)
    (folder / "part").write_text("half")
    with runs.workdir_lock(tmp_path):
        found = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.*")}
    assert found == {*kept, ".lock"}


def test_a_hundred_writers_killed_at_random_leave_whole_files(tmp_path):
    program = Path(__file__).parent / "killed_writers.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", program, tmp_path, "100"],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    assert "records" in done.stdout


@pytest.mark.scheduled
def test_a_training_killed_twice_ends_like_one_that_was_not(tmp_path):
    options = ("--model=mlp", "--width=2", "--depth=1", "--epochs=2", "--log_every=3")
    options += (
        "--checkpoint_every=4",
        "--train_batch_size=128",
        "--keep_checkpoints=1",
    )
    folders = [tmp_path / "killed" / "mlp", tmp_path / "whole" / "mlp"]
    for lines in (4, 12):  # of metrics when the process is killed
        process = start_script("train.py", *options, f"--workdir={folders[0].parent}")
        while len(records.read_jsonl(folders[0] / "metrics.jsonl")) < lines:
            assert process.poll() is None, finish(process)
            time.sleep(0.01)
        process.kill()
        assert finish(process).code == -signal.SIGKILL
    for folder in folders:
        done = finish(start_script("train.py", *options, f"--workdir={folder.parent}"))
        assert done.code == 0, done.err
    model = make_model("mlp", 10, Config(model="mlp", width=2, depth=1))
    template = weights_template(model, (32, 32, 3))._asdict()
    resumed, whole = (restore_latest(f / "checkpoints", template) for f in folders)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    metrics = [records.read_jsonl(folder / "metrics.jsonl") for folder in folders]
    assert len(metrics[0]) > 12
    for lines in metrics:
        for line in lines:
            del line["seconds"]
    assert metrics[0] == metrics[1]


@pytest.mark.scheduled
def test_checkpoints_killed_at_random_are_whole_or_absent(tmp_path):
    program, there = Path(__file__).parent / "killed_checkpoints.py", False
    for kill in range(20):
        process = subprocess.Popen(
            [sys.executable, program, tmp_path],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        assert process.stdout.readline() == "going on\n"
        time.sleep(0.013 * kill)
        process.kill()
        process.communicate()
        found = list(tmp_path.glob("[0-9]*"))
        assert found or not there
        there = bool(found)
    assert there


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = Config(workdir="~/run", data_dir="~/data")
    assert config.workdir == str(tmp_path / "run")
    assert config.data_dir == str(tmp_path / "data")
    for kind, (write, read, held) in KINDS.items():
        write(f"~/a.{kind}", held)
        assert same(read(f"~/a.{kind}"), held)
        assert (tmp_path / f"a.{kind}").exists()
    runs.cached("~/cell", {}, lambda: ({"x": 1}, {}))
    assert (tmp_path / "cell.json").exists()
    with runs.workdir_lock("~/locked"):
        assert (tmp_path / "locked" / ".lock").exists()
    Checkpoints("~/checkpoints").__exit__(None, None, None)
    assert (tmp_path / "checkpoints").is_dir()
    monkeypatch.chdir(tmp_path)
    assert not (tmp_path / "~").exists()


FOREIGN = {
    "empty": b"",
    "null": b"null",
    "number": b"3",
    "text": b'"text"',
    "list": b"[]",
    "list of objects": b"[{}]",
    "object": b"{}",
    "binary": b"\xff\xfe\x00\x00garbage",
    "deep": b"[" * 100_000,
    "nothing": b'{"tracks": {}, "config": {}, "rows": []}',
    "others": b'{"tracks": {"a": 1}, "config": {}, "rows": [{"seed": 1}], "models": 3}',
    "nulls": b'{"tracks": null, "config": null, "rows": null, "condition1": null}',
    "table": b"a,b\n1,2\n",
}


ONE_ROW = ",".join("1" if c != "model" else "mlp" for c in COLUMNS)


def plot(folder):
    return run_script("plot.py", f"--workdir={folder}")


#: What a training returns to the command that reads its metrics.
TRAINED = SimpleNamespace(state=SimpleNamespace(step=3), test_accuracy=0.5)


def text_of_metrics(path):
    with files.reading(path, "the metrics of a training"):
        return train._format_training("mlp", records.read_jsonl(path), TRAINED)


#: A study whose settings are those of a file without any: its runs are read.
STUDY = ("protocol", "networks", "data_fingerprint", "config")

#: By the file's name, and what else is to be said, what reads it.
READERS = {
    "results.json": plot,
    "arrays.npz": plot,
    "claims.json": lambda folder: run_script(
        "study.py", f"--workdir={folder}", "--report_only"
    ),
    "sweep.csv": lambda folder: run_script(
        "sweep.py", f"--workdir={folder}", "--figures_only"
    ),
    "config.json": lambda folder: starts_here(folder, Config()),
    "config.json settings": lambda folder: runs.check_same_run(folder, {"seed": 0}),
    "config.json flags": lambda folder: flags._settings_of_training(
        folder.parent, folder.name
    ),
    "sweep.json": lambda folder: read_rows(folder / "sweep.csv"),
    "transport.json": lambda folder: run_script(
        "transport.py", f"--workdir={folder}", "--report_only"
    ),
    "transport.json resumed": lambda folder: transport._finished_runs(
        folder / "transport.json", dict.fromkeys(STUDY)
    ),
    "4.npz": lambda folder: read_snapshot(folder, 4),
    "cell.json": lambda folder: runs.cached(folder / "cell", {}, lambda: ({}, {})),
    "metrics.jsonl": lambda folder: text_of_metrics(folder / "metrics.jsonl"),
    "metrics.jsonl tracked": lambda folder: track._train_seconds(
        folder / "metrics.jsonl"
    ),
    "records.jsonl": lambda folder: run_script(
        "plot.py", f"--workdir={folder / 'records.jsonl'}"
    ),
    "records.jsonl tracked": lambda folder: read_tracks(folder),
    "conditions.json": lambda folder: run_script("report.py", folder),
    "table.csv": lambda folder: run_script("report.py", folder),
    "figure.png": lambda folder: run_script("report.py", folder),
}


#: How many of the foreign contents are told, where it is not most of them.
TOLD = {
    "cell.json": 0,  # computed again
    "conditions.json": 2,
    "table.csv": 2,
}


@pytest.mark.parametrize("name", READERS)
def test_a_foreign_file_is_one_sentence_with_its_name(tmp_path, name):
    """For every reader: no traceback, whatever lies under the name that it reads."""
    results, arrays = one_model()
    records.write_json(tmp_path / "results.json", results)
    records.write_npz(tmp_path / "arrays.npz", arrays)
    if name == "records.jsonl tracked":
        records.write_json(
            tmp_path / "results.json", {"tracks": {".": {"num_records": 9}}}
        )
    (tmp_path / "sweep.csv").write_text(",".join(COLUMNS) + "\n" + ONE_ROW + "\n")
    path = tmp_path / name.partition(" ")[0]
    reader, told = READERS[name], 0
    with small():
        for kind, contents in FOREIGN.items():
            # A last line without its end is one that was cut short.
            path.write_bytes(contents + b"\n" * (path.suffix == ".jsonl"))
            try:
                done = reader(tmp_path)
            except UserError as error:
                text = str(error)
            else:
                if not hasattr(done, "code") or done.code == 0:
                    continue  # a table of anyone's, or settings of another training
                text = done.err
                assert done.code == 1, (kind, text)
            told += 1
            assert "Traceback" not in text, (kind, text)
            assert text.strip().count("\n") == 0, (kind, text)
            assert path.name in text, (kind, text)
    assert told >= TOLD.get(name, 8)


#: The modules that read files of ours, and the rows of `READERS` for what they read, or
#: the test file that damages it.
READ_IN = {
    "commands/plot.py": ["results.json"],
    "commands/study.py": ["claims.json"],
    "commands/train.py": ["metrics.jsonl"],
    "commands/transport.py": ["transport.json"],
    "common/checkpoints.py": "test_checkpoints",
    "common/flags.py": ["config.json flags"],
    "common/records.py": "test_files",
    "common/runs.py": ["config.json settings", "cell.json"],
    "conditions/run.py": ["config.json"],
    "report/page.py": ["conditions.json"],
    "reproduce/analyse.py": ["results.json", "arrays.npz"],
    "reproduce/run.py": "test_pipeline",
    "sweep/analyse.py": ["sweep.csv", "sweep.json"],
    "track/log.py": ["records.jsonl", "records.jsonl tracked"],
    "track/run.py": ["metrics.jsonl tracked"],
    "transport/run.py": ["transport.json resumed"],
    "transport/snapshots.py": ["4.npz"],
}


def test_every_module_that_reads_a_file_is_handed_a_foreign_one():
    folder = Path(records.__file__).parents[1]
    reads = re.compile(r"\b(records\.)?read_(json|any_json|jsonl|npz)\(")
    found = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.py")
        if reads.search(path.read_text(encoding="utf-8"))
    }
    assert found == set(READ_IN)
    rows = {row for told in READ_IN.values() if isinstance(told, list) for row in told}
    assert rows <= set(READERS)
    others = [told for told in READ_IN.values() if isinstance(told, str)]
    assert all((Path(__file__).parent / f"{told}.py").exists() for told in others)


def test_a_number_that_is_a_list_in_any_place_is_one_sentence(tmp_path):
    """Every leaf of a row of an unsigned claims.json, made a list in turn."""
    row = {"seed": 0, "reduction": "stack", "network": "resnet18", "slope": 1.0}
    row |= dict.fromkeys(("r_squared", "toeplitz_residual", "toeplitz_edge"), 0.5)
    rows = [row, row | {"network": "plainnet18"}]
    with small():
        for key in row:
            broken = [row | {key: [1, [2]]}, rows[1]]
            (tmp_path / "claims.json").write_text(json.dumps({"rows": broken}))
            done = run_script("study.py", f"--workdir={tmp_path}", "--report_only")
            assert done.code == 1
            assert done.err.startswith("error: ")
            assert "claims.json" in done.err
            assert "Traceback" not in done.err


def test_arrays_and_rows_of_another_measurement_are_noticed(tmp_path):
    from grsd_jax.experiments.reproduce.analyse import read_results
    from grsd_jax.experiments.reproduce.run import write_results

    results, arrays = one_model()
    write_results(tmp_path, results, arrays)
    assert read_results(tmp_path)[0] == records.plain(results)
    records.write_npz(tmp_path / "arrays.npz", arrays | {"more": np.ones(1)})
    with pytest.raises(UserError, match=r"arrays.npz': expected the arrays that"):
        read_results(tmp_path)

    line = ONE_ROW
    (tmp_path / "sweep.csv").write_text(",".join(COLUMNS) + "\n" + line + "\n")
    checksum = files.checksum(tmp_path / "sweep.csv")
    records.write_json(tmp_path / "sweep.json", {"rows_sha256": checksum})
    assert read_rows(tmp_path / "sweep.csv")[0]["model"] == "mlp"
    (tmp_path / "sweep.csv").write_text(",".join(COLUMNS) + "\n" + line[:-1] + "2\n")
    with pytest.raises(UserError, match=r"sweep.csv': expected the rows that sweep"):
        read_rows(tmp_path / "sweep.csv")


def test_records_fewer_than_the_results_say_are_noticed(tmp_path):
    records.write_json(tmp_path / "results.json", {"tracks": {"a": {"num_records": 3}}})
    (tmp_path / "a").mkdir()
    write_lines(tmp_path / "a" / "records.jsonl", LINES)
    assert read_tracks(tmp_path) == {"a": LINES}
    whole = (tmp_path / "a" / "records.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "a" / "records.jsonl").write_bytes(b"".join(whole[:2]))
    with pytest.raises(UserError, match=r"records.jsonl': expected 3 records.*got: 2"):
        read_tracks(tmp_path)
