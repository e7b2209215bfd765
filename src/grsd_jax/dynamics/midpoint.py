"""The flux of a small step from the derivative of the kernel, without cancellation.

The exact balance takes the flux as a small difference of large numbers, which rounding
drowns when the step is small. Halfway between both ends the difference of the kernels
is a derivative, and that of their steps a divided difference.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import all_finite, divisor, is_traced, matmul, norm
from grsd_jax._checks import (
    check_choice,
    check_key,
    check_same_tree,
    check_tree_single_or_double,
)
from grsd_jax._typing import PyTree
from grsd_jax.dynamics.amounts import in_dtype, restored
from grsd_jax.dynamics.between_ends import (
    KrylovSteps,
    cheaper_solver,
    krylov_space,
)
from grsd_jax.dynamics.contents import contents_of
from grsd_jax.dynamics.spectra import (
    all_pairs,
    errors_at,
    mean_and_change,
    stacked_point,
)
from grsd_jax.kernel.dense import dense_at
from grsd_jax.kernel.derivative import Derivative
from grsd_jax.kernel.products import projected_derivative
from grsd_jax.problem import Point, Problem
from grsd_jax.results import NamedResult, result, with_undefined
from grsd_jax.shells.soft_shells import RATIONAL_WIDTHS, SoftShells

#: The size of what rounding does, over epsilon: a bound on small networks.
_ROUNDING = 8.0

#: By how much of what passes an edge, in both directions, fewer Lanczos steps may
#: change its flux for it to count as converged.
_AGREEMENT = 0.02

#: Columns of the derivative that are taken at a time.
_COLUMNS = 8


@result(
    masks=dict.fromkeys(("flux", "density", "floor", "flux_error"), "in_range"),
    units=dict.fromkeys(("flux", "floor", "flux_error"), "|e|^2"),
)
class MidpointFlux(NamedResult):
    """The flux past the edges over a small step; the fields as in `ExactBalance`.

    Attributes:
        shells: The shells.
        flux: [q], net energy that passed each edge upward.
        density: [q], energy per unit of log lambda at each edge, halfway.
        floor: [q], what rounding may do to the flux.
        flux_error: [q], the floor, what fewer steps of Lanczos change, and what the
            size of the step may leave out, by the squares of the relative changes of
            error and kernel; infinite where the edge has not converged, and for a step
            that is not small: if these squares add up to more than 1, or if the error
            or the kernel vanishes halfway. 0 where both errors do.
        converged: [q] bool, whether three quarters and half of the Lanczos steps agree
            with all of them, here and at every edge above. True from all pairs.
        finite: [] bool, whether all numbers are finite.
        in_range: [q] bool, whether the dtype holds the amounts, down to their rounding.
            If not, the error is too small or too large for its square, or the motion
            too small for its product with it, and the amounts are NaN.
    """

    shells: SoftShells
    flux: jax.Array
    density: jax.Array
    floor: jax.Array
    flux_error: jax.Array
    converged: jax.Array
    finite: jax.Array
    in_range: jax.Array


def midpoint_flux(
    problem: Problem,
    before: PyTree,
    after: PyTree,
    shells: SoftShells,
    *,
    solver: Literal["auto", "dense"] | KrylovSteps = "auto",
    key: jax.Array | None = None,
) -> MidpointFlux:
    r"""Returns the flux between two parameters that lie close to each other.

    .. math:: F_k = \sum_{ij} c_i c_j\, \mathrm{up}_k[\theta_i, \theta_j]\,
              y_i^\top \Delta M\, y_j, \qquad c_i = y_i^\top e_m

    with the pairs ``(theta_i, y_i)`` of the kernel halfway, the divided differences
    ``up_k[., .]`` of the soft steps, and the derivative ``Delta M`` of the kernel along
    the motion. It differs from the exact flux by its third order in the motion, and
    rounding hardly touches it, where that of `exact_balance` drowns in rounding.

    For smooth networks alone: the derivative does not see the units of a relu network
    switch. Only parameters differ between the ends, no statistics.

    Args:
        problem: The problem, one set of ``n = K N C`` errors.
        before: Parameters in float32 or float64.
        after: Parameters a small step later.
        shells: Soft shells of width 1/2 or 1/3.
        solver: ``"dense"`` for all n pairs; `KrylovSteps` for one run from ``e_m``, of
            which ``num_steps`` alone matters; ``"auto"`` for the cheaper.
        key: Consumed by `KrylovSteps`, and needed for it alone.

    Returns:
        The flux, with its error.

    Raises:
        ValueError: If the trees, a dtype, the problem or the shells do not fit, the
            ends differ in what does not move, or ``key`` is missing.

    References:
        Ours; ``docs/what_moved.md``.
    """
    check_same_tree("after", after, before, "before")
    if shells.width not in RATIONAL_WIDTHS:
        raise ValueError(
            "shells.width: expected 1/2 or 1/3, whose divided differences do not "
            f"cancel, got {shells.width}."
        )
    ends = stacked_point(problem, before), stacked_point(problem, after)
    _check_same_state(*ends)
    # Half precision would round the point halfway to one of the ends.
    check_tree_single_or_double("before", ends[0].params)
    shells = shells.checked(ends[0].error.dtype)
    if solver == "auto":
        solver = cheaper_solver(ends[0], shells.width, KrylovSteps())
    middle, vectors = _middle(*ends), mean_and_change(*map(errors_at, ends))
    if not isinstance(solver, KrylovSteps):
        check_choice("solver", solver, ("auto", "dense"))
        kernel, moved = dense_at(middle)
        values, basis = all_pairs(kernel)
        return with_undefined(_by_all_pairs(values, basis, moved, vectors, shells))
    key = check_key(key, "KrylovSteps")
    still = dataclasses.replace(middle, direction=None)
    run = krylov_space(still, vectors[:, 0], solver, key)
    moved = projected_derivative(middle, run.basis, Derivative(), _COLUMNS)
    inside = matmul(run.basis.T, vectors)
    found = _by_krylov(run.tridiagonal, moved, inside, shells, run.finite)
    return with_undefined(found)


def _check_same_state(before: Point, after: Point) -> None:
    """Raises ValueError if what does not move is known to differ between the ends."""
    ends = before, after
    first, second = (contents_of(end)["state"] for end in ends)
    same = len({jax.tree.structure(end.error_fn) for end in ends}) == 1
    if same and not is_traced((first, second)):
        pairs = zip(first, second, strict=True)
        same = all(one is other or np.array_equal(one, other) for one, other in pairs)
    if not same:
        raise ValueError(
            "after: expected what before holds beside its floating arrays, such as "
            "integers, got others."
        )


def _middle(before: Point, after: Point) -> Point:
    """Returns the point halfway, with the motion as its direction."""
    return dataclasses.replace(
        before,
        params=jax.tree.map(lambda p, q: p / 2 + q / 2, before.params, after.params),
        direction=jax.tree.map(lambda p, q: q - p, before.params, after.params),
    )


class _Flux(NamedTuple):
    """What the pairs give at each edge; ``passed`` is the flux without signs."""

    flux: jax.Array
    passed: jax.Array
    left_out: jax.Array
    density: jax.Array
    floor: jax.Array


@jax.jit
def _by_all_pairs(
    values: jax.Array,
    basis: jax.Array,
    moved: jax.Array,
    vectors: jax.Array,
    shells: SoftShells,
) -> MidpointFlux:
    inside, size = _in_units(matmul(basis.T, vectors))
    found = _flux(values, inside, matmul(basis.T, matmul(moved, basis)), shells)
    return _finished(found, [], size, shells, jnp.bool_(True))


@jax.jit
def _by_krylov(
    tridiagonal: jax.Array,
    moved: jax.Array,
    inside: jax.Array,
    shells: SoftShells,
    finite: jax.Array,
) -> MidpointFlux:
    number, found = len(tridiagonal), []
    inside, size = _in_units(inside)
    for used in (number, 3 * number // 4, number // 2):
        values, rotation = jnp.linalg.eigh(tridiagonal[:used, :used])
        turned = matmul(rotation.T, matmul(moved[:used, :used], rotation))
        found.append(_flux(values, matmul(rotation.T, inside[:used]), turned, shells))
    return _finished(found[0], found[1:], size, shells, finite)


def _in_units(inside: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns coefficients of size one, and the size that they had."""
    size = divisor(jnp.max(jnp.abs(inside), initial=0))
    return inside / size, size


def _flux(
    values: jax.Array, inside: jax.Array, moved: jax.Array, shells: SoftShells
) -> _Flux:
    """Returns what pairs give, whose vectors hold ``[r, 2]`` of ``e_m`` and ``delta``.

    The divided difference of ``x^p / (1 + x^p)`` is ``u(x) u(y) sum_j x^j y^(p-1-j)``
    with ``u(x) = 1 / (1 + x^p)``: p terms, each a product, so that nothing cancels.
    """
    mean, change = inside.T
    order = round(1 / shells.width)
    powers = _powers(values, shells.edges, order)
    pairs = [(powers[j], powers[order - 1 - j]) for j in range(order)]

    def summed(weights: jax.Array, matrix: jax.Array) -> jax.Array:
        weights = weights[:, None]
        terms = [
            jnp.sum(weights * a * matmul(matrix, weights * b), 0) for a, b in pairs
        ]
        return sum(terms, jnp.zeros_like(shells.edges)) / shells.edges

    passed = summed(jnp.abs(mean), jnp.abs(moved))
    largest = jnp.max(jnp.abs(values), initial=0) / shells.edges
    # A rounding of Delta M in every entry, and one of M, which moves its pairs.
    eps = _ROUNDING * jnp.finfo(values.dtype).eps
    squares = [matmul(jnp.square(mean)[None, :], jnp.square(part)) for part in powers]
    spread = sum(squares[j] * squares[order - 1 - j] for j in range(order))
    entry = jnp.max(jnp.abs(moved), initial=0) / shells.edges
    stirred = entry * jnp.sqrt(order * jnp.reshape(spread, shells.edges.shape))
    changes = jnp.square(_relative(change, mean)) + jnp.square(_relative(moved, values))
    # Halfway between distant ends there may be nothing that tells of them.
    left_out = jnp.abs(summed(change, moved)) / 4 + passed * jnp.minimum(changes, 1)
    return _Flux(
        flux=summed(mean, moved),
        passed=passed,
        left_out=jnp.where((changes <= 1) | ~jnp.any(inside), left_out, jnp.inf),
        density=matmul(shells.windows(values).T, jnp.square(mean)),
        floor=eps * (passed * (1 + largest) + stirred),
    )


def _relative(change: jax.Array, whole: jax.Array) -> jax.Array:
    """Returns the norm of a change over that of the whole, infinite if that is zero."""
    scale = norm(whole)
    return jnp.where(scale > 0, norm(change) / divisor(scale), jnp.inf)


def _powers(values: jax.Array, edges: jax.Array, order: int) -> list[jax.Array]:
    """Returns ``x^j / (1 + x^p)``, ``[r, q]``, of ``x = lambda / lambda_k``, j < p."""
    ratios = jnp.where(jnp.isnan(values), jnp.nan, jnp.maximum(values, 0))[:, None]
    ratios = ratios / edges[None, :]
    small = ~(ratios > 1)
    below = jnp.where(small, ratios, 1 / jnp.where(small, 1, ratios))
    base = 1 / (1 + below**order)
    return [
        base * jnp.where(small, below**j, below ** (order - j)) for j in range(order)
    ]


def _finished(
    found: _Flux,
    coarser: list[_Flux],
    size: jax.Array,
    shells: SoftShells,
    finite: jax.Array,
) -> MidpointFlux:
    agrees, apart = jnp.isfinite(found.flux), jnp.zeros_like(found.flux)
    for other in coarser:
        change = jnp.abs(other.flux - found.flux)
        agrees &= change <= _AGREEMENT * found.passed + found.floor
        apart = apart + change
    converged = jnp.flip(jnp.cumprod(jnp.flip(agrees).astype(jnp.int32))) > 0
    error = found.floor + apart + found.left_out
    density = restored(found.density, size)
    finite = finite & all_finite((found.flux, found.density))
    fits = in_dtype(found.flux, found.floor, size) & jnp.isfinite(density)
    return MidpointFlux(
        shells=shells,
        flux=restored(found.flux, size),
        density=density,
        floor=restored(found.floor, size),
        flux_error=restored(jnp.where(converged, error, jnp.inf), size),
        converged=converged,
        finite=finite,
        in_range=fits | ~finite,
    )
