"""Condition 3: how large J and its derivative are, and how the spectrum reorganizes.

The paper asks for ``|J|_op`` and ``|Jdot|_op`` bounded along the training path,
spectral projectors that do not change abruptly, and shell statistics that are Lipschitz
in ``log lambda`` (3.2, 5.3 and equation 13).
"""

import itertools
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from grsd_jax._arrays import as_floating, as_mask, divisor, matmul, norm, where_defined
from grsd_jax._checks import check_at_least, check_key
from grsd_jax._typing import PyTree
from grsd_jax.kernel.operator import (
    LinearizedKernel,
    linearize_derivative,
    linearize_kernel,
)
from grsd_jax.kernel.sharded import ShardedKernel
from grsd_jax.linalg.eigenpairs import LeadingEigenpairs, leading_eigenpairs
from grsd_jax.problem import Problem
from grsd_jax.results import NamedResult, result
from grsd_jax.shells.binning import log_shells
from grsd_jax.shells.diagnostics import CouplingMeasurement

#: By how much vectors are scaled when their product with M leaves the dtype.
_GAIN = 2.0**100

#: How far products of columns may be from those of orthonormal ones.
_ORTHONORMAL = 0.02


@result(axes={"2": "norm"})
class OperatorNorms(NamedResult):
    """How large the Jacobian and its derivative are.

    Attributes:
        jacobian: [], ``|J|_op``.
        derivative: [], ``|Jdot|_op``, per unit of s.
        residuals: [2], the relative residuals of their squares as eigenvalues.
        converged: [2] bool, residuals within the tolerance.
    """

    jacobian: jax.Array
    derivative: jax.Array
    residuals: jax.Array
    converged: jax.Array


def operator_norms(
    problem: Problem,
    params: PyTree,
    direction: PyTree,
    *,
    key: jax.Array,
    block_size: int = 4,
    tolerance: float = 1e-3,
    max_steps: int | None = None,
) -> OperatorNorms:
    """Measures ``|J|_op`` and ``|Jdot|_op``, neither of which is formed.

    They are the roots of the largest eigenvalues of ``J J^T`` and ``Jdot Jdot^T``, by
    block Lanczos; see `leading_eigenpairs`. Call it eagerly. Under ``mean``
    ``J = K^{-1/2} [J_1 .. J_K]``.

    Args:
        problem: The problem.
        params: Parameters.
        direction: The tangent of Jdot, a tree like ``params``.
        key: Consumed for the start blocks.
        block_size: Columns b of a Lanczos block; n if that is less.
        tolerance: Largest residual of the eigenvalues, relative.
        max_steps: Products at most, for each of the two; see `leading_eigenpairs`.

    Returns:
        `OperatorNorms`.

    Raises:
        ValueError: If a shape, tree, dtype, leading axis or choice does not fit.

    References:
        Paper 3.2, Condition 3.
    """
    block_size = check_at_least("block_size", block_size, 1)
    check_key(key)
    operators = (
        linearize_kernel(problem, params),
        linearize_derivative(problem, params, direction),
    )
    found = [
        _leading(operator, k, block_size, tolerance, max_steps)
        for operator, k in zip(operators, jax.random.split(key), strict=True)
    ]
    pairs, gains = zip(*found, strict=True)
    values = jnp.concatenate([pair.values for pair in pairs])
    residuals = jnp.concatenate([pair.residuals for pair in pairs])
    gains = jnp.asarray(gains, values.dtype)
    norms = jnp.sqrt(jnp.maximum(values, 0)) / jnp.sqrt(gains)
    return OperatorNorms(
        jacobian=norms[0],
        derivative=norms[1],
        residuals=residuals / divisor(values),
        converged=jnp.concatenate([pair.converged for pair in pairs]),
    )


def _leading(
    operator: LinearizedKernel | ShardedKernel,
    key: jax.Array,
    block_size: int,
    tolerance: float,
    max_steps: int | None,
) -> tuple[LeadingEigenpairs, float]:
    """Returns the pair of the largest eigenvalue of a gain times M, and the gain.

    The gain is 1, unless M, as the square of J, leaves the dtype where J does not.
    """
    start_key, key = jax.random.split(key)
    size = operator.dimension
    width = min(block_size, size)
    start = jax.random.normal(start_key, (size, width), operator.dtype)

    def found(gain: float) -> LeadingEigenpairs:
        return leading_eigenpairs(
            lambda block: operator.matmat(gain * block),
            start,
            1,
            key=key,
            tolerance=tolerance,
            max_steps=max_steps,
        )

    first = found(1.0)
    if first.finite and first.values[0] > 0:
        return first, 1.0
    gain = _GAIN if first.finite else 1 / _GAIN
    second = found(gain)
    return (second, gain) if second.finite and second.values[0] > 0 else (first, 1.0)


@result()
class ProjectorDrift(NamedResult):
    """How far two subspaces are apart, each measure in [0, 1].

    NaN if the columns that span one of them are not orthonormal.

    Attributes:
        operator: [], ``|P - Q|_op``, the sine of the largest angle; 1 if the dimensions
            differ.
        frobenius: [], ``|P - Q|_F / (dim P + dim Q)^{1/2}``, a mean over the angles; 0
            for two empty subspaces.
    """

    operator: jax.Array
    frobenius: jax.Array


def projector_drift(
    vectors: jax.typing.ArrayLike,
    others: jax.typing.ArrayLike,
    *,
    chosen: jax.typing.ArrayLike | None = None,
    others_chosen: jax.typing.ArrayLike | None = None,
) -> ProjectorDrift:
    """Measures ``|P - Q|`` for the projectors on the spans of chosen columns.

    Args:
        vectors: V, ``[n, r]``, orthonormal columns, such as eigenvectors at one time.
        others: W, ``[n, s]``, orthonormal columns, those at another time.
        chosen: ``[r]`` bool, the columns of V that span P's subspace. Default: all.
        others_chosen: ``[s]`` bool, those of W. Default: all.

    Returns:
        A `ProjectorDrift`.

    Raises:
        ValueError: If a shape or dtype does not fit.

    References:
        Paper 3.2, Condition 3; Golub and Van Loan (2013), "Matrix Computations", 2.5.
    """
    vectors = as_floating("vectors", vectors, [None, None])
    others = as_floating("others", others, [vectors.shape[0], None])
    left = as_mask("chosen", chosen, [vectors.shape[1]])
    right = as_mask("others_chosen", others_chosen, [others.shape[1]])
    return _projector_drift(vectors, others, left, right)


@jax.jit
def _projector_drift(
    vectors: jax.Array, others: jax.Array, left: jax.Array, right: jax.Array
) -> ProjectorDrift:
    v = jnp.where(left[None], vectors, 0)
    w = jnp.where(right[None], others, 0)
    # The parts outside the other subspace keep small angles accurate, unlike 1 - cos^2.
    outside = (v - matmul(w, matmul(w.T, v)), w - matmul(v, matmul(v.T, w)))
    largest = jnp.maximum(*(jnp.linalg.norm(part, 2) for part in outside))
    count = jnp.sum(left, dtype=v.dtype) + jnp.sum(right, dtype=v.dtype)
    whole = norm(jnp.stack([norm(part) for part in outside]))
    mean = whole / jnp.sqrt(jnp.maximum(count, 1))
    span = _are_orthonormal(v, left) & _are_orthonormal(w, right)
    return ProjectorDrift(
        *(jnp.where(span, jnp.minimum(x, 1), jnp.nan) for x in (largest, mean))
    )


def _are_orthonormal(columns: jax.Array, chosen: jax.Array) -> jax.Array:
    """Whether the chosen columns are orthonormal, the others being zero."""
    gram = matmul(columns.T, columns)
    wanted = jnp.diag(chosen.astype(gram.dtype))
    return jnp.all(jnp.abs(gram - wanted) < _ORTHONORMAL)


def log_lipschitz(
    statistic: jax.typing.ArrayLike,
    centers: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    r"""Estimates the Lipschitz constant of a shell statistic in log-log coordinates.

    .. math:: \max_a \frac{|\log f_{a+1} - \log f_a|}{|s_{a+1} - s_a|},
              \qquad s = \log \lambda

    over neighboring shells that are both valid: the largest local exponent of
    ``f(lambda)``, free of the scale of f.

    Args:
        statistic: f, ``[S]``, positive where valid.
        centers: ``[S]``, the shells' lambda, positive.
        mask: ``[S]`` bool, the valid shells. Default: all. Values that are not
            positive count as masked.

    Returns:
        [], NaN where no two neighbors are valid, or one is not finite.

    Raises:
        ValueError: If a shape or dtype does not fit.

    References:
        Paper 3.2, Condition 3; the estimate is ours.
    """
    statistic = as_floating("statistic", statistic, [None])
    centers = as_floating("centers", centers, statistic.shape)
    mask = as_mask("mask", mask, statistic.shape)
    return where_defined(*_largest_slope(statistic, centers, mask))


@jax.jit
def _largest_slope(
    statistic: jax.Array, centers: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns whether any two neighbors are valid, and the largest slope."""
    valid = mask & ~(statistic <= 0)  # what is NaN shows in the result
    logs = jnp.log(jnp.where(valid, statistic, 1))
    both = valid[1:] & valid[:-1]
    spacing = jnp.abs(jnp.diff(jnp.log(centers)))
    slopes = jnp.abs(jnp.diff(logs)) / jnp.where(
        jnp.isfinite(spacing), spacing, jnp.nan
    )
    largest = jnp.max(jnp.where(both, slopes, 0), initial=0.0)
    return jnp.any(both), largest


@result()
class ShellDrift(NamedResult):
    """How far the projector on each shell moves between neighboring measurements.

    Attributes:
        edges: ``[S + 1]``, shells of lambda common to all T measurements.
        drift: ``[T - 1, S]`` in [0, 1], ``|P - Q|_F / (dim P + dim Q)^{1/2}``; NaN
            where a shell is empty at both times.
    """

    edges: jax.Array
    drift: jax.Array


def shell_drift(measurements: Sequence[CouplingMeasurement]) -> ShellDrift:
    """Measures the drift of shell projectors along a path, on common shells.

    A mode that crosses an edge counts as drift, like one that turns.

    Args:
        measurements: At least one, all with the same numbers of pairs and shells; only
            resolved pairs are used.

    Returns:
        A `ShellDrift`.

    Raises:
        ValueError: If there is no measurement.

    References:
        Paper 3.2, Condition 3.
    """
    check_at_least("len(measurements)", len(measurements), 1)
    num_shells = measurements[0].shells.counts.shape[0]
    edges, indices = _common_shells(
        [measured.values for measured in measurements],
        [measured.resolved for measured in measurements],
        num_shells,
    )
    steps = [
        _shell_drift(before.vectors, after.vectors, index, later, num_shells)
        for (before, after), (index, later) in zip(
            itertools.pairwise(measurements), itertools.pairwise(indices), strict=True
        )
    ]
    if not steps:
        none = jnp.zeros((0, num_shells), measurements[0].values.dtype)
        return ShellDrift(edges, none)
    there, drift = map(jnp.stack, zip(*steps, strict=True))
    return ShellDrift(edges, where_defined(there, drift))


@partial(jax.jit, static_argnames="num_shells")
def _common_shells(
    values: list[jax.Array], resolved: list[jax.Array], num_shells: int
) -> tuple[jax.Array, list[jax.Array]]:
    """Returns the edges of common shells, and each measurement's shell of each pair."""
    shells = log_shells(
        jnp.concatenate(values), num_shells, mask=jnp.concatenate(resolved)
    )
    return shells.edges, jnp.split(shells.index, len(values))


@partial(jax.jit, static_argnames="num_shells")
def _shell_drift(
    vectors: jax.Array,
    others: jax.Array,
    index: jax.Array,
    later: jax.Array,
    num_shells: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns whether each shell has pairs, and its drift, ``[S]``."""

    def drift(shell: jax.Array) -> tuple[jax.Array, jax.Array]:
        left, right = index == shell, later == shell
        found = _projector_drift(vectors, others, left, right)
        there = jnp.any(left) | jnp.any(right)
        return there, jnp.where(there, found.frobenius, 0)

    # One after the other: at once, they would hold a copy of the vectors for each.
    return jax.lax.map(drift, jnp.arange(num_shells, dtype=index.dtype))


def coupling_exponent(measured: CouplingMeasurement) -> jax.Array:
    """Returns `log_lipschitz` of ``sqrt(Khat_aa)``, the shells' relative rates.

    Args:
        measured: A measurement.

    Returns:
        [], NaN where no two neighboring shells are valid.
    """
    coupling = measured.renormalized.coupling
    rates = jnp.sqrt(jnp.diag(coupling.matrix))
    return log_lipschitz(rates, measured.shells.centers, jnp.diag(coupling.mask))
