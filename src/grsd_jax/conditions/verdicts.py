"""Numbers against thresholds: what it takes for a condition to count as met.

The paper's conditions are about limits and the existence of constants, but a
measurement has one network. Every verdict therefore shows its numbers and its
thresholds, which are conventions that the caller can set. Without evidence a condition
neither holds nor fails: it is undecided.
"""

import math
from typing import Literal, NamedTuple

from grsd_jax._checks import check_at_least, check_choice, check_not_negative
from grsd_jax.results import NamedResult, result
from grsd_jax.results.text import told_apart

Outcome = Literal["holds", "fails", "undecided"]


class Thresholds(NamedTuple):
    """What the numbers of each condition are held against.

    Attributes:
        influence_share: Condition 1: the share of the squared influence that the band
            must hold.
        max_band: Condition 1: the widest band, in blocks; ``(L - 1) // 2``, half of the
            largest distance, if None.
        max_tail_sum: Condition 2: the largest sum of the coherence profile over the
            distances above 0; 1 is that of a profile halved with every block.
        max_distant_coherence: Condition 2: the largest coherence of two blocks at a
            distance of at least ``distant``; pairs above it are flagged.
        distant: Condition 2: the distance from which blocks count as distant.
        max_growth: Condition 3: the largest ``|J|_op``, and ``|Jdot|_op``, along the
            path, over that at its first point.
        max_drift: Condition 3: the largest drift of the leading projector between two
            neighboring points, ``|P - Q|_F / (dim P + dim Q)^{1/2}``.
        max_lipschitz: Condition 3: the largest local exponent of a shell statistic.
        max_residual: Condition 4: the largest Toeplitz residual of the renormalized
            coupling in the central windows.
        max_slope_error: Condition 4: the largest distance of the diagonal's slope to 1.
        min_r_squared: Condition 4: the smallest R^2 of the diagonal's fit.
    """

    influence_share: float = 0.9
    max_band: int | None = None
    max_tail_sum: float = 1.0
    max_distant_coherence: float = 0.5
    distant: int = 2
    max_growth: float = 10.0
    max_drift: float = 0.5
    max_lipschitz: float = 2.0
    max_residual: float = 0.3
    max_slope_error: float = 0.2
    min_r_squared: float = 0.9


#: Thresholds of shares, for which more than 1 makes no sense.
_SHARES = ("influence_share", "max_distant_coherence", "min_r_squared")


def check_thresholds(thresholds: Thresholds) -> None:
    """Raises ValueError unless thresholds are finite numbers >= 0, and shares <= 1."""
    for name, value in thresholds._asdict().items():
        check_threshold(f"thresholds.{name}", name, value)


def check_threshold(label: str, name: str, value: object) -> None:
    """Raises ValueError unless a threshold is a finite number >= 0, a share <= 1.

    Args:
        label: What to call it.
        name: Its field of `Thresholds`.
        value: Its value.
    """
    if name == "distant":  # at a distance of 0 every block is coherent with itself
        check_at_least(label, value, 1)
    elif name == "max_band":
        if value is not None:
            check_at_least(label, value, 0)
    elif check_not_negative(label, value) > 1 and name in _SHARES:
        raise ValueError(f"{label}: expected a number <= 1, got {value!r}.")


@result()
class Check(NamedResult):
    """One number held against one threshold.

    Attributes:
        name: What the number is.
        number: The number; NaN if it is undefined, and then the check is undecided.
        threshold: The threshold.
        relation: ``"<="`` or ``">="``, of the number to the threshold.
        error: How far off the number may be, one standard error or a residual's bound;
            0 if it is exact to rounding, NaN where none is known. It is shown but does
            not decide.
        converged: Whether every iteration behind the number reached its tolerance; if
            not, the check is undecided.
        count: How many measured numbers it stands on; None where that is not counted.
        reason: Why the number is undefined; empty if it is not.
    """

    name: str
    number: float
    threshold: float
    relation: str = "<="
    error: float = math.nan
    converged: bool = True
    count: int | None = None
    reason: str = ""

    @property
    def outcome(self) -> Outcome:
        """Whether the check ``"holds"``, ``"fails"`` or is ``"undecided"``."""
        if not isinstance(self.relation, str):  # a tree of other things, which has text
            return "undecided"
        check_choice("relation", self.relation, ("<=", ">="))
        unknown = math.isnan(self.number) or math.isnan(self.threshold)
        if unknown or not self.converged:
            return "undecided"
        if self.relation == "<=":
            return "holds" if self.number <= self.threshold else "fails"
        return "holds" if self.number >= self.threshold else "fails"

    @property
    def holds(self) -> bool:
        """Whether the number is converged and on the right side of the threshold."""
        return self.outcome == "holds"

    def _headline(self) -> list[tuple[str, str]]:
        return [("", str(self))]

    def __str__(self) -> str:
        """Returns the check as a line of text."""
        if math.isnan(self.number):
            return f"{self.name}: n/a, undecided ({self.reason or 'not defined'})"
        error = f" +- {self.error:.2g}" if self.error > 0 else ""
        number, threshold = told_apart([self.number, self.threshold])
        sides = f"{number}{error} {self.relation} {threshold}"
        notes = [] if self.count is None else [f"of {self.count}"]
        notes += [] if self.converged else ["not converged"]
        noted = f" ({', '.join(notes)})" if notes else ""
        return f"{self.name}: {sides} {self.outcome}{noted}"


@result()
class Verdict(NamedResult):
    """The checks of one condition.

    Attributes:
        checks: The checks, each with its number and threshold.
    """

    checks: tuple[Check, ...]

    @property
    def outcome(self) -> Outcome:
        """``"fails"`` if a check fails, ``"holds"`` if all of at least one do."""
        outcomes = {check.outcome for check in self.checks} or {"undecided"}
        if "fails" in outcomes:
            return "fails"
        return "undecided" if "undecided" in outcomes else "holds"

    @property
    def holds(self) -> bool:
        """Whether there are checks, and every one holds."""
        return self.outcome == "holds"

    def _headline(self) -> list[tuple[str, str]]:
        return [("", self.outcome), *(("", str(check)) for check in self.checks)]

    def __str__(self) -> str:
        """Returns the verdict, and each check on a line of its own."""
        return "\n  ".join([self.outcome, *map(str, self.checks)])
