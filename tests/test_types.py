"""What a type checker, and so an editor, sees of results."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import grsd_jax

PROGRAM = """\
from typing import reveal_type
import grsd_jax as grsd
import jax

def measure(problem: grsd.Problem, params: dict[str, jax.Array]) -> None:
    measured = grsd.measure_coupling(problem, params, key=jax.random.key(0))
    reveal_type(measured.summary())
    reveal_type(measured.shell_fit.exponent)
    reveal_type(measured.shell_fit.summary())
    reveal_type(measured.literal._replace(window_residuals=1).save("literal.npz"))
    matrix, mask = measured.literal.coupling
    measured.save(3)
    measured.sumary()
    measured.shell_fit.sumary()
"""

REVEALED = {7: "str", 8: "Array", 9: "str", 10: "None"}
WRONG = {12: "bad-argument-type", 13: "missing-attribute", 14: "missing-attribute"}


def test_methods_and_fields_of_results_are_seen(tmp_path):
    pytest.importorskip("pyrefly")
    (tmp_path / "user.py").write_text(PROGRAM)
    settings = {
        "project-includes": ["user.py"],
        "python-interpreter-path": sys.executable,
        "search-path": [str(Path(grsd_jax.__file__).parents[1])],
    }
    lines = [f"{name} = {json.dumps(value)}\n" for name, value in settings.items()]
    (tmp_path / "pyrefly.toml").write_text("".join(lines))
    command = [sys.executable, "-m", "pyrefly", "check", "--output-format=min-text"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    revealed = re.findall(r"user.py:(\d+):.* revealed type: (\S+)", run.stdout)
    assert {int(line): kind for line, kind in revealed} == REVEALED, run
    wrong = re.findall(r"^ERROR user.py:(\d+):.*\[(.*)\]$", run.stdout, re.M)
    assert {int(line): kind for line, kind in wrong} == WRONG, run
