"""The figure page of the conditions, from ``conditions.json`` alone."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from grsd_jax.experiments import records
from grsd_jax.experiments.figures import PAGE_WIDTH, save_figures

_BLUE, _RED, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "0.5"


def write_condition_page(found: Any, folder: records.PathLike) -> list[Path]:
    """Draws all four conditions and the layers on one page, as a PNG and a PDF.

    Args:
        found: The contents of ``conditions.json``, as measured or as read back.
        folder: The folder to write to; it is made if need be.

    Returns:
        The files, each of which was replaced as a whole.

    Raises:
        UserError: If the folder cannot be written.
    """
    return save_figures({"conditions": lambda: _page(found)}, folder)


def _page(found: Any) -> Figure:
    figure = Figure(figsize=(PAGE_WIDTH, 9.0), layout="constrained")
    axes = figure.subplots(4, 2)
    names = found["blocks"]
    _heat(figure, axes[0, 0], found["condition1"]["influence"][-1], names)
    axes[0, 0].set_title(r"1: influence $R_{lm}$, last point")
    axes[0, 0].set(xlabel="block that moves, m", ylabel="block whose $J$ changes, l")
    _influence_shares(axes[0, 1], found)
    _heat(figure, axes[1, 0], found["condition2"]["coherence"], names, limits=(1e-3, 1))
    axes[1, 0].set_title(r"2: coherence $|J_l^\top J_m|\,/\,|J_l||J_m|$ at the start")
    axes[1, 0].set(xlabel="block m", ylabel="block l")
    _coherence_profile(axes[1, 1], found)
    _norms(axes[2, 0], found)
    _drift(axes[2, 1], found)
    _invariance(axes[3, 0], found)
    _layers(axes[3, 1], found)
    return figure


def _numbers(values: Any) -> np.ndarray:
    """Returns an array of floats, NaN for null."""
    return np.array(np.asarray(values, dtype=object), dtype=np.float64)


def _threshold(axis: Axes, found: Any, condition: str, check: int) -> None:
    """Draws the threshold of one check as a dotted line."""
    value = found[condition]["verdict"]["checks"][check]["threshold"]
    axis.axhline(value, color=_GREY, linestyle=":", linewidth=0.9, label="threshold")


def _heat(
    figure: Figure,
    axis: Axes,
    values: Any,
    names: list[str],
    *,
    limits: tuple[float, float] | None = None,
) -> None:
    matrix = _numbers(values)
    positive = matrix[matrix > 0]
    low, high = limits or (
        (positive.min(), positive.max()) if positive.size else (0.1, 1.0)
    )
    norm = LogNorm(low, high if high > low else low * 1.01)
    mesh = axis.imshow(np.maximum(matrix, low), norm=norm, cmap="viridis")
    figure.colorbar(mesh, ax=axis, shrink=0.9).outline.set_linewidth(0.6)
    ticks = range(0, len(names), max(1, len(names) // 8))
    axis.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    axis.set_yticks(ticks, labels=[f"{names[tick]} {tick}" for tick in ticks])
    axis.spines[:].set_visible(True)


def _influence_shares(axis: Axes, found: Any) -> None:
    part = found["condition1"]
    shares = zip(part["steps"], part["share_by_distance"], (_RED, _BLUE), strict=False)
    for step, share, color in shares:
        held = np.cumsum(_numbers(share))
        axis.plot(held, "o-", color=color, markersize=3, label=f"step {step}")
    size = len(found["blocks"])
    distance = np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
    even = np.cumsum(np.bincount(distance.reshape(-1))) / size**2
    axis.plot(even, color=_GREY, linewidth=0.9, label="even influence")
    wanted = found["options"]["thresholds"]["influence_share"]
    axis.axhline(wanted, color=_GREY, linestyle=":", linewidth=0.9, label="threshold")
    band = part["verdict"]["checks"][0]["threshold"]
    axis.axvline(band, color=_GREY, linestyle=":", linewidth=0.9)
    axis.set_title("1: share of the squared influence within a band")
    axis.set(xlabel=r"distance $|l - m|$", ylim=(0, 1.03))
    axis.legend(loc="lower right")


def _coherence_profile(axis: Axes, found: Any) -> None:
    profile = _numbers(found["condition2"]["profile"])
    axis.plot(profile, "o-", color=_BLUE, markersize=3, label="largest coherence")
    _threshold(axis, found, "condition2", 1)
    axis.axvline(
        found["options"]["thresholds"]["distant"], color=_GREY, linestyle=":", lw=0.9
    )
    tail = float(found["condition2"]["tail_sum"])
    axis.set_title(f"2: coherence against distance, tail sum {tail:.3g}")
    axis.set(xlabel=r"distance $|l - m|$", ylim=(0, 1.03))
    axis.legend()


def _norms(axis: Axes, found: Any) -> None:
    norms = found["condition3"]["norms"]
    for name, label, color in (
        ("jacobian", r"$|J|$", _BLUE),
        ("derivative", r"$|\dot J|$", _RED),
    ):
        values = _numbers([point[name] for point in norms])
        axis.plot(found["steps"], values, "o-", color=color, markersize=3, label=label)
    axis.set(yscale="log", xlabel="step", title="3: operator norms along the path")
    axis.legend()


def _drift(axis: Axes, found: Any) -> None:
    part, steps = found["condition3"], found["steps"][1:]
    leading = _numbers([point["frobenius"] for point in part["leading_drift"]])
    axis.plot(steps, leading, "o-", color=_BLUE, markersize=3, label="leading")
    shells = _numbers(part["shell_drift"]["drift"]).reshape(len(steps), -1)
    defined = np.isfinite(shells)
    if defined.any():
        means = np.nansum(shells, axis=1) / np.maximum(defined.sum(axis=1), 1)
        axis.plot(steps, means, "s--", color=_GREEN, markersize=3, label="mean shell")
    _threshold(axis, found, "condition3", 2)
    axis.set(xlabel="step", ylim=(0, 1.03), title="3: drift of spectral projectors")
    axis.legend()


def _invariance(axis: Axes, found: Any) -> None:
    part, steps = found["condition4"], found["steps"]
    residuals = _numbers(part["central_residuals"])
    axis.plot(steps, residuals, "o-", color=_BLUE, ms=3, label="residual, centre")
    slopes = [m["diagonal_fit"]["exponent"] for m in part["measurements"]]
    axis.plot(steps, _numbers(slopes), "s--", color=_RED, ms=3, label="slope")
    axis.axhline(1, color=_RED, linestyle=":", linewidth=0.9)
    _threshold(axis, found, "condition4", 0)
    axis.set(xlabel="step", title="4: Toeplitz residual and diagonal slope")
    axis.set_ylim(bottom=0)
    axis.legend(loc="lower right", ncols=3)


def _layers(axis: Axes, found: Any) -> None:
    layers = found["layers"]["blocks"]
    residuals = [m["toeplitz"]["renormalized"]["residual"] for m in layers]
    slopes = [m["diagonal_fit"]["exponent"] for m in layers]
    axis.plot(_numbers(residuals), "o-", color=_BLUE, ms=3, label="residual of $M_l$")
    axis.plot(_numbers(slopes), "s--", color=_RED, ms=3, label="slope of $M_l$")
    average = float(_numbers(found["layers"]["depth_average"]["residual"]))
    axis.axhline(average, color=_BLUE, linewidth=0.9, label="residual, depth average")
    axis.axhline(1, color=_RED, linestyle=":", linewidth=0.9)
    axis.set(xlabel="block by depth", title="additive structure at the last point")
    axis.set_ylim(bottom=0)
    axis.legend()
