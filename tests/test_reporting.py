import base64
import functools
import html.parser
import http.server
import json
import os
import re
import shutil
import subprocess
import threading

import numpy as np
import pytest
from matplotlib.figure import Figure

from example_results import one_model, several_models
from grsd_jax.experiments.common import records
from grsd_jax.experiments.common.config import UserError
from grsd_jax.experiments.common.plotting import save_figures
from grsd_jax.experiments.report import page as reporting

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
        "<th>slope +- stderr [interval]</th>",
        "91% of the error&#39;s energy lies outside",
        "Figure 1. The diagonal of the projected derivative",
        "Settings other than the defaults",
        "All of config",
    ]
    places = [section.index(part) for part in order]
    assert places == sorted(places)
    chosen = section[places[-2] : places[-1]]
    assert re.findall(r'<th scope="row">(\w+)</th>', chosen) == ["protocol", "seed"]


def test_tables_have_no_long_fractions(workdir):
    cells = Page((workdir / "report.html").read_text()).cells
    assert "0.1235" in cells
    assert not any(re.search(r"\d\.\d{9}", cell) for cell in cells)


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
def test_browser_renders_loads_every_figure_and_prints(workdir, tmp_path):
    handler = functools.partial(Quiet, directory=os.fspath(workdir))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = f"http://127.0.0.1:{server.server_port}/report.html"
        probe = f"http://127.0.0.1:{server.server_port}/probe.html"
        (workdir / "probe.html").write_text(PROBE)
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
<iframe src="report.html" width="1200" height="800"></iframe>
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
