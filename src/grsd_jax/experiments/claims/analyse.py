"""The quantities of both networks with paired statistics over the seeds.

The unit is the seed: both networks of one seed share the order of the data and the
measured batches, so that their difference is taken within the seed.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from grsd_jax.experiments.claims.run import NETWORKS, REDUCTIONS
from grsd_jax.experiments.common.config import TITLES, UserError
from grsd_jax.experiments.common.intervals import t_interval
from grsd_jax.experiments.common.tables import Legend, with_legend
from grsd_jax.results.text import counted

#: The quantities of the table and the figure, with their headings.
QUANTITIES = {
    "slope": "slope of the diagonal",
    "r_squared": "R^2 of the diagonal",
    "toeplitz_residual": "Toeplitz residual",
    "toeplitz_edge": "Toeplitz residual, edge",
    "toeplitz_centre": "Toeplitz residual, center",
}

#: What the columns of the table mean.
LEGEND: Legend = (
    "Means over seeds with 95% intervals of Student's t; differences within a seed.",
    "Stack: one kernel of all batches; mean: the mean of their kernels, as the paper.",
    "Slope and R^2: of |Mdot_ii| against lambda_i. Toeplitz residual: of the "
    "renormalized coupling, 0 if it is log-shift invariant; edge and center: of "
    "windows of shells at the ends and in the middle.",
)

RESNET, PLAIN = NETWORKS


def values_by_seed(
    results: Mapping[str, Any], reduction: str, quantity: str
) -> dict[str, np.ndarray]:
    """Returns one quantity of every seed under one reduction, by network.

    Args:
        results: The contents of ``claims.json``.
        reduction: One of `run.REDUCTIONS`.
        quantity: A key of `QUANTITIES`.

    Returns:
        ``[seeds]`` for each network, in the same order of the seeds; NaN for null.

    Raises:
        UserError: If a network has seeds that the other one does not have.
    """
    found = {
        network: {
            row["seed"]: np.nan if row[quantity] is None else row[quantity]
            for row in results.get("rows", ())
            if (row["network"], row["reduction"]) == (network, reduction)
        }
        for network in NETWORKS
    }
    seeds = sorted(found[RESNET])
    if not seeds or seeds != sorted(found[PLAIN]):
        raise UserError(
            f"claims.json: expected both networks under {reduction!r} at the same "
            f"seeds, got {seeds} and {sorted(found[PLAIN])}."
        )
    return {
        network: np.array([by_seed[seed] for seed in seeds], np.float64)
        for network, by_seed in found.items()
    }


def claim_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Lists every quantity of both networks, and their paired difference.

    Args:
        results: The contents of ``claims.json``.

    Returns:
        Rows of cells, headings first: means over seeds with 95% intervals.

    Raises:
        UserError: If there are no rows, or the seeds of the two networks differ.
    """
    titles = [TITLES[network] for network in NETWORKS]
    rows = [["reduction", "quantity", *titles, "ResNet less plain, paired"]]
    for reduction in REDUCTIONS:
        for quantity, heading in QUANTITIES.items():
            values = values_by_seed(results, reduction, quantity)
            each = [t_interval(values[network]) for network in NETWORKS]
            paired = t_interval(values[RESNET] - values[PLAIN])
            rows.append([reduction, heading, *map(str, each), str(paired)])
    return rows


def format_claims(results: Mapping[str, Any]) -> str:
    """Writes the quantities as a table.

    Args:
        results: The contents of ``claims.json``.

    Returns:
        The table of `claim_rows` with its legend and the number of seeds, valid as
        Markdown.

    Raises:
        UserError: As for `claim_rows`.
    """
    rows = claim_rows(results)
    seeds = values_by_seed(results, REDUCTIONS[0], next(iter(QUANTITIES)))[RESNET]
    return with_legend([rows], (*LEGEND, f"{counted(len(seeds), 'paired seed')}."))
