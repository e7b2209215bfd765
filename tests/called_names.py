"""Which names the tests of a file use, read from its code without running it.

A name is used where a test, or what it reaches in its own file, loads it: as a call, or
as a function in a table of rows. Imports, strings and annotations do not count.
"""

import ast
from pathlib import Path

TESTS = Path(__file__).parent


def used_names(file, mode=None, test="test_"):
    """Returns the names that the tests of a file use, without those that are scheduled.

    Args:
        file: The name of a file in this folder, without its ending.
        mode: Tests that are not in this mode are left out too.
        test: How the names of the tests begin.
    """
    body = ast.parse((TESTS / f"{file}.py").read_text(encoding="utf-8")).body
    defined, helpers = _definitions(body), _helpers(body)
    left_out = {"scheduled", f"not_in_mode {mode}"} | _listed(file)
    of_all = _marks([node.value for node in defined.get("pytestmark", [])])
    waiting = [
        node
        for node in body
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith(test)
        and not ({node.name} | of_all | _marks(node.decorator_list)) & left_out
    ]
    found, seen = set(), set()
    while waiting:
        names = _loaded(waiting.pop())
        found |= names
        new = names - seen
        seen |= new
        waiting += [node for name in new for node in defined.get(name, [])]
        for name in new & helpers.keys():
            found |= _loaded(helpers[name])
    return found


def _listed(file):
    """Returns the tests of a file that are listed as scheduled whole."""
    lines = (TESTS / "scheduled.txt").read_text(encoding="utf-8").splitlines()
    return {x.split("::")[1] for x in lines if x.startswith(f"tests/{file}.py::")}


def _definitions(body):
    """Returns what a module defines, by name: functions, classes, and assignments."""
    found = {}
    for node in body:
        targets = [node.name] if hasattr(node, "name") else []
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.For):
            targets = [x.id for x in ast.walk(node) if _stores(x)]
        for name in targets:
            found.setdefault(name, []).append(node)
    return found


def _stores(node):
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def _helpers(body):
    """Returns the files of this folder that a file imports, by the names it gives."""
    found = {}
    for node in body:
        if isinstance(node, ast.ImportFrom):
            found |= {a.asname or a.name: node.module for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.asname or a.name: a.name for a in node.names}
    paths = {name: TESTS / f"{module}.py" for name, module in found.items()}
    return {
        name: ast.parse(path.read_text(encoding="utf-8"))
        for name, path in paths.items()
        if path.exists()
    }


def _loaded(tree):
    """Returns the names and attributes that code loads, without its annotations."""
    return {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for node in _walk(tree)
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load)
    }


def _walk(node):
    yield node
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _walk(child)


def _marks(nodes):
    """Returns the marks that decorators give, those of single rows not."""
    found = set()
    for node in nodes:
        for mark in node.elts if isinstance(node, ast.List) else [node]:
            called = mark.func if isinstance(mark, ast.Call) else mark
            name = getattr(called, "attr", "")
            words = mark.args if name == "not_in_mode" else []
            found |= {name} | {f"not_in_mode {word.value}" for word in words}
    return found
