"""The exact energy balance between two snapshots of a training.

`exact_balance` finds the spectra of both kernels in the form that fits, all eigenpairs
or Krylov spaces of the two errors, and takes the balance of
`grsd_jax.dynamics.transport`.
"""

import dataclasses
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import divisor, is_traced, matmul, norm, ratio, unit_vectors
from grsd_jax._checks import (
    check_at_least,
    check_choice,
    check_key,
    check_real,
    check_shape,
    check_single_or_double,
    make_plain,
)
from grsd_jax._typing import PyTree
from grsd_jax.dynamics.elapsed_time import MeasuredTime, time_or_zero
from grsd_jax.dynamics.fingerprint import fingerprint
from grsd_jax.dynamics.spectra import (
    SpectralSnapshot,
    dense_snapshot,
    errors_at,
    mean_and_change,
    pair_krylov,
    pair_snapshots,
    product_rounding,
    spectral_snapshot,
    stacked_point,
)
from grsd_jax.dynamics.transport import (
    ERRORS,
    Counting,
    ExactBalance,
    balance_spectra,
    count_pairs,
)
from grsd_jax.kernel.mesh import layout_of
from grsd_jax.kernel.products import held_products
from grsd_jax.kernel.solver import solver_at
from grsd_jax.linalg.lanczos import LanczosResult, block_lanczos
from grsd_jax.problem import Point, Problem
from grsd_jax.results import with_undefined
from grsd_jax.shells.soft_shells import RATIONAL_WIDTHS, SoftShells

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
            steps: what is quadratic in ``delta`` is left out, and no edge converges if
            ``delta`` is longer than ``e_m``.
        num_probes: Random vectors behind the counting velocity, each of which costs as
            many products again; 0 to leave it out, at least 2 for a standard error.
    """

    num_steps: int = 48
    start: Literal["both", "mean"] = "both"
    num_probes: int = 0

    def __post_init__(self) -> None:
        """Checks the options."""
        make_plain(self)
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

    for a step of any size, by any optimizer, of a network with any activation: no
    derivative is taken. The problems of both ends may differ in their state (BatchNorm
    statistics), not in examples, targets and their order, or in the loss.

    With the dense solver the function is pure and may be jitted, and mapped over runs;
    so may it with `KrylovSteps`. On CPU, outside of `jit`, the Lanczos steps are driven
    from the host, where convolutions are faster. Two snapshots need no solver.

    Args:
        before: ``(problem, params)`` of the first end, or its `spectral_snapshot`.
        after: The same of the second end.
        shells: The shells; with `KrylovSteps` of width 1/2 or 1/3.
        solver: ``"dense"`` for all n pairs; `KrylovSteps`; ``"auto"`` for the cheaper
            of the two. Steps without probes, as those of ``"auto"``, count nothing.
        elapsed: The time that passed, such as `measured_time` gives it; without it
            there are amounts, but no velocities.
        key: Consumed by `KrylovSteps`, and needed for it alone.

    Returns:
        The balance, with errors from rounding and from the number of Lanczos steps.

    Raises:
        ValueError: If the ends differ in examples, targets, their order or the name of
            the loss (under `jit` only the field ``comparable`` says so), in size or
            dtype; if the shells do not suit the solver; or if ``elapsed`` is known to
            be infinite, 0 or less.

    References:
        Ours; ``docs/what_moved.md``.
    """
    moment = _moment(elapsed)
    if isinstance(before, SpectralSnapshot) or isinstance(after, SpectralSnapshot):
        like = before if isinstance(before, SpectralSnapshot) else after
        first, second = (_as_snapshot(end, like, key) for end in (before, after))
        return with_undefined(_between(first, second, shells, moment))
    points = stacked_point(*before), stacked_point(*after)
    prints = fingerprint(before[0]), fingerprint(after[0])
    check_same_ends(points, prints)
    if solver == "auto":
        solver = cheaper_solver(points[0], shells.width, KrylovSteps())
    if isinstance(solver, KrylovSteps):
        key = check_key(key, "KrylovSteps")
        check_rational(shells)
        shells = shells.checked(points[0].error.dtype)
        spaces = krylov_spaces(points, solver, key)
        same = jnp.all(prints[0] == prints[1])
        balance = balance_spaces(spaces, shells, moment, same, steps=solver)
        return with_undefined(balance)
    check_choice("solver", solver, ("auto", "dense"))
    first, second = map(dense_snapshot, points, prints)
    return with_undefined(_between(first, second, shells, moment))


def cheaper_solver(
    point: Point, width: float, steps: KrylovSteps
) -> Literal["dense"] | KrylovSteps:
    """Returns the solver that needs fewer operations, dense if Lanczos cannot.

    Args:
        point: The problem at its parameters.
        width: That of the shells.
        steps: How Lanczos would run.

    Returns:
        The solver.
    """
    if width not in RATIONAL_WIDTHS:
        return "dense"
    # Both runs of a measurement with derivative, which the rule counts.
    return "dense" if solver_at(point, 2 * steps.num_steps) == "dense" else steps


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
    """Returns the time that passed, 0 if it is unknown."""
    if isinstance(elapsed, MeasuredTime):
        return time_or_zero(elapsed)
    if elapsed is None:
        return 0.0
    check_shape("elapsed", elapsed, [])
    check_real("elapsed", elapsed)
    if not is_traced(elapsed) and (np.asarray(elapsed) <= 0 or np.isinf(elapsed)):
        raise ValueError(
            f"elapsed: expected a finite time above 0 between two snapshots, got "
            f"{elapsed}."
        )
    return elapsed


def _between(
    before: SpectralSnapshot,
    after: SpectralSnapshot,
    shells: SoftShells,
    elapsed: jax.typing.ArrayLike,
) -> ExactBalance:
    """Returns the balance of two snapshots, after checking that they fit."""
    _check_snapshot("before", before)
    _check_snapshot("after", after)
    _check_same_space(*((len(e.error), e.error.dtype) for e in (before, after)))
    _check_comparable(before.fingerprint, after.fingerprint)
    shells = shells.checked(before.error.dtype)
    return balance_snapshots(before, after, shells, elapsed)


def check_same_ends(
    points: tuple[Point, Point], prints: tuple[jax.Array, jax.Array]
) -> None:
    """Raises ValueError unless two points have one size, dtype and set of examples."""
    _check_same_space(*((point.dimension, point.error.dtype) for point in points))
    _check_comparable(*prints)


def _check_snapshot(name: str, snapshot: SpectralSnapshot) -> None:
    """Raises ValueError unless a snapshot's arrays have one n, one r and one dtype."""
    check_shape(f"{name}.error", snapshot.error, [None])
    check_shape(f"{name}.values", snapshot.values, [None])
    size = [len(snapshot.error), len(snapshot.values)]
    check_shape(f"{name}.vectors", snapshot.vectors, size)
    for part in ("rounding", "complete"):
        check_shape(f"{name}.{part}", getattr(snapshot, part), [])
    wanted = jnp.result_type(snapshot.error)
    check_single_or_double(f"{name}.error", wanted)
    for part in ("values", "vectors"):
        got = jnp.result_type(getattr(snapshot, part))
        if got != wanted:
            raise ValueError(
                f"{name}.{part}: expected dtype {wanted}, that of the error, got {got}."
            )


def _check_same_space(
    before: tuple[int, np.dtype], after: tuple[int, np.dtype]
) -> None:
    """Raises ValueError unless both errors have one size n and dtype."""
    for name, wanted, got in zip(("n =", "dtype"), before, after, strict=True):
        if wanted != got:
            raise ValueError(f"after: expected {name} {wanted} as before, got {got}.")


def _check_comparable(before: jax.Array, after: jax.Array) -> None:
    """Raises ValueError if both fingerprints are known here and differ."""
    if is_traced((before, after)):
        return
    # In NumPy, since inside of `jit` any operation on known arrays is traced too.
    if np.any(np.asarray(before) != np.asarray(after)):
        raise ValueError(
            "after: expected the examples and targets of before, in the same order, "
            "and its loss, got others."
        )


@jax.jit
def balance_snapshots(
    before: SpectralSnapshot,
    after: SpectralSnapshot,
    shells: SoftShells,
    elapsed: jax.typing.ArrayLike,
) -> ExactBalance:
    """Returns the balance of two snapshots that fit.

    Args:
        before: The first.
        after: The second.
        shells: The shells, checked.
        elapsed: [], the time that passed, 0 if it is unknown.

    Returns:
        The balance.
    """
    size = before.vectors.shape[0]
    ranks = before.vectors.shape[1], after.vectors.shape[1]
    balance = balance_spectra(
        pair_snapshots(before, after),
        shells,
        matched=ranks[0] == ranks[1],
        closest=-1,  # the rest may lie as high as the last pair
        rounding=jnp.maximum(before.rounding, after.rounding),
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
        elapsed=jnp.where((elapsed > 0) & jnp.isfinite(elapsed), elapsed, 0),
        comparable=comparable,
        counting=counting,
    )


class KrylovSpaces(NamedTuple):
    """The Lanczos runs of both kernels, from the same blocks.

    Attributes:
        before: The run of the first kernel, from the errors.
        after: That of the second.
        vectors: ``[n, 2]``, ``e_m`` and ``delta``.
        rounding: [], of products with the kernels, relative.
        counted: Both runs from random vectors; empty if nothing is counted.
    """

    before: LanczosResult
    after: LanczosResult
    vectors: jax.Array
    rounding: jax.Array
    counted: tuple[LanczosResult, ...]


def check_rational(shells: SoftShells) -> None:
    """Raises ValueError unless a few Lanczos steps can apply the shells' steps."""
    if shells.width not in RATIONAL_WIDTHS:
        raise ValueError(
            "shells.width: expected 1/2 or 1/3 with KrylovSteps, whose steps would not "
            f"converge for others, got {shells.width}."
        )


def krylov_spaces(
    points: tuple[Point, Point], steps: KrylovSteps, key: jax.Array
) -> KrylovSpaces:
    """Runs Lanczos from the errors of both ends.

    Args:
        points: The problem at both ends.
        steps: How long, and from what.
        key: Consumed.

    Returns:
        The runs.
    """
    probes_key, key = jax.random.split(key)
    vectors = mean_and_change(*(errors_at(point) for point in points))
    start = _unit_columns(vectors if steps.start == "both" else vectors[:, :1])
    shape = (points[0].dimension, steps.num_probes)
    probes = jax.random.normal(probes_key, shape, vectors.dtype)
    starts = [start, probes][: 2 if steps.num_probes else 1]
    widest = max(block.shape[1] for block in starts)
    if widest > shape[0]:
        raise ValueError(
            "solver: expected no more start vectors or probes than n = "
            f"{shape[0]} errors, got {widest}."
        )
    # One end after the other, so that the Jacobian of one is held at a time.
    (first, *counted), (second, *counted_after) = (
        _runs(point, starts, steps.num_steps, key) for point in points
    )
    rounding = [
        product_rounding(point, *_first_product(run))
        for point, run in zip(points, (first, second), strict=True)
    ]
    runs = (*counted, *counted_after)
    return KrylovSpaces(first, second, vectors, jnp.maximum(*rounding), runs)


def _runs(
    point: Point, starts: list[jax.Array], num_steps: int, key: jax.Array
) -> list[LanczosResult]:
    """Returns a run from each start block, with one held Jacobian."""
    matmat, layout = held_products(point), layout_of(point)
    if layout is not None:
        starts = [jax.device_put(start, layout.row_sharding) for start in starts]
    on_host = jax.default_backend() == "cpu" and not is_traced(
        (point.params, point.batches)
    )
    driver = "host" if on_host else "scan"
    return [
        block_lanczos(matmat, start, num_steps, key=key, driver=driver)
        for start in starts
    ]


def krylov_space(
    point: Point, vector: jax.Array, steps: KrylovSteps, key: jax.Array
) -> LanczosResult:
    """Runs Lanczos at one point from one vector.

    Args:
        point: The problem at its parameters.
        vector: ``[n]``.
        steps: How long.
        key: Consumed.

    Returns:
        The run.
    """
    start = _unit_columns(vector[:, None])
    return _runs(point, [start], steps.num_steps, key)[0]


@partial(jax.jit, static_argnames="number")
def leading_ritz_values(run: LanczosResult, *, number: int) -> jax.Array:
    """Returns the leading Ritz values of a run, descending, padded with zeros."""
    values = jnp.linalg.eigvalsh(run.tridiagonal)[::-1][:number]
    return jnp.pad(values, (0, number - len(values)))


@jax.jit
def _first_product(run: LanczosResult) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of the first block's columns, and its product with M."""
    width = run.block_size
    column = jnp.sum(run.basis[:, :width], axis=1)
    return column, matmul(run.basis, jnp.sum(run.tridiagonal[:, :width], axis=1))


@jax.jit
def _unit_columns(vectors: jax.Array) -> jax.Array:
    """Returns columns of norm one: their span matters, not their size."""
    largest = divisor(jnp.max(jnp.abs(vectors), axis=0, keepdims=True))
    return unit_vectors(vectors / largest, axes=0)[0]


@partial(jax.jit, static_argnames="steps")
def balance_spaces(
    spaces: KrylovSpaces,
    shells: SoftShells,
    elapsed: jax.typing.ArrayLike,
    comparable: jax.Array,
    *,
    steps: KrylovSteps,
) -> ExactBalance:
    """Returns the balance of two kernels by their Krylov spaces.

    Args:
        spaces: The runs of both kernels.
        shells: The shells, checked.
        elapsed: [], the time that passed, 0 if it is unknown.
        comparable: [] bool, whether both ends hold the same examples.
        steps: What the runs were made with.

    Returns:
        The balance.
    """
    before, after, number = spaces.before, spaces.after, steps.num_steps
    counting = None
    if spaces.counted:
        counting = count_by_quadrature(*spaces.counted, shells)
    pairings = [
        pair_krylov(before, after, spaces.vectors, used)
        for used in (number, 3 * number // 4, number // 2)
    ]
    balance = balance_spectra(
        pairings,
        shells,
        matched=False,
        square=steps.start == "both",
        change=norm(spaces.vectors[:, 1]) if steps.start == "mean" else None,
        rounding=spaces.rounding,
    )
    if steps.start == "mean":
        balance = _unless_distant(balance, spaces.vectors)
    balance = _finished(balance, elapsed, comparable, counting)
    finite = balance.finite & before.finite & after.finite
    return dataclasses.replace(balance, finite=finite)


def _unless_distant(balance: ExactBalance, vectors: jax.Array) -> ExactBalance:
    """Returns a balance without convergence where ``delta`` is longer than ``e_m``.

    What is quadratic in it is then no small part, and most of it is not seen.
    """
    mean, change = norm(vectors, 0)
    small = change <= mean
    changes: dict[str, Any] = {
        name: jnp.where(small, getattr(balance, name), jnp.inf) for name in ERRORS
    }
    return dataclasses.replace(balance, converged=balance.converged & small, **changes)


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
        The count, with the standard error over the p vectors, infinite if p = 1, and
        with what three quarters and half of the steps change.

    References:
        Ubaru, Chen and Saad (2017), "Fast estimation of tr(f(A)) via stochastic Lanczos
        quadrature".
    """
    width, size = before.block_size, before.basis.shape[0]
    number = len(before.tridiagonal) // width

    def counted(used: int) -> tuple[jax.Array, jax.Array]:
        above, at_edge = [], []
        for run in (before, after):
            leading = run.tridiagonal[: used * width, : used * width]
            values, rotation = jnp.linalg.eigh(leading)
            weights = size * jnp.square(rotation[:width])
            above.append(matmul(weights, shells.above(values)))
            at_edge.append(matmul(weights, shells.windows(values)))
        return above[1] - above[0], (at_edge[0] + at_edge[1]) / 2

    (moved, density), *coarser = map(counted, (number, 3 * number // 4, number // 2))
    mean_moved, mean_density = jnp.mean(moved, axis=0), jnp.mean(density, axis=0)
    share = ratio(mean_moved, mean_density)
    spread = jnp.sum(jnp.square(moved - share[None, :] * density), axis=0)
    stderr = ratio(jnp.sqrt(spread / (width * max(width - 1, 1))), mean_density)
    stderr = stderr if width > 1 else jnp.full_like(stderr, jnp.inf)
    apart = jnp.stack(
        [
            jnp.abs(ratio(jnp.mean(part, axis=0), jnp.mean(at_edge, axis=0)) - share)
            for part, at_edge in coarser
        ]
    )
    return Counting(
        mean_moved,
        mean_density,
        stderr=stderr,
        error=stderr + jnp.sum(apart, axis=0),
        converged=jnp.all(apart <= stderr[None, :], axis=0) & jnp.isfinite(stderr),
    )
