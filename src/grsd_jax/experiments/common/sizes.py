"""Sizes that cannot fit in memory, told before the work begins.

Every estimate counts only what is certainly there at once, so that nothing that fits is
refused; what lies between is told when the device runs out of memory.
"""

import math
import os
from pathlib import Path
from typing import Any

import jax

from grsd_jax.experiments.common.config import UserError

_FLOAT = 4  # bytes


def memory_bytes() -> float:
    """Returns all the memory of the default device, or of this machine or container.

    Returns:
        Bytes; infinity if neither the device nor the system tells.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    limits = [math.inf]
    try:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        # A container's own limit; the word "max" if there is none.
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (ValueError, OSError):
        pass
    return min(limits)


def check_fits(options: str, got: Any, what: str, needed: int) -> None:
    """Checks that what certainly takes so much memory fits in it.

    Args:
        options: The flags that lower it.
        got: Their values.
        what: What takes the memory.
        needed: Bytes.

    Raises:
        UserError: If it does not fit.
    """
    limit = memory_bytes()
    if needed > limit:
        raise UserError(
            f"{options}: expected {what} that fit in {limit / 2**30:.3g} GiB, the "
            f"memory, got {got}, which take at least {needed / 2**30:.3g} GiB."
        )


def check_measurement(config: Any, size: int) -> None:
    """Checks the shells and blocks of a measurement, and that it can fit in memory.

    The dense solver has M, Mdot and the eigenvectors at once, Lanczos its basis.

    Args:
        config: The settings; those of a sweep have no solver, which is then ``auto``.
        size: The error dimension n.

    Raises:
        UserError: If there are more shells than eigenpairs, a block is wider than n, or
            the matrices do not fit.
    """
    solver = getattr(config, "solver", "auto")
    if (width := getattr(config, "block_size", 1)) > size:
        raise UserError(
            f"--block_size: expected at most the error dimension n = {size}, "
            f"got {width}."
        )
    pairs = min(size, getattr(config, "num_pairs", size))
    if config.num_shells > pairs:
        raise UserError(
            f"--num_shells: expected at most the {pairs} eigenpairs, one for each "
            f"shell, got {config.num_shells}."
        )
    if solver == "dense":
        got = f"n = {size}"
        needed = 3 * _FLOAT * size**2
        check_fits("--batch_size or --num_batches", got, "matrices", needed)
    elif solver == "lanczos":
        got = f"{pairs} vectors of n = {size}"
        needed = _FLOAT * size * pairs
        check_fits("--num_pairs", got, "Lanczos vectors", needed)
