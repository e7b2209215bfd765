"""The whole measurement in one call: spectrum, coupling, shells and diagnostics.

The pieces are all public; this module puts them in order, chooses the solver, and adds
the two cross-checks that every result carries: how far the pairs are from eigenpairs of
the matrix-free kernel, and how far the exact derivative is from a finite difference.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grsd_jax._arrays import is_traced
from grsd_jax._checks import (
    check_at_least,
    check_choice,
    check_positive,
    check_same_tree,
)
from grsd_jax._memory import default_bytes, naming_what_to_lower
from grsd_jax._typing import Derivative, ErrorFn, PyTree, Reduction
from grsd_jax.jacobian.autodiff import check_problem, evaluate, split_batches
from grsd_jax.jacobian.factored import JacobianForm, uses_factors
from grsd_jax.kernel.dense import kernel_dense, kernel_with_derivative_dense
from grsd_jax.kernel.derivative import DERIVATIVES, central_difference
from grsd_jax.kernel.null_space import class_sums_vanish
from grsd_jax.kernel.operator import REDUCTIONS, error_dimension
from grsd_jax.kernel.products import Problem
from grsd_jax.kernel.solver import SOLVERS, choose_solver
from grsd_jax.linalg.lanczos import LanczosResult, block_lanczos
from grsd_jax.linalg.ritz import RitzPairs, resolved_pairs, ritz_pairs, rounding_bound
from grsd_jax.shells.diagnostics import CouplingMeasurement, diagnose

_HIGHEST = jax.lax.Precision.HIGHEST


class _Krylov(NamedTuple):
    """How Lanczos runs."""

    block_size: int
    num_steps: int
    driver: Literal["auto", "scan", "host"]
    progress: Callable[[int], None] | None


def measure_coupling(
    error_fn: ErrorFn,
    params: PyTree,
    batches: PyTree,
    direction: PyTree,
    *,
    key: jax.Array,
    reduction: Reduction = "mean",
    solver: Literal["auto", "dense", "lanczos"] = "auto",
    jacobian: JacobianForm = "auto",
    derivative: Derivative = "exact",
    step: float | None = None,
    block_size: int = 8,
    num_steps: int = 20,
    driver: Literal["auto", "scan", "host"] = "auto",
    tolerance: float = 0.05,
    floor: float | None = None,
    num_shells: int = 12,
    window: int = 5,
    min_count: int = 1,
    num_bootstrap: int = 1000,
    max_bytes: int | None = None,
    progress: Callable[[int], None] | None = None,
    mesh: Mesh | None = None,
) -> CouplingMeasurement:
    """Measures the shell coupling of the kernel's derivative, with its diagnostics.

    ``M = J J^T`` and ``Mdot`` along ``direction`` at ``params``; eigenpairs of M (all
    of them, or Ritz pairs); ``V^T Mdot V``; log shells; literal and renormalised
    coupling; Toeplitz residuals, whole and in sliding windows; power-law fits.

    Call it eagerly (its programs are compiled once and reused while shapes stay the
    same), or inside `jit`, where nothing is checked but shapes.

    Args:
        error_fn: ``error_fn(params, batch) -> [N, C]``.
        params: Parameters, a pytree of floating arrays.
        batches: A pytree with leading axes ``[K, N]``.
        direction: The tangent d, a tree like ``params``; see `gradient_flow_direction`.
        key: Consumed for the start block and the bootstrap.
        reduction: ``"mean"`` or ``"stack"``.
        solver: ``"dense"`` for all n pairs (examples must be independent),
            ``"lanczos"`` for the leading ``m b``; ``"auto"`` takes the cheaper by
            `choose_solver`.
        jacobian: ``"factored"`` takes J apart by layers (`linen_error_fn`; examples
            must be independent), ``"plain"`` differentiates; ``"auto"`` is factored
            where the error function has factors.
        derivative: ``"exact"`` or ``"finite_difference"``.
        step: Relative step of the difference; see `kernel_derivative`.
        block_size: b. At most n; also the columns differentiated at a time.
        num_steps: m.
        driver: Of the Lanczos run; ``"auto"`` loops on the host on CPU, unless traced.
        tolerance: Largest residual of a resolved pair, relative to its value.
        floor: Smallest resolved value, relative to the largest; ten eps if None.
        num_shells: S.
        window: Shells w in one sliding window.
        min_count: Pairs that a shell needs, lest it be masked.
        num_bootstrap: Resamples behind the intervals of the fits; 0 for none.
        max_bytes: Memory to fill with J, its factors or residuals, and dense matrices;
            half of what is free if None. Lanczos keeps its Jacobian if it fits, and
            linearises anew for every product if not.
        progress: Called with the number of Lanczos steps done; host driver only.
        mesh: A mesh over whose first axis the examples, and the rows of all vectors,
            are spread; its D devices must divide N, and the solver is Lanczos. One
            device if None.

    Returns:
        A `CouplingMeasurement`; with a mesh, ``vectors`` lie on it by rows and
        everything else is on every device.

    Raises:
        ValueError: If a shape, tree, dtype, leading axis or choice does not fit.
        MemoryError: If the device runs out of memory; it names what to lower.

    References:
        Paper 7.2 to 7.5 and B.
    """
    check_choice("solver", solver, SOLVERS)
    check_choice("derivative", derivative, DERIVATIVES)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("driver", driver, ("auto", "scan", "host"))
    _check_numbers(
        {"block_size": block_size, "num_steps": num_steps, "min_count": min_count},
        {"tolerance": tolerance, "floor": floor, "step": step},
    )
    _check_shells(num_shells, window, num_bootstrap)
    problem = Problem(
        error_fn,
        params,
        batches,
        direction,
        reduction,
        derivative,
        step,
        "factored" if uses_factors(error_fn, jacobian) else "plain",
        default_bytes() if max_bytes is None else max_bytes,
        mesh,
    )
    size = _checked_size(problem, block_size)
    if mesh is not None:
        check_choice("solver, with a mesh,", solver, ("auto", "lanczos"))
        problem, solver = problem.placed(), "lanczos"
    elif solver == "auto":
        solver = choose_solver(
            error_fn,
            params,
            batches,
            reduction=reduction,
            num_columns=min(block_size * num_steps, size),
            block_size=block_size,
            jacobian=problem.jacobian,
            max_bytes=problem.max_bytes,
        )
    start_key, bootstrap_key = jax.random.split(key)
    with naming_what_to_lower("max_bytes", "block_size", "num_steps", "batches"):
        if solver == "dense":
            pairs, coupling = _dense_pairs(problem, tolerance, floor)
        else:
            krylov = _Krylov(block_size, num_steps, driver, progress)
            pairs, coupling = _lanczos_pairs(
                problem, krylov, start_key, tolerance, floor
            )
        checks = _cross_checks(problem, pairs, coupling, block_size)
    finite = _all_finite((coupling, pairs.values)) & _problem_finite(problem)
    return diagnose(
        pairs,
        coupling,
        (*checks, finite),
        bootstrap_key,
        labels=(solver, problem.jacobian, derivative, reduction),
        num_shells=num_shells,
        window=window,
        min_count=min_count,
        num_bootstrap=num_bootstrap,
    )


def _check_numbers(counts: dict[str, int], thresholds: dict[str, float | None]) -> None:
    """Checks options before any work is done: counts from 1, thresholds above zero."""
    for name, count in counts.items():
        check_at_least(name, count, 1)
    for name, threshold in thresholds.items():
        if threshold is not None:
            check_positive(name, threshold)


def _check_shells(num_shells: int, window: int, num_bootstrap: int) -> None:
    check_at_least("num_shells", num_shells, 1)
    check_at_least("window", window, 1)
    check_at_least("num_bootstrap", num_bootstrap, 0)
    if window > num_shells:
        raise ValueError(
            f"window: expected at most num_shells = {num_shells}, got {window}."
        )


def _checked_size(problem: Problem, block_size: int) -> int:
    """Returns n, after checking the direction and that a block is not wider than n."""
    check_same_tree("direction", problem.direction, problem.params, "params")
    size = error_dimension(
        problem.error_fn, problem.params, problem.batches, reduction=problem.reduction
    )
    if block_size > size:
        raise ValueError(
            f"block_size: expected at most the error dimension n = {size}, "
            f"got {block_size}."
        )
    return size


def _dense_pairs(
    problem: Problem, tolerance: float, floor: float | None
) -> tuple[RitzPairs, jax.Array]:
    """Returns all n eigenpairs and ``V^T Mdot V``, by the dense solver."""
    fn, params, batches, direction = problem[:4]
    options = {
        "reduction": problem.reduction,
        "jacobian": problem.jacobian,
        "max_jacobian_bytes": max(problem.max_bytes // 4, 1),
    }
    if problem.derivative == "exact":
        kernel, moved = kernel_with_derivative_dense(
            fn, params, batches, direction, **options
        )
    else:
        kernel = kernel_dense(fn, params, batches, **options)
        moved = central_difference(
            lambda p: kernel_dense(fn, p, batches, **options),
            params,
            direction,
            step=problem.step,
        )
    return diagonalize(kernel, moved, tolerance=tolerance, floor=floor)


@partial(jax.jit, static_argnames=("tolerance", "floor"))
def diagonalize(
    kernel: jax.Array, moved: jax.Array, *, tolerance: float, floor: float | None
) -> tuple[RitzPairs, jax.Array]:
    """Returns all n eigenpairs of a dense kernel, and its derivative among them.

    Args:
        kernel: M, ``[n, n]``.
        moved: Mdot, ``[n, n]``.
        tolerance: Largest residual of a resolved pair, relative to its value.
        floor: Smallest resolved value, relative to the largest; ten eps if None.

    Returns:
        The pairs, and ``V^T Mdot V``; nothing is resolved if a number is not finite.
        The bounds of the residuals include the rounding of M itself.
    """
    finite = _all_finite((kernel, moved))
    kernel, moved = (jnp.where(finite, matrix, 0) for matrix in (kernel, moved))
    values, vectors = jnp.linalg.eigh(kernel)
    values, vectors = values[::-1], vectors[:, ::-1]
    left_over = jnp.matmul(kernel, vectors, precision=_HIGHEST) - vectors * values[None]
    residuals = jnp.linalg.norm(left_over, axis=0)
    resolved = resolved_pairs(values, residuals, tolerance=tolerance, floor=floor)
    coupling = jnp.matmul(
        vectors.T, jnp.matmul(moved, vectors, precision=_HIGHEST), precision=_HIGHEST
    )
    bounds = residuals + rounding_bound(len(values), values.dtype) * jnp.max(values)
    return RitzPairs(values, vectors, bounds, resolved & finite), coupling


def _lanczos_pairs(
    problem: Problem,
    krylov: _Krylov,
    key: jax.Array,
    tolerance: float,
    floor: float | None,
) -> tuple[RitzPairs, jax.Array]:
    """Returns the Ritz pairs and ``V^T Mdot V``, projected b columns at a time."""
    run = _lanczos_run(problem, krylov, key)
    pairs = _ritz_pairs(run, tolerance=tolerance, floor=floor)
    coupling = problem.projected_derivative(
        pairs.vectors, problem.derivative, krylov.block_size
    )
    return pairs, coupling


def _lanczos_run(problem: Problem, krylov: _Krylov, key: jax.Array) -> LanczosResult:
    """Runs block Lanczos from a Gaussian block free of the softmax null space."""
    fn, params, batches = problem[:3]
    traced = is_traced((params, batches))
    start_key, probe_key, lanczos_key = jax.random.split(key, 3)
    error = check_problem(fn, params, batches)
    size = error_dimension(fn, params, batches, reduction=problem.reduction)
    shape = (size, krylov.block_size)
    start = jax.random.normal(start_key, shape, error.dtype)
    centered = class_sums_vanish(fn, params, batches, probe_key)
    by_class = start.reshape(-1, error.shape[1], krylov.block_size)
    free = by_class - jnp.mean(by_class, axis=1, keepdims=True)
    start = jnp.where(centered, free.reshape(shape), start)
    driver = krylov.driver
    if driver == "auto":
        on_cpu = jax.default_backend() == "cpu"
        driver = "host" if on_cpu and not traced else "scan"
    return block_lanczos(
        problem.products(),
        problem.by_rows(start),
        krylov.num_steps,
        key=lanczos_key,
        driver=driver,
        progress=krylov.progress,
    )


_ritz_pairs = partial(jax.jit, static_argnames=("tolerance", "floor"))(ritz_pairs)


def _cross_checks(
    problem: Problem, pairs: RitzPairs, coupling: jax.Array, block_size: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the secant's and the matrix-free operator's disagreement."""
    leading = pairs.vectors[:, :block_size]
    first = coupling[:block_size, :block_size]
    exact = problem.derivative == "exact"
    other_method: Derivative = "finite_difference" if exact else "exact"
    other = problem.projected_derivative(leading, other_method, block_size)
    difference = other if exact else first
    product = problem.matmat(leading)
    expected = leading * pairs.values[None, :block_size]
    return (
        _ratio(jnp.linalg.norm(first - other), jnp.linalg.norm(difference)),
        _ratio(
            jnp.max(jnp.linalg.norm(product - expected, axis=0)),
            jnp.max(jnp.abs(pairs.values)),
        ),
    )


def _problem_finite(problem: Problem) -> jax.Array:
    errors = [
        evaluate(problem.error_fn, problem.params, batch)
        for batch in split_batches(problem.batches)
    ]
    return _all_finite((errors, problem.params, problem.direction))


@jax.jit
def _all_finite(tree: PyTree) -> jax.Array:
    checks = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(checks))


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Divides, with 0 for 0 / 0."""
    positive = denominator > 0
    return jnp.where(
        positive, numerator / jnp.where(positive, denominator, 1), numerator
    )
