"""Which tests run where: every public name in every mode, no slow test by default."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import modes
from called_names import used_names
from test_public_api import PUBLIC

TESTS = Path(__file__).parent


def is_result(value):
    """Whether a class is one of results: test_result_files makes one of each."""
    return inspect.isclass(value) and hasattr(value, "_description")


def returned_by(functions):
    """Returns the names of the classes that functions say they return."""
    hints = (inspect.signature(function).return_annotation for function in functions)
    return {word for hint in hints for word in re.findall(r"\w+", str(hint))}


@pytest.mark.parametrize("mode", modes.MODES)
def test_every_public_name_is_used_by_a_test_that_runs_in_the_mode(mode):
    assert "test_result_files" in modes.FILES
    found = set().union(*(used_names(file, mode) for file in modes.FILES))
    values = {name: getattr(importlib.import_module(t), name) for t, name in PUBLIC}
    functions = filter(inspect.isfunction, values.values())
    names = {name for name, value in values.items() if not is_result(value)}
    assert sorted(names - found - returned_by(functions)) == []


def test_the_scheduled_job_runs_every_mode():
    workflow = (TESTS.parent / ".github" / "workflows" / "ci.yml").read_text()
    (listed,) = re.findall(r"mode: \[(.*)\]", workflow)
    assert set(listed.split(", ")) == set(modes.MODES)


def test_the_marked_tests_exist(unknown_tests):
    assert unknown_tests == []


def test_the_lists_of_marked_tests_are_sorted():
    for name in ("slow", "scheduled"):
        lines = (TESTS / f"{name}.txt").read_text().splitlines()
        assert lines == sorted(set(lines))
