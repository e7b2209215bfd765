"""Bounds for the flux past sharp edges, at any n.

A few steps of Lanczos cannot apply a sharp step to a vector, but they bound what it
would give: the quadrature with a node at the edge encloses the energy above it, by the
inequalities of Chebyshev, Markov and Stieltjes.
"""

from functools import partial

import jax
import jax.numpy as jnp

from grsd_jax._arrays import all_finite, divisor, matmul
from grsd_jax._checks import check_at_least, check_key
from grsd_jax._typing import PyTree
from grsd_jax.dynamics.amount_errors import rounding_floors
from grsd_jax.dynamics.amounts import in_dtype, restored
from grsd_jax.dynamics.between_ends import (
    KrylovSpaces,
    KrylovSteps,
    check_same_ends,
    krylov_spaces,
)
from grsd_jax.dynamics.fingerprint import fingerprint
from grsd_jax.dynamics.spectra import pair_krylov, stacked_point
from grsd_jax.linalg.lanczos import block_lanczos
from grsd_jax.problem import Problem
from grsd_jax.results import NamedResult, result, with_undefined
from grsd_jax.shells.soft_shells import SoftShells

_BOUNDS = ("lower", "upper")


@result(masks=dict.fromkeys(_BOUNDS, "in_range"), units=dict.fromkeys(_BOUNDS, "|e|^2"))
class SharpFlux(NamedResult):
    """Bounds for the flux past sharp edges between two ends.

    Attributes:
        edges: [q], ``lambda_k``; a pair on an edge lies above it.
        lower: [q], the least that passed upward, as in `ExactBalance`.
        upper: [q], the most.
        comparable: [] bool, whether both ends hold the same examples and targets in the
            same order, and the same loss. If not, no number means anything.
        finite: [] bool, whether all numbers are finite.
        in_range: [q] bool, whether the dtype holds the bounds, down to their rounding.
            If not, the error is too small or too large for its square, and the bounds
            are NaN.
    """

    edges: jax.Array
    lower: jax.Array
    upper: jax.Array
    comparable: jax.Array
    finite: jax.Array
    in_range: jax.Array


def sharp_flux_bounds(
    before: tuple[Problem, PyTree],
    after: tuple[Problem, PyTree],
    edges: jax.Array,
    *,
    num_steps: int = 48,
    key: jax.Array,
) -> SharpFlux:
    r"""Returns bounds for the flux past sharp edges between two points of a training.

    .. math:: F_k = \tfrac12 \sum_{e \in \{e_0, e_1\}} e^\top
              \left[ 1(M_1 \geq \lambda_k) - 1(M_0 \geq \lambda_k) \right] e

    for a step of any size, by any optimizer. Each of the four energies lies between
    those of the Gauss-Radau quadrature with a node at the edge, without that node and
    with it. What rounding may do is added to both, to first order. The gap closes no
    faster than as one over the number of steps, so that small steps need soft shells.

    Args:
        before: The problem and its parameters at the first end.
        after: The same of the second; problems may differ in their state.
        edges: [q], positive and increasing.
        num_steps: Lanczos steps m of each kernel, from both errors.
        key: Consumed.

    Returns:
        The bounds.

    Raises:
        ValueError: If the ends differ in examples, loss, size or dtype, the edges are
            not positive, increasing numbers, or ``num_steps`` is below 4.

    References:
        Golub and Meurant (2010), "Matrices, Moments and Quadrature with Applications",
        chapter 6; ours, ``docs/what_moved.md``.
    """
    num_steps = check_at_least("num_steps", num_steps, 4)
    check_key(key)
    points = stacked_point(*before), stacked_point(*after)
    prints = fingerprint(before[0]), fingerprint(after[0])
    check_same_ends(points, prints)
    run_key, key = jax.random.split(key)
    spaces = krylov_spaces(points, KrylovSteps(num_steps), run_key)
    shells = SoftShells(edges, width=0).checked(spaces.vectors.dtype)
    same = jnp.all(prints[0] == prints[1])
    return with_undefined(_bounds(spaces, shells, same, key, num_steps=num_steps))


@partial(jax.jit, static_argnames="num_steps")
def _bounds(
    spaces: KrylovSpaces,
    shells: SoftShells,
    comparable: jax.Array,
    key: jax.Array,
    *,
    num_steps: int,
) -> SharpFlux:
    runs, edges = (spaces.before, spaces.after), shells.edges
    size = divisor(jnp.max(jnp.abs(spaces.vectors)))
    mean, change = (spaces.vectors / size).T
    errors = jnp.stack([mean - change / 2, mean + change / 2], axis=1)
    starts = jnp.stack([matmul(run.basis.T, errors).T for run in runs])

    def above(start: jax.Array, tridiagonal: jax.Array) -> tuple[jax.Array, jax.Array]:
        scalar = _scalar_run(tridiagonal, start, num_steps, key)
        return energy_above(scalar, jnp.sum(jnp.square(start)), edges)

    def of_kernel(one: tuple[jax.Array, jax.Array]) -> list[jax.Array]:
        tridiagonal, starts = one
        both = jax.lax.map(partial(above, tridiagonal=tridiagonal), starts)
        return [jnp.mean(bound, axis=0) for bound in both]

    kernels = jnp.stack([run.tridiagonal for run in runs])
    least, most = jax.lax.map(of_kernel, (kernels, starts))
    pairing = pair_krylov(*runs, spaces.vectors / size, num_steps)
    floor = rounding_floors(pairing, shells, spaces.rounding).flux
    bounds = least[1] - most[0] - floor, most[1] - least[0] + floor
    finite = all_finite(bounds) & runs[0].finite & runs[1].finite
    fits = in_dtype(bounds[0], floor, size) & in_dtype(bounds[1], floor, size)
    lower, upper = (restored(bound, size) for bound in bounds)
    return SharpFlux(edges, lower, upper, comparable, finite, fits | ~finite)


def _scalar_run(
    tridiagonal: jax.Array, start: jax.Array, num_steps: int, key: jax.Array
) -> jax.Array:
    """Returns the Jacobi matrix of one error, ``[m, m]``, without further products.

    The Krylov space of one vector lies in that of the block which holds it.
    """
    run = block_lanczos(
        partial(matmul, tridiagonal), start[:, None], num_steps, key=key
    )
    return run.tridiagonal


def energy_above(
    tridiagonal: jax.Array, total: jax.Array, edges: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns bounds for the mass of a measure above edges, by Gauss-Radau quadrature.

    Args:
        tridiagonal: ``[m, m]``, the measure's Jacobi matrix.
        total: [], its mass.
        edges: [q].

    Returns:
        The least and the most that lies at or above each edge, ``[q]`` each.
    """
    diagonal, couplings = jnp.diagonal(tridiagonal), jnp.diagonal(tridiagonal, 1)
    tiny = float(jnp.finfo(diagonal.dtype).tiny)
    last = len(diagonal) - 1

    def one(edge: jax.Array) -> tuple[jax.Array, jax.Array]:
        def eliminate(
            pivot: jax.Array, entries: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, None]:
            entry, coupling = entries
            return _pivot(entry - edge - coupling * (coupling / pivot), tiny), None

        first = _pivot(diagonal[0] - edge, tiny)
        rest = diagonal[1:last], couplings[: last - 1]
        pivot, _ = jax.lax.scan(eliminate, first, rest)
        # The last diagonal entry that puts a node on the edge.
        entry = edge + couplings[-1] * (couplings[-1] / pivot)
        nodes, rotation = jnp.linalg.eigh(tridiagonal.at[last, last].set(entry))
        weights = total * jnp.square(rotation[0])
        at_edge = jnp.argmin(jnp.abs(nodes - edge))
        above = (nodes > edge).at[at_edge].set(False)
        least = jnp.sum(jnp.where(above, weights, 0))
        return least, least + weights[at_edge]

    return jax.lax.map(one, edges)


def _pivot(value: jax.Array, tiny: float) -> jax.Array:
    """Returns a pivot that can be divided by."""
    return jnp.where(jnp.abs(value) < tiny, tiny, value)
