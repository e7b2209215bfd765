"""One self-contained HTML page of everything that lies in a workdir.

Figures are embedded and styles are inline, so that the page needs no network and can
be mailed. It is made from the files alone: any JSON file of results, wherever it lies
in the workdir, becomes a section, with the figures and CSV tables beside it.
"""

import base64
import csv
import dataclasses
import io
import json
import time
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from PIL import Image

from grsd_jax.experiments.claims.analyse import claim_rows
from grsd_jax.experiments.common import files, records
from grsd_jax.experiments.common.config import Config, UserError
from grsd_jax.experiments.conditions.analyse import condition_rows
from grsd_jax.experiments.reproduce.analyse import result_caveats, result_tables
from grsd_jax.experiments.transport.analyse import transport_tables

#: Keys of a results file that get tables of their own.
_SETTINGS = ("config", "environment")

#: Rows of a CSV table that are shown; the file itself lies beside the page.
_MOST_ROWS = 200

#: Characters of a number that is shown as it stands in a table.
_LONGEST = 8

#: What the figures show, by the beginning of their file's name; the longest counts.
_CAPTIONS = {
    "figure1": "Figure 1. The diagonal of the projected derivative against the "
    "eigenvalue, mode by mode, with its power law. The theory predicts slope 1.",
    "figure2": "Figure 2. Toeplitz residual of sliding windows of shells, from the "
    "spectral edge to the center, beside what chance would give.",
    "spectrum": "Eigenvalues of the kernel in descending order, and the shells that "
    "cut their logarithm into equal widths.",
    "coupling_literal": "Shell coupling: mean square of the projected derivative "
    "between two shells.",
    "coupling_renormalized": "The same, each entry divided by both eigenvalues. The "
    "theory predicts equal values along each diagonal.",
    "track_energies": "Energy of the error in each shell along the training.",
    "track_amounts": "What moved between shells from one record to the next, and what "
    "was lost, as shares of the energy.",
    "track_profiles": "Flux over each edge with its error, and its velocity beside the "
    "null, at several times of the training.",
    "track_velocity": "Velocity of the energy at each edge, beside that of a kernel "
    "that only grows.",
    "track_eigenvalues": "The leading eigenvalues along the training.",
    "track_steps": "How what is seen depends on the training steps between both ends.",
    "track_non_adjacent": "Share of the moved energy between shells that are not "
    "neighbors.",
    "transport_products": "Velocity of the energy beyond that of a growing kernel, "
    "times the effective time, over the edges and in every interval.",
    "transport_spreads": "Size of that product, and its spreads over edges and over "
    "intervals, for both networks of each seed.",
    "transport_law": "The exponent of the velocity in lambda, and its size times the "
    "effective time, along the training.",
    "transport_resolution": "What is seen over h training steps.",
    "conditions": "The four conditions along the training, with their thresholds.",
    "claims": "The quantities behind the claims, for both networks of each seed.",
}


class Figure(NamedTuple):
    """One picture.

    Attributes:
        name: What it shows, or its file's name in words.
        source: A ``data:`` address that holds the picture itself.
    """

    name: str
    source: str


class Section(NamedTuple):
    """What one results file and its folder have to show.

    Attributes:
        title: The file, relative to the workdir.
        made: The command that made it, if the file says so, and when it was written.
        tables: Rows of cells, headings first.
        notes: Sentences that belong below the tables.
        figures: The pictures.
        chosen: Names and values of the settings that are not the defaults.
        settings: Names and values of the configuration and the environment.
        details: All of the file, as JSON.
    """

    title: str
    made: tuple[str, str]
    tables: list[list[list[str]]]
    notes: list[str]
    figures: list[Figure]
    chosen: list[tuple[str, str]]
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
    written = time.localtime(path.stat().st_mtime)
    return Section(
        title=path.relative_to(workdir).as_posix(),
        made=(str(results.get("command") or ""), time.strftime("%d %B %Y", written)),
        tables=tables,
        notes=_notes(results),
        figures=[_figure(figure) for figure in figures],
        chosen=list(_flat(_chosen(results["config"]))),
        settings=settings,
        details=json.dumps(shown, indent=1),
    )


def _chosen(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that are not those of the main job."""
    usual = dataclasses.asdict(Config())
    plain = {name: list(x) if isinstance(x, tuple) else x for name, x in usual.items()}
    return {name: x for name, x in config.items() if plain.get(name) != x}


def _notes(results: Mapping[str, Any]) -> list[str]:
    """Returns what a reader of the tables must know."""
    if "model" in results or "models" in results:
        return result_caveats(results)
    return []


def _tables(path: Path, results: Mapping[str, Any]) -> list[list[list[str]]]:
    """Returns the tables that the kind of results has of its own."""
    if "condition1" in results:
        return [condition_rows(results)]
    if path.name == "claims.json":
        return [claim_rows(results)]
    if path.name == "transport.json":
        return transport_tables(results)
    if "model" in results or "models" in results:
        return result_tables(results)
    return []


def _figure(path: Path) -> Figure:
    with files.reading(path, "a PNG figure"):
        picture = path.read_bytes()
        with Image.open(io.BytesIO(picture), formats=["PNG"]) as opened:
            opened.verify()  # the checksums in it
        data = base64.b64encode(picture).decode("ascii")
    return Figure(_caption(path.stem), f"data:image/png;base64,{data}")


def _caption(stem: str) -> str:
    """Returns what a figure shows, or its file's name in words."""
    known = [name for name in _CAPTIONS if stem.startswith(name)]
    return _CAPTIONS[max(known, key=len)] if known else stem.replace("_", " ")


def _read_csv(path: Path) -> list[list[str]]:
    with files.reading(path, "a table of comma-separated values"):
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file, strict=True) if row]
        if len({len(row) for row in rows}) != 1:
            raise ValueError("rows of different lengths, or none")
    return [[_shortened(cell) for cell in row] for row in rows[: _MOST_ROWS + 1]]


def _shortened(cell: str) -> str:
    """Returns a cell, a long fraction to four digits."""
    try:
        value = float(cell)
    except ValueError:
        return cell
    return f"{value:.4g}" if len(cell) > _LONGEST else cell


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yields the names, joined by dots, and the values of nested settings."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        yield name, ", ".join(str(item) for item in value)
    else:
        yield name, "" if value is None else _shortened(str(value))
