"""One self-contained HTML page of everything that lies in a workdir.

Figures are embedded and styles are inline, so that the page needs no network and can
be mailed. It is made from the files alone: any JSON file of results, wherever it lies
in the workdir, becomes a section, with the figures and CSV tables beside it, and so
does any file of a probe's records.
"""

import base64
import csv
import dataclasses
import io
import json
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from PIL import Image

from grsd_jax.experiments.common import files, records
from grsd_jax.experiments.common.config import Config, UserError
from grsd_jax.experiments.report.contents import contents_of, tracked
from grsd_jax.experiments.track.analyse import summary
from grsd_jax.experiments.track.figures import write_log_figures
from grsd_jax.experiments.track.log import read_log

#: Keys of a results file that get tables of their own.
_SETTINGS = ("config", "environment")

#: Rows of a CSV table that are shown; the file itself lies beside the page.
_MOST_ROWS = 200

#: Characters of a number that is shown as it stands in a table, and what a fraction is:
#: no whole number, such as a seed, nor a word of digits, such as a checksum.
_LONGEST = 8
_FRACTION = re.compile(r"-?\d+\.\d+(?:e[+-]?\d+)?")

#: Scale of the figures on the page, and the dots per inch of a figure without any.
_PIXELS_PER_INCH, _DPI = 144, 300

#: Symbols that the terminal spells out.
_SYMBOLS = {"+-": "±", "->": "→", "<=": "≤", ">=": "≥", "^2": "²"}

#: What the figures show, by the beginning of their file's name; the longest counts.
_CAPTIONS = {
    "figure1": "The diagonal of the projected derivative against the eigenvalue, "
    "mode by mode, with its power law, as in the paper's Figure 1. The theory predicts "
    "slope 1.",
    "figure2": "Toeplitz residual of sliding windows of shells, from the spectral edge "
    "to the center, for the literal and the renormalized coupling, as in the paper's "
    "Figure 2.",
    "spectrum": "Eigenvalues of the kernel in descending order, and the shells that "
    "cut their logarithm into equal widths.",
    "coupling_literal": "Shell coupling: mean square of the projected derivative "
    "between two shells.",
    "coupling_renormalized": "Renormalized shell coupling: the mean square of the "
    "projected derivative over both eigenvalues. The theory predicts equal values "
    "along each diagonal.",
    "track_energies": "Energy of the error in each shell along the training.",
    "track_amounts": "What moved between shells from one record to the next, and what "
    "was lost, as shares of the energy.",
    "track_profiles": "Flux over each edge with its error, and its velocity beside the "
    "null, at several times of the training.",
    "track_velocity": "Median velocity of the energy over the usable edges along the "
    "training, beside that of a kernel that only grows.",
    "track_eigenvalues": "The leading eigenvalues along the training.",
    "track_steps": "How what is seen depends on the training steps between both ends.",
    "track_non_adjacent": "Share of the moved energy between shells that are not "
    "neighbors.",
    "records_energies": "Energy of the error in each shell over time.",
    "records_flux": "Flux over each edge with its error, at several times.",
    "records_velocity": "Velocity of the energy at each edge, beside that of a kernel "
    "that only grows, at several times.",
    "records_eigenvalues": "The leading eigenvalues over time.",
    "sweep_coupling": "Toeplitz residual, slope and R^2 of the shell coupling against "
    "depth: the mean over seeds, in a bar from the smallest to the largest.",
    "sweep_increments": "Increments of the log-norm against depth, at initialization.",
    "sweep_mixing": "Over how many blocks directions decorrelate, against depth.",
    "sweep_scale": "The deepest residual networks against their branch scale.",
    "benchmarks": "The best time of each peer over ours, a row for each task.",
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
        width: How wide the page shows it, in CSS pixels; text of 7 points becomes one
            of 14 pixels.
    """

    name: str
    source: str
    width: int


class Section(NamedTuple):
    """What one results file and its folder have to show.

    Attributes:
        title: The file, relative to the workdir.
        made: The command that made it, if the file says so, and when it was written.
        summary: What was found, in one sentence; empty for unknown results.
        tables: Rows of cells, headings first.
        notes: Sentences that belong below the tables.
        figures: The pictures.
        chosen: Names and values of the settings that are not the defaults; None where
            the file has no settings.
        settings: Names and values of the configuration and the environment.
        details: All of the file, as JSON.
    """

    title: str
    made: tuple[str, str]
    summary: str
    tables: list[list[list[str]]]
    notes: list[str]
    figures: list[Figure]
    chosen: list[tuple[str, str]] | None
    settings: dict[str, list[tuple[str, str]]]
    details: str


def write_report(workdir: files.PathLike) -> Path:
    """Writes ``WORKDIR/report.html``, whole or not at all.

    Args:
        workdir: The folder of any run, or a file of records, whose folder gets the
            page.

    Returns:
        The page.

    Raises:
        UserError: If there are no results in the folder, a file cannot be read, or the
            page cannot be written.
    """
    workdir = files.as_path(workdir)
    sections = list(find_sections(workdir))
    folder = workdir.parent if workdir.is_file() else workdir
    page = render(f"Report on {folder.resolve().name}", sections)
    path = folder / "report.html"
    with files.atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def find_sections(workdir: Path) -> Iterator[Section]:
    """Yields a section for each results file of a workdir, the outermost first.

    A results file is a JSON file that says how it was made, under ``config``. After
    them come the ``records.jsonl`` of loops that no results file speaks of.

    Args:
        workdir: The folder, or a file of records alone.

    Yields:
        The sections.

    Raises:
        UserError: If there is none, or a file cannot be read.
    """
    if workdir.is_file():
        yield _log_section(workdir, workdir.parent)
        return
    found, told = False, set()
    paths = sorted(workdir.rglob("*.json"), key=lambda p: (len(p.parts), p))
    for path in paths:
        if "checkpoints" in path.relative_to(workdir).parts:
            continue
        results = records.read_any_json(path)
        if isinstance(results, Mapping) and isinstance(results.get("config"), Mapping):
            found = True
            with files.reading(path, "the results of a run"):
                told |= {path.parent / name for name in results.get("tracks", ())}
                section = _section(path, results, workdir)
            yield section
    for log in sorted(workdir.rglob("records.jsonl")):
        if log.parent not in told:
            found = True
            yield _log_section(log, workdir)
    if not found:
        raise UserError(
            f"--workdir: expected a results file (JSON with 'config') or records.jsonl "
            f"in '{workdir}', got none."
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
    environment.filters["typeset"] = _typeset
    template = resources.files("grsd_jax.experiments.report") / "page.html.jinja"
    source = template.read_text(encoding="utf-8")
    return environment.from_string(source).render(title=title, sections=sections)


def _typeset(text: str) -> str:
    """Returns a text with the symbols that it spells out."""
    for spelled, symbol in _SYMBOLS.items():
        text = text.replace(spelled, symbol)
    return text


def _section(path: Path, results: Mapping[str, Any], workdir: Path) -> Section:
    csvs = {file.name: _read_csv(file) for file in sorted(path.parent.glob("*.csv"))}
    contents = contents_of(path, results)
    settings = {key: list(_flat(results[key])) for key in _SETTINGS if key in results}
    figures = sorted({*path.parent.glob("*.png"), *path.parent.glob("figures/*.png")})
    shown = {key: value for key, value in results.items() if key not in _SETTINGS}
    return Section(
        title=path.relative_to(workdir).as_posix(),
        made=(str(results.get("command") or ""), _date(path)),
        summary=contents.summary,
        tables=[*contents.tables, *(rows[: _MOST_ROWS + 1] for rows in csvs.values())],
        notes=[*contents.notes, *_left_out(csvs)],
        figures=[_figure(figure) for figure in figures],
        chosen=list(_flat(_chosen(results["config"]))),
        settings=settings,
        details=json.dumps(shown, indent=1),
    )


def _log_section(log: Path, workdir: Path) -> Section:
    """Returns what the records of a loop show, with figures drawn for this page."""
    lines, name = read_log(log), log.resolve().parent.name
    with files.reading(log, "the records of a probe"):
        contents = tracked({name: summary(lines)})
        with tempfile.TemporaryDirectory() as folder:
            paths = write_log_figures(lines, name, folder)
            figures = [_figure(path) for path in paths if path.suffix == ".png"]
    return Section(
        title=log.relative_to(workdir).as_posix(),
        made=("", _date(log)),
        summary=contents.summary,
        tables=list(contents.tables),
        notes=list(contents.notes),
        figures=figures,
        chosen=None,
        settings={},
        details=json.dumps(lines, indent=1),
    )


def _date(path: Path) -> str:
    """Returns the day on which a file was written."""
    return time.strftime("%d %B %Y", time.localtime(path.stat().st_mtime))


def _chosen(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that are not those of the main job."""
    usual = dataclasses.asdict(Config())
    plain = {name: list(x) if isinstance(x, tuple) else x for name, x in usual.items()}
    return {name: x for name, x in config.items() if plain.get(name) != x}


def _figure(path: Path) -> Figure:
    with files.reading(path, "a PNG figure"):
        picture = path.read_bytes()
        with Image.open(io.BytesIO(picture), formats=["PNG"]) as opened:
            inches = opened.width / opened.info.get("dpi", (_DPI, _DPI))[0]
            opened.verify()  # the checksums in it
        data = base64.b64encode(picture).decode("ascii")
    source = f"data:image/png;base64,{data}"
    return Figure(_caption(path.stem), source, round(_PIXELS_PER_INCH * inches))


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
    return [[_shortened(cell) for cell in row] for row in rows]


def _left_out(csvs: Mapping[str, list[list[str]]]) -> Iterator[str]:
    """Yields what the tables of files do not show."""
    for name, rows in csvs.items():
        if len(rows) - 1 > _MOST_ROWS:
            yield f"The first {_MOST_ROWS} of the {len(rows) - 1} rows of {name}."


def _shortened(cell: str) -> str:
    """Returns a cell; a long fraction to four digits, or more to remain a fraction."""
    if len(cell) <= _LONGEST or not _FRACTION.fullmatch(cell):
        return cell
    if (value := float(cell)).is_integer():
        return cell
    texts = [f"{value:.{digits}g}" for digits in (4, 8, 12)]
    return next((text for text in texts if not float(text).is_integer()), cell)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yields the names, joined by dots, and the values of nested settings."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        yield name, ", ".join(str(item) for item in value)
    else:
        yield name, "" if value is None else _shortened(str(value))
