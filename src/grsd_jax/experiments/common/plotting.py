"""What the figures share: one style, one look for each network, and their files.

Every figure is a PNG and a PDF whose text stays text. Matplotlib's object-oriented
interface is used throughout: no window, no backend and no setting of the caller's is
touched.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from grsd_jax.experiments.common import files
from grsd_jax.experiments.common.intervals import Interval
from grsd_jax.experiments.common.tables import MISSING

_STYLE = {
    "font.size": 8.5,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "lines.linewidth": 1.2,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "hatch.linewidth": 0.4,
    "mathtext.fontset": "stixsans",
    "pdf.fonttype": 42,
    "savefig.dpi": 300,
}

#: Widths in inches of a page's text, of one of its two columns, and of two panels that
#: fit in a column too: text of 7 points becomes one of 5.5 there, and none is smaller.
PAGE_WIDTH, COLUMN_WIDTH, PANELS_WIDTH = 6.9, 3.3, 4.2


class Look(NamedTuple):
    """How the marks of one network look.

    Attributes:
        color: Its color (Okabe and Ito's palette).
        marker: Its marker.
        linestyle: Its line.
    """

    color: str
    marker: str
    linestyle: str


_LOOKS = {
    ("resnet18", "own"): Look("#0072B2", "o", "-"),
    ("plainnet18", "shared"): Look("#D55E00", "s", "-"),
    ("plainnet18", "recalibrated"): Look("#E69F00", "^", "--"),
    ("plainnet18", "own"): Look("#CC79A7", "D", "-."),
    ("mlp", "own"): Look("#D55E00", "s", "-"),
    ("resmlp", "own"): Look("#0072B2", "o", "--"),
    ("cnn", "own"): Look("#CC79A7", "D", "-"),
    ("rescnn", "own"): Look("#009E73", "^", "--"),
    ("transformer", "own"): Look("#E69F00", "v", "-."),
    ("ssm", "own"): Look("0.3", "x", ":"),
}


def look_of(network: str, protocol: str = "own") -> Look:
    """Returns the look of a network under a protocol, the same in every figure.

    Args:
        network: One of `config.MODELS`.
        protocol: Where its weights come from.

    Returns:
        The look.
    """
    return _LOOKS.get((network, protocol), Look("#009E73", "v", ":"))


def draw_mean(axis: Axes, place: float, found: Interval, look: Look) -> None:
    """Draws a mean over seeds with its interval, or "n/a" where it is undefined.

    Args:
        axis: The axes.
        place: Where on their horizontal axis.
        found: The mean.
        look: Of the network.
    """
    if math.isnan(found.mean):
        beside: Any = {"transform": axis.get_xaxis_transform(), "ha": "center"}
        axis.text(place, 0.5, MISSING, color=look.color, fontsize="small", **beside)
    axis.vlines(place, found.low, found.high, color=look.color, linewidth=1.4)
    axis.plot(place, found.mean, look.marker, color=look.color, markersize=4.5)


def save_figures(
    drawings: Mapping[str, Callable[[], Figure]], folder: files.PathLike
) -> list[Path]:
    """Draws figures in one style, and writes each as a PNG and a PDF.

    Args:
        drawings: What draws each figure, by the name of its files.
        folder: The folder to write to; it is made if need be.

    Returns:
        The files, each of which was replaced as a whole.

    Raises:
        UserError: If the folder cannot be written.
    """
    paths = []
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever the user's own settings are
        mpl.rcParams.update(_STYLE)
        for name, draw in drawings.items():
            figure = draw()
            for suffix in ("png", "pdf"):
                path = Path(folder) / f"{name}.{suffix}"
                with files.atomic_path(path) as temporary:
                    figure.savefig(temporary, format=suffix)
                paths.append(path)
    return paths


def shared_legend(figure: Figure, axes: Iterable[Axes], **options: Any) -> None:
    """Draws one legend for all axes of a figure, each label once.

    Args:
        figure: The figure; without any label it gets no legend.
        axes: Its axes.
        **options: Of `Figure.legend`, such as ``loc``; by default one row of columns.
    """
    found: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    if found:
        options = {"ncols": len(found)} | options
        options.setdefault("columnspacing", 1.2)
        figure.legend(list(found.values()), list(found), **options)
