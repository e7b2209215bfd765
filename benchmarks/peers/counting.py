"""An operator that counts the columns it is applied to."""

from collections.abc import Callable
from typing import Any


class CountedOperator:
    """Wraps ``M V`` and counts.

    Attributes:
        counts: ``columns`` multiplied since the last reset, in how many ``products``.
    """

    def __init__(self, matmat: Callable[[Any], Any]) -> None:
        self._matmat = matmat
        self.reset()

    def reset(self) -> None:
        """Counts from zero again."""
        self.counts = {"columns": 0, "products": 0}

    def __call__(self, block: Any) -> Any:
        """Applies the operator to columns ``[n, b]``."""
        self.counts["columns"] += block.shape[1]
        self.counts["products"] += 1
        return self._matmat(block)
