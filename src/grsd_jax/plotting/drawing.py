"""What the figures share: axes to draw on, and points that can be drawn."""

from typing import TYPE_CHECKING, Any

import numpy as np

from grsd_jax.results.tables import needed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DARK, GRAY, LIGHT = "0.15", "0.55", "0.94"

#: Blue of Okabe and Ito's palette.
COLOR = "#0072B2"

#: Size of new axes, in inches, and of the text in legends and beside shells, in points:
#: it stays legible in one column of a page.
_SIZE = (4.2, 3.0)
LEGEND = 7


def axes_of(ax: "Axes | None") -> "Axes":
    """Returns the axes, or new ones in a figure of their own.

    Raises:
        ImportError: If Matplotlib is not installed.
    """
    needed("matplotlib", "plotting", "plots")
    if ax is not None:
        return ax
    pyplot = needed("matplotlib.pyplot", "plotting", "plots")
    _, ax = pyplot.subplots(figsize=_SIZE, layout="compressed")
    return ax


def check_result(name: str, value: Any, *kinds: type) -> None:
    """Raises ValueError unless a value is a result of one of the kinds."""
    if not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        got = type(value).__name__
        raise ValueError(f"{name}: expected a {wanted}, got a {got}.")


def positive(*coordinates: Any, chosen: Any) -> tuple[np.ndarray, ...]:
    """Returns the chosen points that a log-log plot can show, in float64."""
    stacked = np.stack([np.asarray(x, np.float64) for x in coordinates])
    keep = (np.isfinite(stacked) & (stacked > 0)).all(axis=0)
    return tuple(stacked[:, keep & np.asarray(chosen, bool)])


def say_empty(ax: "Axes", text: str) -> None:
    """Writes in the middle of axes why they show nothing."""
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", color="0.4")


def color_bar(ax: "Axes", mappable: Any, label: str) -> Any:
    """Draws a labeled color bar beside axes, and returns it."""
    figure: Any = ax.get_figure()
    # In axes of its own beside a square, layouts would cut off a label.
    bar = figure.colorbar(mappable, cax=ax.inset_axes((1.04, 0, 0.05, 1)))
    bar.set_label(label, fontsize="small")
    bar.outline.set_linewidth(0.6)
    return bar


def leave_room(ax: "Axes", share: float, *, heights: np.ndarray | None = None) -> None:
    """Leaves room for a legend above all lines, also where axes share their limits.

    Args:
        ax: The axes.
        share: The room, as a share of the height of the lines.
        heights: What must be seen; what lies beyond may be cut off. All lines if None.
    """
    if whole := heights is None:
        heights = np.concatenate([np.asarray(x.get_ydata(), float) for x in ax.lines])
    scale = ax.get_yaxis().get_transform()
    with np.errstate(divide="ignore", invalid="ignore"):
        places = scale.transform(heights)
    kept = np.isfinite(places) & np.isfinite(heights)
    if kept.any():
        low, high = places[kept].min(), places[kept].max()
        top = scale.inverted().transform(np.asarray([high + share * (high - low)]))[0]
        if whole:
            ax.update_datalim([(0.0, top)], updatex=False)
        else:
            ax.dataLim.intervaly = (heights[kept].min(), top)
        ax.autoscale_view()
