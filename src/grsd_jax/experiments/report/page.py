"""One self-contained HTML page of everything that lies in a workdir.

Figures are embedded and styles are inline, so that the page needs no network and can
be mailed. It is made from the files alone: any JSON file of results, wherever it lies
in the workdir, becomes a section, with the figures and CSV tables beside it.
"""

import base64
import csv
import io
import json
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from PIL import Image

from grsd_jax.experiments.claims.analyse import claim_rows
from grsd_jax.experiments.common import files, records
from grsd_jax.experiments.common.config import UserError
from grsd_jax.experiments.conditions.analyse import condition_rows
from grsd_jax.experiments.reproduce.analyse import result_tables

#: Keys of a results file that get tables of their own.
_SETTINGS = ("config", "environment")

#: Rows of a CSV table that are shown; the file itself lies beside the page.
_MOST_ROWS = 200


class Figure(NamedTuple):
    """One picture.

    Attributes:
        name: Its file's name without the ending, in words.
        source: A ``data:`` address that holds the picture itself.
    """

    name: str
    source: str


class Section(NamedTuple):
    """What one results file and its folder have to show.

    Attributes:
        title: The file, relative to the workdir.
        tables: Rows of cells, headings first.
        figures: The pictures.
        settings: Names and values of the configuration and the environment.
        details: All of the file, as JSON.
    """

    title: str
    tables: list[list[list[str]]]
    figures: list[Figure]
    settings: dict[str, list[tuple[str, str]]]
    details: str


def write_report(workdir: files.PathLike) -> Path:
    """Writes ``WORKDIR/report.html``, whole or not at all.

    Args:
        workdir: The folder of any run.

    Returns:
        The page.

    Raises:
        UserError: If there is no results file in the folder, one cannot be read, or the
            page cannot be written.
    """
    workdir = files.as_path(workdir)
    page = render(workdir.resolve().name, list(find_sections(workdir)))
    path = workdir / "report.html"
    with files.atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def find_sections(workdir: Path) -> Iterator[Section]:
    """Yields a section for each results file of a workdir, the outermost first.

    A results file is a JSON file that says how it was made, under ``config``.

    Args:
        workdir: The folder.

    Yields:
        The sections.

    Raises:
        UserError: If there is none, or a file cannot be read.
    """
    found = False
    paths = sorted(workdir.rglob("*.json"), key=lambda p: (len(p.parts), p))
    for path in paths:
        if "checkpoints" in path.relative_to(workdir).parts:
            continue
        results = records.read_any_json(path)
        if isinstance(results, Mapping) and isinstance(results.get("config"), Mapping):
            found = True
            with files.reading(path, "the results of a run"):
                section = _section(path, results, workdir)
            yield section
    if not found:
        raise UserError(
            f"--workdir: expected a results file (JSON with 'config') in '{workdir}', "
            "got none."
        )


def render(title: str, sections: list[Section]) -> str:
    """Returns the page.

    Args:
        title: What stands above it.
        sections: Its sections.

    Returns:
        HTML.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = resources.files("grsd_jax.experiments.report") / "page.html.jinja"
    source = template.read_text(encoding="utf-8")
    return environment.from_string(source).render(title=title, sections=sections)


def _section(path: Path, results: Mapping[str, Any], workdir: Path) -> Section:
    tables = [_read_csv(file) for file in sorted(path.parent.glob("*.csv"))]
    tables = [*_tables(path, results), *tables]
    settings = {key: list(_flat(results[key])) for key in _SETTINGS if key in results}
    figures = sorted({*path.parent.glob("*.png"), *path.parent.glob("figures/*.png")})
    shown = {key: value for key, value in results.items() if key not in _SETTINGS}
    return Section(
        title=path.relative_to(workdir).as_posix(),
        tables=tables,
        figures=[_figure(figure) for figure in figures],
        settings=settings,
        details=json.dumps(shown, indent=1),
    )


def _tables(path: Path, results: Mapping[str, Any]) -> list[list[list[str]]]:
    """Returns the tables that the kind of results has of its own."""
    if "condition1" in results:
        return [condition_rows(results)]
    if path.name == "claims.json":
        return [claim_rows(results)]
    if "model" in results or "models" in results:
        return result_tables(results)
    return []


def _figure(path: Path) -> Figure:
    with files.reading(path, "a PNG figure"):
        picture = path.read_bytes()
        with Image.open(io.BytesIO(picture), formats=["PNG"]) as opened:
            opened.verify()  # the checksums in it
        data = base64.b64encode(picture).decode("ascii")
    return Figure(path.stem.replace("_", " "), f"data:image/png;base64,{data}")


def _read_csv(path: Path) -> list[list[str]]:
    with files.reading(path, "a table of comma-separated values"):
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file, strict=True) if row]
        if len({len(row) for row in rows}) != 1:
            raise ValueError("rows of different lengths, or none")
    return rows[: _MOST_ROWS + 1]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yields the names, joined by dots, and the values of nested settings."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        yield name, ", ".join(str(item) for item in value)
    else:
        yield name, "" if value is None else str(value)
