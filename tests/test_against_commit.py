"""The interleaved comparison with another commit: all but the other commit itself."""

import importlib
import io
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

pytest.importorskip("flax")
sys.path.append(str(BENCHMARKS))
against = importlib.import_module("against_commit")
grid = importlib.import_module("comparison.grid")
inputs_of = importlib.import_module("comparison.inputs")
worker = importlib.import_module("against_worker")

OPERATIONS = [
    "dense M",
    "dense M and Mdot",
    "prepare",
    "M V, b = 8",
    "M V, b = 32",
    "V^T Mdot V, r = 32",
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    spec = grid.parse_problem("mlp_w2_n4")
    path = tmp_path_factory.mktemp("inputs") / "inputs.npz"
    arrays = worker.inputs_at(path, spec)
    again = worker.inputs_at(path, spec)
    assert inputs_of.digest(again) == inputs_of.digest(arrays)
    return inputs_of.load(spec, arrays)


def test_operations_of_this_tree_agree_with_one_another(loaded):
    seconds, results = worker.first_calls(worker.make_operations(loaded))
    assert list(seconds) == OPERATIONS
    assert all(value > 0 for value in seconds.values())
    kernel, derivative = (results[f"dense M and Mdot/{i}"] for i in range(2))
    wide = np.asarray(loaded.block[:, :32])
    for name, expected in {
        "dense M": kernel,
        "M V, b = 8": kernel @ wide[:, :8],
        "M V, b = 32": kernel @ wide,
        "V^T Mdot V, r = 32": wide.T @ derivative @ wide,
    }.items():
        scale = np.max(np.abs(expected))
        np.testing.assert_allclose(results[f"{name}/0"], expected, atol=1e-5 * scale)


def test_operations_of_a_tree_before_problem_take_its_arguments(loaded, monkeypatch):
    called = []

    def noting(name):
        def function(*arguments):
            called.append((name, len(arguments)))
            return SimpleNamespace(matmat=lambda columns: columns)

        return function

    names = (
        "kernel_dense",
        "kernel_with_derivative_dense",
        "linearize_kernel",
        "kernel_derivative",
    )
    old = SimpleNamespace(
        models=SimpleNamespace(linen_error_fn=lambda model, state: "error"),
        **{name: noting(name) for name in names},
    )
    monkeypatch.setattr(worker, "grsd_jax", old)
    operations = worker.make_operations(loaded)
    assert list(operations) == OPERATIONS
    for operation in operations.values():
        operation()
    assert called == [
        ("kernel_dense", 3),
        ("kernel_with_derivative_dense", 4),
        ("linearize_kernel", 3),  # timed
        ("linearize_kernel", 3),  # held
        ("kernel_derivative", 5),
    ]


def test_a_turn_repeats_short_operations_and_takes_the_fastest(monkeypatch):
    times = iter([0.3, 0.1, 0.15, 9.0, 0.7])
    monkeypatch.setattr(worker, "_timed", lambda operation: (next(times), None))
    assert worker.turn(None) == 0.1
    assert worker.turn(None) == 9.0
    assert worker.turn(None) == 0.7


def test_requests_are_answered_in_order():
    answers = io.StringIO()
    worker.serve({"a": lambda: jax.numpy.ones(2)}, ["a\n", "a\n"], answers)
    assert len([json.loads(line) for line in answers.getvalue().splitlines()]) == 2


STUB = """
import json, sys
print(json.dumps({"library": sys.argv[1]}), flush=True)
for line in sys.stdin:
    print(len(line), flush=True)
"""


def test_a_worker_answers_until_it_ends(tmp_path):
    library = str(tmp_path / "src" / "grsd_jax" / "__init__.py")
    with against.started([sys.executable, "-c", STUB, library], tmp_path) as stub:
        assert [stub.seconds("dense"), stub.seconds("b")] == [6, 2]
    for script, message in (
        (STUB, "expected the library of"),
        ("raise SystemExit(3)", "ended with status 3"),
    ):
        with (
            pytest.raises(RuntimeError, match=message),
            against.started([sys.executable, "-c", script, "elsewhere"], tmp_path),
        ):
            pass


def test_a_row_tells_medians_their_ratio_and_its_range():
    row = against.make_row("a", [[2.0, 1.0], [1.0, 2.0], [1.2, 1.5]], 1e-7)
    assert (row["this_seconds"], row["other_seconds"]) == (1.2, 1.5)
    assert row["ratio"] == pytest.approx(0.8)
    assert row["ratio_range"] == [0.5, 2.0]
    assert row["within_limit"]
    assert not against.make_row("a", [[1.06, 1.0]], None)["within_limit"]


def test_differences_are_relative_and_the_largest_of_an_operation():
    ours = {"a/0": np.array([3.0, 4.0]), "a/1": np.array([1.0])}
    theirs = {"a/0": np.array([3.0, 4.5]), "a/1": np.array([2.0])}
    assert against.largest_differences(ours, theirs) == {"a": 0.5}
    assert against.largest_differences(ours, ours) == {"a": 0.0}


def test_the_table_tells_everything():
    about = {"commit": "abc", "versions": {"jax": "1.2"}}
    text = against.render(
        {
            "problem": "resnet18_w2_n4",
            "repeats": 2,
            "this": about,
            "other": {**about, "commit": "def"},
            "others": 0.25,
            "machine": {"cpu": "a CPU", "cores": 2, "memory_gib": 24.0},
            "rows": [
                against.make_row("dense M", [[0.5, 1.0], [1.0, 1.0]], 2e-7),
                against.make_row("prepare", [[3.0, 1.0]], None),
            ],
        }
    )
    assert "this tree (abc) against def, 2 turns" in text
    assert (
        "| dense M | 0.7500 | 1.0000 | 0.750 | 0.500 to 1.000 | yes | 2e-07 |" in text
    )
    assert "| prepare | 3.0000 | 1.0000 | 3.000 | 3.000 to 3.000 | **no** |  |" in text
    assert "a CPU, 2 cores, 24 GiB; other processes took 25% of it." in text
    assert "this: jax 1.2." in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --commit --other is required"),
        (["--commit", "a", "--other", "b"], "not allowed with"),
        (["--commit", "a", "--num_examples", "3"], "--num_examples: expected at least"),
        (["--commit", "a", "--repeats", "0"], "--repeats: expected at least 1"),
    ],
)
def test_the_command_line_tells_what_it_expected(
    arguments, message, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["against_commit.py", *arguments])
    with pytest.raises(SystemExit):
        against.parse_options()
    assert message in capsys.readouterr().err


def test_sources_of_a_commit_are_unpacked(tmp_path, monkeypatch):
    archive = tmp_path / "archive.tar"
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text("a = 1")
    with against.tarfile.open(archive, "w") as file:
        file.add(tmp_path / "src", "src")
    done = Namespace(stdout=archive.read_bytes())
    monkeypatch.setattr(against.subprocess, "run", lambda *_, **__: done)
    folder = against.unpacked("abc", tmp_path / "other")
    assert (folder / "src" / "a.py").read_text() == "a = 1"
