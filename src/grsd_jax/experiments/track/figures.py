"""The figures of a tracked training, from its ``records.jsonl`` alone."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from grsd_jax.experiments.common import files
from grsd_jax.experiments.common.config import TITLES, UserError
from grsd_jax.experiments.common.plotting import PAGE_WIDTH, look_of, save_figures
from grsd_jax.experiments.track.quantities import (
    Line,
    Lines,
    by_steps,
    column,
    lost_share,
    moved_share,
    total_energy,
    usable_velocities,
    whole_intervals,
)

Tracks = Mapping[str, Lines]

#: Profiles drawn at most, evenly over the records.
_MOST_PROFILES = 6

_TIME = r"effective time $\tau = \sum \eta / (1 - \mu)$"


def write_tracking_figures(tracks: Tracks, folder: files.PathLike) -> list[Any]:
    """Draws every figure of tracked trainings, each as a PNG and a PDF.

    ``track_energies`` (energy of each shell), ``track_amounts`` (what was lost, and
    what moved), ``track_profiles`` (flux with its error, and velocity beside its null,
    over the edges), ``track_velocity`` (both over time), ``track_eigenvalues`` (the
    leading ones); ``track_steps`` (over how many steps one looks) if there are balances
    over several; and ``track_non_adjacent`` where the shells allow it.

    Args:
        tracks: The records of each network, by its name.
        folder: The folder to write to; it is made if need be.

    Returns:
        The files, each of which was replaced as a whole.

    Raises:
        UserError: If a network has no finite record, or the folder cannot be written.
    """
    order = [name for name in TITLES if name in tracks]
    whole = {name: whole_intervals(tracks[name]) for name in order}
    for name, lines in whole.items():
        if not lines:
            raise UserError(f"{name}: expected records that are finite, got none.")
    drawings: dict[str, Callable[[], Figure]] = {
        "track_energies": partial(_energies, whole),
        "track_amounts": partial(_amounts, whole),
        "track_profiles": partial(_profiles, whole),
        "track_velocity": partial(_velocity, whole),
        "track_eigenvalues": partial(_eigenvalues, whole),
    }
    if any(len(by_steps(tracks[name])) > 1 for name in order):
        finite = {name: tracks[name] for name in order}
        drawings["track_steps"] = partial(_steps, finite)
    shares = [column(lines, "non_adjacent_share") for lines in whole.values()]
    if any(np.isfinite(share).any() for share in shares):
        drawings["track_non_adjacent"] = partial(_non_adjacent, whole)
    return save_figures(drawings, folder)


def _panels(tracks: Tracks, rows: int, height: float) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(PAGE_WIDTH, height * rows), layout="constrained")
    axes = figure.subplots(rows, len(tracks), squeeze=False, sharex="row", sharey="row")
    for place, name in enumerate(tracks):
        axes[0, place].set_title(TITLES.get(name, name))
        for axis in axes[:, place]:
            axis.tick_params(labelbottom=True, labelleft=True)
    return figure, axes


def _energies(tracks: Tracks) -> Figure:
    """The energy of each shell, coloured by its place in the spectrum."""
    figure, axes = _panels(tracks, 1, 2.7)
    for axis, lines in zip(axes[0], tracks.values(), strict=True):
        axis.set(yscale="log", xlabel=_TIME, ylabel=r"energy $E_a$")
        time = column(lines, "effective_time")
        energies = column(lines, "energies")[:, 1]
        colors, norm = mpl.colormaps["viridis"], Normalize(0, energies.shape[1] - 1)
        for shell, track in enumerate(energies.T):
            shown = np.where(track > 0, track, np.nan)
            axis.plot(time, shown, ".-", color=colors(norm(shell)), markersize=3)
        axis.plot(time, np.sum(energies, axis=1), "-", color="0.15", label="all")
        axis.legend(loc="best")
        bar = figure.colorbar(
            mpl.cm.ScalarMappable(norm, colors), ax=axis, label="shell $a$"
        )
        bar.outline.set_linewidth(0.6)
    return figure


def _amounts(tracks: Tracks) -> Figure:
    """What moved and what was lost between two records, as shares of the energy."""
    figure, axis = _single()
    for name, lines in tracks.items():
        time = column(lines, "effective_time")
        _line(axis, name, time, np.array([moved_share(line) for line in lines]))
        lost = [lost_share(line) for line in lines]
        axis.plot(time, lost, ":", color=look_of(name).color)
    axis.plot([], [], ":", color="0.4", label="lost; below 0: gained")
    axis.axhline(0, color="0.8", linewidth=0.6, zorder=0)
    axis.set(xlabel=_TIME, ylabel=r"moved, $\frac{1}{2}\sum |T_{ab}| / |e|^2$")
    axis.legend()
    return figure


def _profiles(tracks: Tracks) -> Figure:
    """Flux with its error, and velocity beside its null, at several times."""
    figure, axes = _panels(tracks, 2, 2.4)
    for place, lines in enumerate(tracks.values()):
        count = min(_MOST_PROFILES, len(lines))
        chosen = np.unique(np.linspace(0, len(lines) - 1, count).round().astype(int))
        colors = mpl.colormaps["plasma"](np.linspace(0, 0.85, len(chosen)))
        for color, index in zip(colors, chosen, strict=True):
            _profile(axes[:, place], lines[index], color)
        for axis in axes[:, place]:
            axis.set(xscale="log", xlabel=r"edge $\lambda_k$")
            axis.axhline(0, color="0.8", linewidth=0.6, zorder=0)
        axes[0, place].set_ylabel(r"flux $F_k / |e|^2$")
        axes[1, place].set_ylabel("$v_k$, and $v^N_k$ (dotted)")
        flux = [np.array(x["flux"], np.float64) / total_energy(x) for x in lines]
        _symmetric_log(axes[0, place], np.array(flux))
        axes[0, place].legend(title=r"$\tau$", ncols=2, loc="best")
    return figure


def _profile(axes: np.ndarray, line: Line, color: Any) -> None:
    """Draws flux and velocity of one record, where they are known."""
    edges, flux, error, velocity, spread = (
        np.array(line[name], np.float64)
        for name in ("edges", "flux", "flux_error", "velocity", "velocity_error")
    )
    energy, used = total_energy(line), np.array(line["velocity_mask"], bool)
    style = dict(color=color, markersize=3.5, elinewidth=0.6)
    known = np.isfinite(error)
    axes[0].errorbar(
        edges[known],
        flux[known] / energy,
        error[known] / energy,
        fmt=".-",
        label=f"{line['effective_time']:.3g}",
        **style,
    )
    axes[1].errorbar(edges[used], velocity[used], spread[used], fmt=".-", **style)
    if line["counting_velocity"] is not None:
        counted = np.array(line["counting_velocity"], np.float64)
        axes[1].plot(edges[used], counted[used], ":", color=color, linewidth=0.9)


def _velocity(tracks: Tracks) -> Figure:
    """The median velocity over the usable edges beside that of the null, over time."""
    figure, axis = _single()
    for name, lines in tracks.items():
        pairs = [usable_velocities(line) for line in lines]
        median = np.array([[_median(values) for values in pair] for pair in pairs])
        time, color = column(lines, "effective_time"), look_of(name).color
        _line(axis, name, time, median[:, 0])
        axis.plot(time, median[:, 1], ":", color=color)
    axis.plot([], [], ":", color="0.4", label="counting velocity")
    axis.axhline(0, color="0.8", linewidth=0.6, zorder=0)
    axis.set(xlabel=_TIME, ylabel=r"velocity in $\log\lambda$, median")
    axis.legend()
    return figure


def _steps(tracks: Tracks) -> Figure:
    """What is lost and what moves, a training step, against the steps looked over."""
    figure, axis = _single()
    for name, lines in tracks.items():
        groups, look = by_steps(lines), look_of(name)
        steps = np.array(list(groups), np.float64)
        for share, style in ((moved_share, look.linestyle), (lost_share, ":")):
            found = [np.median([share(x) for x in group]) for group in groups.values()]
            label = TITLES.get(name, name) if share is moved_share else None
            axis.plot(
                steps,
                np.abs(found) / steps,
                style,
                color=look.color,
                marker=look.marker,
                markersize=3,
                label=label,
            )
    axis.plot([], [], ":", color="0.4", label="lost")
    axis.set(xscale="log", yscale="log", xlabel="training steps $h$ between both ends")
    axis.set_ylabel("moved, share of $|e|^2$ a step, median")
    axis.legend()
    return figure


def _non_adjacent(tracks: Tracks) -> Figure:
    figure, axis = _single()
    for name, lines in tracks.items():
        time = column(lines, "effective_time")
        _line(axis, name, time, column(lines, "non_adjacent_share"))
    axis.set(xlabel=_TIME, ylabel="share of transfers between\nnon-adjacent shells")
    axis.set_ylim(0, 1)
    axis.legend()
    return figure


def _symmetric_log(axis: Axes, values: np.ndarray) -> None:
    """Shows both signs over decades, linear below a hundredth of the largest."""
    largest = float(np.nanmax(np.abs(values), initial=0.0))
    if largest > 0:
        axis.set_yscale("symlog", linthresh=largest / 1e2)


def _median(values: np.ndarray) -> float:
    """Returns the median of what is finite, NaN of nothing."""
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else float("nan")


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
        time, values = column(lines, "effective_time"), column(lines, "values")
        colors = mpl.colormaps["viridis_r"]
        norm = Normalize(0, values.shape[1])
        for index, track in enumerate(values.T):
            shown = np.where(track > 0, track, np.nan)
            axis.plot(time, shown, "-", color=colors(norm(index)), linewidth=0.8)
        axis.set(yscale="log", xlabel=_TIME, ylabel=r"eigenvalue $\lambda_i$")
    return figure
