"""The documentation: its code runs, its links lead somewhere, its numbers agree."""

import ast
import importlib
import importlib.util
import json
import re
import tomllib
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *NOTEBOOKS]

CELL = "```{code-cell} ipython3"

#: A block that needs a package which only the tests install names it in its fence.
OPTIONAL = ("equinox", "haiku", "safetensors")


def python_source(page: str, package: str = "") -> str:
    """Joins a page's python blocks, every line where the page has it.

    Those without a package in the fence, or also those of one package.
    """
    fences = {"```python", CELL, f"```python {package}".strip()}
    lines, inside = [], False
    for line in page.splitlines():
        if line.startswith("```"):
            inside = line.strip() in fences
            line = ""
        lines.append(line if inside else "")
    return "\n".join(lines)


def test_python_source_keeps_only_the_blocks_and_their_line_numbers():
    page = "a\n```python\nx = 1\n```\nb\n```bash\nls\n```\n```python eqx\ny = 2\n```\n"
    assert python_source(page).splitlines()[2] == "x = 1"
    for package, expected in (("", ["x = 1"]), ("eqx", ["x = 1", "y = 2"])):
        lines = python_source(page, package).splitlines()
        assert [line for line in lines if line] == expected


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_fences_of_python_name_known_packages(page):
    named = re.findall(r"^```py\w* *(.*)$", page.read_text(), re.M)
    assert set(named) <= {"", *OPTIONAL}


#: Pages whose code is among the default tests, and pages that a scheduled job runs.
FIRST = ("README.md",)
LATER = (
    "architectures_and_depth.md",
    "conditions.md",
    "devices.md",
    "results_guide.md",
    "shell_dynamics.md",
    "track_training.md",
    "use_in_your_loop.md",
    "what_moved.md",
    "your_own_checkpoint.md",
    "your_own_network.md",
)

RUNNABLE = [page for page in PAGES if python_source(page.read_text()).strip()]


def test_the_pages_with_code_are_found():
    names = {page.name for page in RUNNABLE}
    assert names >= {"README.md", "quickstart.md", "use_in_your_loop.md"}


def marks(page: Path) -> list[pytest.MarkDecorator]:
    """Returns how a page is run: a notebook only where no build of the docs runs it."""
    built = importlib.util.find_spec("myst_nb") and page in NOTEBOOKS
    skip = pytest.mark.skipif(bool(built), reason="the build of the docs runs it")
    if page.name in FIRST:
        return [skip]
    later = page.name in LATER
    return [skip, pytest.mark.scheduled if later else pytest.mark.slow]


@pytest.fixture
def quick_compilation():
    """Compiles without optimization: each program runs once, on a few numbers."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=marks(page)) for page in RUNNABLE],
    ids=lambda page: page.name,
)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_blocks(page)


@pytest.mark.scheduled
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("page", "package"),
    [
        (page, package)
        for page in PAGES
        for package in OPTIONAL
        if f"```python {package}\n" in page.read_text()
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_code_blocks_of_optional_packages_run(page, package, tmp_path, monkeypatch):
    pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    run_blocks(page, package)


def run_blocks(page: Path, package: str = "") -> None:
    """Runs a page's blocks in one namespace."""
    code = compile(python_source(page.read_text(), package), str(page), "exec")
    exec(code, {"__name__": "__docs__"})


def test_first_lines_of_the_readme_are_among_those_that_run():
    page = (ROOT / "README.md").read_text()
    first = re.search(r"^```py\n(.*?)^```$", page, re.M | re.S)[1]
    assert first in python_source(page)


@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: page.name)
def test_notebooks_have_cells_and_a_kernel_and_can_be_downloaded(page):
    text = page.read_text()
    assert text.startswith(
        "---\nfile_format: mystnb\nkernelspec:\n  name: python3\n---\n"
    )
    assert len(re.findall(rf"^{re.escape(CELL)}$", text, re.M)) > 3
    assert f"<{page.stem}.ipynb>`" in text
    assert f"notebooks/{page.stem}\n" in (ROOT / "docs" / "index.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose)
    relative = [target for target in targets if not re.match(r"[a-z]+:", target)]
    missing = [target for target in relative if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_figures_of_the_documentation_are_named_and_have_captions(page):
    text = page.read_text()
    if page.parent != ROOT:  # the others are read where no Sphinx numbers figures
        assert not re.search(r"!\[", text)
    for name, body in re.findall(r"^```{figure} (.*?)\n(.*?)^```$", text, re.M | re.S):
        assert (page.parent / name).is_file()
        options = r":name: [\w-]+\n:width: \d+px\n:alt: \w.*\n"
        assert re.match(rf"{options}\n[^:\s].*\.\n", body)


def test_readme_documents_every_flag_with_its_default():
    config = pytest.importorskip("grsd_jax.experiments.common.config")
    page = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `--(\w+)` \| (?:`([^`]*)`)? ?\|", page, re.M)
    expected = {}
    for field in config.dataclasses.fields(config.Config):
        default = field.default
        value = ",".join(default) if isinstance(default, tuple) else str(default)
        expected[field.name] = "" if default is None else value
    assert dict(rows) == expected


def shell_lines(page: str) -> list[str]:
    """Returns the lines of a page's bash blocks, without comments."""
    found = []
    for block in re.findall(r"^ *```bash\n(.*?)^ *```", page, re.M | re.S):
        if "git checkout" in block:  # of an earlier version
            continue
        lines = block.replace("\\\n", " ").splitlines()
        found += [re.sub(r"(^|\s+)#.*", "", line) for line in lines]
    return found


def commands(pattern):
    """Returns every command of the pages, in a block or a sentence, that matches."""
    found = []
    for page in PAGES:
        text = page.read_text()
        spans = re.findall(r"`(\.venv[^`\n]*)`", text)
        for line in dict.fromkeys([*shell_lines(text), *spans]):
            if re.search(pattern, line):
                found.append((page.name, line))
    return found


#: What runs a command of the package, and its name and arguments.
COMMAND = r"(?:\.venv/bin/python scripts/(?=\w+\.py)|\bgrsd )(\w+)(.*)"


@pytest.mark.parametrize(("page", "line"), commands(r"scripts/|grsd [a-z]"))
def test_commands_of_the_pages_have_flags_that_exist(page, line):
    flags = pytest.importorskip("absl.flags")
    from grsd_jax.experiments.commands import COMMANDS

    name, arguments = re.search(COMMAND, line).groups()
    assert name in COMMANDS
    known = set(flags.FLAGS)
    module = importlib.import_module(f"grsd_jax.experiments.commands.{name}")
    try:
        module.define()
        given = re.findall(r"--(\w+)", arguments)
        assert set(given) <= set(flags.FLAGS)
    finally:
        for defined in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, defined)


#: A file of the repository that Python runs, and its arguments.
SCRIPT = r"bin/python ((?:benchmarks|tests|\.ci)/\S+)(.*)"


def options_of(script: Path) -> set[str]:
    """Returns the options that a script or the `common` module beside it adds."""
    sources = [script, script.with_name("common.py")]
    text = "".join(path.read_text() for path in sources if path.exists())
    calls = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
    strings = (a.value for c in calls for a in c.args if isinstance(a, ast.Constant))
    return {s for s in strings if isinstance(s, str) and s.startswith("--")}


def test_options_of_scripts_are_read_from_their_source():
    assert "--only" in options_of(ROOT / "benchmarks/environments.py")
    assert {"--out", "--data_dir"} <= options_of(ROOT / "benchmarks/gpu/science.py")
    assert not options_of(ROOT / "tests/stack_memory.py")


def test_the_commands_of_benchmarks_are_found():
    pages = {page for page, _ in commands(SCRIPT)}
    assert pages >= {"benchmarks.md", "devices.md", "quickstart.md", "what_moved.md"}


@pytest.mark.parametrize(("page", "line"), commands(SCRIPT))
def test_benchmarks_on_the_pages_have_options_that_exist(page, line):
    script, arguments = re.search(SCRIPT, line).groups()
    assert (ROOT / script).is_file()
    assert set(re.findall(r"--\w+", arguments)) <= options_of(ROOT / script)


#: A program of the environment that does not say where it is.
BARE = re.compile(
    r"(?<![\w/.-])(?:python3?(?! -m venv)|pip|pytest|pyrefly|ruff|sphinx-build"
    r"|pre-commit|grsd)(?= |$)"
)


def test_bare_programs_are_found():
    for line in ("python benchmarks/compare.py", "cd x && pip install .", "pytest"):
        assert BARE.search(line)
    assert not BARE.search("python3 -m venv .venv && .venv/bin/pip install jax")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_the_environment(page):
    text = page.read_text()
    spans = re.findall(r"`((?:python3?|pip|pytest) [^`\n]*)`", text)
    assert not [line for line in [*shell_lines(text), *spans] if BARE.search(line)]


def test_gate_runs_the_commands_of_the_readme():
    page, gate = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    assert ".venv/bin/pip install -e '.[tests]'" in page
    assert ".venv/bin/pytest -n auto" in page
    install = "\"$bin/pip\" install --no-compile -e '.[dev]'"  # dev contains tests
    assert install in gate
    assert '"$bin/pytest" -n auto' in gate
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "grsd-jax[tests,docs]" in extras["optional-dependencies"]["dev"]


#: British endings and words, by the stems and words that such texts use.
STEMS = """
    author categor central character custom diagonal discret emphas equal factor final
    general initial linear local material maxim memor minim normal optim organ
    orthogonal parallel penal quant random real recogn regular serial special stabil
    standard summar symmetr synchron token util vector visual
"""
BRITISH = re.compile(
    rf"\b\w*?(?:{'|'.join(STEMS.split())})is(?:e[drs]?|ing|ations?|able)\b"
    r"|\b\w*(?:behavi|col|fav|flav|hon|neighb)our\w*"
    r"|\b\w*(?:cancel|channel|label|level|model|signal|travel)l(?:ed|ing)\b"
    r"|\b(?:re)?cent(?:re[ds]?|ring)\b|\b(?:fibre|metre|grey|licence|defence)s?\b"
    r"|\b(?:back|down|for|in|out|up)wards\b"
    r"|\b(?:afterwards|analyse[ds]?|artefacts?|judgement|learnt|towards|whilst)\b",
    re.I,
)


@pytest.mark.parametrize(
    "word", ["Normalised", "neighbours", "centre", "unlabelled", "upwards"]
)
def test_british_words_are_found(word):
    assert BRITISH.search(f"a {word}.")
    assert not BRITISH.search("precise noise, toeplitz_centre, organism, color, center")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_spelled_the_american_way(page):
    assert not [found[0] for found in BRITISH.finditer(page.read_text())]


def test_docstrings_and_messages_are_spelled_the_american_way():
    found = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words = [match[0] for match in BRITISH.finditer(node.value)]
                found += [f"{path.name}:{node.lineno}: {word}" for word in words]
    assert not found


def strings_of(value) -> list[str]:
    """Returns every string of a JSON value, the keys included."""
    if isinstance(value, dict):
        return [*value, *(s for inner in value.values() for s in strings_of(inner))]
    if isinstance(value, list):
        return [s for inner in value for s in strings_of(inner)]
    return [value] if isinstance(value, str) else []


def test_committed_results_are_spelled_the_american_way():
    assert strings_of({"a": ["b", {"c": "d", "e": 1}]}) == ["a", "b", "c", "e", "d"]
    paths = sorted((ROOT / "docs" / "results").rglob("*.json"))
    assert paths
    strings = [s for path in paths for s in strings_of(json.loads(path.read_text()))]
    assert not [found[0] for s in strings for found in BRITISH.finditer(s)]


def test_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    changes = (ROOT / "CHANGELOG.md").read_text()
    version, date = re.search(r"^## \[(.*)\] - (.*)$", changes, re.M).groups()
    assert version == project["version"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {version}\ndate-released: {date}\n" in citation


def test_actions_of_the_workflows_are_pinned_by_their_commit():
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    used = {line for w in workflows for line in re.findall("uses: .*", w.read_text())}
    assert len(used) > 4
    pinned = re.compile(r"uses: [\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")
    assert not {line for line in used if not pinned.fullmatch(line)}
