import dataclasses
import json
import sys

import jax
import pytest
from absl import flags as absl_flags

from grsd_jax.experiments.common import flags
from grsd_jax.experiments.common.config import Config, UserError


def parse(*arguments, **options):
    values = absl_flags.FlagValues()
    flags.define_flags(flag_values=values, **options)
    values(["script", *arguments])
    return flags.config_from_flags(values)


def test_flags_without_arguments_are_the_defaults():
    assert parse() == Config()


def test_every_field_can_be_set_by_its_flag():
    other = Config(
        dataset="cifar10",
        data_dir="data",
        workdir="elsewhere",
        seed=3,
        model="plainnet18",
        width=5,
        depth=6,
        branch_scale=0.25,
        rho=0.75,
        activation="gelu",
        epochs=7,
        train_batch_size=9,
        optimizer="adamw",
        learning_rate=0.5,
        momentum=0.0,
        schedule="linear_schedule",
        schedule_args='{"end_value": 0.0}',
        checkpoint_every=11,
        keep_checkpoints=12,
        log_every=13,
        record_every=14,
        over=(2, 3),
        num_steps=22,
        shells="sharp",
        batch_size=15,
        num_batches=17,
        solver="dense",
        block_size=19,
        num_pairs=21,
        derivative="finite_difference",
        reduction="mean",
        num_shells=23,
        window=6,
        protocol=("own", "shared"),
        precision="default",
    )
    arguments = []
    for field in dataclasses.fields(Config):
        value = getattr(other, field.name)
        assert value != field.default, f"{field.name} is not tested"
        text = ",".join(map(str, value)) if isinstance(value, tuple) else value
        arguments.append(f"--{field.name}={text}")
    assert parse(*arguments) == other


def test_a_script_can_choose_fields_and_defaults():
    assert parse(only=["width"], width=3) == Config(width=3)
    with pytest.raises(ValueError, match="expected fields of Config, got 'layers'"):
        parse(layers=3)


def test_fields_that_do_not_concern_a_script_can_be_left_out():
    kept = flags.all_but("rho", "depth")
    names = {field.name for field in dataclasses.fields(Config)}
    assert set(kept) == names - {"rho", "depth"}
    with pytest.raises(ValueError, match="all_but: expected fields of Config, got 'x"):
        flags.all_but("x")


def test_a_script_takes_the_others_flags_but_does_not_list_them():
    assert parse("--epochs=7", only=["width"]) == Config(epochs=7)
    values = absl_flags.FlagValues()
    flags.define_flags(only=["width"], flag_values=values)
    shown = values.module_help(sys.argv[0])
    assert "--width" in shown
    assert "epochs" not in shown
    assert "epochs" in values.get_help()


def of_run(workdir, *arguments):
    values = absl_flags.FlagValues()
    flags.define_flags(flag_values=values)
    values(["script", f"--workdir={workdir}", *arguments])
    return flags.config_from_flags(values, reads_run=True)


def test_what_a_training_was_made_with_is_read(tmp_path):
    (tmp_path / "resnet18").mkdir()
    settings = {"width": 3, "activation": "gelu", "model": "resnet18", "steps": 7}
    (tmp_path / "resnet18" / "config.json").write_text(json.dumps(settings))
    expected = Config(workdir=str(tmp_path), width=3, activation="gelu")
    assert of_run(tmp_path) == expected
    assert of_run(tmp_path, "--width=3", "--seed=0") == expected
    with pytest.raises(UserError, match="--width: expected 3 as in the run"):
        of_run(tmp_path, "--width=5")
    # The plain network takes the ResNet's weights; another network is another run.
    plain = dataclasses.replace(expected, model="plainnet18")
    assert of_run(tmp_path, "--model=plainnet18") == plain
    other = Config(workdir=str(tmp_path), model="mlp")
    assert of_run(tmp_path, "--model=mlp") == other


def test_the_only_training_of_a_folder_is_meant(tmp_path):
    for name in ("mlp", "cnn"):
        (tmp_path / name).mkdir()
        text = json.dumps({"model": name, "depth": 2})
        (tmp_path / name / "config.json").write_text(text)
        found = of_run(tmp_path)
        expected = ("mlp", 2) if name == "mlp" else ("resnet18", 4)
        assert (found.model, found.depth) == expected


@pytest.mark.parametrize(
    "argument",
    [
        "--dataset=mnist",
        "--solver=magic",
        "--seed=4294967296",
        "--width=0",
        "--width=wide",
        "--momentum=1",
        "--protocol=shared,theirs",
        "--protocol=",
        "--schedule=constant",
        "--schedule_args={",
    ],
)
def test_a_bad_value_is_a_usage_error_that_names_the_flag(argument):
    with pytest.raises(absl_flags.IllegalFlagValueError) as caught:
        parse(argument)
    text = str(caught.value)
    assert argument.split("=")[0] in text
    assert text.count("--") == 1


@pytest.fixture
def run(monkeypatch):
    """Runs a body as `run_main` does, without absl's own frame around it."""
    before = jax.config.jax_default_matmul_precision
    monkeypatch.setattr(flags.app, "run", lambda main, **_: main(["script"]))
    monkeypatch.setattr(
        flags, "config_from_flags", lambda *, settings, reads_run: settings()
    )
    absl_flags.FLAGS(["script"], known_only=True)
    yield flags.run_main
    jax.config.update("jax_default_matmul_precision", before)


def test_run_main_sets_the_precision(run):
    seen = []
    run(lambda config: seen.append(jax.config.jax_default_matmul_precision))
    assert seen == ["highest"]


@pytest.mark.parametrize(
    "error",
    [
        UserError("no room"),
        MemoryError("out of memory; lower one of: max_bytes."),
        ValueError("block: expected at most n columns, got more."),
    ],
)
def test_run_main_tells_an_expected_error_in_one_sentence(run, error, capsys):
    def body(config):
        raise error

    with pytest.raises(SystemExit) as caught:
        run(body)
    assert caught.value.code == 1
    assert capsys.readouterr().err == f"error: {error}\n"


def test_run_main_keeps_the_traceback_of_a_bug(run):
    def body(config):
        raise ValueError("cannot reshape")

    with pytest.raises(ValueError, match="cannot reshape"):
        run(body)


def test_run_main_refuses_what_is_not_a_flag(run, monkeypatch, capsys):
    run_body = lambda main, **_: main(["script", "width"])  # noqa: E731
    monkeypatch.setattr(flags.app, "run", run_body)
    with pytest.raises(SystemExit):
        run(lambda config: None)
    assert "expected only --flags, got 'width'" in capsys.readouterr().err


@pytest.fixture
def parsed(monkeypatch):
    """Parses a command line as `run_main` does, with flags of its own."""

    def parse_line(*arguments):
        values = absl_flags.FlagValues()
        monkeypatch.setattr(flags.flags, "FLAGS", values)
        flags.define_flags(only=["workdir", "num_shells"], flag_values=values)
        flags.flags.DEFINE_bool("redo", False, "Again.", flag_values=values)
        return flags._parse("workdir", ["script", *arguments]), values

    return parse_line


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("--num_shells=1.5", "--num_shells: expected an integer, got '1.5'."),
        ("--num_shells=0", "--num_shells: expected an integer >= 2, got 0."),
        ("--momentum=x", "--momentum: expected a number, got 'x'."),
        ("--solver=magic", "--solver: expected one of auto, dense, lanczos, got "),
        ("--redo=maybe", "--redo: expected true or false, got 'maybe'."),
        ("--noredo=3", "--noredo=3 does not take an argument. --help lists"),
        ("--num_shell=3", "'num_shell'. Did you mean: num_shells? --help lists"),
        ('--schedule_args={"a": x', "--schedule_args: expected a JSON object, got '{"),
        ("", "--workdir: expected the name of a folder, got ''."),
    ],
)
def test_a_wrong_flag_is_one_sentence(parsed, argument, told, capsys):
    with pytest.raises(SystemExit) as caught:
        parsed(argument)
    error = capsys.readouterr().err
    assert caught.value.code == 1
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert told in error


def test_the_positional_setting_is_given_once(parsed):
    rest, values = parsed("runs/a")
    assert rest == ["script"]
    assert values["workdir"].value == "runs/a"
    assert parsed("runs/a", "runs/b")[0] == ["script", "runs/b"]
    assert parsed("--workdir=runs/a", "runs/b")[0] == ["script", "runs/b"]


def test_a_flag_of_other_commands_is_told(parsed, capsys):
    parsed("--num_shells=3", "--epochs=3")
    flags._say_without_effect()
    told = capsys.readouterr().err
    assert told == "note: --epochs has no effect on this command.\n"
