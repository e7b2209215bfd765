"""Progress of long work: a bar on a terminal, now and then a line in a log.

A run under nohup or a scheduler writes to a file, where a bar that redraws itself is of
no use and silence for an hour is worse.
"""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from grsd_jax.experiments.common import devices

#: Seconds between the lines of a log; work that takes less leaves none.
LOG_SECONDS = 30.0


class _Lines:
    """A text file for tqdm that ends every redrawn bar with a newline."""

    def write(self, text: str) -> None:
        told = text.strip()
        if told:
            sys.stderr.write(told + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """Makes a bar of progress, which the first process alone shows.

    Args:
        iterable: What the work goes through; None to count by ``update``.
        **options: Of `tqdm`.

    Returns:
        The bar; where standard error is no terminal it writes a line each
        `LOG_SECONDS`.
    """
    if not devices.writes():
        return tqdm(iterable, disable=True, **options)
    if not sys.stderr.isatty():
        options |= {
            "file": _Lines(),
            "delay": LOG_SECONDS,
            "mininterval": LOG_SECONDS,
            "maxinterval": LOG_SECONDS,
            "ncols": 88,
            "leave": False,
            "position": 0,  # a nested bar would move the cursor
        }
    return tqdm(iterable, **options)
