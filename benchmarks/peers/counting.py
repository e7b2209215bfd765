"""An operator that counts the columns it is applied to."""

from collections.abc import Callable
from typing import Any


class CountedOperator:
    """Wraps ``M V`` and counts.

    Attributes:
        columns: Columns multiplied since the last reset.
        products: Calls since then.
    """

    def __init__(self, matmat: Callable[[Any], Any]) -> None:
        self._matmat = matmat
        self.reset()

    def reset(self) -> None:
        """Counts from zero again."""
        self.columns = 0
        self.products = 0

    def __call__(self, block: Any) -> Any:
        """Applies the operator to columns ``[n, b]``."""
        self.columns += block.shape[1]
        self.products += 1
        return self._matmat(block)
