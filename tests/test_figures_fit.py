"""Figures of the committed results: nothing is cut off, covered or without a name."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

import example_results
from grsd_jax.experiments.claims import analyse, run
from grsd_jax.experiments.claims.figures import write_claims_figure
from grsd_jax.experiments.common import records
from grsd_jax.experiments.common.plotting import COLUMN_WIDTH, PAGE_WIDTH
from grsd_jax.experiments.conditions.figures import write_condition_page
from grsd_jax.experiments.reproduce.figures import write_figures
from grsd_jax.experiments.sweep.analyse import read_rows
from grsd_jax.experiments.sweep.figures import write_sweep_figures
from grsd_jax.experiments.track.figures import write_tracking_figures
from grsd_jax.experiments.track.log import read_tracks

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def claims(folder):
    rows = [
        {"seed": seed, "network": network, "reduction": reduction}
        | dict.fromkeys(analyse.QUANTITIES, 0.1 * seed)
        for seed in range(3)
        for network in run.NETWORKS
        for reduction in run.REDUCTIONS
    ]
    write_claims_figure({"rows": rows}, folder)


def many_networks(folder):
    rows = read_rows(RESULTS / "sweep" / "sweep.csv")
    rows = [row for row in rows if row["depth"] <= 4 and row["seed"] == 0]
    more = [row | {"width": 64, "activation": "relu"} for row in rows]
    write_sweep_figures([*rows, *more], folder)


STUDIES = {
    "many networks": many_networks,
    "track": lambda folder: write_tracking_figures(
        read_tracks(RESULTS / "track_cifar10_w16"), folder
    ),
    "sweep": lambda folder: write_sweep_figures(
        read_rows(RESULTS / "sweep" / "sweep.csv"), folder
    ),
    "conditions": lambda folder: write_condition_page(
        records.read_json(RESULTS / "conditions" / "conditions.json"), folder
    ),
    "claims": claims,
    "reproduce": lambda folder: write_figures(*example_results.one_model(), folder),
}


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_everything_is_in_view_and_named(study, monkeypatch, tmp_path):
    def check(figure, path, *, format):
        Path(path).write_bytes(b"drawn")
        if format == "png":
            figure.draw_without_rendering()
            check_inside(figure)
            check_text(figure)
            for ax in figure.axes:
                check_legend(ax)
                if "colorbar" in ax.get_label():
                    assert ax.get_ylabel()

    monkeypatch.setattr(Figure, "savefig", check)
    study(tmp_path)


def check_inside(figure):
    """Everything is in the figure, up to what rounding of the layout takes."""
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0) > -0.03
    assert box.x1 < width + 0.03
    assert box.y1 < height + 0.03


def check_text(figure):
    """Text is legible at the width of a column, or of a page for which it is drawn."""
    width = figure.get_figwidth()
    shrunk = 1.0 if width == PAGE_WIDTH else min(COLUMN_WIDTH / width, 1.0)
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text():
            assert round(text.get_fontsize() * shrunk, 6) >= 5.5, text


def check_legend(ax):
    """Entries differ, and no point of a line lies behind them."""
    legend = ax.get_legend()
    if legend is None:
        return
    texts = [text.get_text() for text in legend.get_texts()]
    assert len(set(texts)) == len(texts)
    frame = legend.get_window_extent()
    for line in ax.lines:
        points = line.get_transform().transform(np.array(line.get_data(), float).T)
        assert not any(frame.contains(*point) for point in points)


def test_a_slope_that_would_flatten_the_others_is_written_down(monkeypatch, tmp_path):
    drawn = {}

    def keep(figure, path, *, format):
        drawn[Path(path).name.removeprefix(".").split(".")[0]] = figure
        Path(path).write_bytes(b"drawn")

    monkeypatch.setattr(Figure, "savefig", keep)
    STUDIES["sweep"](tmp_path)
    slope = drawn["sweep_coupling"].axes[1]
    (text,) = slope.texts
    assert text.get_text() == "out of view:\nCNN at 32: -1.1 [-5.1, 0.97]"
    assert 0 < slope.get_ylim()[0] < 0.73  # the smallest of all other bands
    assert drawn["sweep_mixing"].axes[0].get_ylim()[0] == 0  # no time is negative
