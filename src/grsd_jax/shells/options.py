"""Options of a measurement that belong together: which pairs, and which shells."""

import dataclasses
import sys

from grsd_jax._checks import check_at_least, check_positive, make_plain


@dataclasses.dataclass(frozen=True)
class Window:
    """The part of the spectrum that is measured, whichever solver finds it.

    Attributes:
        num_pairs: Leading pairs; all those above the floor if None.
        floor: Smallest value, relative to the largest; ten eps if None.
        tolerance: Largest residual of a pair that is used, relative to its value.
    """

    num_pairs: int | None = 100
    floor: float | None = None
    tolerance: float = 0.05

    def __post_init__(self) -> None:
        """Checks the options."""
        make_plain(self)
        if self.num_pairs is not None:
            check_at_least("num_pairs", self.num_pairs, 1)
        if self.floor is not None:
            check_positive("floor", self.floor)
            if self.floor > 1:
                raise ValueError(f"floor: expected at most 1, got {self.floor!r}.")
        check_positive("tolerance", self.tolerance)


@dataclasses.dataclass(frozen=True)
class Binning:
    """The shells of a spectrum, and what is computed from them.

    Attributes:
        num_shells: S.
        window: Shells w in one sliding window of the Toeplitz residual.
        min_count: Pairs that a shell needs; one with fewer is masked.
        num_bootstrap: Resamples behind the intervals of the fits; 0 for none.
    """

    num_shells: int = 12
    window: int = 5
    min_count: int = 1
    num_bootstrap: int = 1000

    def __post_init__(self) -> None:
        """Checks the options."""
        make_plain(self)
        check_at_least("num_shells", self.num_shells, 1)
        check_at_least("window", self.window, 1)
        check_at_least("min_count", self.min_count, 1)
        # What cannot fit is told later, with the number of pairs.
        check_at_least("num_bootstrap", self.num_bootstrap, 0, sys.maxsize)
        if self.window > self.num_shells:
            raise ValueError(
                f"window: expected at most num_shells = {self.num_shells}, "
                f"got {self.window}."
            )
