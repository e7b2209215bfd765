"""How far the amounts of a balance may be off: by rounding, and by what is missing."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from grsd_jax._arrays import divisor, matmul, norm, ratio
from grsd_jax.dynamics.amounts import Amounts, Pairing, weights_of
from grsd_jax.shells.soft_shells import SoftShells

#: The size of what rounding adds to a kernel, over ``eps lambda_max``, and to sums of
#: energies, over ``eps |e|^2``: bounds on small networks.
_KERNEL_ROUNDING, _SUM_ROUNDING = 3.0, 4.0

#: Pairs this many roundings from a sharp edge may lie on either side of it.
_AMBIGUOUS = 8.0

#: Eigenvalues relatively closer than this have the mean of both slopes as the divided
#: difference of a step, which would cancel.
_NEAR = 1e-3


class AmountErrors(NamedTuple):
    """The errors of the `Amounts` of the same names."""

    energies: jax.Array
    lost: jax.Array
    moved: jax.Array
    flux: jax.Array
    density: jax.Array


def rounding_floors(
    pairing: Pairing, shells: SoftShells, rounding: jax.Array
) -> AmountErrors:
    """Returns what rounding may do to the amounts.

    Args:
        pairing: The spectra of both kernels.
        shells: The shells.
        rounding: [], of products with the kernel, relative.

    Returns:
        The floors, by the names of the amounts.
    """
    ends = [pairing.before, pairing.after]
    weights = [weights_of(end, square=True) for end in ends]
    energy = (jnp.sum(weights[0]) + jnp.sum(weights[1])) / 2
    change = jnp.sum(jnp.square(pairing.after.coefficients[:, 1]))
    noise = _KERNEL_ROUNDING * rounding
    turned = [
        _stirred(end.values, weight, shells, noise)
        for end, weight in zip(ends, weights, strict=True)
    ]
    summing = _SUM_ROUNDING * rounding * energy
    flux = jnp.sqrt(jnp.square(turned[0]) + jnp.square(turned[1])) + summing
    shell = jnp.pad(flux, (1, 0)) + jnp.pad(flux, (0, 1))
    return AmountErrors(
        energies=shell,
        lost=2 * shell * jnp.sqrt(ratio(change, energy)) + summing,
        # The turning of one shell's neighbors is seen by every other.
        moved=jnp.maximum(shell[:, None], shell[None, :]),
        flux=flux,
        density=flux / (shells.width or 1.0),
    )


def _stirred(
    values: jax.Array, weights: jax.Array, shells: SoftShells, noise: jax.Array
) -> jax.Array:
    r"""Returns what a random kernel of norm ``noise lambda_max`` does to ``up_k``, [q].

    To first order ``e^T (up_k(M + E) - up_k(M)) e = sum_ij g_i g_j up_k[i, j] E_ij``,
    with the divided differences of the step; this is its root mean square.
    """
    largest = jnp.max(values, initial=0)

    def one(edge: jax.Array, up: jax.Array, window: jax.Array) -> jax.Array:
        places, size = jnp.maximum(values, 0) / edge, noise * largest / edge
        gaps = jnp.abs(places[:, None] - places[None, :])
        steps = jnp.abs(up[:, None] - up[None, :])
        if shells.width:
            slopes = window / divisor(places)
            near = gaps <= _NEAR * jnp.maximum(places[:, None], places[None, :])
            slopes = (slopes[:, None] + slopes[None, :]) / 2
            divided = jnp.where(near, slopes, steps / jnp.where(near, 1, gaps))
        else:  # whoever lies on the edge may fall on either side of it
            divided = steps / divisor(jnp.maximum(gaps, size))
            on_edge = jnp.abs(places - 1) <= _AMBIGUOUS * size
            divided = divided + jnp.diag(jnp.where(on_edge, 1 / divisor(size), 0))
        pairs = matmul(jnp.square(divided), weights[:, None])[:, 0]
        return size * jnp.sqrt(jnp.sum(weights * pairs))

    columns = shells.above(values).T, shells.windows(values).T
    return jax.lax.map(lambda args: one(*args), (shells.edges, *columns))


def amount_errors(
    floors: AmountErrors,
    found: Amounts,
    others: Sequence[Amounts],
    converged: jax.Array,
) -> AmountErrors:
    """Adds to the floors what other forms of the amounts change.

    Infinite where an edge has not converged: fewer steps then say nothing of more.
    """
    above = jnp.pad(converged, (0, 1), constant_values=True)
    below = jnp.pad(converged, (1, 0), constant_values=True)
    shell = above & below
    known = {
        "moved": shell[:, None] & shell[None, :],
        "flux": converged,
        "density": converged,
    }

    def error(name: str) -> jax.Array:
        full, floor = getattr(found, name), getattr(floors, name)
        changes = (jnp.abs(full - getattr(other, name)) for other in others)
        total = sum(changes, jnp.broadcast_to(floor, full.shape))
        reached = jnp.broadcast_to(known.get(name, shell), full.shape)
        return jnp.where(reached, total, jnp.inf)

    return AmountErrors(**{name: error(name) for name in AmountErrors._fields})


def unseen_errors(
    pairing: Pairing, change: jax.Array, shells: SoftShells
) -> AmountErrors:
    r"""Returns what is quadratic in ``delta`` at most, beyond what the spectra know.

    With ``delta = s + u``, s in the span of the pairs, and a function of M from 0 to 1,
    ``delta^T f delta`` is that of s up to ``|u|^2 + 2 |s| |u|``. Flux and transfers are
    differences of two such, and slopes of the steps are ``1 / 4w`` at most.
    """
    ends = [pairing.before, pairing.after]
    seen = jnp.stack([norm(end.coefficients[:, 1]) for end in ends])
    rest = jnp.sqrt(jnp.maximum(jnp.square(change) - jnp.square(seen), 0))
    bound = jnp.max(jnp.square(rest) + 2 * seen * rest) / 4
    nothing = jnp.zeros_like(bound)
    return AmountErrors(
        energies=bound,
        lost=nothing,
        moved=2 * bound,
        flux=2 * bound,
        density=bound / 4 / (shells.width or 1.0),
    )


def converged_edges(
    found: Amounts, coarser: Sequence[Amounts], floors: AmountErrors, agreement: float
) -> jax.Array:
    """Returns whether fewer steps agree, at each edge and at every one above, [q]."""
    number = len(found.flux)
    shell = jnp.arange(number + 1, dtype=jnp.int32)
    above = (shell[None, :] > shell[:-1, None]).astype(found.moved.dtype)
    # Over each edge in both directions, which does not vanish where the flux turns.
    sizes = matmul(above, jnp.abs(found.moved)) * (1 - above)
    passed = jnp.maximum(jnp.sum(sizes, axis=1), jnp.abs(found.flux))
    agrees = jnp.isfinite(found.flux)
    for other in coarser:
        apart = jnp.abs(other.flux - found.flux)
        agrees &= apart <= agreement * passed + floors.flux
        apart = jnp.abs(other.density - found.density)
        agrees &= apart <= agreement * found.density + floors.density
    return jnp.flip(jnp.cumprod(jnp.flip(agrees).astype(jnp.int32))) > 0
