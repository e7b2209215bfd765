"""Shell dynamics: how the error's energy moves over the spectrum while it is learned.

With ``M phi_i = lambda_i phi_i`` and ``g_i = <phi_i, e>``, the energy of a shell
changes because the error itself changes, which is dissipation, and because the
eigenvectors turn, which is transfer between shells. Everything here is exact at one
instant, and all derivatives are with respect to one time, that of the direction behind
``coupling`` (paper 2.2, 3.3 and A.2).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from grsd_jax._arrays import (
    all_finite,
    as_floating,
    as_scalar,
    as_square,
    divisor,
    magnitude,
    matmul,
    ratio,
)
from grsd_jax._checks import check_positive
from grsd_jax._typing import PyTree
from grsd_jax.results import NamedResult, result
from grsd_jax.shells.binning import Shells, check_shells_of

#: Rounding of the eigenvalues, in units of eps times the largest: closer ones are
#: indistinguishable. Resolved pairs lie above ten.
_GAP = 4

_UNITS = dict.fromkeys(("energies", "unresolved_energy"), "|e|^2")
_UNITS |= dict.fromkeys(
    (
        "dissipation",
        "transfers",
        "leak",
        "energy_rate",
        "flux",
        "nearest_flux",
        "unresolved_dissipation",
        "ambiguous_rate",
    ),
    "|e|^2 per time",
)
_UNITS |= {"velocity": "lambda per time"}


@result()
class BasisRotation(NamedResult):
    """How the eigenvectors turn.

    Attributes:
        matrix: [r, r], ``Omega_ij = <phi_i, d phi_j / dt>``, antisymmetric; 0 inside a
            cluster.
        clusters: [r] int32, the cluster of each pair, numbered in ascending order of
            the eigenvalues. Most clusters hold one pair.
        num_degenerate: [] int32, how many pairs share a cluster with another.
    """

    matrix: jax.Array
    clusters: jax.Array
    num_degenerate: jax.Array


@result(masks={"velocity": "velocity_mask"}, units=_UNITS)
class ShellDynamics(NamedResult):
    """The energy balance of the shells at one instant; shell 0 holds the smallest.

    ``energy_rate = sum_b transfers[:, b] + leak - dissipation``, exactly.

    Attributes:
        energies: [S], ``E_a``, the sum of ``g_i^2`` over the shell.
        density: [S], ``E_a`` over the width of the shell in lambda.
        dissipation: [S], ``D_a = -2 sum_i g_i <phi_i, e_dot>``: what is lost because
            the error itself moves.
        transfers: [S, S], ``T_ab``, what a gains from b; antisymmetric.
        leak: [S], what a gains from the given pairs outside all shells.
        energy_rate: [S], the predicted ``dE_a/dt``, of the same pairs.
        flux: [S-1], net energy per time passing each inner edge upward, from all
            shells below it to all shells above it.
        nearest_flux: [S-1], the part of it between the two shells at the edge.
        non_adjacent_share: [], ``sum |T_ab|`` over shells that are not neighbors, as a
            fraction of the sum over all; 0 if nothing is transferred.
        edge_density: [S-1], the density at each inner edge, see `shell_dynamics`.
        velocity: [S-1], ``v = flux / edge_density``, in lambda per time; 0, as a
            placeholder, where ``velocity_mask`` is False.
        mask: [S] bool, the shells that hold a pair.
        velocity_mask: [S-1] bool, the edges with energy on at least one side.
        unresolved_energy: [], ``|e|^2`` less the sum of the energies: given pairs
            outside the shells, and everything outside the given pairs.
        unresolved_dissipation: [], ``-2 <e, e_dot>`` less the sum of the dissipation.
        ambiguous_rate: [S], the absolute rate that pairs of one cluster in different
            shells would exchange if they were ``gap`` apart. No other field includes
            it.
        num_ambiguous: [] int32, how many pairs are in a cluster that an edge cuts.
        finite: [] bool, whether all inputs and results are finite, outside the shells
            too. If not, the pairs and couplings that are not finite were left out, and
            the fields describe only what remains of the error.
        in_range: [] bool, whether no energy of a shell is too small or too large for
            the dtype. If not, such energies and their rates are 0 or infinite;
            velocities and ``non_adjacent_share`` are right all the same.
    """

    energies: jax.Array
    density: jax.Array
    dissipation: jax.Array
    transfers: jax.Array
    leak: jax.Array
    energy_rate: jax.Array
    flux: jax.Array
    nearest_flux: jax.Array
    non_adjacent_share: jax.Array
    edge_density: jax.Array
    velocity: jax.Array
    mask: jax.Array
    velocity_mask: jax.Array
    unresolved_energy: jax.Array
    unresolved_dissipation: jax.Array
    ambiguous_rate: jax.Array
    num_ambiguous: jax.Array
    finite: jax.Array
    in_range: jax.Array


class _Modes(NamedTuple):
    """What the balance needs: eigenvalues, g, its rate, and the coupling."""

    values: jax.Array
    projections: jax.Array
    rates: jax.Array
    coupling: jax.Array


class _Exchange(NamedTuple):
    """What shells gain from each other; the fields as in `ShellDynamics`."""

    transfers: jax.Array
    leak: jax.Array
    ambiguous_rate: jax.Array
    num_ambiguous: jax.Array


def eigenvalue_drift(coupling: jax.typing.ArrayLike) -> jax.Array:
    r"""Returns ``d lambda_i / dt``, the diagonal of the coupling.

    .. math:: \dot\lambda_i = \phi_i^\top \dot M \phi_i

    Exact for a simple eigenvalue. For a repeated one the rates are the eigenvalues of
    the block of ``coupling`` that belongs to it, whose trace is the same.

    Args:
        coupling: [r, r], ``V^T Mdot V``.

    Returns:
        [r], in units of lambda per time.

    Raises:
        ValueError: If ``coupling`` is not a floating square matrix.

    References:
        Paper A.2.
    """
    return jnp.diagonal(as_square("coupling", coupling))


def basis_rotation(
    values: jax.typing.ArrayLike,
    coupling: jax.typing.ArrayLike,
    *,
    gap: float | None = None,
) -> BasisRotation:
    r"""Returns the rotation of the eigenvectors that keeps them eigenvectors.

    .. math:: \Omega_{ij} = \langle \phi_i, \dot\phi_j \rangle
              = \frac{\phi_i^\top \dot M \phi_j}{\lambda_j - \lambda_i}, \qquad i \neq j

    Neighboring eigenvalues at most ``gap`` times the largest apart form one cluster.
    Inside a cluster the eigenvectors are a choice (a gauge), and their rotation is set
    to 0 and counted; only that of the cluster against the rest is a property of M.

    Args:
        values: [r], ``lambda_i`` in any order.
        coupling: [r, r], ``V^T Mdot V``; its symmetric part is used.
        gap: The distance relative to the largest ``|lambda|`` up to which neighbors
            are one cluster. Default: 4 eps, the rounding of the eigenvalues.

    Returns:
        The rotation, the clusters and their number of members. Entries of values or
        couplings that are not finite are NaN.

    Raises:
        ValueError: If the shapes do not fit together, an array is not floating, or
            ``gap`` is not a finite number above zero.

    References:
        Paper A.2, the exact formula for the rotation generator.
    """
    values = as_floating("values", values, [None])
    coupling = as_square("coupling", coupling, values.shape[0])
    dtype = jnp.promote_types(values.dtype, coupling.dtype)
    values, coupling = values.astype(dtype), coupling.astype(dtype)
    clusters = _clusters(values, _tolerance(values, gap))
    together = clusters[:, None] == clusters[None, :]
    differences = jnp.where(together, 1, values[None, :] - values[:, None])
    matrix = jnp.where(together, 0, (coupling / 2 + coupling.T / 2) / differences)
    known = jnp.isfinite(values)
    known = known[:, None] & known[None, :] & jnp.isfinite(coupling)
    matrix = jnp.where(known & known.T, matrix, jnp.nan)
    shared = jnp.sum(together, axis=1, dtype=jnp.int32) > 1
    return BasisRotation(matrix, clusters, jnp.sum(shared, dtype=jnp.int32))


def shell_dynamics(
    values: jax.typing.ArrayLike,
    projections: jax.typing.ArrayLike,
    coupling: jax.typing.ArrayLike,
    shells: Shells,
    *,
    loss_constant: jax.typing.ArrayLike | None = None,
    rate_projections: jax.typing.ArrayLike | None = None,
    total_energy: jax.typing.ArrayLike | None = None,
    total_dissipation: jax.typing.ArrayLike | None = None,
    gap: float | None = None,
) -> ShellDynamics:
    r"""Returns the energy balance of the shells: dissipation, transfer, flux, velocity.

    .. math:: \frac{dE_a}{dt} = \sum_b T_{ab} + L_a - D_a, \qquad
              T_{ab} = \sum_{i \in S_a} \sum_{j \in S_b}
              \frac{2 g_i g_j \dot M_{ij}}{\lambda_i - \lambda_j}, \qquad
              D_a = -2 \sum_{i \in S_a} g_i \langle \phi_i, \dot e \rangle

    ``L_a``, the leak, is the same sum as ``T_ab`` over the given pairs j outside all
    shells. Transfers inside a shell cancel. Pairs of one cluster (`basis_rotation`) in
    different shells exchange nothing here and are reported as ambiguous. The motion of
    eigenvalues over an edge is not part of the balance: see `edge_crossings`.

    The flux through the edge at ``lambda_e`` is ``F = sum_{a above, b below} T_ab``.
    The velocity is ``v = F / eps`` with the density at the edge
    ``eps = (E_below + E_above) / (h_below + h_above) / lambda_e``, h the widths in
    ``log lambda``: the mean of the two shells' densities in ``log lambda``.

    Exactly one of ``loss_constant`` and ``rate_projections`` says how the error moves.

    Args:
        values: [r], ``lambda_i``.
        projections: [r], ``g_i = <phi_i, e>``.
        coupling: [r, r], ``V^T Mdot V`` along the direction in which training moves.
        shells: The shells of ``values``, of `log_shells` or `assign_shells`.
        loss_constant: [], c in ``e_dot = -c M e``, which only the dissipation needs:
            squared loss and gradient flow. 1
            over the number of examples for the mean of `half_squared_loss`.
        rate_projections: [r], ``<phi_i, e_dot>``, of any error and direction.
        total_energy: [], ``|e|^2``. Default: the sum over all given pairs, right if
            they are all n.
        total_dissipation: [], ``-2 <e, e_dot>``. Default: as above.
        gap: As in `basis_rotation`.

    Returns:
        The balance. Energies in squared units of e, rates per unit of time.

    Raises:
        ValueError: If the shapes do not fit together, an array is not floating, ``gap``
            is not a finite number above zero, or not exactly one of ``loss_constant``
            and ``rate_projections`` is given; or, outside of `jit`, if the shells are
            those of other values.

    References:
        Paper 2.2 and A.2, equations (23) and (31); the leak and the clusters are ours.
    """
    values = as_floating("values", values, [None])
    size, num_shells = values.shape[0], shells.counts.shape[0]
    coupling = as_square("coupling", coupling, size)
    projections = as_floating("projections", projections, [size])
    check_shells_of(values, shells)
    dtype = jnp.result_type(values, projections, coupling)
    values, projections = values.astype(dtype), projections.astype(dtype)
    rates = _rates(values, projections, loss_constant, rate_projections)
    modes, finite = _leave_out(
        _Modes(values, projections, rates, coupling.astype(dtype))
    )

    index = shells.index
    member = index[:, None] == jnp.arange(num_shells, dtype=index.dtype)[None, :]
    weights = member.astype(dtype)
    # In units of g and its rate, so that no product of two leaves the dtype on the way.
    unit, rate_unit = magnitude(modes.projections), magnitude(modes.rates)
    g, g_rates = modes.projections / unit, modes.rates / rate_unit
    scaled = matmul(weights.T, jnp.square(g))
    energies = scaled * unit * unit
    losses = -2 * g * g_rates
    dissipation = matmul(weights.T, losses) * unit * rate_unit
    total = jnp.sum(jnp.square(g)) * unit * unit
    lost = jnp.sum(losses) * unit * rate_unit
    if total_energy is not None:
        total = as_scalar("total_energy", total_energy, dtype)
    if total_dissipation is not None:
        lost = as_scalar("total_dissipation", total_dissipation, dtype)
    exchange = _exchange(modes._replace(projections=g), index, weights, gap)
    flux, nearest_flux, share = _fluxes(exchange.transfers)
    edge_density = _edge_density(scaled, shells.edges)
    velocity_mask = edge_density > 0
    velocity = ratio(flux, edge_density)
    exchange, flux, nearest_flux, edge_density = _times(
        (exchange, flux, nearest_flux, edge_density), unit
    )
    gained = jnp.sum(exchange.transfers, axis=1) + exchange.leak
    held = (energies >= jnp.finfo(dtype).tiny) | (scaled == 0)
    result = ShellDynamics(
        energies=energies,
        density=energies / jnp.diff(shells.edges).astype(dtype),
        dissipation=dissipation,
        transfers=exchange.transfers,
        leak=exchange.leak,
        energy_rate=gained - dissipation,
        flux=flux,
        nearest_flux=nearest_flux,
        non_adjacent_share=share,
        edge_density=edge_density,
        velocity=velocity,
        mask=jnp.any(member, axis=0),
        velocity_mask=velocity_mask,
        unresolved_energy=total - jnp.sum(energies),
        unresolved_dissipation=lost - jnp.sum(dissipation),
        ambiguous_rate=exchange.ambiguous_rate,
        num_ambiguous=exchange.num_ambiguous,
        finite=finite,
        in_range=jnp.all(held & jnp.isfinite(energies)),
    )
    return result._replace(finite=finite & all_finite(result))


def _times(tree: PyTree, unit: jax.Array) -> PyTree:
    """Returns a tree of what is quadratic in g, restored from units of it."""
    return jax.tree.map(
        lambda x: x * unit * unit if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def _rates(
    values: jax.Array,
    projections: jax.Array,
    loss_constant: jax.typing.ArrayLike | None,
    rate_projections: jax.typing.ArrayLike | None,
) -> jax.Array:
    """Returns ``<phi_i, e_dot>``, from whichever of the two was given."""
    if loss_constant is None and rate_projections is not None:
        rates = as_floating("rate_projections", rate_projections, values.shape)
        return rates.astype(values.dtype)
    if loss_constant is None or rate_projections is not None:
        got = "neither" if loss_constant is None else "both"
        raise ValueError(
            f"loss_constant: expected it or rate_projections, and not both, got {got}."
        )
    constant = as_scalar("loss_constant", loss_constant, values.dtype)
    return -constant * values * projections


def _leave_out(modes: _Modes) -> tuple[_Modes, jax.Array]:
    """Returns the modes with zeros for what is not finite, and whether all is."""
    usable = jnp.isfinite(modes.values) & jnp.isfinite(modes.projections)
    usable &= jnp.isfinite(modes.rates)
    clean = jnp.isfinite(modes.coupling) & usable[:, None] & usable[None, :]
    kept = _Modes(
        values=jnp.where(usable, modes.values, 0),
        projections=jnp.where(usable, modes.projections, 0),
        rates=jnp.where(usable, modes.rates, 0),
        coupling=jnp.where(clean, modes.coupling, 0),
    )
    return kept, jnp.all(clean)


def _exchange(
    modes: _Modes, index: jax.Array, weights: jax.Array, gap: float | None
) -> _Exchange:
    """Sums what pairs gain from each other over the shells they are in."""
    rotation = basis_rotation(modes.values, modes.coupling, gap=gap)
    products = 2 * modes.projections[:, None] * modes.projections[None, :]
    gains = matmul(weights.T, products * rotation.matrix.T)
    transfers = matmul(gains, weights)
    cut = rotation.clusters[:, None] == rotation.clusters[None, :]
    cut &= index[:, None] != index[None, :]
    tolerance = _tolerance(modes.values, gap)
    sizes = jnp.abs(products * (modes.coupling / divisor(tolerance)))
    return _Exchange(
        transfers=(transfers - transfers.T) / 2,  # equal up to the rounding of the sums
        leak=matmul(gains, (index < 0).astype(gains.dtype)),
        ambiguous_rate=matmul(weights.T, jnp.sum(jnp.where(cut, sizes, 0), axis=1)),
        num_ambiguous=jnp.sum(jnp.any(cut, axis=1), dtype=jnp.int32),
    )


def _tolerance(values: jax.Array, gap: float | None) -> jax.Array:
    """Returns the distance up to which neighboring eigenvalues are one cluster."""
    if gap is None:
        gap = _GAP * float(jnp.finfo(values.dtype).eps)
    gap = check_positive("gap", gap)
    return gap * jnp.max(jnp.abs(values), where=jnp.isfinite(values), initial=0)


def _clusters(values: jax.Array, tolerance: jax.Array) -> jax.Array:
    """Returns the cluster of each value, [r]; neighbors within tolerance share one."""
    order = jnp.argsort(values)
    apart = jnp.diff(values[order]) > tolerance
    numbers = jnp.concatenate(
        [jnp.zeros(min(1, len(values)), jnp.int32), jnp.cumsum(apart, dtype=jnp.int32)]
    )
    return jnp.zeros(len(values), jnp.int32).at[order].set(numbers)


def _fluxes(transfers: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the fluxes, their nearest-neighbor parts and the non-adjacent share."""
    num_shells = len(transfers)
    shell = jnp.arange(num_shells, dtype=jnp.int32)
    above = (shell[None, :] > shell[:-1, None]).astype(transfers.dtype)
    flux = jnp.sum(matmul(above, transfers) * (1 - above), axis=1)
    far = jnp.abs(shell[:, None] - shell[None, :]) > 1
    sizes = jnp.abs(transfers)
    share = ratio(jnp.sum(jnp.where(far, sizes, 0)), jnp.sum(sizes))
    return flux, jnp.diagonal(transfers, offset=-1), share


def _edge_density(energies: jax.Array, edges: jax.Array) -> jax.Array:
    """Returns the densities at the inner edges, the mean of both sides' in log."""
    edges = edges.astype(energies.dtype)
    roots = jnp.sqrt(edges)  # whose ratios stay in the range of the dtype
    both_widths = 2 * jnp.log(roots[2:] / roots[:-2])
    return (energies[:-1] + energies[1:]) / both_widths / edges[1:-1]
