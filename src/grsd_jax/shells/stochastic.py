r"""Shell couplings of the whole spectrum without its eigenpairs, by random signs.

The coupling of two soft shells is a trace,

.. math:: C_{ab} = \mathrm{tr}(f_a \, \dot M' f_b \, \dot M') =
          \sum_{ij} f_a(\lambda_i) f_b(\lambda_j) (K_{ij} - \delta_{ij} g(\lambda_i))^2,

``K = V^T Mdot V``. The mean drift of the eigenvalues is taken out,
``Mdot' = Mdot - g(M)``: soft shells share their modes with their neighbors, and with
them the diagonal of K, which would hide the coupling. Leading pairs are taken exactly,
among themselves and against the bulk. For the bulk against itself
``C_ab = E x^T f_a(M) x`` with ``x = Mdot' y`` and ``y = f_b(M)^(1/2) z`` of random
signs z, every function of M from a Lanczos run.
"""

import dataclasses
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from grsd_jax._arrays import divisor, matmul, outside
from grsd_jax._checks import check_at_least, check_key, check_shape, make_plain
from grsd_jax._memory import waits_for_memory
from grsd_jax._typing import Matmat, PyTree
from grsd_jax.kernel.dense import dense_at
from grsd_jax.kernel.derivative import (
    gradient_flow_direction,
    kernel_derivative_matmat,
)
from grsd_jax.kernel.products import held_products
from grsd_jax.kernel.solver import matrices_are_cheaper
from grsd_jax.linalg.eigenpairs import leading_eigenpairs
from grsd_jax.linalg.lanczos import LanczosResult, block_lanczos
from grsd_jax.linalg.ritz import default_floor
from grsd_jax.problem import Problem, point_at
from grsd_jax.shells.soft_shells import SoftShells
from grsd_jax.shells.stochastic_coupling import StochasticCoupling, jackknife_error

#: Edges where none are given, columns of a block of the search for leading pairs, and
#: the largest residual of such a pair, relative to its value.
_EDGES, _BLOCK, _CONVERGENCE = 8, 8, 1e-3

#: Part of the Lanczos steps that all of them are held against.
_SHARE = 0.75

#: Eigenvalues below which a shell counts as empty.
_FEWEST = 0.5


@dataclasses.dataclass(frozen=True)
class Signs:
    """How a coupling is estimated.

    Attributes:
        num_signs: q, random sign vectors. Intervals are reliable from eight on.
        num_steps: Lanczos steps m of every run. Blocks are as wide as there are signs
            or shells, which makes few steps reach far down.
    """

    num_signs: int = 8
    num_steps: int = 20

    def __post_init__(self) -> None:
        """Checks the options."""
        make_plain(self)
        check_at_least("num_signs", self.num_signs, 2)
        check_at_least("num_steps", self.num_steps, 4)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["shells"],
    meta_fields=["renormalize"],
)
@dataclasses.dataclass(frozen=True)
class _Weights:
    """The shells above the lowest edge as functions of lambda.

    Attributes:
        shells: The shells.
        renormalize: Whether weights are divided by lambda.
    """

    shells: SoftShells
    renormalize: bool

    def members(self, values: jax.Array) -> jax.Array:
        """Returns ``f_a(lambda)``, ``[r, S]``."""
        return self.shells.members(values)[:, 1:]

    def __call__(self, values: jax.Array) -> jax.Array:
        """Returns ``f_a``, or ``f_a / lambda`` in units of the top edge, ``[r, S]``."""
        members = self.members(values)
        if not self.renormalize:
            return members
        relative = values / self.shells.edges[-1]
        # f_a falls at least as lambda^2: below the smallest number nothing is left.
        return members / jnp.maximum(relative, jnp.finfo(values.dtype).tiny)[:, None]

    def drift(self, relative: jax.Array, values: jax.Array) -> jax.Array:
        """Returns ``g(lambda)``, ``[r]``."""
        logs = jnp.log(self.shells.edges)
        spacing = jnp.diff(logs, append=2 * logs[-1:] - logs[-2:-1])
        found = jnp.log(jnp.maximum(values, jnp.finfo(values.dtype).tiny))
        return values * jnp.interp(found, logs + spacing / 2, relative)


class _Leading(NamedTuple):
    """Leading pairs.

    Attributes:
        values: ``[k]``, eigenvalues.
        vectors: ``[n, k]``, their vectors.
        moved: ``[n, k]``, Mdot times these.
    """

    values: jax.Array
    vectors: jax.Array
    moved: jax.Array


class _Functions(NamedTuple):
    """Functions of M applied to a block, from a Lanczos run that started there.

    Attributes:
        run: The run.
        block: ``[n, c]``, the block.
        values: ``[r]``, Ritz values.
        rotation: ``[r, r]``, eigenvectors of the projected operator.
        inside: ``[r, c]``, the block in the Ritz vectors.
    """

    run: LanczosResult
    block: jax.Array
    values: jax.Array
    rotation: jax.Array
    inside: jax.Array

    @classmethod
    def of(cls, run: LanczosResult, block: jax.Array, share: float) -> "_Functions":
        """Returns them from a share of the run's steps."""
        width = run.block_size
        used = max(1, int(share * run.tridiagonal.shape[0] / width)) * width
        return cls(run, block, *_projected(run, block, used))

    def fewer(self, share: float) -> "_Functions":
        """Returns the same from a share of the steps."""
        return self.of(self.run, self.block, share)

    def combine(self, coefficients: jax.Array) -> jax.Array:
        """Returns ``[n, ...]`` of coefficients ``[r, ...]`` of the Ritz vectors."""
        return _combined(self.run.basis, self.rotation, coefficients)


# The host drives Lanczos; what lies between two runs is one program each.


@partial(jax.jit, static_argnums=2)
def _projected(
    run: LanczosResult, block: jax.Array, used: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns values, rotation and inside of `_Functions` from the first columns."""
    values, rotation = jnp.linalg.eigh(run.tridiagonal[:used, :used])
    inside = matmul(rotation.T, matmul(run.basis[:, :used].T, block))
    return jnp.maximum(values, 0), rotation, inside


@jax.jit
def _combined(
    basis: jax.Array, rotation: jax.Array, coefficients: jax.Array
) -> jax.Array:
    columns = matmul(rotation, coefficients.reshape(len(rotation), -1))
    combined = matmul(basis[:, : len(rotation)], columns)
    return combined.reshape(-1, *coefficients.shape[1:])


@jax.jit
def _outside(vectors: jax.Array, block: jax.Array) -> jax.Array:
    """Returns columns ``[n, ...]`` without their part in the vectors."""
    return outside(vectors, block.reshape(len(block), -1)).reshape(block.shape)


@dataclasses.dataclass(frozen=True)
class _Estimate:
    """An operator, its derivative, and how functions of it are taken.

    Attributes:
        matmat: ``M V``.
        derivative: ``Mdot V``.
        vectors: ``[n, k]``, leading eigenvectors.
        weights: The shells.
        signs: The options.
        driver: Of the Lanczos runs.
        key: Of the Lanczos runs.
    """

    matmat: Matmat
    derivative: Matmat
    vectors: jax.Array
    weights: _Weights
    signs: Signs
    driver: Literal["scan", "host"]
    key: jax.Array

    def run(self, block: jax.Array) -> LanczosResult:
        """Runs Lanczos on the bulk, from a block in it."""
        return block_lanczos(
            lambda columns: _outside(self.vectors, self.matmat(columns)),
            block,
            max(1, min(self.signs.num_steps, len(block) // block.shape[1])),
            key=self.key,
            driver=self.driver,
        )

    def differentiate(self, block: jax.Array) -> jax.Array:
        """Returns ``Mdot`` times columns ``[n, ...]``."""
        if not block.size:
            return block
        return self.derivative(block.reshape(len(block), -1)).reshape(block.shape)


def stochastic_shell_coupling(
    matmat: Matmat,
    derivative: Matmat,
    values: jax.Array,
    vectors: jax.Array,
    shells: SoftShells,
    *,
    key: jax.Array,
    signs: Signs = Signs(),
    renormalize: bool = False,
    driver: Literal["scan", "host"] = "scan",
) -> StochasticCoupling:
    """Estimates the coupling between soft shells of an operator's whole spectrum.

    With k leading pairs, q signs, m steps and S shells it takes about
    ``m (q + (q + 1) S + k)`` columns of M and ``k + (q + 1) S`` of Mdot.

    Args:
        matmat: ``M V`` for a block ``[n, b]``, symmetric positive semidefinite.
        derivative: ``Mdot V``, symmetric; or ``(M_1 V - M_0 V) / Delta tau``, the
            change over a training step.
        values: ``[k]``, leading eigenvalues.
        vectors: ``[n, k]``, their vectors, orthonormal; k may be 0.
        shells: At least two edges, three widths w or more apart; w is 1/2 or 1/3.
        key: Consumed for the signs.
        signs: How many signs and steps.
        renormalize: Whether each square is divided by ``lambda_i lambda_j``.
        driver: As for `grsd_jax.linalg.block_lanczos`.

    Returns:
        A `StochasticCoupling`.

    Raises:
        ValueError: If a shape does not fit, an option is out of range, or there are
            more than n / 2 signs or shells for a larger bulk.

    References:
        Ours; ``docs/theory.md``. Ubaru, Chen and Saad (2017), "Fast estimation of
        tr(f(A)) via stochastic Lanczos quadrature".
    """
    check_shape("vectors", vectors, [None, len(values)])
    shells = shells.checked(vectors.dtype)
    check_at_least("len(shells.edges)", len(shells.edges), 2)
    check_key(key)
    widest = max(signs.num_signs, len(shells.edges))
    _check_blocks(len(vectors), len(values), widest)
    sign_key, key = jax.random.split(key)
    size = (len(vectors), signs.num_signs)
    weights = _Weights(shells, renormalize)
    estimate = _Estimate(matmat, derivative, vectors, weights, signs, driver, key)
    block = _outside(vectors, jax.random.rademacher(sign_key, size, vectors.dtype))
    leading = _Leading(values, vectors, estimate.differentiate(vectors))
    return _estimated(estimate, block, leading)


@waits_for_memory("signs.num_signs", "num_pairs", "batches")
def measure_stochastic_coupling(
    problem: Problem,
    params: PyTree,
    direction: PyTree | None = None,
    *,
    key: jax.Array,
    shells: SoftShells | None = None,
    num_pairs: int = 32,
    signs: Signs = Signs(),
    renormalize: bool = True,
) -> StochasticCoupling:
    """Measures the shell coupling of the spectrum down to a lowest edge, at any n.

    Leading pairs by Lanczos, then `stochastic_shell_coupling`. M and Mdot are formed
    once if they fit, the examples are independent, and that takes fewer operations than
    products with so many columns. It runs eagerly, driven from the host, since the
    number of steps for the leading pairs depends on the data.

    Args:
        problem: The problem, its batches on one device.
        params: Parameters.
        direction: The tangent d, a tree like ``params``; the gradient flow of the
            problem's loss if None.
        key: Consumed for the start block and the signs.
        shells: The shells; if None, of width 1/3 with eight edges at ``lambda_1 / e``,
            ``lambda_1 / e^2``, and so on.
        num_pairs: Leading pairs that are taken exactly.
        signs: How many signs and steps.
        renormalize: Whether each square is divided by ``lambda_i lambda_j``.

    Returns:
        A `StochasticCoupling`, not finite if the leading pairs did not converge or,
        without shells, no eigenvalue is there to place them.

    Raises:
        ValueError: If a shape, tree, dtype or leading axis does not fit.
        MemoryError: If the device runs out of memory; it names what to lower.

    References:
        Ours; see `stochastic_shell_coupling`.
    """
    num_pairs = check_at_least("num_pairs", num_pairs, 1)
    check_key(key)
    if direction is None:
        direction = gradient_flow_direction(problem, params)
    point = point_at(problem, params, direction)
    num_pairs = min(num_pairs, point.dimension)
    num_shells = _EDGES if shells is None else len(shells.edges)
    if matrices_are_cheaper(point, *_num_columns(signs, num_pairs, num_shells)):
        matmat, derivative = (partial(matmul, matrix) for matrix in dense_at(point))
    else:
        matmat = held_products(point)
        derivative = partial(kernel_derivative_matmat, problem, params, direction)
    start_key, pairs_key, key = jax.random.split(key, 3)
    shape = (point.dimension, min(_BLOCK, num_pairs))
    start = jax.random.normal(start_key, shape, point.error.dtype)
    leading = leading_eigenpairs(
        matmat, start, num_pairs, key=pairs_key, tolerance=_CONVERGENCE
    )
    placed = jnp.asarray(True)
    if shells is None:
        shells, placed = _shells_below(leading.values[0])
    found = stochastic_shell_coupling(
        matmat,
        derivative,
        leading.values,
        leading.vectors,
        shells,
        key=key,
        signs=signs,
        renormalize=renormalize,
        driver="host",
    )
    usable = found.finite & jnp.all(leading.converged) & placed
    return _only_if(usable, found)


def _shells_below(largest: jax.Array) -> tuple[SoftShells, jax.Array]:
    """Returns the shells where none are given, and whether an eigenvalue places them.

    Without one, as of a kernel that is zero, they lie below 1.
    """
    relative = jnp.exp(-1 - jnp.arange(_EDGES, dtype=largest.dtype))[::-1]
    edges = largest * relative
    placed = jnp.isfinite(largest) & (edges[0] >= jnp.finfo(largest.dtype).tiny)
    return SoftShells(jnp.where(placed, edges, relative), 1 / 3), placed


def _only_if(usable: jax.Array, found: StochasticCoupling) -> StochasticCoupling:
    """Returns a coupling, all of it masked unless it is usable."""
    mask = found.mask & usable
    numbers = ("matrix", "replicates", "log_error", "lanczos_error")
    kept = {name: jnp.where(mask, getattr(found, name), 0) for name in numbers}
    return found._replace(mask=mask, finite=usable, **kept)


def _num_columns(signs: Signs, num_pairs: int, num_shells: int) -> tuple[int, int]:
    """Returns how many columns M and Mdot are multiplied by, about."""
    differentiated = num_pairs + (signs.num_signs + 1) * num_shells
    return signs.num_steps * (signs.num_signs + differentiated), differentiated


def _check_blocks(size: int, num_pairs: int, width: int) -> None:
    """Raises ValueError if blocks are too wide for steps that can be compared.

    One step is enough where a block fills the bulk, and nothing is needed without one.
    """
    spans = size - num_pairs <= width <= size
    if width > size or (size > num_pairs and 2 * width > size and not spans):
        raise ValueError(
            f"signs.num_signs: expected at most n / 2 = {size / 2:g}, as of the "
            "shells, since a block as wide leaves Lanczos less than two steps, got "
            f"{width}."
        )


def _estimated(
    estimate: _Estimate, block: jax.Array, leading: _Leading
) -> StochasticCoupling:
    """Returns the coupling, given random signs in the bulk."""
    weights, functions = estimate.weights, _Functions.of(estimate.run(block), block, 1)
    roots, _ = _roots(weights, functions)
    columns = functions.combine(roots)
    changes = estimate.differentiate(columns)
    drift = _relative_drift(weights, leading, functions, (columns, changes))
    bulk = _of_bulk(estimate, functions, (roots, changes), drift)
    exact = _of_leading(estimate, leading, drift)
    return _assembled(weights, functions, bulk, exact, drift, leading.values)


class _Drift(NamedTuple):
    """How eigenvalues drift, and the size of what is left.

    Attributes:
        relative: ``[S]``, ``tr(f_a Mdot) / tr(f_a M)``; 0 where a shell is empty.
        resolved: ``[S]`` bool, the shells above the rounding of M. Below are the zeros
            of M, and what their rounding makes of drift and coupling.
        unit: [], the largest entry of Mdot times the columns.
    """

    relative: jax.Array
    resolved: jax.Array
    unit: jax.Array


@jax.jit
def _roots(weights: _Weights, functions: _Functions) -> tuple[jax.Array, jax.Array]:
    """Returns ``f_b(M)^(1/2) z`` in the Ritz vectors, and its squared length.

    ``[r, S, q]``, each column of length one: the scatter of the lengths says nothing of
    the coupling. ``[S, q]``, of which the mean is the trace of the weights.
    """
    factors = jnp.sqrt(weights(functions.values))
    roots = factors[:, :, None] * functions.inside[:, None, :]
    lengths = jnp.sum(roots**2, 0)
    return roots / jnp.sqrt(jnp.where(lengths > 0, lengths, 1))[None], lengths


@jax.jit
def _relative_drift(
    weights: _Weights,
    leading: _Leading,
    functions: _Functions,
    columns: tuple[jax.Array, jax.Array],
) -> _Drift:
    """Returns the drift, from the columns of `_roots` and Mdot times these."""
    roots, lengths = _roots(weights, functions)
    vectors, changes = columns
    growth = jnp.mean(jnp.sum(vectors * changes, 0) * lengths, -1)
    sizes = jnp.sum(functions.values[:, None, None] * roots**2, 0)
    size = jnp.mean(sizes * lengths, -1)

    known = weights(leading.values)
    own = jnp.sum(leading.vectors * leading.moved, 0)
    numerator = growth + matmul(own, known)
    denominator = size + matmul(leading.values, known)
    drift = jnp.where(denominator > 0, numerator, 0) / divisor(denominator)

    largest = jnp.max(jnp.concatenate([leading.values, functions.values]))
    resolved = weights.shells.edges >= default_floor(largest.dtype) * largest
    # Modes above are held against what is known of the drift.
    drift = jnp.where(resolved, drift, drift[jnp.argmax(resolved)])
    unit = divisor(jnp.maximum(_largest(changes), _largest(leading.moved)))
    return _Drift(drift, resolved, unit)


class _Bulk(NamedTuple):
    """What the bulk gives against itself, over ``unit^2``.

    Attributes:
        cells: ``[q, S, S]``, ``x_b^T f_a(M) x_b`` with ``x_b = Mdot' y_b``.
        rough: ``[S, S]``, that of the first sign vector from fewer Lanczos steps.
        finite: [] bool, whether all is finite.
    """

    cells: jax.Array
    rough: jax.Array
    finite: jax.Array


def _of_bulk(
    estimate: _Estimate,
    functions: _Functions,
    columns: tuple[jax.Array, jax.Array],
    drift: _Drift,
) -> _Bulk:
    """Returns the bulk, given the unit ``y_b`` of `_roots`, and ``Mdot y_b``."""
    weights = estimate.weights

    def cells(
        functions: _Functions, columns: tuple[jax.Array, jax.Array], share: float
    ) -> tuple[jax.Array, jax.Array]:
        by_sign = _without_drift(weights, estimate.vectors, functions, columns, drift)

        def one(block: jax.Array) -> tuple[jax.Array, jax.Array]:
            run = estimate.run(block)
            return _quadrature(weights, run, block, share), run.finite

        if estimate.driver == "scan":
            return jax.lax.map(one, by_sign)
        found, finite = zip(*map(one, by_sign), strict=True)
        return jnp.stack(found), jnp.stack(finite)

    samples, finite = cells(functions, columns, 1.0)
    fewer = functions.fewer(_SHARE)
    first = _roots(weights, fewer)[0][..., :1]
    again = estimate.differentiate(fewer.combine(first))
    (rough,), _ = cells(fewer, (first, again), _SHARE)
    finite = jnp.all(finite) & functions.run.finite & jnp.all(jnp.isfinite(samples))
    return _Bulk(samples, rough, finite)


@jax.jit
def _without_drift(
    weights: _Weights,
    vectors: jax.Array,
    functions: _Functions,
    columns: tuple[jax.Array, jax.Array],
    drift: _Drift,
) -> jax.Array:
    """Returns ``x_b``, ``[q, n, S]``."""
    roots, changes = columns
    still = weights.drift(drift.relative, functions.values)[:, None, None] * roots
    found = (changes - functions.combine(still)) / drift.unit
    return jnp.moveaxis(_outside(vectors, found), -1, 0)


def _of_leading(
    estimate: _Estimate, leading: _Leading, drift: _Drift
) -> tuple[jax.Array, jax.Array]:
    """Returns ``C_ab`` of the leading pairs and of theirs with the bulk, twice.

    Over ``unit^2``, ``[S, S]``; from all Lanczos steps, and from fewer.
    """
    weights, count = estimate.weights, len(leading.values)
    if not count:
        nothing = jnp.zeros((len(weights.shells.edges),) * 2, leading.moved.dtype)
        return nothing, nothing
    exact, rest = _among(weights, leading, drift)
    width = min(len(weights.shells.edges), count)
    both = [exact, exact]
    for start in range(0, count, width):
        part = slice(start, start + width)
        run = estimate.run(rest[:, part])
        for index, share in enumerate((1.0, _SHARE)):
            crossed = _crossed(weights, run, rest[:, part], leading.values[part], share)
            both[index] = both[index] + crossed
    return both[0], both[1]


@jax.jit
def _among(
    weights: _Weights, leading: _Leading, drift: _Drift
) -> tuple[jax.Array, jax.Array]:
    """Returns ``C_ab`` of the leading pairs alone, and their Mdot V in the bulk."""
    known = weights(leading.values)
    among = matmul(leading.vectors.T, leading.moved)
    among = among - jnp.diag(weights.drift(drift.relative, leading.values))
    squares = (among / drift.unit) ** 2
    exact = matmul(known.T, matmul(squares, known))
    return exact, _outside(leading.vectors, leading.moved) / drift.unit


@partial(jax.jit, static_argnums=3)
def _quadrature(
    weights: _Weights, run: LanczosResult, block: jax.Array, share: float
) -> jax.Array:
    """Returns ``x^T f_a(M) x`` of the columns x of a block, ``[S, c]``."""
    functions = _Functions.of(run, block, share)
    return matmul(weights(functions.values).T, functions.inside**2)


@partial(jax.jit, static_argnums=4)
def _crossed(
    weights: _Weights,
    run: LanczosResult,
    block: jax.Array,
    values: jax.Array,
    share: float,
) -> jax.Array:
    """Returns ``C_ab`` of leading pairs with the bulk, both ways."""
    crossed = matmul(_quadrature(weights, run, block, share), weights(values))
    return crossed + crossed.T


@jax.jit
def _assembled(
    weights: _Weights,
    functions: _Functions,
    bulk: _Bulk,
    leading: tuple[jax.Array, jax.Array],
    drift: _Drift,
    values: jax.Array,
) -> StochasticCoupling:
    """Returns the coupling from what the bulk and the leading pairs give."""
    exact, fewer_exact = leading
    lengths = _roots(weights, functions)[1]
    known = jnp.sum(weights.members(values), 0)
    counted = matmul(weights.members(functions.values).T, functions.inside**2)

    def of(chosen: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the means and the counts from signs with the given weights."""
        cells = jnp.einsum("sab,s,bt,t->ab", bulk.cells, chosen, lengths, chosen)
        counts = known + matmul(counted, chosen)
        filled = jnp.where(counts >= _FEWEST, counts, jnp.inf)
        return (_symmetric(cells) + exact) / jnp.outer(filled, filled), counts

    number = len(bulk.cells)
    matrix, counts = of(jnp.full(number, 1 / number, bulk.cells.dtype))
    others = (1 - jnp.eye(number, dtype=bulk.cells.dtype)) / (number - 1)
    replicates, _ = jax.vmap(of)(others)
    unit = drift.unit
    scale = unit / weights.shells.edges[-1] if weights.renormalize else unit
    scaled = [array * scale * scale for array in (matrix, replicates)]
    usable = _is_held(scaled[0]) & jnp.all(_is_held(scaled[1]), 0)
    mask = bulk.finite & usable & jnp.outer(drift.resolved, drift.resolved)
    logs = jnp.log(jnp.where(mask, replicates, 1))
    mass = jnp.mean(lengths, -1)[None]
    first = _symmetric(bulk.cells[0] * mass) + exact
    change = _symmetric((bulk.rough - bulk.cells[0]) * mass) + fewer_exact - exact
    return StochasticCoupling(
        matrix=jnp.where(mask, scaled[0], 0),
        mask=mask,
        replicates=jnp.where(mask, scaled[1], 0),
        log_error=jackknife_error(logs),
        lanczos_error=jnp.abs(change) / jnp.where(mask, first, jnp.inf),
        edges=weights.shells.edges,
        counts=counts,
        relative_drift=drift.relative,
        finite=bulk.finite,
    )


def _is_held(array: jax.Array) -> jax.Array:
    """Whether positive numbers have neither overflowed nor lost their digits."""
    info = jnp.finfo(array.dtype)
    return (array >= float(info.tiny)) & (array <= float(info.max))


def _symmetric(matrix: jax.Array) -> jax.Array:
    return (matrix + matrix.T) / 2


def _largest(columns: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(columns), initial=0)
