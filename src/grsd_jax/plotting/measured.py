"""Figures of one measurement: spectrum, diagonal, coupling and sliding windows."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from grsd_jax._checks import check_choice
from grsd_jax.plotting.drawing import (
    COLOR,
    DARK,
    GRAY,
    LEGEND,
    LIGHT,
    axes_of,
    check_result,
    color_bar,
    leave_room,
    positive,
    say_empty,
)
from grsd_jax.results import percent
from grsd_jax.results.text import counted, told_apart
from grsd_jax.shells import (
    CouplingMeasurement,
    PowerLawFit,
    ShellCoupling,
    StochasticCoupling,
    ToeplitzDiagnostics,
    windowed_toeplitz_degrees_of_freedom,
)
from grsd_jax.shells.diagnostics import mostly_unresolved

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

Kind = Literal["literal", "renormalized"]

KINDS: tuple[Kind, Kind] = ("literal", "renormalized")

#: What each coupling is, in print.
FORMULAS = {
    "literal": r"$K_{ab} = \langle |\dot{M}_{ij}\,|^2 \rangle$",
    "renormalized": (
        r"$\hat K_{ab} = \langle |\dot{M}_{ij}\,|^2 / (\lambda_i \lambda_j) \rangle$"
    ),
}


def spectrum(
    measured: CouplingMeasurement,
    ax: "Axes | None" = None,
    *,
    color: str = COLOR,
    bottom: float | None = None,
) -> "Axes":
    """Draws the eigenvalues against their index, with the shells shaded.

    The legend says how many values the shells hold, from the fewest to the most.

    Args:
        measured: The measurement.
        ax: The axes; new ones if None.
        color: Of the resolved eigenvalues; the others are gray.
        bottom: The smallest value that is drawn. By default two decades below the
            smallest resolved one, since what lies further down is rounding and would
            squeeze the shells; the legend counts what is hidden.

    Returns:
        The axes.

    Raises:
        ImportError: If Matplotlib is not installed.
        ValueError: If it is no measurement.
    """
    check_result("measured", measured, CouplingMeasurement)
    ax = axes_of(ax)
    ax.set(xscale="log", yscale="log")
    ax.set(xlabel=r"index $i$", ylabel=r"eigenvalue $\lambda_i$")
    values = np.asarray(measured.values, np.float64)
    resolved = np.asarray(measured.resolved, bool)
    index = np.arange(1, values.size + 1, dtype=np.float64)
    if not (values > 0).any():
        say_empty(ax, "no positive eigenvalue")
        return ax
    if bottom is None:
        bottom = smallest_drawn(measured)
    in_shells = ""
    if resolved.any():
        _shade_shells(ax, measured.shells.edges)
        counts = np.asarray(measured.shells.counts)
        in_shells = f", {counts.min()} to {counts.max()} a shell"
    for name, chosen, shade in (
        ("unresolved", ~resolved, GRAY),
        ("resolved", resolved, color),
    ):
        x, y = positive(index, values, chosen=chosen & (values >= bottom))
        lost = int(np.sum(chosen & ~np.isfinite(values)))
        hidden = int(chosen.sum()) - x.size - lost
        below = f", {hidden} of them below" if hidden else ""
        below += f", {lost} not finite" if lost else ""
        more = in_shells if name == "resolved" else ""
        label = f"{name} ({int(chosen.sum())}{below}{more})"
        ax.plot(x, y, ".", color=shade, markersize=3.5, label=label)
    ax.legend(loc="lower left", fontsize=LEGEND)
    return ax


def smallest_drawn(measured: CouplingMeasurement) -> float:
    """Returns where the view of a spectrum ends, 0 if nothing is resolved."""
    (found,) = positive(measured.values, chosen=measured.resolved)
    return float(found.min()) / 100 if found.size else 0.0


def _shade_shells(ax: "Axes", edges: Any) -> None:
    """Shades every other shell."""
    edges = np.asarray(edges)
    for low, high in zip(edges[:-1:2], edges[1::2], strict=True):
        ax.axhspan(low, high, color=LIGHT, zorder=0)


def diagonal(
    measured: CouplingMeasurement, ax: "Axes | None" = None, *, color: str = COLOR
) -> "Axes":
    r"""Draws ``|Mdot_ii|`` against ``lambda_i``, with both fits and the slope 1.

    Condition 4 of the paper predicts the slope 1, mode by mode and shell by shell.

    Args:
        measured: The measurement.
        ax: The axes; new ones if None.
        color: Of the modes and their fit; the shells are dark.

    Returns:
        The axes, with a legend that holds the slopes, and the share of the error's
        energy in these modes if it is less than half.

    Raises:
        ImportError: If Matplotlib is not installed.
        ValueError: If it is no measurement.

    References:
        Paper 7.3, Figure 1.
    """
    check_result("measured", measured, CouplingMeasurement)
    ax = axes_of(ax)
    ax.set(xscale="log", yscale="log")
    ax.set_xlabel(r"eigenvalue $\lambda_i$")
    ax.set_ylabel(r"diagonal coupling $|\dot{M}_{ii}\,|$")
    sizes = np.abs(np.diagonal(measured.coupling))
    x, y = positive(measured.values, sizes, chosen=measured.resolved)
    literal = measured.literal.coupling
    root = np.sqrt(np.maximum(np.diagonal(literal.matrix), 0))
    shell_x, shell_y = positive(
        measured.shells.centers, root, chosen=np.diagonal(literal.mask)
    )
    if not x.size:
        say_empty(ax, "no resolved mode with a coupling above 0")
        return ax
    ends = np.array([x.min(), x.max()])
    modes: Any = dict(color=color, alpha=0.45, markersize=4.5, markeredgewidth=0)
    shells: Any = dict(color=DARK, markersize=4, markerfacecolor="white")
    modes_name = counted(x.size, "mode")
    shells_name = counted(shell_x.size, "shell") + r", $\sqrt{K_{aa}}$"
    legend = {
        modes_name + _fit_text(measured.diagonal_fit): (
            *ax.plot(x, y, ".", **modes),
            *_draw_fit(ax, measured.diagonal_fit, ends, "-", color),
        ),
        shells_name + _fit_text(measured.shell_fit): (
            *ax.plot(shell_x, shell_y, "D", markeredgewidth=0.9, **shells),
            *_draw_fit(ax, measured.shell_fit, ends, "--", DARK),
        ),
    }
    guide = np.exp(np.mean(np.log(y)) - np.mean(np.log(x))) * ends
    legend["slope 1"] = (*ax.plot(ends, guide, ":", color="0.45", linewidth=1.0),)
    share = float(measured.unresolved_share)
    if mostly_unresolved(share):
        held = rf"the modes hold only {percent(1 - share)} of $|e\,|^2$"
        legend[held] = (*ax.plot([], [], linestyle="none"),)
    leave_room(ax, 0.1 + 0.1 * len(legend))
    place: Any = {"loc": "upper left", "borderaxespad": 0.1, "fontsize": LEGEND}
    place |= {"handlelength": 1.2, "handletextpad": 0.5}
    ax.legend(legend.values(), legend.keys(), **place)
    return ax


def _draw_fit(
    ax: "Axes", fit: PowerLawFit, ends: np.ndarray, line: str, color: str
) -> "list[Line2D]":
    """Draws one power-law fit, if it is defined."""
    slope, prefactor = float(fit.exponent), float(fit.prefactor)
    if not np.isfinite([slope, prefactor]).all():
        return []
    return ax.plot(ends, prefactor * ends**slope, line, color=color)


def _fit_text(fit: PowerLawFit) -> str:
    """Writes the slope, its standard error and R^2, as far as they are defined."""
    slope, r_squared, stderr = map(
        float, (fit.exponent, fit.r_squared, fit.exponent_stderr)
    )
    if not np.isfinite(slope):
        return ", no fit"
    text = f": slope {slope:.2f}"
    if np.isfinite(stderr):
        text += f" ± {told_apart([stderr], [0.0], decimals=2)[0]}"
    if np.isfinite(r_squared):
        ends: Any = {"others": [0.0, 1.0], "tolerance": 1e-6}
        text += f", $R^2$ = {told_apart([r_squared], decimals=2, **ends)[0]}"
    return text


def coupling(
    measured: CouplingMeasurement | StochasticCoupling,
    ax: "Axes | None" = None,
    *,
    kind: Kind = "renormalized",
    edges: Any = None,
    limits: tuple[float, float] | None = None,
) -> "Axes":
    """Draws the coupling between shells as a heat map with a color bar.

    Args:
        measured: The measurement, or a `StochasticCoupling`.
        ax: The axes; new ones if None.
        kind: ``"literal"`` or ``"renormalized"``, of a `CouplingMeasurement`.
        edges: ``[S + 1]``, the edges of the shells in lambda. By default those of the
            measurement; a stochastic coupling has none, and shells have numbers.
        limits: The smallest and the largest value of the color bar, such as
            `coupling_limits` of several measurements; those of this one if None.

    Returns:
        The axes, hatched where there is no value. The color bar is beside them.

    Raises:
        ImportError: If Matplotlib is not installed.
        ValueError: If the kind is none of both, or it is no measurement.
    """
    check_choice("kind", kind, KINDS)
    check_result("measured", measured, CouplingMeasurement, StochasticCoupling)
    ax = axes_of(ax)
    label = FORMULAS[kind]
    if isinstance(measured, StochasticCoupling):
        label = "coupling $C_{ab} / (n_a n_b)$"
    elif edges is None:
        edges = measured.shells.edges
    limits = coupling_limits([measured], kind) if limits is None else limits
    _heat_map(ax, _valid_entries(measured, kind), edges, limits, label)
    return ax


def coupling_limits(
    measured: Iterable[CouplingMeasurement | StochasticCoupling],
    kind: Kind = "renormalized",
) -> tuple[float, float] | None:
    """Returns the smallest and largest coupling above 0 of several measurements.

    Args:
        measured: The measurements.
        kind: ``"literal"`` or ``"renormalized"``.

    Returns:
        The limits of one color bar for all; None if there is no coupling above 0.
    """
    entries = [_valid_entries(each, kind).compressed() for each in measured]
    found = np.concatenate([*entries, np.zeros(0)])
    found = found[found > 0]
    return (float(found.min()), float(found.max())) if found.size else None


def _valid_entries(
    measured: CouplingMeasurement | StochasticCoupling, kind: Kind
) -> np.ma.MaskedArray:
    pairs = measured
    if not isinstance(pairs, StochasticCoupling):
        pairs = getattr(measured, kind).coupling
    matrix = np.asarray(pairs.matrix, np.float64)
    valid = np.asarray(pairs.mask, bool) & np.isfinite(matrix)
    return np.ma.masked_array(matrix, ~valid)


def _heat_map(
    ax: "Axes",
    matrix: np.ma.MaskedArray,
    edges: Any,
    limits: tuple[float, float] | None,
    label: str,
) -> None:
    from matplotlib.colors import LogNorm

    scale, names = "log", (r"shell of $\lambda_j$", r"shell of $\lambda_i$")
    if edges is None:
        edges, scale = np.arange(len(matrix) + 1), "linear"
        names = ("shell b", "shell a")
    ax.set(xscale=scale, yscale=scale, xlabel=names[0], ylabel=names[1])
    ax.set_box_aspect(1)
    ax.spines[:].set_visible(True)
    ax.patch.set(facecolor="0.93", edgecolor="0.7", hatch="/////")
    low, high = limits or (0.1, 1.0)
    norm = LogNorm(low, high if high > low else low * 1.01)
    # A value of 0 has underflowed: the lowest color, not the absence of a value.
    shown = np.ma.clip(matrix, low, None)
    edges = np.asarray(edges, np.float64)
    mesh = ax.pcolormesh(edges, edges, shown, norm=norm, rasterized=True)
    if not (matrix.compressed() > 0).any():
        say_empty(ax, "no coupling above 0")
    color_bar(ax, mesh, label)


def windows(
    measured: CouplingMeasurement,
    ax: "Axes | None" = None,
    *,
    kind: Kind = "renormalized",
    label: str | None = None,
    noise_floor: bool = True,
    **style: Any,
) -> "Axes":
    """Draws the Toeplitz residual of each sliding window against its position.

    Args:
        measured: The measurement.
        ax: The axes; new ones if None. Call it again with the same axes to compare.
        kind: ``"literal"`` or ``"renormalized"``.
        label: The name of the network in the legend.
        noise_floor: Whether a dotted line shows the residual that a coupling which is
            exactly Toeplitz would have because a shell holds few pairs; see
            `noise_floor_of`.
        **style: Of the line, for Matplotlib.

    Returns:
        The axes. A window without a degree of freedom is a gap; the legend names a
        network that has no other.

    Raises:
        ImportError: If Matplotlib is not installed.
        ValueError: If the kind is none of both, or it is no measurement.

    References:
        Paper 7.5, Figure 2; the noise floor is ours.
    """
    check_choice("kind", kind, KINDS)
    check_result("measured", measured, CouplingMeasurement)
    ax = axes_of(ax)
    diagnostics: ToeplitzDiagnostics = getattr(measured, kind)
    free = np.asarray(diagnostics.degrees_of_freedom) > 0
    residuals = np.where(free, np.asarray(diagnostics.windows, np.float64), np.nan)
    positions = np.arange(residuals.size) / max(residuals.size - 1, 1)
    positions = positions if residuals.size > 1 else np.array([0.5])
    _window_axes(ax)
    if not np.isfinite(residuals).any():
        if not ax.lines[1:]:
            say_empty(ax, "no window with degrees of freedom")
        # A legend of several networks must not lack this one.
        ax.plot([], [], linestyle="", label=f"{label or kind}: undefined")
        return ax
    for text in [text for text in ax.texts if "no window" in text.get_text()]:
        text.remove()
    look: dict[str, Any] = {"marker": "o", "markersize": 4, "clip_on": False} | style
    look |= {"markeredgecolor": "white", "markeredgewidth": 0.5}
    (line,) = ax.plot(positions, residuals, label=label or kind, **look)
    if noise_floor:
        floors = noise_floor_of(measured, kind)
        ax.plot(positions, floors, ":", color=line.get_color(), label="noise floor")
    return ax


def _window_axes(ax: "Axes") -> None:
    if ax.lines:
        return
    ax.set(xlabel="position of the window in the spectrum")
    ax.set_ylabel("Toeplitz residual")
    ax.set_xticks([0.0, 0.25, 0.5, 0.75, 1.0])
    ax.set_xticklabels(
        ["edge at\nsmall $\\lambda$", "", "center", "", "edge at\nlarge $\\lambda$"]
    )
    ax.axvline(0.5, color="0.85", linewidth=0.8, zorder=0)
    ax.set(xlim=(-0.04, 1.04), ylim=(0.0, 1.02))
    ax.grid(axis="y", color="0.92", linewidth=0.6)
    ax.set_axisbelow(True)


def noise_floor_of(
    measured: CouplingMeasurement | StochasticCoupling,
    kind: Kind = "renormalized",
    *,
    window: int = 5,
) -> np.ndarray:
    r"""Returns the residual of every window that sampling alone would make.

    If the entries ``Mdot_ij`` of a pair of shells are independent, Gaussian and of one
    variance, the mean of their ``n_a n_b`` squares scatters by the factor
    ``sqrt(2 / (n_a n_b))``, and within one shell, by symmetry, by
    ``sqrt(2 (2 n_a - 1) / n_a^3)``. On a diagonal of m shells a fraction ``1 - 1/m`` of
    that variance is left beside the mean. It is a root mean square, for cells as large
    as those that were measured.

    Soft shells share eigenvalues, so that theirs scatter less: for them it is an upper
    bound under the same assumption.

    Args:
        measured: The measurement, or a `StochasticCoupling`.
        kind: ``"literal"`` or ``"renormalized"``, of a `CouplingMeasurement`.
        window: w, of a `StochasticCoupling`.

    Returns:
        ``[S - w + 1]``, NaN where the window has no degree of freedom.

    Raises:
        ValueError: If the kind is none of both, it is no measurement, or the window
            does not fit.

    References:
        Ours.
    """
    check_choice("kind", kind, KINDS)
    check_result("measured", measured, CouplingMeasurement, StochasticCoupling)
    if isinstance(measured, StochasticCoupling):
        return _noise_floors(measured, measured.counts, window)
    diagnostics: ToeplitzDiagnostics = getattr(measured, kind)
    coupling = diagnostics.coupling
    window = len(coupling.matrix) - len(diagnostics.windows) + 1
    return _noise_floors(coupling, measured.shells.counts, window)


def _noise_floors(
    coupling: ShellCoupling | StochasticCoupling, counts: Any, window: int
) -> np.ndarray:
    mask = np.asarray(coupling.mask, bool)
    matrix = np.where(mask, np.asarray(coupling.matrix, np.float64), 0)
    counts = np.maximum(np.asarray(counts, np.float64), 1)
    scatter = 2 / np.outer(counts, counts)
    np.fill_diagonal(scatter, 2 * (2 * counts - 1) / counts**3)
    free = np.asarray(windowed_toeplitz_degrees_of_freedom(mask, window))
    floors = np.full(len(free), np.nan)
    for start, freedom in enumerate(free):
        inside = (slice(start, start + window),) * 2
        whole = np.sum(matrix[inside] ** 2)
        if freedom > 0 and whole > 0:
            variance = scatter[inside] * matrix[inside] ** 2
            floors[start] = np.sqrt(_beside_means(variance, mask[inside]) / whole)
    return floors


def _beside_means(variance: np.ndarray, mask: np.ndarray) -> float:
    """Returns the variance that is left when each diagonal's mean is taken off."""
    total = 0.0
    for offset in range(1 - len(mask), len(mask)):
        number_of = np.sum(np.diagonal(mask, offset))
        if number_of:
            along = np.sum(
                np.diagonal(variance, offset), where=np.diagonal(mask, offset)
            )
            total += along * (1 - 1 / number_of)
    return total
