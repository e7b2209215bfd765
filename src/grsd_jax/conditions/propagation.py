"""How far blocks reach each other through a stable propagator (Proposition 2).

Where the state's propagator obeys ``|A^k| <= const rho^k`` with ``rho < 1``, blocks at
distance d influence each other by at most ``c rho^d``: up to a tolerance, the Jacobian
path is banded (paper A.1).
"""

import math

import numpy as np

from grsd_jax._checks import check_not_negative, check_positive
from grsd_jax.results import NamedResult, result

#: Relative rounding of the ratio of two logarithms.
_ROUNDING = 1e-12


@result()
class PropagationReport(NamedResult):
    """Measured influence beside the bound of Proposition 2.

    Attributes:
        in_condition: Whether ``rho < 1``. If not, the proposition does not apply: there
            is no predicted range, and the bound does not fall.
        profile: ``[L]``, the largest influence at each distance ``|l - m|``.
        bound: ``[L]``, ``c rho^d``.
        below_bound: Whether the profile lies under the bound at every distance, up to
            the relative rounding that was allowed.
        predicted_range: ``ceil(log(c / eps) / log(1 / rho))``; None outside.
        measured_range: The smallest distance from which on the profile stays at or
            below eps; None if it never does.
        epsilon: The tolerance eps.
        defined: Whether every influence is finite and one differs from zero. If not,
            nothing was compared: ``below_bound`` is False and ``measured_range`` None.
    """

    in_condition: bool
    profile: np.ndarray
    bound: np.ndarray
    below_bound: bool
    predicted_range: int | None
    measured_range: int | None
    epsilon: float
    defined: bool


def interaction_range(constant: float, rho: float, epsilon: float) -> int | None:
    r"""Returns the distance beyond which influence is below a tolerance.

    .. math:: w(\epsilon) = \left\lceil \frac{\log(c / \epsilon)}{\log(1 / \rho)}
              \right\rceil

    Args:
        constant: c, in the units of the influence.
        rho: The spectral radius.
        epsilon: The tolerance, in the same units as c.

    Returns:
        w, at least 0; None if ``rho >= 1``, outside the proposition's condition.

    Raises:
        ValueError: If an argument is not a finite number above zero.

    References:
        Paper A.1, equation 9.
    """
    constant = check_positive("constant", constant)
    rho = check_positive("rho", rho)
    epsilon = check_positive("epsilon", epsilon)
    if rho >= 1:
        return None
    # Logarithms apart: their quotients may leave the range of floats.
    ratio = (math.log(constant) - math.log(epsilon)) / -math.log(rho)
    return max(0, math.ceil(ratio * (1 - _ROUNDING)))


def propagation_report(
    influence: np.typing.ArrayLike,
    *,
    constant: float,
    rho: float,
    epsilon: float,
    rounding: float = 1e-4,
) -> PropagationReport:
    """Compares measured influence between blocks with the bound ``c rho^distance``.

    Args:
        influence: R, ``[L, L]``, as `influence_profile` measures it.
        constant: c, from the norms of the local derivatives, never fitted to R.
        rho: The spectral radius.
        epsilon: The tolerance that defines the ranges.
        rounding: Relative excess over the bound, or over eps, that counts as rounding.

    Returns:
        The comparison. ``rho >= 1`` is reported, not an error.

    Raises:
        ValueError: If R is not a square matrix, an entry is complex or negative, a
            number is not above zero, or ``rounding`` is negative.

    References:
        Paper A.1, Proposition 2 and equation 10.
    """
    if np.iscomplexobj(influence):
        raise ValueError("influence: expected real numbers, got complex ones.")
    rounding = check_not_negative("rounding", rounding)
    matrix = np.asarray(influence, np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(
            f"influence: expected a square matrix, got shape {list(matrix.shape)}."
        )
    if np.any(matrix < 0):  # signed changes would pass for small ones
        raise ValueError(
            f"influence: expected sizes, zero or above, got {matrix.min()}."
        )
    predicted = interaction_range(constant, rho, epsilon)
    distances = np.arange(len(matrix))
    profile = np.array(
        [
            np.maximum(matrix.diagonal(d).max(), matrix.diagonal(-d).max())
            for d in distances.tolist()
        ]
    )
    with np.errstate(over="ignore"):  # outside of the condition
        bound = constant * np.float64(rho) ** distances
    above = np.flatnonzero(~(profile <= epsilon * (1 + rounding)))
    first = int(above[-1]) + 1 if len(above) else 0
    defined = bool(np.isfinite(matrix).all() and matrix.any())
    return PropagationReport(
        in_condition=rho < 1,
        profile=profile,
        bound=bound,
        below_bound=defined and bool(np.all(profile <= bound * (1 + rounding))),
        predicted_range=predicted,
        measured_range=first if defined and first < len(matrix) else None,
        epsilon=epsilon,
        defined=defined,
    )
