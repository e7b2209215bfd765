"""What pairs of snapshots say: the statistic of the study, and the time resolution."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax.dynamics import SpectralSnapshot, exact_balance, velocity_law
from grsd_jax.experiments.track.log import balance_line
from grsd_jax.experiments.track.quantities import lost_share, moved_share
from grsd_jax.experiments.transport.protocol import FORMS, Protocol, grid_of

Snapshots = Mapping[int, SpectralSnapshot]

#: The numbers of `statistics`.
STATISTICS = (
    "size",
    "edge_spread",
    "interval_spread",
    "relative_edge_spread",
    "relative_interval_spread",
)


def statistics(products: np.ndarray, *, min_edges: int) -> dict[str, float]:
    """Returns how even ``(v - v^N) tau`` is over edges and over intervals.

    Args:
        products: ``[intervals, edges]``; NaN where it cannot be used.
        min_edges: Usable edges without which an interval is left out.

    Returns:
        ``size``, the mean over intervals of the mean over edges; ``edge_spread``, the
        median over intervals of the standard deviation over edges; ``interval_spread``,
        the standard deviation over intervals of the mean over edges; and both spreads
        as shares of ``|size|``. NaN with fewer than two intervals.
    """
    rows = [row[np.isfinite(row)] for row in products]
    rows = [row for row in rows if len(row) >= min_edges]
    if len(rows) < 2:
        return dict.fromkeys(STATISTICS, float("nan"))
    means = [np.mean(row) for row in rows]
    size = float(np.mean(means))
    spreads = {
        "edge_spread": float(np.median([np.std(row) for row in rows])),
        "interval_spread": float(np.std(means)),
    }
    relative = {
        f"relative_{name}": spread / abs(size) if size else float("nan")
        for name, spread in spreads.items()
    }
    return {"size": size, **spreads, **relative}


class Law(NamedTuple):
    """The velocity law of one run, under one width and one grid.

    Attributes:
        products: ``(v - v^N) tau``, ``[intervals, edges]`` by form, NaN where it cannot
            be used.
        numbers: What files hold of it.
        lines: The amounts of each interval.
    """

    products: dict[str, np.ndarray]
    numbers: dict[str, Any]
    lines: list[dict[str, Any]]


def law_of(
    snapshots: Snapshots,
    times: Mapping[int, float] | np.ndarray,
    ends: Sequence[int],
    *,
    width: float,
    grid: str,
) -> Law:
    """Returns the velocity law over intervals of doubling time.

    Args:
        snapshots: By their steps.
        times: tau by the number of training steps done.
        ends: The steps at which intervals begin and end.
        width: The width w of the shells.
        grid: Their edges, see `Reading`.

    Returns:
        The law.
    """
    pairs = list(itertools.pairwise(ends))
    balances, counted = [], []
    for start, end in pairs:
        before, after = snapshots[start], snapshots[end]
        top = float(np.sqrt(before.values[0] * after.values[0]))
        shells = grid_of(grid, top, width)
        elapsed = float(times[end] - times[start])
        balances.append(exact_balance(before, after, shells, elapsed=elapsed))
        before, after = _of_equal_energy(before), _of_equal_energy(after)
        counted.append(exact_balance(before, after, shells, elapsed=elapsed))
    starts = np.array([times[start] for start, _ in pairs], np.float32)
    law = jax.device_get(velocity_law(balances, starts, velocity="excess"))
    balances = jax.device_get(balances)

    def by_interval(values: Iterable[Any]) -> np.ndarray:
        """Returns velocities times tau, ``[intervals, edges]``."""
        return np.array(list(values), np.float64) * law.times[:, None]

    used = np.array([balance.velocity_mask for balance in balances])
    shifts = by_interval(balance.shift_velocity for balance in balances)
    excess = {
        "flux": by_interval(balance.excess_velocity for balance in balances),
        "shift": shifts - by_interval(null.shift_velocity for null in counted),
    }
    products = {form: np.where(used, values, np.nan) for form, values in excess.items()}
    numbers = {
        "steps": pairs,
        "times": law.times,
        "edges": [balance.shells.edges for balance in balances],
        "effective_edges": [balance.effective_edges for balance in balances],
        "counted": by_interval(balance.counting_velocity for balance in balances),
        "errors": by_interval(balance.velocity_error for balance in balances),
        "exponents": law.fits.fit.exponent,
        "exponent_errors": law.exponent_error,
        "curvatures": law.fits.curvature,
        "curvature_p_values": law.fits.p_value,
        "sign_shares": law.fits.sign_share,
        "means": law.products,
        "decay": law.decay.exponent,
        "decay_stderr": law.decay.exponent_stderr,
    }
    return Law(products, numbers, [balance_line(balance) for balance in balances])


def _of_equal_energy(snapshot: SpectralSnapshot) -> SpectralSnapshot:
    """Returns a snapshot whose energy is the number of its eigenvalues.

    Its balance counts: the flux is ``tr up_k(M_1) - tr up_k(M_0)``, and the shift is
    that of the eigenvalues alone, whatever the error is.
    """
    return snapshot._replace(
        vectors=jnp.eye(len(snapshot.values), dtype=snapshot.vectors.dtype),
        error=jnp.ones_like(snapshot.error),
    )


def resolution_of(
    snapshots: Snapshots, looks: Sequence[tuple[int, int]]
) -> list[dict[str, Any]]:
    """Returns what is seen over h steps from the same starts, in sharp shells.

    The share of transfers between shells that are not neighbors has a meaning for sharp
    shells, or for soft ones of at least 8 w.

    Args:
        snapshots: By their steps.
        looks: ``(start, h)``.

    Returns:
        For each look the ``non_adjacent_share``; the shares of ``|e|^2`` that were
        ``moved`` and ``lost``; and ``flux``, the mean of ``|F_k| / |e|^2`` over edges.
    """
    found = []
    for start, length in looks:
        before, after = snapshots[start], snapshots[start + length]
        shells = grid_of("top", float(before.values[0]), 0)
        balance = jax.device_get(exact_balance(before, after, shells))
        line = balance_line(balance)
        energy = np.sum(balance.energies[0])
        found.append(
            {
                "start": start,
                "length": length,
                "non_adjacent_share": float(balance.non_adjacent_share),
                "moved": moved_share(line),
                "lost": lost_share(line),
                "flux": float(np.mean(np.abs(balance.flux)) / energy),
            }
        )
    return found


def jackknife_stderr(values: np.ndarray) -> np.ndarray:
    """Returns the standard error of a statistic from leaving out groups in turn.

    Args:
        values: ``[groups, ...]``, the statistic without each group.

    Returns:
        ``[...]``; NaN with fewer than two groups.
    """
    number = len(values)
    if number < 2:
        return np.full(values.shape[1:], np.nan)
    apart = values - np.mean(values, axis=0)
    return np.sqrt((number - 1) / number * np.sum(np.square(apart), axis=0))


def image_errors(
    snapshots: Sequence[Snapshots],
    compute: Callable[[Snapshots], Law],
    protocol: Protocol,
) -> dict[str, dict[str, float]]:
    """Returns the standard errors over images of the statistics, by form.

    Args:
        snapshots: Those without each group of images.
        compute: Returns the `Law` of snapshots.
        protocol: For the smallest number of edges.

    Returns:
        The jackknife errors; NaN with fewer than two groups.
    """
    laws = [compute(group) for group in snapshots]
    found = {}
    for form in FORMS:
        each = [
            statistics(law.products[form], min_edges=protocol.min_edges) for law in laws
        ]
        table = [[values[name] for name in STATISTICS] for values in each]
        shape = len(each), len(STATISTICS)
        errors = jackknife_stderr(np.reshape(table, shape)).tolist()
        found[form] = dict(zip(STATISTICS, errors, strict=True))
    return found
