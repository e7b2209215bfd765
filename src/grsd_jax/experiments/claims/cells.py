"""The quantities that the study's claims speak of, with replicates for intervals.

Every cell of the study is one measurement, or another binning of one. Its replicates
are the same quantities of random halves of the resolved pairs, drawn without
replacement: the variance of an estimate over halves is that of the estimate itself,
and no pair meets itself off the diagonal as in a bootstrap.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax.experiments.claims.plan import Binning
from grsd_jax.experiments.reproduce.tables import edge_and_centre
from grsd_jax.shells.binning import ShellCoupling, Shells, log_shells, shell_coupling
from grsd_jax.shells.diagnostics import (
    CouplingMeasurement,
    ToeplitzDiagnostics,
    toeplitz_diagnostics,
)
from grsd_jax.shells.power_law import PowerLawFit, fit_power_law

#: The quantities, in the order of the arrays' last axis.
QUANTITIES = (
    "slope",
    "r_squared",
    "literal",
    "literal_edge",
    "literal_centre",
    "renormalized",
    "renormalized_edge",
    "renormalized_centre",
    "inter_over_intra",
)

Cell = dict[str, Any]


def cell_of(
    measured: CouplingMeasurement,
    *,
    num_shells: int,
    window: int,
    num_replicates: int,
    key: jax.Array,
    binning: Binning | None = None,
) -> Cell:
    """Computes the quantities of a measurement, and of halves of its pairs.

    Args:
        measured: The measurement.
        num_shells: S, unless the binning says otherwise.
        window: Shells in one window, unless the binning says otherwise.
        num_replicates: Random halves.
        key: Consumed for the halves and the controls.
        binning: What to do otherwise than the measurement did; None for nothing.

    Returns:
        ``quantities`` [Q] and ``replicates`` [num_replicates, Q], in the order of
        `QUANTITIES` and NaN where undefined; ``windows`` [2, W] of both couplings;
        ``values``, ``diagonal`` and ``used`` [r] for the scatter plot.
    """
    binning = Binning("base", "") if binning is None else binning
    halves_key, control_key = jax.random.split(key)
    values = jnp.asarray(measured.values)
    used = jnp.asarray(measured.resolved) & (values >= binning.floor * values[0])
    coupling = controlled(
        jnp.asarray(measured.coupling), values, used, control_key, kind=binning.control
    )
    shells = log_shells(values, binning.num_shells or num_shells, mask=used)
    window = binning.window or window
    whole = _diagnosed(values, coupling, shells, used, window)
    halves = _halves(halves_key, used, num_replicates)
    diagnosed = jax.device_get(
        _diagnosed_each(values, coupling, shells, halves, window)
    )
    replicates = [
        _quantities(jax.tree.map(lambda leaf, i=i: leaf[i], diagnosed))
        for i in range(num_replicates)
    ]
    whole = jax.device_get(whole)
    return {
        "quantities": _quantities(whole),
        "replicates": np.asarray(replicates),
        "windows": np.stack([_windows(found)[:, 1] for found in whole[1:3]]),
        "values": np.asarray(values),
        "diagonal": np.abs(np.diag(coupling)),
        "used": np.asarray(used),
    }


def controlled(
    coupling: jax.Array,
    values: jax.Array,
    used: jax.Array,
    key: jax.Array,
    *,
    kind: str | None,
) -> jax.Array:
    """Puts a control in the place of a coupling.

    Args:
        coupling: ``V^T Mdot V``, ``[r, r]``.
        values: ``[r]``.
        used: ``[r]`` bool, the pairs in use.
        key: Consumed.
        kind: ``"random"`` for independent normal entries, symmetric; ``"shuffled"`` for
            the coupling of the pairs in use in another order, against the same values;
            ``"planted"`` for ``sqrt(lambda_i lambda_j kappa(s_i - s_j))`` of random
            signs, ``kappa = exp(-|s|)``; None for the coupling itself.

    Returns:
        ``[r, r]``, symmetric.
    """
    if kind is None:
        return coupling
    if kind == "shuffled":
        order = jnp.argsort(~used, stable=True)
        drawn = jax.random.uniform(key, values.shape)
        moved = order[jnp.argsort(jnp.where(used[order], drawn, 2.0))]
        place = jnp.zeros_like(order).at[order].set(moved)
        return coupling[place][:, place]
    noise = jax.random.normal(key, coupling.shape, coupling.dtype)
    noise = jnp.triu(noise) + jnp.triu(noise, 1).T
    if kind == "random":
        return noise
    scale = jnp.log(jnp.maximum(values, jnp.finfo(values.dtype).tiny))
    distance = jnp.abs(scale[:, None] - scale[None, :])
    sizes = jnp.exp((scale[:, None] + scale[None, :] - distance) / 2)
    return jnp.sign(noise) * sizes


def _halves(key: jax.Array, used: jax.Array, num_replicates: int) -> jax.Array:
    """Returns ``[num_replicates, r]`` masks, each of half of the pairs in use."""
    drawn = jax.random.uniform(key, (num_replicates, used.shape[0]))
    rank = jnp.argsort(jnp.argsort(jnp.where(used[None], drawn, 2.0), axis=1), axis=1)
    return rank < jnp.sum(used) // 2


Diagnosed = tuple[PowerLawFit, ToeplitzDiagnostics, ToeplitzDiagnostics, ShellCoupling]


@partial(jax.jit, static_argnames="window")
def _diagnosed(
    values: jax.Array, coupling: jax.Array, shells: Shells, used: jax.Array, window: int
) -> Diagnosed:
    """Diagnoses the pairs in use, in the given shells."""
    index = jnp.where(used, shells.index, -1)
    number = jnp.arange(len(shells.counts), dtype=index.dtype)
    counts = jnp.sum(index[None, :] == number[:, None], axis=1, dtype=jnp.int32)
    shells = shells._replace(index=index, counts=counts)
    literal, renormalized = (
        toeplitz_diagnostics(
            shell_coupling(coupling, values, shells, renormalize=renormalize), window
        )
        for renormalize in (False, True)
    )
    fit = fit_power_law(values, jnp.abs(jnp.diag(coupling)), used)
    return fit, literal, renormalized, _mixing(coupling, values, shells)


def _mixing(coupling: jax.Array, values: jax.Array, shells: Shells) -> ShellCoupling:
    """Returns the renormalised coupling of distinct pairs, without their own drift."""
    others = coupling * (1 - jnp.eye(len(values), dtype=coupling.dtype))
    matrix, mask = shell_coupling(others, values, shells, renormalize=True)
    size = len(shells.counts)
    same = jnp.eye(size, dtype=bool)
    counts = shells.counts.astype(matrix.dtype)
    corrected = matrix * (counts / jnp.maximum(counts - 1, 1))[:, None]
    several = jnp.broadcast_to(counts[:, None] > 1, (size, size))
    return ShellCoupling(
        jnp.where(same, corrected, matrix), jnp.where(same, mask & several, mask)
    )


@partial(jax.jit, static_argnames="window")
def _diagnosed_each(
    values: jax.Array,
    coupling: jax.Array,
    shells: Shells,
    masks: jax.Array,
    window: int,
) -> Diagnosed:
    return jax.vmap(lambda used: _diagnosed(values, coupling, shells, used, window))(
        masks
    )


def _quantities(found: Diagnosed) -> np.ndarray:
    fit, literal, renormalized, mixing = found
    numbers: list[Any] = [fit.exponent, fit.r_squared]
    for toeplitz in (literal, renormalized):
        edge, centre = edge_and_centre([tuple(row) for row in _windows(toeplitz)])
        numbers += [toeplitz.residual, edge, centre]
    numbers.append(inter_over_intra(np.asarray(mixing.matrix), np.asarray(mixing.mask)))
    return np.array([np.nan if x is None else x for x in numbers], np.float64)


def _windows(found: ToeplitzDiagnostics) -> np.ndarray:
    """Returns (position, residual) of the windows, NaN where zero by construction."""
    residuals = np.where(found.degrees_of_freedom > 0, found.windows, np.nan)
    return np.stack([np.linspace(0, 1, len(residuals)), residuals], axis=1)


def inter_over_intra(matrix: np.ndarray, mask: np.ndarray) -> float:
    """Compares couplings between neighbouring shells with those inside them.

    Args:
        matrix: ``K_ab``, ``[S, S]``, of squared couplings of distinct pairs.
        mask: ``[S, S]`` bool.

    Returns:
        The mean over neighbours of ``K_ab / sqrt(K_aa K_bb)``, NaN without any.
    """
    inside = np.sqrt(np.where(mask, matrix, np.nan).diagonal())
    between = np.where(mask, matrix, np.nan).diagonal(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = between / (inside[1:] * inside[:-1])
    known = shares[np.isfinite(shares)]
    return float(known.mean()) if len(known) else float("nan")
