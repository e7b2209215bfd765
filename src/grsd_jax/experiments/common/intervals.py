"""Intervals for a mean over seeds."""

from typing import NamedTuple

import numpy as np
import scipy.stats

from grsd_jax.experiments.common.tables import MISSING, number
from grsd_jax.results.text import told_apart


class Interval(NamedTuple):
    """A mean over seeds with its 95% interval.

    Attributes:
        mean: The mean.
        low: Lower end.
        high: Upper end.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """Returns such as ``"0.912 [0.871, 0.951]"``, ``"n/a"`` where undefined.

        Digits tell the mean and both ends apart, and from 0 and 1, where no difference
        or a ratio of one lies.
        """
        if np.isnan(self.mean):
            return MISSING
        if np.isnan(self.low):
            return f"{number(self.mean)} [{MISSING}]"
        # Seeds that differ by rounding alone may read alike.
        told = told_apart(self, others=(0.0, 1.0), decimals=3, tolerance=1e-9)
        mean, low, high = told
        return f"{mean} [{low}, {high}]"


def t_interval(values: np.ndarray) -> Interval:
    """Returns the mean of independent values and Student's 95% interval for it.

    Args:
        values: One number a seed.

    Returns:
        The interval; undefined if one of the values is, and its ends with fewer than
        two values.
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, np.nan, np.nan)
    half = scipy.stats.sem(values) * scipy.stats.t.ppf(0.975, len(values) - 1)
    return Interval(mean, float(mean - half), float(mean + half))
