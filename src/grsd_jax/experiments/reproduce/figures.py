"""The figures of a result, from ``results.json`` and ``arrays.npz`` alone."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from grsd_jax.experiments.common import files
from grsd_jax.experiments.common.plotting import (
    PAGE_WIDTH,
    Look,
    look_of,
    save_figures,
    say_empty,
    shared_legend,
)
from grsd_jax.experiments.reproduce.analyse import Entry, entry_arrays, list_entries

_DARK, _GREY = "0.15", "0.65"

#: With more shells than this the counts beside them would overlap.
_MOST_COUNTS = 16

_KINDS = {
    "literal": (
        "literal coupling",
        r"$K_{ab} = \langle |\dot{M}_{ij}\,|^2 \rangle$",
    ),
    "renormalized": (
        "renormalised coupling",
        r"$\hat K_{ab} = \langle |\dot{M}_{ij}\,|^2 / (\lambda_i \lambda_j) \rangle$",
    ),
}


class _Panel(NamedTuple):
    """One measurement, its arrays and its look."""

    entry: Entry
    arrays: dict[str, np.ndarray]
    look: Look


def write_figures(
    results: Any, arrays: Mapping[str, np.ndarray], folder: files.PathLike
) -> list[Path]:
    """Draws every figure of a result, each as a PNG and a PDF.

    ``figure1_diagonal_scaling`` (diagonal of the coupling against the eigenvalue),
    ``figure2_toeplitz_residual`` (residual against window position),
    ``coupling_literal`` and ``coupling_renormalized`` (heat maps over pairs of shells)
    and ``spectrum_shells`` (eigenvalues and shells).

    Args:
        results: The contents of ``results.json``, of one measurement or of several.
        arrays: The contents of ``arrays.npz``.
        folder: The folder to write to; it is made if need be.

    Returns:
        The files, each of which was replaced as a whole.

    Raises:
        UserError: If the result or its arrays are incomplete, or the folder cannot be
            written.
    """
    panels = []
    for entry in list_entries(results):
        look = look_of(entry.name, entry.protocol)
        panels.append(_Panel(entry, entry_arrays(entry, arrays), look))
    drawings: dict[str, Callable[[], Figure]] = {
        "figure1_diagonal_scaling": lambda: _diagonal_scaling(panels),
        "figure2_toeplitz_residual": lambda: _toeplitz_residual(panels),
        "coupling_literal": lambda: _coupling(panels, "literal"),
        "coupling_renormalized": lambda: _coupling(panels, "renormalized"),
        "spectrum_shells": lambda: _spectrum(panels),
    }
    return save_figures(drawings, folder)


def _grid(
    num_panels: int, height: float, *, share: bool = True
) -> tuple[Figure, list[Axes]]:
    """Returns a page-wide figure with one panel for each measurement."""
    columns = min(num_panels, 2)
    rows = math.ceil(num_panels / columns)
    width = PAGE_WIDTH if columns > 1 else 0.58 * PAGE_WIDTH
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=share, sharey=share, squeeze=False)
    flat = list(axes.flat)
    for unused in flat[num_panels:]:
        unused.remove()
    for axis in flat[:num_panels]:
        axis.tick_params(labelbottom=True, labelleft=True)
    return figure, flat[:num_panels]


def _diagonal_scaling(panels: Sequence[_Panel]) -> Figure:
    """Figure 1: ``|Mdot_ii|`` against ``lambda_i``, with fits and the slope 1."""
    figure, axes = _grid(len(panels), 2.6)
    for axis, panel in zip(axes, panels, strict=True):
        axis.set(title=panel.entry.label, xscale="log", yscale="log")
        axis.set_xlabel(r"eigenvalue $\lambda_i$")
        axis.set_ylabel(r"diagonal coupling $|\dot{M}_{ii}\,|$")
        _scaling_panel(axis, panel)
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(low, high * (high / low) ** 0.25)  # room for the legends
    return figure


def _scaling_panel(axis: Axes, panel: _Panel) -> None:
    arrays = panel.arrays
    x, y = _positive(
        arrays["values"], arrays["coupling_diagonal"], chosen=arrays["resolved"]
    )
    root = np.sqrt(np.maximum(np.diag(arrays["literal"]), 0))
    shell_x, shell_y = _positive(
        arrays["shell_centers"], root, chosen=np.diag(arrays["literal_mask"])
    )
    if not x.size:
        say_empty(axis, "no resolved mode")
        return
    ends = np.array([x.min(), x.max()])
    modes = dict(color=panel.look.color, alpha=0.45, markersize=4.5, markeredgewidth=0)
    shells = dict(color=_DARK, markersize=4, markerfacecolor="white")
    shells_name = rf"{shell_x.size} shells, $\sqrt{{K_{{aa}}}}$"
    legend = {
        f"{x.size} modes" + _fit_text(panel.entry, "diagonal_fit"): (
            *axis.plot(x, y, ".", **modes),
            *_draw_fit(axis, panel.entry, "diagonal_fit", ends, "-", panel.look.color),
        ),
        shells_name + _fit_text(panel.entry, "shell_fit"): (
            *axis.plot(shell_x, shell_y, "D", markeredgewidth=0.9, **shells),
            *_draw_fit(axis, panel.entry, "shell_fit", ends, "--", _DARK),
        ),
    }
    guide = np.exp(np.mean(np.log(y)) - np.mean(np.log(x))) * ends
    legend["slope 1"] = (*axis.plot(ends, guide, ":", color="0.45", linewidth=1.0),)
    axis.legend(legend.values(), legend.keys(), loc="upper left", borderaxespad=0.1)


def _draw_fit(
    axis: Axes, entry: Entry, name: str, ends: np.ndarray, line: str, color: str
) -> list[Line2D]:
    """Draws one power-law fit, if it is defined."""
    slope, prefactor = entry.number(name, "exponent"), entry.number(name, "prefactor")
    if slope is None or prefactor is None:
        return []
    return axis.plot(ends, prefactor * ends**slope, line, color=color)


def _fit_text(entry: Entry, name: str) -> str:
    """Writes the slope, its standard error and R^2, as far as they are defined."""
    slope, r_squared = entry.number(name, "exponent"), entry.number(name, "r_squared")
    if slope is None:
        return ", no fit"
    stderr = entry.number(name, "exponent_stderr")
    text = f": slope {slope:.2f}" + (f" ± {stderr:.2f}" if stderr is not None else "")
    return text + (f", $R^2$ = {r_squared:.2f}" if r_squared is not None else "")


def _toeplitz_residual(panels: Sequence[_Panel]) -> Figure:
    """Figure 2: the Toeplitz residual of each window against its position."""
    figure = Figure(figsize=(PAGE_WIDTH, 2.8), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for axis, (kind, (title, formula)) in zip(axes, _KINDS.items(), strict=True):
        axis.set_title(f"{title}, {formula}")
        axis.set_xlabel("position of the window in the spectrum")
        axis.set_xticks([0.0, 0.25, 0.5, 0.75, 1.0])
        axis.set_xticklabels(
            ["edge at\nsmall $\\lambda$", "", "centre", "", "edge at\nlarge $\\lambda$"]
        )
        axis.axvline(0.5, color="0.85", linewidth=0.8, zorder=0)
        axis.set(xlim=(-0.04, 1.04), ylim=(0.0, 1.02))
        axis.grid(axis="y", color="0.92", linewidth=0.6)
        axis.set_axisbelow(True)
        if not any([_window_line(axis, panel, kind) for panel in panels]):
            say_empty(axis, "no window with degrees of freedom")
    axes[0].set_ylabel("relative Toeplitz residual")
    axes[1].tick_params(labelleft=True)
    shared_legend(figure, axes, loc="outside upper center")
    return figure


def _window_line(axis: Axes, panel: _Panel, kind: str) -> bool:
    """Draws one line, broken where a window is undefined; says whether any is not."""
    windows = np.array(panel.entry.windows(kind)).reshape(-1, 2)
    if not np.isfinite(windows[:, 1]).any():
        return False
    axis.plot(
        *windows.T, **panel.look._asdict(), markersize=4, markeredgecolor="white",
        markeredgewidth=0.5, label=panel.entry.label, clip_on=False,
    )  # fmt: skip
    return True


def _coupling(panels: Sequence[_Panel], kind: str) -> Figure:
    """Heat maps over pairs of shells; grey hatching where there is no value."""
    figure, axes = _grid(len(panels), 2.85, share=False)
    title, formula = _KINDS[kind]
    figure.suptitle(f"{title}, {formula}", fontsize=8.5)
    for axis, panel in zip(axes, panels, strict=True):
        axis.set(title=panel.entry.label, xscale="log", yscale="log", aspect="equal")
        axis.set_xlabel(r"shell of $\lambda_j$")
        axis.set_ylabel(r"shell of $\lambda_i$")
        axis.spines[:].set_visible(True)
        axis.patch.set(facecolor="0.93", edgecolor="0.7", hatch="/////")
        matrix = _valid_entries(panel, kind)
        positive = matrix.compressed()[matrix.compressed() > 0]
        low, high = (positive.min(), positive.max()) if positive.size else (0.1, 1.0)
        norm = LogNorm(low, high if high > low else low * 1.01)
        edges = panel.arrays["shell_edges"]
        # A value of 0 has underflowed: the lowest colour, not the absence of a value.
        shown = np.ma.clip(matrix, low, None)
        mesh = axis.pcolormesh(edges, edges, shown, norm=norm, rasterized=True)
        if not positive.size:
            say_empty(axis, "no pair of shells")
        figure.colorbar(mesh, ax=axis, shrink=0.9).outline.set_linewidth(0.6)
    return figure


def _valid_entries(panel: _Panel, kind: str) -> np.ma.MaskedArray:
    matrix = np.asarray(panel.arrays[kind], np.float64)
    valid = panel.arrays[f"{kind}_mask"].astype(bool) & np.isfinite(matrix)
    return np.ma.masked_array(matrix, ~valid)


def _spectrum(panels: Sequence[_Panel]) -> Figure:
    """Eigenvalues against their index, with the shells shaded.

    The view ends two decades below the smallest resolved value: what lies further down
    is the noise of the arithmetic, and would squeeze the shells. The legend counts it.
    """
    figure, axes = _grid(len(panels), 2.7)
    figure.set_layout_engine("constrained", w_pad=0.12)  # the margin holds the counts
    smallest = [
        _positive(p.arrays["values"], chosen=p.arrays["resolved"])[0] for p in panels
    ]
    bottom = min((x.min() / 100 for x in smallest if x.size), default=0.0)
    for axis, panel in zip(axes, panels, strict=True):
        axis.set(title=panel.entry.label, xscale="log", yscale="log")
        axis.set_xlabel(r"index $i$")
        axis.set_ylabel(r"eigenvalue $\lambda_i$")
        _spectrum_panel(axis, panel, bottom)
    return figure


def _spectrum_panel(axis: Axes, panel: _Panel, bottom: float) -> None:
    values = np.asarray(panel.arrays["values"], np.float64)
    resolved = panel.arrays["resolved"].astype(bool)
    index = np.arange(1, values.size + 1, dtype=np.float64)
    if not (values > 0).any():
        say_empty(axis, "no positive eigenvalue")
        return
    if resolved.any():
        _shade_shells(axis, panel.arrays["shell_edges"], panel.arrays["shell_counts"])
    for name, chosen, color in (
        ("unresolved", ~resolved, _GREY),
        ("resolved", resolved, panel.look.color),
    ):
        x, y = _positive(index, values, chosen=chosen & (values >= bottom))
        hidden = int(chosen.sum()) - x.size
        below = f", {hidden} of them below" if hidden else ""
        label = f"{name} ({int(chosen.sum())}{below})"
        axis.plot(x, y, ".", color=color, markersize=3.5, label=label)
    axis.legend(loc="lower left")


def _shade_shells(axis: Axes, edges: np.ndarray, counts: np.ndarray) -> None:
    """Shades every other shell, and writes beside each how many modes it holds."""
    small = {"fontsize": 6, "color": "0.4", "annotation_clip": False}
    for shell, count in enumerate(counts):
        low, high = edges[shell : shell + 2]
        if shell % 2 == 0:
            axis.axhspan(low, high, color="0.94", zorder=0)
        if len(counts) <= _MOST_COUNTS:
            place = {"xycoords": ("axes fraction", "data"), "va": "center"}
            axis.annotate(str(count), (1.01, np.sqrt(low * high)), **place, **small)
    if len(counts) <= _MOST_COUNTS:
        place = {"xycoords": "axes fraction", "va": "bottom", "ha": "center"}
        axis.annotate("per shell", (1.01, 1.0), **place, **small)


def _positive(*coordinates: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns the chosen points that a log-log plot can show, in float64."""
    stacked = np.stack([np.asarray(x, np.float64) for x in coordinates])
    keep = chosen.astype(bool) & (np.isfinite(stacked) & (stacked > 0)).all(axis=0)
    return tuple(stacked[:, keep])
