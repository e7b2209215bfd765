import base64
import csv
import functools
import html.parser
import http.server
import inspect
import json
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from example_results import one_model, several_models
from grsd_jax.experiments.common import records
from grsd_jax.experiments.common.config import UserError
from grsd_jax.experiments.common.plotting import save_figures
from grsd_jax.experiments.report import page as reporting
from grsd_jax.experiments.report.contents import contents_of
from grsd_jax.experiments.reproduce import figures as reproduce_figures
from grsd_jax.experiments.reproduce.figures import write_figures
from grsd_jax.experiments.sweep.analyse import read_rows, write_rows
from grsd_jax.experiments.sweep.figures import write_sweep_figures
from grsd_jax.experiments.track.figures import write_tracking_figures
from grsd_jax.experiments.transport.figures import write_transport_figures

RESULTS = Path(__file__).parents[1] / "docs" / "results"

WRITERS = (
    write_figures,
    write_sweep_figures,
    write_tracking_figures,
    write_transport_figures,
)

BROWSER = next(
    filter(
        None,
        map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome")),
    ),
    None,
)


def noise():
    figure = Figure(figsize=(4, 3))
    figure.add_axes((0, 0, 1, 1)).imshow(np.random.default_rng(0).random((99, 99)))
    return figure


def write_run(folder, made, *, figure=True):
    results, arrays = made
    results["config"] = {"seed": 7, "protocol": ["shared", "own"], "width": 8}
    results["command"] = "grsd reproduce --seed=7"
    for entry in results.get("models", {}).values():
        entry["unresolved_share"] = 0.9123456789012345
    results["environment"] = {"versions": {"jax": "<0.10>"}}
    records.write_npz(folder / "arrays.npz", arrays)
    records.write_json(folder / "results.json", results)
    if figure:
        names = ("spectrum_shells", "coupling_literal", "figure1", "figure2")
        save_figures(dict.fromkeys(names, noise), folder / "figures")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a run"
    folder.mkdir()
    write_run(folder, several_models())
    inner = folder / "resnet18"
    inner.mkdir()
    write_run(inner, one_model(), figure=False)
    (inner / "cells.csv").write_text('name,"x, y"\nplain & simple,0.1234567890123456\n')
    records.write_json(inner / "config.json", {"seed": 1})  # no results
    reporting.write_report(folder)
    return folder


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.cells, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] in ("td", "th", "h2"):
            self.cells.append(data)


def test_page_holds_tables_settings_and_every_figure(workdir):
    text = (workdir / "report.html").read_text()
    page = Page(text)
    for cell in ("PlainNet-18", "recalibrated", "shared, own", "versions.jax"):
        assert cell in page.cells, cell
    assert "results.json" in page.cells
    assert "resnet18/results.json" in page.cells
    assert "<0.10>" in page.cells  # escaped, and so text rather than a tag
    assert "plain & simple" in page.cells
    pictures = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(pictures) == len(list((workdir / "figures").glob("*.png"))) > 3
    for source in pictures:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")


def test_a_section_says_how_it_was_made_then_the_numbers_then_the_figures(workdir):
    text = (workdir / "report.html").read_text()
    section = text[text.index('<h2 id="section1"') : text.index('<h2 id="section2"')]
    order = [
        "Written on ",
        "<code>grsd reproduce --seed=7</code>",
        "Slope of the diagonal, which the theory predicts to be 1: ",
        ">slope ± stderr [interval]</th>",
        "Pairs: those that are resolved",
        "91% of the error&#39;s energy lies outside",
        "<figcaption>The diagonal of the projected derivative",
        "Settings other than the defaults",
        "All of config",
    ]
    places = [section.index(part) for part in order]
    assert places == sorted(places)
    chosen = section[places[-2] : places[-1]]
    assert re.findall(r'<th scope="row">(\w+)</th>', chosen) == ["protocol", "seed"]


def test_the_title_says_what_the_page_is(workdir):
    text = (workdir / "report.html").read_text()
    assert "<title>Report on a run</title>" in text
    assert "<h1>Report on a run</h1>" in text


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
def test_every_figure_of_a_command_has_a_caption(writer):
    stems = re.findall(r"``(\w+_\w+)``", inspect.getdoc(writer))
    assert len(stems) > 3
    for stem in stems:
        assert reporting._caption(stem) != stem.replace("_", " ")


def test_captions_promise_nothing_that_a_figure_lacks():
    assert "noise_floor=False" in inspect.getsource(reproduce_figures)
    assert "chance" not in reporting._caption("figure2_toeplitz_residual")
    assert reporting._caption("benchmarks") != "benchmarks"


def test_a_sweep_and_a_benchmark_are_told_in_a_sentence_and_tables(tmp_path):
    for kind in ("sweep", "operations"):
        shutil.copytree(RESULTS / kind, tmp_path / kind)
    benchmark, sweep = sorted(reporting.find_sections(tmp_path), key=lambda x: x.title)
    rows = records.read_json(RESULTS / "operations" / "benchmark.json")["rows"]
    slowest = max(rows, key=lambda row: row["seconds"])
    assert benchmark.summary == (
        f"Of {len(rows)} operations the slowest is {slowest['case']}, with "
        f"{slowest['gradients']:.1f} gradients of the same batches."
    )
    assert [row[0] for row in benchmark.tables[0][1:]] == [row["case"] for row in rows]
    assert benchmark.notes[0].startswith("Seconds: ")
    with open(RESULTS / "sweep" / "sweep.csv", newline="") as file:
        cells = list(csv.DictReader(file))
    names = {cell["model"] for cell in cells}
    assert sweep.summary.startswith(f"{len(cells)} trainings of {len(names)} networks")
    assert sweep.tables[0][0][:3] == ["network", "depth", "cells"]
    assert sweep.notes[0].startswith("Cells: ")
    assert [figure.name.split()[0] for figure in sweep.figures] == [
        "Toeplitz",
        "Increments",
        "Over",
    ]


def test_tables_have_no_long_fractions(workdir):
    cells = Page((workdir / "report.html").read_text()).cells
    assert "0.1235" in cells
    assert not any(re.search(r"\d\.\d{9}", cell) for cell in cells)


@pytest.mark.parametrize(
    ("cell", "told"),
    [
        ("0.1234567890123456", "0.1235"),
        ("1234567890", "1234567890"),  # a seed
        ("12e4567890", "12e4567890"),  # a checksum, and as a number infinite
        ("0.99999123456", "0.99999123"),  # not 1
        ("123456.789012345", "123456.79"),
        ("11173962.0", "11173962.0"),
        ("-1.23456789e-30", "-1.235e-30"),
    ],
)
def test_what_is_shortened_stays_what_it_is(cell, told):
    assert reporting._shortened(cell) == told


def test_rows_that_are_not_shown_are_told(tmp_path):
    records.write_json(tmp_path / "any.json", {"config": {"seed": 1}})
    for name, number in (("long.csv", 201), ("short.csv", 200)):
        rows = "\n".join(map(str, range(number)))
        (tmp_path / name).write_text(f"row\n{rows}\n")
    (section,) = reporting.find_sections(tmp_path)
    assert [len(rows) for rows in section.tables] == [201, 201]
    assert section.notes == ["The first 200 of the 201 rows of long.csv."]


def test_a_sweep_says_how_many_trainings_diverged(tmp_path):
    rows = read_rows(RESULTS / "sweep" / "sweep.csv")[:1]
    write_rows(tmp_path / "sweep.csv", [row | {"status": "diverged"} for row in rows])
    records.write_json(tmp_path / "sweep.json", {"config": {}})
    (section,) = reporting.find_sections(tmp_path)
    depth = rows[0]["depth"]
    wanted = f"1 training of 1 network at depth {depth}, of which 1 diverged."
    assert section.summary == wanted


def test_symbols_are_typeset(workdir):
    text = (workdir / "report.html").read_text()
    assert "±" in text
    assert "→" in text
    for cell in Page(text).cells:
        assert not re.search(r"\+-|->|\^2", cell)


def test_figures_are_shown_in_proportion_to_their_width_on_paper(tmp_path):
    for inches in (3.3, 6.9):
        figure = Figure(figsize=(inches, 1))
        save_figures({"wide": lambda figure=figure: figure}, tmp_path)
        shown = reporting._figure(tmp_path / "wide.png").width
        assert shown == pytest.approx(144 * inches, abs=1)


def test_page_asks_for_nothing_from_elsewhere(workdir):
    text = (workdir / "report.html").read_text()
    addresses = re.findall(r"""(?:src|href)=["']([^"']*)|url\(([^)]*)""", text)
    for address in filter(None, (a or b for a, b in addresses)):
        assert address.startswith(("data:", "#")), address
    assert "<script" not in text


def test_details_are_the_whole_file(workdir):
    (section, *_) = reporting.find_sections(workdir)
    results = records.read_json(workdir / "results.json")
    assert json.loads(section.details)["models"] == results["models"]


def test_folder_without_results_is_refused(tmp_path):
    records.write_json(tmp_path / "config.json", {"seed": 1})
    with pytest.raises(UserError, match="workdir: expected a results file"):
        reporting.write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.skipif(BROWSER is None, reason="needs chromium or chrome on the PATH")
@pytest.mark.parametrize("width", [1200, 390])
def test_browser_renders_loads_every_figure_and_prints(workdir, tmp_path, width):
    handler = functools.partial(Quiet, directory=os.fspath(workdir))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = f"http://127.0.0.1:{server.server_port}/report.html"
        probe = f"http://127.0.0.1:{server.server_port}/probe.html"
        (workdir / "probe.html").write_text(PROBE.replace("WIDTH", str(width)))
        dom = browse(tmp_path, "--virtual-time-budget=20000", "--dump-dom", probe)
        pdf = tmp_path / "page.pdf"
        browse(tmp_path, f"--print-to-pdf={pdf}", page)
        server.shutdown()
    told = json.loads(re.search(r"<output>(.*?)</output>", dom, re.DOTALL)[1])
    drawn = np.asarray(told["widths"])
    assert len(drawn) == len(list((workdir / "figures").glob("*.png")))
    assert np.all(drawn > 100)
    assert told["rows"] >= 12
    assert told["overflow"] <= 0
    assert pdf.read_bytes().startswith(b"%PDF")
    assert pdf.stat().st_size > 50_000


#: A page that loads the report in a frame and tells what became of it.
PROBE = """<!DOCTYPE html><output></output>
<iframe src="report.html" width="WIDTH" height="800"></iframe>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument;
  document.querySelector("output").textContent = JSON.stringify({
    widths: [...page.images].map((image) => image.naturalWidth),
    rows: page.querySelectorAll("tr").length,
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
  });
};
</script>"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def browse(folder, *arguments):
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={folder / 'profile'}",
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("share", [0.74, 0.3])
def test_a_slope_of_little_of_the_error_says_so_in_the_summary(share):
    results = several_models(("own",))[0]
    for entry in results["models"].values():
        entry["unresolved_share"] = share
    said = contents_of(Path("results.json"), results).summary
    assert ("(of 26% of the energy)" in said) == (share > 0.5)
