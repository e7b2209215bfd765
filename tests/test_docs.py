"""The documentation: its code runs, its links lead somewhere, its numbers agree."""

import importlib.metadata
import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_source(page: str) -> str:
    """Joins a page's python blocks, every line where the page has it."""
    lines, inside = [], False
    for line in page.splitlines():
        if line.startswith("```"):
            inside = line.strip() == "```python"
            line = ""
        lines.append(line if inside else "")
    return "\n".join(lines)


def test_python_source_keeps_only_the_blocks_and_their_line_numbers():
    page = "a\n```python\nx = 1\n```\nb\n```bash\nls\n```\n```python\ny = 2\n```\n"
    lines = python_source(page).splitlines()
    assert [line for line in lines if line] == ["x = 1", "y = 2"]
    assert lines[2] == "x = 1"


#: Pages whose code is among the default tests; that of all is in the slow ones.
FIRST = ("README.md", "quickstart.md", "use_in_your_loop.md")

RUNNABLE = [page for page in PAGES if python_source(page.read_text()).strip()]


def test_the_pages_with_code_are_found():
    names = {page.name for page in RUNNABLE}
    assert names >= {"README.md", "quickstart.md", "use_in_your_loop.md"}


@pytest.fixture
def quick_compilation():
    """Compiles without optimisation: each program runs once, on a few numbers."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[] if page.name in FIRST else pytest.mark.slow)
        for page in RUNNABLE
    ],
    ids=lambda page: page.name,
)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = compile(python_source(page.read_text()), str(page), "exec")
    exec(code, {"__name__": "__docs__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    relative = [target for target in targets if not re.match(r"[a-z]+:", target)]
    missing = [target for target in relative if not (page.parent / target).exists()]
    assert not missing


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


@pytest.mark.parametrize(
    ("program", "arguments"), [("pip", "install -e '.[tests]'"), ("pytest", "-n auto")]
)
def test_readme_and_gate_run_the_same_commands(program, arguments):
    assert f".venv/bin/{program} {arguments}" in (ROOT / "README.md").read_text()
    assert f'"$bin/{program}" {arguments}' in (ROOT / ".ci" / "run").read_text()


def test_version_is_the_same_everywhere():
    version = importlib.metadata.version("grsd-jax")
    citation = (ROOT / ".github" / "CITATION.cff").read_text()
    assert re.search(rf"^version: {re.escape(version)}$", citation, re.M)
    assert f"## [{version}]" in (ROOT / "docs" / "changelog.md").read_text()
