"""Figures: what they show, the files they leave, and the script around them."""

import copy
import math
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

import example_results
from grsd_jax.experiments.common import records
from grsd_jax.experiments.common.config import UserError
from grsd_jax.experiments.reproduce import figures
from running import run_script

NAMES = (
    "figure1_diagonal_scaling",
    "figure2_toeplitz_residual",
    "coupling_literal",
    "coupling_renormalized",
    "spectrum_shells",
)


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """Draws a result without writing it, and returns its figures by name."""

    def run(results, arrays, *, layout=False):
        drawn = {}

        def savefig(figure, path, *, format):
            if layout:  # slow, but it is where text and axes can fail
                figure.draw_without_rendering()
            drawn[Path(path).name.removeprefix(".").split(".")[0]] = figure
            Path(path).write_bytes(b"drawn")

        with monkeypatch.context() as patch:
            patch.setattr(Figure, "savefig", savefig)
            figures.write_figures(results, arrays, tmp_path / "figures")
        assert set(drawn) == set(NAMES)
        return drawn

    return run


def test_files_are_real_pngs_and_pdfs(tmp_path):
    results, arrays = example_results.one_model()
    settings = dict(mpl.rcParams)
    paths = figures.write_figures(results, arrays, tmp_path / "new" / "figures")
    assert dict(mpl.rcParams) == settings
    assert {path.name for path in paths} == {
        f"{name}.{suffix}" for name in NAMES for suffix in ("png", "pdf")
    }
    assert sorted(paths) == sorted((tmp_path / "new" / "figures").iterdir())
    for path in paths:
        head = path.read_bytes()
        if path.suffix == ".png":
            assert head.startswith(b"\x89PNG")
            width = int.from_bytes(head[16:20], "big")
            assert width in (990, 2070)  # of a column or a page, at 300 dpi
        else:
            assert head.startswith(b"%PDF")
            assert b"/Type3" not in head  # fonts as outlines that can be edited


def test_one_panel_for_each_measurement(draw):
    results, arrays = example_results.several_models()
    drawn = draw(results, arrays)
    labels = [
        "ResNet-18",
        "PlainNet-18 (shared)",
        "PlainNet-18 (recalibrated)",
        "PlainNet-18 (own)",
    ]
    for name in NAMES:
        titles = [axis.get_title() for axis in drawn[name].axes if axis.get_title()]
        if name == "figure2_toeplitz_residual":
            assert [title.split()[0] for title in titles] == ["literal", "renormalized"]
            texts = drawn[name].legends[0].get_texts()
            assert [text.get_text() for text in texts] == labels
        else:
            assert titles == labels


def test_one_colour_for_each_measurement(draw):
    drawn = draw(*example_results.several_models())
    points = [axis.lines[0].get_color() for axis in drawn[NAMES[0]].axes]
    assert len(set(points)) == 4
    for axis in drawn["figure2_toeplitz_residual"].axes:
        lines = [line for line in axis.lines if len(line.get_xdata()) > 2]
        assert [line.get_color() for line in lines] == points
    spectra = [axis.lines[-1].get_color() for axis in drawn["spectrum_shells"].axes]
    assert spectra == points


def test_figure1_shows_the_resolved_modes_and_the_fit(draw):
    results, arrays = example_results.one_model()
    (axis,) = draw(results, arrays)["figure1_diagonal_scaling"].axes
    modes, fit, shells, *_ = axis.lines
    resolved = arrays["resnet18/resolved"]
    np.testing.assert_allclose(modes.get_xdata(), arrays["resnet18/values"][resolved])
    np.testing.assert_allclose(
        modes.get_ydata(), arrays["resnet18/coupling_diagonal"][resolved]
    )
    root = np.sqrt(np.diag(arrays["resnet18/literal"]))
    counted = np.diag(arrays["resnet18/literal_mask"])
    np.testing.assert_allclose(shells.get_ydata(), root[counted], rtol=1e-6)
    slope = np.diff(np.log(fit.get_ydata())) / np.diff(np.log(fit.get_xdata()))
    exponent = results["model"]["diagonal_fit"]["exponent"]
    np.testing.assert_allclose(slope, exponent, rtol=1e-6)
    texts = [text.get_text() for text in axis.get_legend().get_texts()]
    assert f"128 modes: slope {exponent:.2f}" in texts[0]
    assert "$R^2$" in texts[0]
    assert texts[-1] == "slope 1"


def test_spectrum_shows_every_mode_but_noise(draw):
    results, arrays = copy.deepcopy(example_results.one_model())
    values, resolved = arrays["resnet18/values"], arrays["resnet18/resolved"]
    values[-10:-3] = 1e-9  # far below the resolved ones; three more are not positive
    (axis,) = draw(results, arrays)["spectrum_shells"].axes
    grey, colored = axis.lines
    np.testing.assert_allclose(colored.get_ydata(), values[resolved], rtol=1e-6)
    np.testing.assert_array_equal(colored.get_xdata(), np.flatnonzero(resolved) + 1)
    assert len(grey.get_xdata()) == 32 - 10
    texts = [text.get_text() for text in axis.get_legend().get_texts()]
    counts = arrays["resnet18/shell_counts"]
    assert texts == [
        "unresolved (32, 10 of them below)",
        f"resolved (128, {counts.min()} to {counts.max()} a shell)",
    ]


def test_figure2_leaves_undefined_windows_out(draw):
    results, arrays = copy.deepcopy(example_results.one_model())
    windows = results["model"]["toeplitz"]["literal"]["windows"]
    for undefined in (0, 3):
        windows[undefined]["residual"] = None
    literal, _ = draw(results, arrays)["figure2_toeplitz_residual"].axes
    (line,) = [line for line in literal.lines if len(line.get_xdata()) > 2]
    want = [w["residual"] if w["residual"] is not None else math.nan for w in windows]
    np.testing.assert_array_equal(line.get_ydata(), want)
    np.testing.assert_array_equal(
        line.get_xdata(), [window["position"] for window in windows]
    )


def test_heat_maps_leave_masked_pairs_out_and_keep_zeros(draw):
    results, arrays = copy.deepcopy(example_results.one_model())
    arrays["resnet18/literal"][0, :] = np.nan
    arrays["resnet18/literal_mask"][:, 5] = False
    arrays["resnet18/literal"][7, 7] = 0.0  # underflown, but measured
    figure = draw(results, arrays)["coupling_literal"]
    (mesh,) = [c for axis in figure.axes for c in axis.collections if c.norm.vmin][:1]
    shown = mesh.get_array()
    mask = np.ma.getmaskarray(shown)
    want = np.zeros((12, 12), bool)
    want[0, :] = want[:, 5] = True
    np.testing.assert_array_equal(mask, want)
    assert shown[7, 7] == shown.min() > 0
    low, high = arrays["resnet18/literal"][1, 1], shown[1, 1]
    np.testing.assert_allclose(low, high, rtol=1e-6)


def test_nothing_resolved_and_everything_undefined(draw):
    results, arrays = copy.deepcopy(example_results.several_models(("own",)))
    entry = results["models"]["plainnet18"]
    for name in ("diagonal_fit", "shell_fit"):
        entry[name] = dict.fromkeys(entry[name])
    for kind in ("literal", "renormalized"):
        entry["toeplitz"][kind]["residual"] = None
        for window in entry["toeplitz"][kind]["windows"]:
            window["residual"] = None
        arrays[f"plainnet18.own/{kind}"][:] = 0
        arrays[f"plainnet18.own/{kind}_mask"][:] = False
    arrays["plainnet18.own/resolved"][:] = False
    arrays["plainnet18.own/values"][:] = np.nan
    drawn = draw(results, arrays)
    said = {t.get_text() for f in drawn.values() for a in f.axes for t in a.texts}
    assert "no resolved mode with a coupling above 0" in said
    assert {"no coupling above 0", "no positive eigenvalue"} <= said
    # And when there is nothing else in the figure.
    del results["models"]["resnet18"]
    drawn = draw(results, arrays, layout=True)
    said = {t.get_text() for f in drawn.values() for a in f.axes for t in a.texts}
    assert "no window with degrees of freedom" in said


def test_a_failure_leaves_the_old_figure(tmp_path, monkeypatch):
    results, arrays = example_results.one_model()
    old = tmp_path / "figure1_diagonal_scaling.png"
    old.write_bytes(b"old")

    def savefig(figure, path, *, format):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", savefig)
    with pytest.raises(UserError, match="No space left on device"):
        figures.write_figures(results, arrays, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [old.name]
    assert old.read_bytes() == b"old"


def write_result(folder):
    results, arrays = example_results.one_model()
    records.write_json(folder / "results.json", results)
    records.write_npz(folder / "arrays.npz", arrays)


def test_the_script_draws_from_the_two_files_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path, **_: Path(path).write_bytes(b"drawn")
    )
    write_result(tmp_path)
    workdir = f"--workdir={tmp_path}"
    done = run_script("plot.py", workdir)
    assert done.code == 0, done.err
    *listed, following = done.out.splitlines()
    assert following == f"next: grsd report {tmp_path}"
    listed = [Path(line) for line in listed]
    assert len(listed) == 10
    assert sorted(listed) == sorted((tmp_path / "figures").iterdir())

    (tmp_path / "arrays.npz").write_bytes(b"PK\x03\x04 cut short")
    cut = run_script("plot.py", workdir)
    assert cut.code == 1
    assert "arrays.npz': expected an .npz file" in cut.err
    (tmp_path / "results.json").write_text('{"models": {')
    broken = run_script("plot.py", workdir)
    assert broken.code == 1
    assert "results.json': expected a JSON file" in broken.err
    (tmp_path / "results.json").unlink()
    missing = run_script("plot.py", workdir)
    assert (missing.code, missing.out) == (1, "")
    (line,) = missing.err.splitlines()
    assert line.startswith("error: ")
    assert "--workdir: expected a folder with results.json or records.jsonl" in line
