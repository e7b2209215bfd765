"""The figure page of the conditions, from ``conditions.json`` alone."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure

from grsd_jax.experiments.common import records
from grsd_jax.experiments.conditions.results import TITLES, number_with_error
from grsd_jax.experiments.reproduce.figures import PAGE_WIDTH, save_figures
from grsd_jax.experiments.reproduce.results import finite

_BLUE, _RED, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "0.5"

#: Numbers over thresholds beyond these are drawn at the edge.
_RATIOS = (0.05, 20.0)


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
    figure = Figure(figsize=(PAGE_WIDTH, 11.2), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 4))
    top, rest = parts
    _verdicts(top.subplots(), found)
    axes = rest.subplots(4, 2)
    names = found["blocks"]
    _heat(rest, axes[0, 0], found["condition1"]["influence"][-1], names)
    axes[0, 0].set_title(r"1: influence $R_{lm}$, last point")
    axes[0, 0].set(xlabel="block that moves, m", ylabel="block whose $J$ changes, l")
    _influence_shares(axes[0, 1], found)
    _heat(rest, axes[1, 0], found["condition2"]["coherence"], names, limits=(1e-3, 1))
    axes[1, 0].set_title(r"2: coherence $|J_l^\top J_m|\,/\,|J_l||J_m|$ at the start")
    axes[1, 0].set(xlabel="block m", ylabel="block l")
    _coherence_profile(axes[1, 1], found)
    _norms(axes[2, 0], found)
    _drift(axes[2, 1], found)
    _invariance(axes[3, 0], found)
    _layers(axes[3, 1], found)
    return figure


def _verdicts(axis: Axes, found: Any) -> None:
    """Draws every check as its number over its threshold, the allowed side shaded."""
    checks = {
        f"{number}: {check['name']}": check
        for number, name in enumerate(TITLES, start=1)
        for check in found[name]["verdict"]["checks"]
    }
    rows = np.arange(len(checks))[::-1]
    for row, check in zip(rows.tolist(), checks.values(), strict=True):
        color = _GREEN if check["holds"] else _RED
        ratio = _over_threshold(check)
        if ratio is not None:
            axis.plot(np.clip(ratio, *_RATIOS), row, "o", color=color, markersize=4.5)
        told = f"{number_with_error(check)} {check['relation']} "
        told += f"{check['threshold']:.3g} "
        told += "holds" if check["holds"] else "fails"
        told += "" if check["converged"] else ", not converged"
        axis.text(
            1.01, row, told, transform=axis.get_yaxis_transform(), va="center",
            fontsize="small",
        )  # fmt: skip
    axis.set_yticks(rows, labels=list(checks))
    axis.axvspan(_RATIOS[0], 1, color=_GREEN, alpha=0.08, linewidth=0)
    axis.axvline(1, color=_GREY, linestyle=":", linewidth=0.9)
    axis.set(xscale="log", xlim=_RATIOS, ylim=(-0.7, len(checks) - 0.3))
    axis.set_xlabel("number over threshold (threshold over number for >=)")
    held = [title for name, title in TITLES.items() if found[name]["verdict"]["holds"]]
    axis.set_title("conditions that hold: " + ("; ".join(held) or "none"))


def _over_threshold(check: Any) -> float | None:
    """Returns the number in units of the threshold, at most 1 where the check holds."""
    number, threshold = finite(check["number"]), check["threshold"]
    if number is None:
        return None
    above, below = (
        (number, threshold) if check["relation"] == "<=" else (threshold, number)
    )
    return above / below if below > 0 else (np.inf if above > 0 else 1.0)


def _numbers(values: Any) -> np.ndarray:
    """Returns an array of floats, NaN for null."""
    return np.array(np.asarray(values, dtype=object), dtype=np.float64)


def _threshold(axis: Axes, found: Any, condition: str, check: int) -> None:
    """Draws the threshold of one check as a dotted line."""
    value = found[condition]["verdict"]["checks"][check]["threshold"]
    axis.axhline(value, color=_GREY, linestyle=":", linewidth=0.9, label="threshold")


def _heat(
    figure: SubFigure,
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
    tail = found["condition2"]["verdict"]["checks"][0]
    axis.set_title(
        f"2: coherence, tail sum {number_with_error(tail)} (<= {tail['threshold']:.3g})"
    )
    axis.set(xlabel=r"distance $|l - m|$", ylim=(0, 1.03))
    axis.legend()


def _norms(axis: Axes, found: Any) -> None:
    """Both norms with the growth that is allowed, and the Lipschitz constant."""
    part, thresholds = found["condition3"], found["options"]["thresholds"]
    for name, label, color in (
        ("jacobian", r"$|J|$", _BLUE),
        ("derivative", r"$|\dot J|$", _RED),
    ):
        values = _numbers([point[name] for point in part["norms"]])
        axis.plot(found["steps"], values, "o-", color=color, markersize=3, label=label)
        limit = values[0] * thresholds["max_growth"]
        axis.axhline(limit, color=color, linestyle=":", linewidth=0.9)
    lipschitz = _numbers(part["lipschitz"])
    axis.plot(found["steps"], lipschitz, "s--", color=_GREEN, ms=3, label="Lipschitz")
    axis.axhline(
        thresholds["max_lipschitz"], color=_GREEN, linestyle=":", linewidth=0.9
    )
    axis.set(yscale="log", xlabel="step")
    axis.set_title("3: norms, Lipschitz constant; dotted: thresholds")
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
    fits = [m["diagonal_fit"] for m in part["measurements"]]
    for name, label, style, color in (
        ("exponent", "slope", "s--", _RED),
        ("r_squared", "$R^2$", "^:", _GREEN),
    ):
        values = _numbers([fit[name] for fit in fits])
        axis.plot(steps, values, style, color=color, ms=3, label=label)
    thresholds = found["options"]["thresholds"]
    off = thresholds["max_slope_error"]
    axis.axhspan(1 - off, 1 + off, color=_RED, alpha=0.08, linewidth=0)
    for name, color in (("max_residual", _BLUE), ("min_r_squared", _GREEN)):
        axis.axhline(thresholds[name], color=color, linestyle=":", linewidth=0.9)
    axis.set(xlabel="step", title="4: Toeplitz residual, slope (allowed: band), $R^2$")
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
