"""The figures of a result, from ``results.json`` and ``arrays.npz`` alone."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from grsd_jax import plotting
from grsd_jax.experiments.common import files
from grsd_jax.experiments.common.plotting import (
    COLUMN_WIDTH,
    PAGE_WIDTH,
    Look,
    look_of,
    save_figures,
    shared_legend,
)
from grsd_jax.experiments.reproduce.analyse import as_measurement, list_entries
from grsd_jax.plotting.measured import FORMULAS, KINDS, Kind, smallest_drawn
from grsd_jax.shells import CouplingMeasurement


class _Panel(NamedTuple):
    """One measurement, its name and its look."""

    measured: CouplingMeasurement
    label: str
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
        panels.append(_Panel(as_measurement(entry, arrays), entry.label, look))
    drawings: dict[str, Callable[[], Figure]] = {
        "figure1_diagonal_scaling": lambda: _diagonal_scaling(panels),
        "figure2_toeplitz_residual": lambda: _toeplitz_residual(panels),
        "coupling_literal": lambda: _coupling(panels, "literal"),
        "coupling_renormalized": lambda: _coupling(panels, "renormalized"),
        "spectrum_shells": lambda: _spectrum(panels),
    }
    return save_figures(drawings, folder)


def _grid(
    num_panels: int, height: float, *, share: bool = True, columns: int = 2
) -> tuple[Figure, list[Axes]]:
    """Returns a figure with one panel for each measurement, page-wide with columns."""
    columns = min(num_panels, columns)
    rows = math.ceil(num_panels / columns)
    width = PAGE_WIDTH if columns > 1 else COLUMN_WIDTH
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=share, sharey=share, squeeze=False)
    flat = list(axes.flat)
    for unused in flat[num_panels:]:
        unused.remove()
    for axis in flat[:num_panels]:
        axis.tick_params(labelbottom=True, labelleft=True)
    return figure, flat[:num_panels]


def _diagonal_scaling(panels: Sequence[_Panel]) -> Figure:
    """Figure 1: ``|Mdot_ii|`` against ``lambda_i``, with fits and the slope 1.

    The panels are one below the other, to be legible at the width of a column.
    """
    figure, axes = _grid(len(panels), 2.5, columns=1)
    for axis, panel in zip(axes, panels, strict=True):
        axis.set_title(panel.label)
        plotting.diagonal(panel.measured, axis, color=panel.look.color)
    return figure


def _toeplitz_residual(panels: Sequence[_Panel]) -> Figure:
    """Figure 2: the Toeplitz residual of each window against its position."""
    figure = Figure(figsize=(COLUMN_WIDTH, 4.6), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True, sharey=True)
    for axis, kind in zip(axes, KINDS, strict=True):
        axis.set_title(_title(kind))
        for panel in panels:
            plotting.windows(
                panel.measured,
                axis,
                kind=kind,
                label=panel.label,
                noise_floor=False,
                **panel.look._asdict(),
            )
        axis.label_outer()
    shared_legend(figure, axes, loc="outside upper center", ncols=2)
    return figure


def _title(kind: Kind) -> str:
    return f"{kind} coupling, {FORMULAS[kind]}"


def _coupling(panels: Sequence[_Panel], kind: Kind) -> Figure:
    """Heat maps over pairs of shells; gray hatching where there is no value."""
    figure, axes = _grid(len(panels), 2.85, share=False)
    figure.suptitle(_title(kind), fontsize="medium")
    limits = plotting.coupling_limits([panel.measured for panel in panels], kind)
    for axis, panel in zip(axes, panels, strict=True):
        axis.set_title(panel.label)
        plotting.coupling(panel.measured, axis, kind=kind, limits=limits)
    return figure


def _spectrum(panels: Sequence[_Panel]) -> Figure:
    """Eigenvalues against their index, with the shells shaded, from one value up."""
    figure, axes = _grid(len(panels), 2.7)
    bottoms = [smallest_drawn(panel.measured) for panel in panels]
    bottom = min((x for x in bottoms if x > 0), default=0.0)
    for axis, panel in zip(axes, panels, strict=True):
        axis.set_title(panel.label)
        plotting.spectrum(panel.measured, axis, color=panel.look.color, bottom=bottom)
    return figure
