"""The whole measurement in one call: spectrum, coupling, shells and diagnostics.

The pieces are all public; this module puts them in order, chooses the solver, and adds
the cross-checks that every result carries: how far the pairs' values are from those of
the plain kernel, how far the exact derivative is from a finite difference, and how much
of the error lies outside the pairs.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import all_finite, is_traced, magnitude, matmul, norm, ratio
from grsd_jax._checks import check_choice, check_key, check_type
from grsd_jax._memory import check_fits, waits_for_memory
from grsd_jax._typing import Matmat, PyTree
from grsd_jax.jacobian.plan import plan_of, stray_rows, verdict_of
from grsd_jax.kernel.dense import check_dense_fits, dense_at
from grsd_jax.kernel.derivative import (
    Derivative,
    central_difference,
    gradient_flow_direction,
    project_kernel,
    usable_step,
)
from grsd_jax.kernel.mesh import layout_of
from grsd_jax.kernel.null_space import free_start
from grsd_jax.kernel.products import (
    held_factors,
    held_products,
    projected_derivative,
)
from grsd_jax.kernel.solver import COLUMNS_A_PAIR, Lanczos, solver_at
from grsd_jax.linalg.eigenpairs import leading_eigenpairs
from grsd_jax.linalg.lanczos import block_lanczos
from grsd_jax.linalg.ritz import (
    RitzPairs,
    default_floor,
    descending_pairs,
    resolved_pairs,
    ritz_pairs,
    rounding_bound,
    small_rounding,
)
from grsd_jax.objective import evaluate
from grsd_jax.problem import Point, Problem, misfits, point_at
from grsd_jax.shells.diagnostics import (
    CouplingMeasurement,
    CrossChecks,
    Labels,
    diagnose,
)
from grsd_jax.shells.options import Binning, Window

#: What a measurement accepts as its solver.
Solver = Literal["auto", "dense", "lanczos"] | Lanczos

#: Pairs at first, where a floor ends the window and not a number.
_FIRST_PAIRS = 64


@waits_for_memory("solver.block_size", "solver.num_steps", "batches")
def measure_coupling(
    problem: Problem,
    params: PyTree,
    direction: PyTree | None = None,
    *,
    key: jax.Array,
    solver: Solver = "auto",
    window: Window = Window(),
    shells: Binning = Binning(),
    derivative: Derivative = Derivative(),
    progress: Callable[[int], None] | None = None,
) -> CouplingMeasurement:
    """Measures the shell coupling of the kernel's derivative, with its diagnostics.

    ``M = J J^T`` and ``Mdot`` along ``direction`` at ``params``; the eigenpairs of M in
    the spectral window; ``V^T Mdot V``; log shells; literal and renormalized coupling;
    Toeplitz residuals, whole and in sliding windows; power-law fits.

    The window decides what is measured, the solver only how: both measure the same
    pairs. Lanczos runs until they have converged. ``num_missing`` counts those that did
    not, and ``unresolved_share`` is the share of the error outside the pairs.

    Where the pairs that the error lies in are too many to compute, or lie too close
    together to converge, ``measure_stochastic_coupling(...).toeplitz()`` gives the
    Toeplitz residuals of the spectrum down to a lowest edge without them.

    Call it eagerly (its programs are compiled once and reused while shapes stay the
    same), or inside `jit`, where nothing is checked but shapes.

    Args:
        problem: The problem. If its batches lie on a mesh (see `shard_batches`), each
            device takes its own examples, and the solver is Lanczos.
        params: Parameters.
        direction: The tangent d, a tree like ``params``; the gradient flow of the
            problem's loss if None.
        key: Consumed for the start block and the bootstrap.
        solver: ``"dense"`` (examples must be independent), ``"lanczos"`` or a
            `Lanczos`; ``"auto"`` takes the cheaper by `choose_solver`.
        window: Which pairs are measured, by default the leading 100. More are asked for
            by name: ``Window(num_pairs=400)``, or ``Window(num_pairs=None)`` for all.
        shells: The shells, and what is computed from them.
        derivative: How Mdot is computed, and whether it and M are cross-checked.
        progress: Called with the number of Lanczos steps done, where the steps are
            driven from the host (on a CPU, outside `jit`).

    Returns:
        A `CouplingMeasurement`; with a mesh, ``vectors`` lie on it by rows and
        everything else is on every device.

    Raises:
        ValueError: If a shape, tree, dtype, leading axis or choice does not fit.
        MemoryError: If what is asked for is larger than all memory, before any work, or
            the device runs out of it; it names what to lower.

    References:
        Paper 7.2 to 7.5 and B.
    """
    for name, given, kind in (
        ("window", window, Window),
        ("shells", shells, Binning),
        ("derivative", derivative, Derivative),
    ):
        check_type(name, given, kind)
    check_key(key)
    if direction is None:
        direction = gradient_flow_direction(problem, params)
    point = point_at(problem, params, direction)
    if derivative.method != "exact" or derivative.cross_checked:
        usable_step(point.params, derivative.step)
    lanczos = _resolved(solver, point, window)
    _check_sizes(point, lanczos, window, shells)
    width = min((lanczos or Lanczos()).block_size, point.dimension)
    start_key, bootstrap_key = jax.random.split(key)
    if lanczos is None:
        plan = plan_of(point)
        pairs, coupling = _dense_pairs(point, window, derivative)
        complete = jnp.bool_(True)
    else:
        plan = held_factors(point)
        pairs, complete = _lanczos_pairs(point, lanczos, window, start_key, progress)
        coupling = projected_derivative(point, pairs.vectors, derivative, width)
    pairs = leading_pairs(pairs, window)
    checks = _cross_checks(point, pairs, coupling, derivative, width, window)
    checks = checks._replace(complete=complete)
    labels = Labels(
        "dense" if lanczos is None else "lanczos",
        "plain" if plan is None else "factored",
        derivative.method,
        point.reduction,
        verdict_of(point).coupled,
        window,
    )
    return diagnose(
        pairs, coupling, checks, bootstrap_key, labels=labels, binning=shells
    )


def _resolved(solver: Solver, point: Point, window: Window) -> Lanczos | None:
    """Returns how Lanczos runs, or None for the dense solver."""
    on_mesh = layout_of(point) is not None
    if isinstance(solver, Lanczos):
        if solver.block_size > point.dimension:
            raise ValueError(
                "block_size: expected at most the error dimension "
                f"n = {point.dimension}, got {solver.block_size}."
            )
        return solver
    choices = ("auto", "lanczos") if on_mesh else ("auto", "dense", "lanczos")
    named = "solver, with batches on a mesh," if on_mesh else "solver"
    check_choice(named, solver, choices)
    default = Lanczos(min(Lanczos().block_size, point.dimension))
    if solver == "auto" and not on_mesh:
        solver = solver_at(point, _num_columns(point, default, window))
    return None if solver == "dense" else default


def _num_columns(point: Point, lanczos: Lanczos, window: Window) -> int:
    """Returns how many columns Lanczos is expected to need, a multiple of its block."""
    n, width = point.dimension, lanczos.block_size
    if lanczos.num_steps is not None:
        return width * lanczos.num_steps
    wanted = n if window.num_pairs is None else COLUMNS_A_PAIR * window.num_pairs
    return width * -(-min(wanted, n) // width)


def _check_sizes(
    point: Point, lanczos: Lanczos | None, window: Window, shells: Binning
) -> None:
    """Raises MemoryError, before any work, if what is asked for cannot fit."""
    n, itemsize = point.dimension, point.error.dtype.itemsize
    pairs = n
    if lanczos is None:
        check_dense_fits(point, extra=2)  # V, and the derivative in its terms
    elif layout_of(point) is None:
        pairs = _num_columns(point, lanczos, window)
        given = lanczos.num_steps is not None
        lower = "num_steps or block_size of Lanczos" if given else "num_pairs of Window"
        check_fits(
            f"solver: a basis and Ritz vectors of {pairs} columns of n = {n}",
            2.0 * pairs * n * itemsize,
            f"lower {lower}",
            "measure fewer batches or examples",
        )
    check_fits(
        f"shells: {shells.num_bootstrap} resamples of {pairs} pairs",
        float(shells.num_bootstrap) * pairs * itemsize,
        "lower num_bootstrap of Binning",
    )


def _dense_pairs(
    point: Point, window: Window, derivative: Derivative
) -> tuple[RitzPairs, jax.Array]:
    """Returns all n eigenpairs and ``V^T Mdot V``, by the dense solver."""
    if derivative.method == "exact":
        kernel, moved = dense_at(point)
    else:
        still = dataclasses.replace(point, direction=None)
        (kernel,) = dense_at(still)
        moved = central_difference(
            lambda p: dense_at(still.moved(p))[0],
            point.params,
            point.direction,
            step=derivative.step,
        )
    return diagonalize(kernel, moved, tolerance=window.tolerance, floor=window.floor)


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
        The pairs, and ``V^T Mdot V``; if a number is not finite, nothing is resolved,
        and the derivative is NaN. The bounds of the residuals include the rounding of M
        itself.
    """
    finite = all_finite((kernel, moved))
    kernel, moved = (jnp.where(finite, matrix, 0) for matrix in (kernel, moved))
    values, vectors = descending_pairs(kernel)
    residuals = norm(matmul(kernel, vectors) - vectors * values[None], 0)
    resolved = resolved_pairs(values, residuals, tolerance=tolerance, floor=floor)
    coupling = matmul(vectors.T, matmul(moved, vectors))
    coupling = jnp.where(finite, coupling, jnp.nan)  # not zeros to believe
    bounds = residuals + rounding_bound(len(values), values.dtype) * jnp.max(values)
    return RitzPairs(values, vectors, bounds, resolved & finite), coupling


def leading_pairs(pairs: RitzPairs, window: Window) -> RitzPairs:
    """Returns the pairs, with only the leading ``num_pairs`` still resolved."""
    if window.num_pairs is None:
        return pairs
    return pairs._replace(resolved=_only_leading(pairs.resolved, window.num_pairs))


@partial(jax.jit, static_argnums=1)
def _only_leading(resolved: jax.Array, count: int) -> jax.Array:
    return resolved & (jnp.arange(len(resolved)) < count)


@partial(jax.jit, static_argnames=("size", "window"))
def missing_pairs(pairs: RitzPairs, size: int, window: Window) -> jax.Array:
    """Counts the pairs of the window that are not resolved, [] int32.

    Args:
        pairs: The pairs that were found, in descending order.
        size: The dimension n.
        window: The window.

    Returns:
        The count, with those that the solver did not come to. How many these are is not
        known if a floor ends the window: then they count as one.
    """
    rank = len(pairs.values)
    wanted = size if window.num_pairs is None else min(window.num_pairs, size)
    floor = window.floor or default_floor(pairs.values.dtype)
    above = pairs.values > floor * jnp.max(pairs.values, initial=0)
    inside = above & (jnp.arange(rank) < wanted)
    beyond = wanted - rank if window.num_pairs is not None else 1
    unseen = jnp.where(above[-1] & (rank < wanted), beyond, 0)
    missing = jnp.sum(inside & ~pairs.resolved) + unseen
    return missing.astype(jnp.int32)


def _lanczos_pairs(
    point: Point,
    lanczos: Lanczos,
    window: Window,
    key: jax.Array,
    progress: Callable[[int], None] | None,
) -> tuple[RitzPairs, jax.Array | None]:
    """Returns leading pairs by block Lanczos: converged, or of a number of steps.

    And whether no copy of a value is missing, None after a number of steps.
    """
    start_key, probe_key, lanczos_key = jax.random.split(key, 3)
    shape = (point.dimension, lanczos.block_size)
    start = jax.random.normal(start_key, shape, point.error.dtype)
    start = free_start(point, start, probe_key)
    layout = layout_of(point)
    if layout is not None:
        start = jax.device_put(start, layout.row_sharding)
    traced = is_traced((point.params, point.batches))
    matmat = held_products(point)
    if lanczos.num_steps is None and not traced:
        return _converged_pairs(matmat, start, window, lanczos_key, progress)
    num_steps = _num_columns(point, lanczos, window) // lanczos.block_size
    on_host = jax.default_backend() == "cpu" and not traced
    run = block_lanczos(
        matmat,
        start,
        num_steps,
        key=lanczos_key,
        driver="host" if on_host else "scan",
        progress=progress,
    )
    return _ritz_pairs(run, tolerance=window.tolerance, floor=window.floor), None


def _converged_pairs(
    matmat: Matmat,
    start: jax.Array,
    window: Window,
    key: jax.Array,
    progress: Callable[[int], None] | None,
) -> tuple[RitzPairs, jax.Array]:
    """Returns the pairs of the window, from as many steps as they need.

    And whether no copy of a value is missing.
    """
    size = start.shape[0]
    floor = window.floor or default_floor(start.dtype)
    num_pairs = min(window.num_pairs or _FIRST_PAIRS, size)
    while True:
        found = leading_eigenpairs(
            matmat,
            start,
            num_pairs,
            key=key,
            tolerance=window.tolerance,
            progress=progress,
        )
        above = found.values > floor * found.values[0]
        if window.num_pairs is not None or num_pairs == size or not above[-1]:
            # What has converged to the rounding of small pairs is not accurate yet.
            rounding = small_rounding(start.dtype) * found.values[0]
            accurate = rounding <= window.tolerance * found.values
            resolved = found.converged & above & accurate
            pairs = RitzPairs(found.values, found.vectors, found.residuals, resolved)
            return pairs, found.proven
        num_pairs = min(2 * num_pairs, size)


_ritz_pairs = partial(jax.jit, static_argnames=("tolerance", "floor"))(ritz_pairs)


def _cross_checks(
    point: Point,
    pairs: RitzPairs,
    coupling: jax.Array,
    derivative: Derivative,
    width: int,
    window: Window,
) -> CrossChecks:
    """Returns what a measurement says of its own accuracy."""
    # A NaN that a program returns would stop it under `jax_debug_nans`.
    unmade = np.inf if is_traced(coupling) else np.nan
    secant = operator = jax.device_put(np.asarray(unmade, pairs.values.dtype))
    if derivative.cross_checked:
        secant = _secant_disagreement(point, pairs, coupling, derivative, width)
        leading, values = pairs.vectors[:, :width], pairs.values
        apart = project_kernel(point, leading) - jnp.diag(values[:width])
        operator = jnp.max(jnp.abs(apart)) / jnp.max(jnp.abs(values))
    errors = [evaluate(point.error_fn, point.params, batch) for batch in point.parts]
    stack = point.reduction == "stack"
    numbers = (coupling, pairs.values, errors, point.params, point.direction)
    return CrossChecks(
        secant_disagreement=secant,
        operator_disagreement=operator,
        unresolved_share=_unresolved_share(pairs, errors, stack=stack),
        num_missing=missing_pairs(pairs, point.dimension, window),
        num_misfits=misfits(point) + stray_rows(point),
        finite=all_finite(numbers),
        complete=None,
    )


def _secant_disagreement(
    point: Point,
    pairs: RitzPairs,
    coupling: jax.Array,
    derivative: Derivative,
    width: int,
) -> jax.Array:
    """Returns ``|F - X|_F / |F|_F`` of finite difference and exact derivative."""
    first = coupling[:width, :width]
    exact = derivative.method == "exact"
    method = "finite_difference" if exact else "exact"
    other_method = dataclasses.replace(derivative, method=method)
    other = projected_derivative(point, pairs.vectors[:, :width], other_method, width)
    return norm(first - other) / norm(other if exact else first)


@partial(jax.jit, static_argnames="stack")
def _unresolved_share(
    pairs: RitzPairs, errors: list[jax.Array], *, stack: bool
) -> jax.Array:
    """Returns ``1 - |V^T e|^2 / |e|^2``, V resolved, all batches together."""
    rows = jnp.stack([jnp.ravel(error) for error in errors])
    columns = rows.reshape(-1, 1) if stack else rows.T
    columns = columns / magnitude(columns)
    inside = matmul(pairs.vectors.T, columns)
    held = jnp.sum(jnp.square(inside), axis=1, where=pairs.resolved[:, None])
    total = jnp.sum(jnp.square(columns))
    share = 1 - ratio(jnp.sum(held), total)
    return jnp.where(total > 0, jnp.clip(share, 0, 1), jnp.nan)
