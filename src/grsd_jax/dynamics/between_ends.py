"""The exact energy balance between two snapshots of a training.

`exact_balance` finds the spectra of both kernels in the form that fits, all eigenpairs
or Krylov spaces of the two errors, and takes the balance of
`grsd_jax.dynamics.transport`.
"""

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import divisor, is_traced, matmul, ratio, unit_vectors
from grsd_jax._checks import check_at_least, check_choice, check_shape
from grsd_jax._typing import PyTree
from grsd_jax.dynamics.elapsed_time import MeasuredTime
from grsd_jax.dynamics.soft_shells import RATIONAL_WIDTHS, SoftShells
from grsd_jax.dynamics.spectra import (
    SpectralSnapshot,
    errors_at,
    fingerprint,
    mean_and_change,
    pair_krylov,
    pair_snapshots,
    spectral_snapshot,
    stacked_point,
)
from grsd_jax.dynamics.transport import (
    Counting,
    ExactBalance,
    balance_spectra,
    count_pairs,
)
from grsd_jax.kernel.operator import multiply_at
from grsd_jax.kernel.products import held_products
from grsd_jax.kernel.solver import solver_at
from grsd_jax.linalg.lanczos import LanczosResult, block_lanczos
from grsd_jax.problem import Point, Problem

#: One end: the problem and its parameters, or a snapshot.
End = tuple[Problem, PyTree] | SpectralSnapshot

STARTS = ("both", "mean")


@dataclasses.dataclass(frozen=True)
class KrylovSteps:
    """Lanczos from the errors themselves, at any n.

    Attributes:
        num_steps: Steps m of each run. The lowest edge that converges falls as
            ``lambda_max / m^2``.
        start: ``"both"`` starts from ``e_m`` and ``delta``, exact for steps of any
            size. ``"mean"`` starts from ``e_m`` alone, at half the products, for small
            steps: what is quadratic in ``delta`` is left out.
        num_probes: Random vectors behind the counting velocity, each of which costs as
            many products again; 0 to leave it out, at least 2 for a standard error.
    """

    num_steps: int = 48
    start: Literal["both", "mean"] = "both"
    num_probes: int = 0

    def __post_init__(self) -> None:
        """Checks the options."""
        check_at_least("num_steps", self.num_steps, 4)
        check_choice("start", self.start, STARTS)
        check_at_least("num_probes", self.num_probes, 0)


def exact_balance(
    before: End,
    after: End,
    shells: SoftShells,
    *,
    solver: Literal["auto", "dense"] | KrylovSteps = "auto",
    elapsed: jax.typing.ArrayLike | MeasuredTime | None = None,
    key: jax.Array | None = None,
) -> ExactBalance:
    r"""Returns what happened to the energy of the shells between two snapshots.

    .. math:: E_a^1 - E_a^0 = -D_a + \sum_b T_{ab}

    for a step of any size, by any optimiser, of a network with any activation: no
    derivative is taken. The problems of both ends may differ in their state (BatchNorm
    statistics), not in examples, targets and their order.

    With the dense solver the function is pure and may be jitted, and mapped over runs;
    so may it with `KrylovSteps`. On CPU, outside of `jit`, the Lanczos steps are driven
    from the host, where convolutions are faster. Two snapshots need no solver.

    Args:
        before: ``(problem, params)`` of the first end, or its `spectral_snapshot`.
        after: The same of the second end.
        shells: The shells; with `KrylovSteps` of width 1/2 or 1/3.
        solver: ``"dense"`` for all n pairs; `KrylovSteps`; ``"auto"`` for the cheaper
            of the two.
        elapsed: The time that passed, such as `measured_time` gives it; without it
            there are amounts, but no velocities.
        key: Consumed by `KrylovSteps`, and needed for it alone.

    Returns:
        The balance, with errors from rounding and from the number of Lanczos steps.

    Raises:
        ValueError: If the ends differ in examples, targets or their order (under `jit`
            only the field ``comparable`` says so), in size or dtype; if the shells do
            not suit the solver; or if ``elapsed`` is known to be 0 or less.

    References:
        Ours; ``docs/what_moved.md``.
    """
    moment = _moment(elapsed)
    if isinstance(before, SpectralSnapshot) or isinstance(after, SpectralSnapshot):
        like = before if isinstance(before, SpectralSnapshot) else after
        first, second = (_as_snapshot(end, like, key) for end in (before, after))
        return _between(first, second, shells, moment)
    points = stacked_point(*before), stacked_point(*after)
    prints = fingerprint(before[0]), fingerprint(after[0])
    _check_same_space(*((p.dimension, p.error.dtype) for p in points))
    _check_comparable(*prints)
    if solver == "auto":
        steps = KrylovSteps()
        dense = solver_at(points[0], 4 * steps.num_steps) == "dense"
        solver = "dense" if dense else steps
    if isinstance(solver, KrylovSteps):
        return _by_krylov(points, prints, shells, solver, moment, key)
    check_choice("solver", solver, ("auto", "dense"))
    first, second = spectral_snapshot(*before), spectral_snapshot(*after)
    return _between(first, second, shells, moment, product_rounding(points))


def product_rounding(points: tuple[Point, Point]) -> jax.Array:
    """Returns the rounding of products with the kernels, relative, [].

    The sum of two products with the held Jacobian against one product, taken afresh, of
    the sum: in reduced precision the two round differently. At least epsilon.

    Args:
        points: The problem at the parameters of both ends.

    Returns:
        [].
    """
    columns = mean_and_change(*(errors_at(point) for point in points))
    sizes = jnp.max(jnp.abs(columns), axis=0, keepdims=True)
    columns = columns / jnp.where(sizes > 0, sizes, 1)
    found = [
        _disagreement(
            held_products(point)(columns),
            multiply_at(point, jnp.sum(columns, axis=1, keepdims=True)),
        )
        for point in points
    ]
    return jnp.maximum(*found)


@jax.jit
def _disagreement(products: jax.Array, product: jax.Array) -> jax.Array:
    """Returns ``|M a + M b - M (a + b)|`` over the largest entry, at least epsilon."""
    size = divisor(jnp.max(jnp.abs(products)))
    apart = jnp.sum(products / size, axis=1) - product[:, 0] / size
    eps = jnp.finfo(products.dtype).eps
    return jnp.maximum(jnp.sqrt(jnp.mean(jnp.square(apart))), eps)


def _as_snapshot(end: End, like: End, key: jax.Array | None) -> SpectralSnapshot:
    """Returns the end as a snapshot, with as many pairs as another."""
    if isinstance(end, SpectralSnapshot):
        return end
    assert isinstance(like, SpectralSnapshot)
    size, rank = like.vectors.shape
    num_pairs = None if rank == size else rank
    return spectral_snapshot(*end, num_pairs=num_pairs, key=key)


def _moment(
    elapsed: jax.typing.ArrayLike | MeasuredTime | None,
) -> jax.typing.ArrayLike:
    """Returns the time that passed, NaN if it is unknown."""
    if isinstance(elapsed, MeasuredTime):
        return elapsed.elapsed
    if elapsed is None:
        return float("nan")
    check_shape("elapsed", elapsed, [])
    if not is_traced(elapsed) and np.asarray(elapsed) <= 0:
        raise ValueError(
            f"elapsed: expected a time above 0 between two snapshots, got {elapsed}."
        )
    return elapsed


def _between(
    before: SpectralSnapshot,
    after: SpectralSnapshot,
    shells: SoftShells,
    elapsed: jax.typing.ArrayLike,
    rounding: jax.Array | None = None,
) -> ExactBalance:
    """Returns the balance of two snapshots, after checking that they fit."""
    _check_same_space(*((len(e.error), e.error.dtype) for e in (before, after)))
    _check_comparable(before.fingerprint, after.fingerprint)
    shells = shells.checked(before.error.dtype)
    return _balance_snapshots(before, after, shells, elapsed, rounding)


def _check_same_space(
    before: tuple[int, np.dtype], after: tuple[int, np.dtype]
) -> None:
    """Raises ValueError unless both errors have one size n and dtype."""
    for name, wanted, got in zip(("n =", "dtype"), before, after, strict=True):
        if wanted != got:
            raise ValueError(f"after: expected {name} {wanted} as before, got {got}.")


def _check_comparable(before: jax.Array, after: jax.Array) -> None:
    """Raises ValueError if both fingerprints are known here and differ."""
    if not is_traced((before, after)) and np.any(before != after):
        raise ValueError(
            "after: expected the examples and targets of before, in the same order, "
            "got others."
        )


@jax.jit
def _balance_snapshots(
    before: SpectralSnapshot,
    after: SpectralSnapshot,
    shells: SoftShells,
    elapsed: jax.typing.ArrayLike,
    rounding: jax.Array | None,
) -> ExactBalance:
    size = before.vectors.shape[0]
    ranks = before.vectors.shape[1], after.vectors.shape[1]
    balance = balance_spectra(
        pair_snapshots(before, after),
        shells,
        matched=ranks[0] == ranks[1],
        rounding=rounding,
    )
    counting = None
    if ranks == (size, size):
        counting = count_pairs(before.values, after.values, shells)
    same = jnp.all(before.fingerprint == after.fingerprint)
    return _finished(balance, elapsed, same, counting)


def _finished(
    balance: ExactBalance,
    elapsed: jax.typing.ArrayLike,
    comparable: jax.Array,
    counting: Counting | None,
) -> ExactBalance:
    elapsed = jnp.asarray(elapsed, balance.flux.dtype)
    return dataclasses.replace(
        balance,
        elapsed=jnp.where(elapsed > 0, elapsed, jnp.nan),
        comparable=comparable,
        counting=counting,
    )


def _by_krylov(
    points: tuple[Point, Point],
    prints: tuple[jax.Array, jax.Array],
    shells: SoftShells,
    steps: KrylovSteps,
    elapsed: jax.typing.ArrayLike,
    key: jax.Array | None,
) -> ExactBalance:
    """Returns the balance by Lanczos from the errors of both ends."""
    if key is None:
        raise ValueError("key: expected a PRNG key for KrylovSteps, got None.")
    if shells.width not in RATIONAL_WIDTHS:
        raise ValueError(
            "shells.width: expected 1/2 or 1/3 with KrylovSteps, whose steps would not "
            f"converge for others, got {shells.width}."
        )
    shells = shells.checked(points[0].error.dtype)
    errors_key, probes_key, start_key = jax.random.split(key, 3)
    vectors = mean_and_change(*(errors_at(point) for point in points))
    start = _unit_columns(vectors if steps.start == "both" else vectors[:, :1])
    runs = [_run(point, start, steps, errors_key) for point in points]
    counting = None
    if steps.num_probes:
        shape = (points[0].dimension, steps.num_probes)
        probes = jax.random.normal(start_key, shape, start.dtype)
        counted = [_run(point, probes, steps, probes_key) for point in points]
        counting = count_by_quadrature(*counted, shells)
    return _balance_runs(
        *runs,
        vectors,
        shells,
        product_rounding(points),
        elapsed,
        jnp.all(prints[0] == prints[1]),
        counting,
        steps=steps,
    )


def _run(
    point: Point, start: jax.Array, steps: KrylovSteps, key: jax.Array
) -> LanczosResult:
    traced = is_traced((point.params, point.batches))
    on_host = jax.default_backend() == "cpu" and not traced
    return block_lanczos(
        held_products(point),
        start,
        steps.num_steps,
        key=key,
        driver="host" if on_host else "scan",
    )


@jax.jit
def _unit_columns(vectors: jax.Array) -> jax.Array:
    """Returns columns of norm one: their span matters, not their size."""
    largest = divisor(jnp.max(jnp.abs(vectors), axis=0, keepdims=True))
    return unit_vectors(vectors / largest, axes=0)[0]


@partial(jax.jit, static_argnames="steps")
def _balance_runs(
    before: LanczosResult,
    after: LanczosResult,
    vectors: jax.Array,
    shells: SoftShells,
    rounding: jax.Array,
    elapsed: jax.typing.ArrayLike,
    comparable: jax.Array,
    counting: Counting | None,
    *,
    steps: KrylovSteps,
) -> ExactBalance:
    number = steps.num_steps
    pairings = [
        pair_krylov(before, after, vectors, used)
        for used in (number, 3 * number // 4, number // 2)
    ]
    balance = balance_spectra(
        pairings,
        shells,
        matched=False,
        square=steps.start == "both",
        rounding=rounding,
    )
    balance = _finished(balance, elapsed, comparable, counting)
    finite = balance.finite & before.finite & after.finite
    return dataclasses.replace(balance, finite=finite)


@jax.jit
def count_by_quadrature(
    before: LanczosResult, after: LanczosResult, shells: SoftShells
) -> Counting:
    """Estimates the counts by stochastic Lanczos quadrature.

    Args:
        before: A run of the first kernel, from a block of p random vectors.
        after: A run of the second, from the same block, so that their noise cancels.
        shells: The shells.

    Returns:
        The count, with the standard error over the p vectors; NaN if p = 1.

    References:
        Ubaru, Chen and Saad (2017), "Fast estimation of tr(f(A)) via stochastic Lanczos
        quadrature".
    """
    number, size = before.block_size, before.basis.shape[0]
    above, at_edge = [], []
    for run in (before, after):
        values, rotation = jnp.linalg.eigh(run.tridiagonal)
        weights = size * jnp.square(rotation[:number])
        above.append(matmul(weights, shells.above(values)))
        at_edge.append(matmul(weights, shells.windows(values)))
    moved, density = above[1] - above[0], (at_edge[0] + at_edge[1]) / 2
    mean_moved, mean_density = jnp.mean(moved, axis=0), jnp.mean(density, axis=0)
    share = ratio(mean_moved, mean_density)[None, :]
    spread = jnp.sum(jnp.square(moved - share * density), axis=0)
    stderr = ratio(jnp.sqrt(spread / (number * max(number - 1, 1))), mean_density)
    stderr = stderr if number > 1 else jnp.full_like(stderr, jnp.nan)
    return Counting(mean_moved, mean_density, stderr)
