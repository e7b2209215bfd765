"""The scripts as a user runs them: their help, their errors, what they leave."""

import ast
import importlib
import inspect
import json
import os
import re
import sys

import jax
import numpy as np
import pytest

from grsd_jax.experiments import commands
from grsd_jax.experiments.common import records
from grsd_jax.experiments.common.checkpoints import restore_latest
from grsd_jax.experiments.common.networks import weights_template
from running import SCRIPTS, Twin, run_script, small

TINY = ("--width=1", "--epochs=1", "--train_batch_size=4", "--log_every=2")


@pytest.fixture(autouse=True, scope="module")
def _small():
    with small():
        yield


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*.py")))
def test_help_helps_and_unknown_values_are_named(script):
    shown = run_script(script, "--help")
    assert shown.code == 0
    assert "\nExample" in shown.out
    assert "\n  --workdir=" in shown.out
    wrong = run_script(script, "--workdir=")
    assert wrong.code != 0
    assert "workdir" in wrong.err + wrong.out
    assert "Traceback" not in wrong.err


def test_every_script_is_a_command():
    assert {path.stem for path in SCRIPTS.glob("*.py")} == set(commands.COMMANDS)


def test_the_command_without_a_name_lists_the_names(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["grsd"])
    commands.main()
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in commands.COMMANDS)


def test_an_unknown_command_is_told(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["grsd", "fly"])
    with pytest.raises(SystemExit) as stopped:
        commands.main()
    assert stopped.value.code == 1
    assert "got 'fly'" in capsys.readouterr().err


@pytest.mark.parametrize("told", [None, "elsewhere"])
def test_compilations_are_kept_unless_jax_is_told_where(monkeypatch, told):
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")
    folder, seconds = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in (folder, seconds)}
    try:
        jax.config.update(folder, told)
        commands.keep_compilations()
        assert getattr(jax.config, folder) == (told or "caches/grsd_jax")
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_the_command_passes_its_arguments_on(monkeypatch):
    seen = []
    monkeypatch.setattr("sys.argv", ["bin/grsd", "plot", "runs/x"])
    monkeypatch.setattr(commands, "run", lambda name: seen.append((name, sys.argv)))
    commands.main()
    assert seen == [("plot", ["grsd plot", "runs/x"])]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("train.py", ("ResNet-18", "seconds", "--workdir", "--schedule_args")),
        ("track.py", ("records.jsonl", "--record_every", "--models")),
        ("measure.py", ("--distributed", "--protocol")),
    ],
)
def test_help_says_what_a_script_does_and_how(script, words):
    shown = run_script(script, "--help").out
    for word in words:
        assert word in shown


@pytest.mark.parametrize(
    ("script", "argument", "named"),
    [
        ("train.py", "--width=0", "--width"),
        ("train.py", "--solver=magic", "solver"),
        ("train.py", "extra", "'extra'"),
        (
            "measure.py",
            "--num_processes=2",
            "--num_processes: expected --distributed, --coordinator_address",
        ),
        ("measure.py", "--protocol=own,shared", "--protocol: expected one protocol"),
        ("measure.py", "--protocol=shared", "--protocol: expected own"),
        ("measure.py", "--workdir=missing", "--workdir: expected a folder"),
        (
            "plot.py",
            "--workdir=missing",
            "got 'missing', which does not exist.",
        ),
    ],
)
def test_a_bad_command_line_is_told_without_a_traceback(script, argument, named):
    done = run_script(script, argument)
    assert (done.code, done.out) == (1, "")
    assert named in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_ends_with_places_and_the_next_one(name):
    module = importlib.import_module(f"{commands.__name__}.{name}")
    *_, last = ast.parse(inspect.getsource(module.main)).body[0].body
    called = last.value.func
    assert getattr(called, "id", getattr(called, "attr", None)) == "say_end"
    assert [keyword.arg for keyword in last.value.keywords] == ["then"]
    assert last.value.args


def test_the_next_command_can_be_pasted(capsys):
    commands.say_end("a b", then=("grsd", "report", "a b"))
    assert capsys.readouterr().out == "a b\nnext: grsd report 'a b'\n"


def test_a_reader_may_leave(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "argv", ["grsd", "--help"])
    with open(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(SystemExit) as caught:
            commands.main()
    assert caught.value.code == 1


def test_a_failed_measurement_leaves_no_folder(tmp_path):
    done = run_script("measure.py", tmp_path, "--dataset=synthetic")
    assert done.code == 1
    assert "checkpoint" in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_data_set_is_one_sentence(tmp_path):
    workdir = tmp_path / "run"
    flags = ("--dataset=cifar10", f"--data_dir={tmp_path}", f"--workdir={workdir}")
    done = run_script("train.py", *flags)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: --data_dir: expected prepared CIFAR-10")
    assert done.err.count("\n") == 1
    assert not workdir.exists()


def test_a_run_trains_and_says_where_everything_is(tmp_path):
    flags = (*TINY, f"--workdir={tmp_path}", "--model=plainnet18")
    done = run_script("train.py", *flags)
    assert (done.code, done.err) == (0, "")
    table, legend = done.out.split("\n\n")
    assert re.search(r"PlainNet-18 \| 16 +\|( +\d\.\d{3,4} \|){3} +\d+\.\d \|$", table)
    folder = tmp_path / "plainnet18"
    assert legend.splitlines()[-3:] == [
        str(folder / "metrics.jsonl"),
        str(folder / "checkpoints"),
        f"next: grsd measure {tmp_path} --model=plainnet18",
    ]
    lines = records.read_jsonl(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(2, 17, 2))
    # What it wrote is the ResNet's checkpoint as well.
    template = {"step": jax.ShapeDtypeStruct((), np.int32)}
    template |= weights_template(Twin(10, 1, "relu"), (32, 32, 3))._asdict()
    assert int(restore_latest(folder / "checkpoints", template)["step"]) == 16
    again = run_script("train.py", *flags)
    assert "plainnet18: complete already, 16 steps" in again.out


def test_measure_reads_the_settings_of_the_training(tmp_path):
    trained = run_script(
        "train.py", *TINY, f"--workdir={tmp_path}", "--model=resmlp", "--depth=1"
    )
    assert trained.code == 0, trained.err
    options = ("--batch_size=2", "--num_batches=1", "--num_shells=4", "--window=2")
    done = run_script("measure.py", tmp_path, *options)
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "resmlp" / "results.json").read_text())["config"]
    assert (config["model"], config["width"], config["depth"]) == ("resmlp", 1, 1)
    other = run_script("measure.py", tmp_path, *options, "--depth=2")
    assert other.code == 1
    assert "--depth: expected 1" in other.err


def test_track_then_plot(tmp_path):
    workdir = f"--workdir={tmp_path}"
    options = (
        "--width=1",
        "--depth=1",
        "--epochs=1",
        "--train_batch_size=16",
        "--batch_size=3",
        "--record_every=2",
        "--over=1",
        "--num_shells=5",
        "--models=plainnet18,resmlp",
    )
    done = run_script("track.py", workdir, *options)
    assert done.code == 0, done.err
    logs = [tmp_path / name / "records.jsonl" for name in ("plainnet18", "resmlp")]
    places = [tmp_path / "results.json", *logs, tmp_path / "figures"]
    ending = [*map(str, places), f"next: grsd report {tmp_path}"]
    assert done.out.splitlines()[-5:] == ending
    results = records.read_json(tmp_path / "results.json")
    assert set(results) == {"command", "config", "environment", "tracks"}
    assert results["command"].startswith("track.py --workdir=")
    assert set(results["tracks"]) == {"plainnet18", "resmlp"}
    for name, track in results["tracks"].items():
        lines = records.read_jsonl(tmp_path / name / "records.jsonl")
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert track["num_records"] == 4
    assert len(list((tmp_path / "figures").glob("*.pdf"))) == 6

    drawn = run_script("plot.py", workdir)
    assert drawn.code == 0, drawn.err
    assert drawn.out.count(".png") == 6
    wrong = run_script("track.py", workdir, *options, "--record_every=3")
    assert wrong.code == 1
    assert wrong.err.startswith("error: --record_every: expected 2")
