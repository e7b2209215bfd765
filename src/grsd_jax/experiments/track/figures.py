"""The figures of a tracked training, from its ``records.jsonl`` alone."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from grsd_jax import plotting
from grsd_jax.experiments.common import files
from grsd_jax.experiments.common.config import TITLES, UserError
from grsd_jax.experiments.common.plotting import (
    COLUMN_WIDTH,
    PANELS_WIDTH,
    look_of,
    save_figures,
    shared_legend,
)
from grsd_jax.experiments.track.quantities import (
    Lines,
    by_steps,
    column,
    in_order,
    lost_share,
    moved_share,
    usable_velocities,
    whole_intervals,
)
from grsd_jax.plotting.drawing import leave_room
from grsd_jax.plotting.tracked import TIME, time_of

Tracks = Mapping[str, Lines]


def write_tracking_figures(tracks: Tracks, folder: files.PathLike) -> list[Path]:
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
    tracks = {name: tracks[name] for name in in_order(tracks)}
    whole = {name: whole_intervals(lines) for name, lines in tracks.items()}
    for name, lines in whole.items():
        if not lines:
            raise UserError(f"{name}: expected records that are finite, got none.")
    whole = _on_one_clock(whole)
    drawings: dict[str, Callable[[], Figure]] = {
        "track_energies": partial(_each, plotting.energies, whole),
        "track_amounts": partial(_amounts, whole),
        "track_profiles": partial(_profiles, whole),
        "track_velocity": partial(_velocity, whole),
        "track_eigenvalues": partial(_each, plotting.eigenvalues, whole),
    }
    if any(len(by_steps(lines)) > 1 for lines in tracks.values()):
        drawings["track_steps"] = partial(_steps, tracks)
    shares = [column(lines, "non_adjacent_share") for lines in whole.values()]
    if any(np.isfinite(share).any() for share in shares):
        drawings["track_non_adjacent"] = partial(_non_adjacent, whole)
    return save_figures(drawings, folder)


def _on_one_clock(tracks: Tracks) -> Tracks:
    """Returns records without their times if one is not known, as panels share axes."""
    label, _ = time_of([line for lines in tracks.values() for line in lines])
    if label == TIME:
        return tracks
    return {
        name: [{**line, "effective_time": None} for line in lines]
        for name, lines in tracks.items()
    }


def write_log_figures(lines: Lines, title: str, folder: files.PathLike) -> list[Path]:
    """Draws the records of any loop by the public functions, as PNG and PDF.

    ``records_energies``, ``records_flux``, ``records_velocity`` and
    ``records_eigenvalues``.

    Args:
        lines: The records.
        title: What stands above each figure.
        folder: The folder to write to; it is made if need be.

    Returns:
        The files, each of which was replaced as a whole.

    Raises:
        UserError: If the folder cannot be written.
    """
    public = plotting.energies, plotting.flux, plotting.velocity, plotting.eigenvalues
    drawings: dict[str, Callable[[], Figure]] = {
        f"records_{draw.__name__}": partial(_each, draw, {title: lines})
        for draw in public
    }
    return save_figures(drawings, folder)


def _each(draw: Callable[..., Axes], tracks: Tracks) -> Figure:
    """One of the public figures, a panel for each network, one below the other."""
    figure = Figure(figsize=(COLUMN_WIDTH, 2.4 * len(tracks)), layout="constrained")
    axes = figure.subplots(len(tracks), 1, squeeze=False, sharex=True, sharey=True)
    for axis, (name, lines) in zip(axes[:, 0], tracks.items(), strict=True):
        axis.set_title(_title(name))
        axis.tick_params(labelbottom=True)
        draw(lines, axis)
    return figure


def _title(name: str) -> str:
    """Returns a network's name as it is, though Matplotlib reads ``$`` as a formula."""
    return TITLES.get(name, name).replace("$", r"\$")


def _profiles(tracks: Tracks) -> Figure:
    """Flux with its error, and velocity beside its null, at several times."""
    figure = Figure(figsize=(PANELS_WIDTH, 4.8), layout="constrained")
    axes = figure.subplots(2, len(tracks), squeeze=False, sharex="row", sharey="row")
    for row, name in zip(axes, ("flux", "velocity"), strict=True):
        values = [column(lines, name).ravel() for lines in tracks.values()]
        _spread(row[0], np.abs(np.concatenate(values)))
    for (flux, velocity), (name, lines) in zip(axes.T, tracks.items(), strict=True):
        flux.set_title(_title(name))
        plotting.flux(lines, flux)
        plotting.velocity(lines, velocity)
        _legend_of_null(velocity)
        for axis in (flux, velocity):
            axis.label_outer(remove_inner_ticks=False)
            axis.tick_params(labelbottom=True, labelleft=True)
    return figure


def _legend_of_null(axis: Axes) -> None:
    """Leaves the null alone in the legend: the panel above names the times."""
    named = zip(*axis.get_legend_handles_labels(), strict=True)
    null = [handle for handle, label in named if label.startswith("null")]
    if (legend := axis.get_legend()) is not None:
        legend.remove()
    if null:
        axis.relim()
        leave_room(axis, 0.15)
        axis.legend(handles=null, loc="upper left")


def _spread(axis: Axes, sizes: np.ndarray) -> None:
    """Shows both signs over decades: the first interval moves far more than later."""
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    if sizes.size:
        width = float(np.percentile(sizes, 75))
        axis.set_yscale("asinh", linear_width=width)
        powers = np.arange(round(math.log10(width)), math.log10(sizes.max()) + 2)
        decades = 10.0**powers
        ticks = [*-decades, 0.0, *decades]
        axis.yaxis.set_major_locator(FixedLocator(ticks))


def _over_time(
    tracks: Tracks,
    of: Callable[[Lines], np.ndarray],
    beside: Callable[[Lines], np.ndarray] | None = None,
    *,
    name_beside: str = "",
    ylabel: str,
) -> Figure:
    """One quantity of each network over its training; dotted, another beside it."""
    figure, axis = _single()
    axis.axhline(0, color="0.8", linewidth=0.6, zorder=0)
    any_beside = False
    for name, lines in tracks.items():
        xlabel, time = time_of(lines)
        axis.set_xlabel(xlabel)
        look, values = look_of(name), of(lines)
        defined = np.isfinite(values).any()
        label = _title(name) + ("" if defined else ": undefined")
        axis.plot(time, values, **look._asdict(), markersize=3, label=label)
        if beside is not None:
            dotted = beside(lines)
            axis.plot(time, dotted, ":", color=look.color)
            any_beside |= bool(np.isfinite(dotted).any())
    if any_beside:
        axis.plot([], [], ":", color="0.4", label=name_beside)
    axis.set_ylabel(ylabel)
    shared_legend(figure, [axis], loc="outside upper center", ncols=3)
    return figure


def _amounts(tracks: Tracks) -> Figure:
    """What moved and what was lost between two records, as shares of the energy."""
    return _over_time(
        tracks,
        lambda lines: np.array([moved_share(line) for line in lines]),
        lambda lines: np.array([lost_share(line) for line in lines]),
        name_beside="lost; below 0: gained",
        ylabel=r"moved, $\frac{1}{2}\sum |T_{ab}|\;/\;|e\,|^2$",
    )


def _velocity(tracks: Tracks) -> Figure:
    """The median velocity over the usable edges beside that of the null, over time."""

    def median(lines: Lines, which: int) -> np.ndarray:
        return np.array([_median(usable_velocities(line)[which]) for line in lines])

    return _over_time(
        tracks,
        partial(median, which=0),
        partial(median, which=1),
        name_beside="null: growth alone",
        ylabel="velocity in $\\log\\lambda$, median",
    )


def _non_adjacent(tracks: Tracks) -> Figure:
    return _over_time(
        tracks,
        lambda lines: column(lines, "non_adjacent_share"),
        ylabel="share of transfers between\nnon-adjacent shells",
    )


def _steps(tracks: Tracks) -> Figure:
    """What is lost and what moves, a training step, against the steps looked over."""
    figure, axis = _single()
    axis.set(xscale="log", yscale="log", xlabel="training steps $h$ between both ends")
    axis.set_ylabel("moved in one step,\nshare of $|e\\,|^2$, median")
    steps: set[int] = set()
    for name, lines in tracks.items():
        groups, look = by_steps(lines), look_of(name)
        steps |= set(groups)
        label = _title(name)
        moved: Any = look._asdict() | {"markersize": 3, "label": label}
        lost = moved | {"linestyle": ":", "markerfacecolor": "white", "label": None}
        for share, style in ((moved_share, moved), (lost_share, lost)):
            found = [np.median([share(x) for x in group]) for group in groups.values()]
            axis.plot(list(groups), np.abs(found) / np.array(list(groups)), **style)
    axis.plot([], [], ":", color="0.4", label="lost or gained")
    axis.set_xticks(sorted(steps), [str(step) for step in sorted(steps)])
    axis.minorticks_off()
    shared_legend(figure, [axis], loc="outside upper center", ncols=3)
    return figure


def _median(values: np.ndarray) -> float:
    """Returns the median of what is finite, NaN of nothing."""
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else float("nan")


def _single() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(COLUMN_WIDTH, 2.4), layout="constrained")
    return figure, figure.subplots()
