"""The figures of a tracked training, from its ``records.jsonl`` alone."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from grsd_jax.experiments.common import files
from grsd_jax.experiments.common.config import TITLES, UserError
from grsd_jax.experiments.common.plotting import PAGE_WIDTH, look_of, save_figures

Lines = Sequence[Mapping[str, Any]]
Tracks = Mapping[str, Lines]

#: Profiles drawn at most, evenly over the records.
_MOST_PROFILES = 6

_TIME = r"effective time $\tau = \sum \eta / (1 - \mu)$"


def write_tracking_figures(tracks: Tracks, folder: files.PathLike) -> list[Any]:
    """Draws every figure of tracked trainings, each as a PNG and a PDF.

    ``track_energies`` (energy of each shell), ``track_profiles`` (flux and velocity
    over the shell edges), ``track_exponent`` (with its bootstrap interval),
    ``track_non_adjacent`` (the share of transfers between shells that are not
    neighbours), ``track_eigenvalues`` (the leading ones) and ``track_closure``.

    Args:
        tracks: The records of each network, by its name.
        folder: The folder to write to; it is made if need be.

    Returns:
        The files, each of which was replaced as a whole.

    Raises:
        UserError: If a network has no finite record, or the folder cannot be written.
    """
    order = [name for name in TITLES if name in tracks]
    tracks = {name: [x for x in tracks[name] if x["finite"]] for name in order}
    for name, lines in tracks.items():
        if not lines:
            raise UserError(f"{name}: expected records that are finite, got none.")
    drawings: dict[str, Callable[[], Figure]] = {
        "track_energies": partial(_energies, tracks),
        "track_profiles": partial(_profiles, tracks),
        "track_exponent": partial(_exponent, tracks),
        "track_non_adjacent": partial(_non_adjacent, tracks),
        "track_eigenvalues": partial(_eigenvalues, tracks),
        "track_closure": partial(_closure, tracks),
    }
    return save_figures(drawings, folder)


def _column(lines: Lines, name: str) -> np.ndarray:
    """Returns one field of all records, ``[records, ...]``, NaN for null."""
    return np.array([line[name] for line in lines], np.float64)


def _panels(tracks: Tracks, rows: int, height: float) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(PAGE_WIDTH, height * rows), layout="constrained")
    axes = figure.subplots(rows, len(tracks), squeeze=False, sharex="row", sharey="row")
    for column, name in enumerate(tracks):
        axes[0, column].set_title(TITLES.get(name, name))
        for axis in axes[:, column]:
            axis.tick_params(labelbottom=True, labelleft=True)
    return figure, axes


def _energies(tracks: Tracks) -> Figure:
    """The energy of each shell, coloured by its place in the spectrum."""
    figure, axes = _panels(tracks, 1, 2.7)
    for axis, lines in zip(axes[0], tracks.values(), strict=True):
        axis.set(yscale="log", xlabel=_TIME, ylabel=r"energy $E_a$")
        time, edges = _column(lines, "effective_time"), np.array(lines[0]["edges"])
        energies = _column(lines, "energies")
        centers = np.sqrt(edges[:-1] * edges[1:])
        norm = LogNorm(centers[0], centers[-1])
        colors = mpl.colormaps["viridis"]
        for shell, center in enumerate(centers):
            shown = np.where(energies[:, shell] > 0, energies[:, shell], np.nan)
            axis.plot(time, shown, ".-", color=colors(norm(center)), markersize=3)
        rest = _column(lines, "unresolved_energy")
        rest = np.where(rest > 0, rest, np.nan)
        axis.plot(time, _column(lines, "total_energy"), "-", color="0.15", label="all")
        axis.plot(time, rest, ":", color="0.5", label="unresolved")
        axis.legend(loc="best")
        bar = figure.colorbar(
            mpl.cm.ScalarMappable(norm, colors), ax=axis, label=r"shell $\lambda_a$"
        )
        bar.outline.set_linewidth(0.6)
    return figure


def _profiles(tracks: Tracks) -> Figure:
    """Flux and speed over the inner edges, at several times; hollow: downwards."""
    figure, axes = _panels(tracks, 2, 2.4)
    for column, lines in enumerate(tracks.values()):
        count = min(_MOST_PROFILES, len(lines))
        chosen = np.unique(np.linspace(0, len(lines) - 1, count).round().astype(int))
        colors = mpl.colormaps["plasma"](np.linspace(0, 0.85, len(chosen)))
        for color, index in zip(colors, chosen, strict=True):
            _profile(axes[:, column], lines[index], color)
        for axis in axes[:, column]:
            axis.set(xscale="log", xlabel=r"edge $\lambda$")
        axes[0, column].axhline(0, color="0.8", linewidth=0.6, zorder=0)
        axes[0, column].set_ylabel(r"flux $F / |e|^2$")
        axes[1, column].set_ylabel(r"speed $|v| = |F| / \varepsilon$")
        _log_scale(axes[1, column], np.abs(_column(lines, "velocity")))
        flux = _column(lines, "flux") / _column(lines, "total_energy")[:, None]
        _symmetric_log(axes[0, column], flux)
        axes[0, column].legend(title=r"$\tau$", ncols=2, loc="best")
    return figure


def _profile(axes: np.ndarray, line: Mapping[str, Any], color: Any) -> None:
    """Draws the flux and the speed of one record."""
    edges, flux, velocity = (
        np.array(values, np.float64)
        for values in (line["edges"][1:-1], line["flux"], line["velocity"])
    )
    style = dict(color=color, markersize=3.5)
    axes[0].plot(
        edges, flux / line["total_energy"], ".-", label=_time_text(line), **style
    )
    speed = np.where(velocity != 0, np.abs(velocity), np.nan)
    axes[1].plot(edges, speed, "-", color=color, linewidth=0.8)
    for sign, face in ((1, color), (-1, "white")):
        shown = np.where(np.sign(velocity) == sign, speed, np.nan)
        axes[1].plot(edges, shown, "o", markerfacecolor=face, **style)


def _time_text(line: Mapping[str, Any]) -> str:
    return f"{line['effective_time']:.3g}"


def _log_scale(axis: Axes, values: np.ndarray) -> None:
    """Makes the axis logarithmic, unless there is nothing that it could show."""
    if np.nanmax(values, initial=0.0) > 0:
        axis.set_yscale("log")


def _symmetric_log(axis: Axes, values: np.ndarray) -> None:
    """Shows both signs over decades, linear below a hundredth of the largest."""
    largest = float(np.nanmax(np.abs(values), initial=0.0))
    if largest > 0:
        axis.set_yscale("symlog", linthresh=largest / 1e2)


def _exponent(tracks: Tracks) -> Figure:
    """The exponent of the velocity, with its interval as a band."""
    figure, axis = _single()
    for name, lines in tracks.items():
        time = _column(lines, "effective_time")
        interval = _column(lines, "exponent_interval").reshape(-1, 2)
        look = look_of(name)
        low, high = interval.T
        axis.fill_between(time, low, high, color=look.color, alpha=0.18, linewidth=0)
        # Without an interval there were too few points for the exponent to mean much.
        defined = np.isfinite(interval).all(axis=1)
        _line(axis, name, time, np.where(defined, _column(lines, "exponent"), np.nan))
    axis.set(xlabel=_TIME, ylabel=r"exponent $p$ of $|v| = c \lambda^p$")
    axis.legend()
    return figure


def _non_adjacent(tracks: Tracks) -> Figure:
    figure, axis = _single()
    for name, lines in tracks.items():
        time = _column(lines, "effective_time")
        _line(axis, name, time, _column(lines, "non_adjacent_share"))
    axis.set(xlabel=_TIME, ylabel="share of transfers between\nnon-adjacent shells")
    axis.set_ylim(0, 1)
    axis.legend()
    return figure


def _closure(tracks: Tracks) -> Figure:
    figure, axis = _single()
    for name, lines in tracks.items():
        time, total = _column(lines, "effective_time"), _column(lines, "closure_error")
        _line(axis, name, time, total)
        held = _column(lines, "counts") > 0
        errors = np.ma.masked_array(_column(lines, "closure_errors"), ~held)
        median = np.ma.median(errors, axis=1)
        color = look_of(name).color
        axis.plot(time, median, ":", color=color, label="median over shells")
        _log_scale(axis, total)
    axis.set_xlabel(_TIME)
    axis.set_ylabel(r"closure error $|\dot E - \dot E_{meas}| / |\dot E_{meas}|$")
    axis.legend()
    return figure


def _single() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(0.62 * PAGE_WIDTH, 2.5), layout="constrained")
    return figure, figure.subplots()


def _line(axis: Axes, name: str, time: np.ndarray, values: np.ndarray) -> None:
    """Draws one quantity of one network over its training."""
    look = look_of(name)._asdict()
    axis.plot(time, values, **look, markersize=3, label=TITLES.get(name, name))


def _eigenvalues(tracks: Tracks) -> Figure:
    """The leading eigenvalues, each a line, in order of size."""
    figure, axes = _panels(tracks, 1, 2.7)
    for axis, lines in zip(axes[0], tracks.values(), strict=True):
        time, values = _column(lines, "effective_time"), _column(lines, "values")
        colors = mpl.colormaps["viridis_r"]
        norm = Normalize(0, values.shape[1])
        for index, track in enumerate(values.T):
            shown = np.where(track > 0, track, np.nan)
            axis.plot(time, shown, "-", color=colors(norm(index)), linewidth=0.8)
        axis.set(yscale="log", xlabel=_TIME, ylabel=r"eigenvalue $\lambda_i$")
    return figure
