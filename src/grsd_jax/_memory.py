"""How much memory there is, and what a run will take of it."""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

import jax
import numpy as np

from grsd_jax._arrays import is_traced
from grsd_jax._typing import PyTree

_P = ParamSpec("_P")
_R = TypeVar("_R")

#: Share of the free memory that the library fills by default.
_SHARE = 0.5


def free_bytes() -> int:
    """Returns the memory free on the default device: its own, or the machine's.

    Returns:
        Bytes; 4 GiB if neither the device nor the operating system tells.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 4 * 2**30


def total_bytes() -> int:
    """Returns the memory of the default device, free or not: its own, or the machine's.

    Returns:
        Bytes; 2**62 if neither the device nor the operating system tells.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 2**62


def check_fits(what: str, wanted: float, *remedies: str) -> None:
    """Raises MemoryError, before any work, if something cannot fit in memory.

    It is held against all memory, since what is free now may be less than what the
    system can free.

    Args:
        what: What is to be held.
        wanted: Its bytes, at least.
        *remedies: What to change, most effective first.

    Raises:
        MemoryError: If there is less memory in all.
    """
    total = total_bytes()
    if wanted > total:
        listed = ", or ".join(remedies)
        raise MemoryError(
            f"{what} would take {wanted / 2**30:.3g} GiB or more, of "
            f"{total / 2**30:.3g} GiB in all; {listed}."
        )


def default_bytes() -> int:
    """Returns the bytes that a call may fill if it is not told: half of what is free.

    Rounded down to a power of two, so that programs chosen by it seldom change.

    Returns:
        Bytes.
    """
    return 2 ** int(np.log2(max(_SHARE * free_bytes(), 2**20)))


def peak_bytes() -> int:
    """Returns the most resident memory that this process has had.

    `resource.getrusage` also counts what the process had before it became this
    program, a copy of its parent; the system's better account is read where it exists.

    Returns:
        Bytes.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        import resource  # not on every system that JAX runs on

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def tree_bytes(tree: PyTree) -> int:
    """Returns the bytes of the arrays of a tree, or of their shapes.

    Args:
        tree: A pytree of arrays or of `jax.ShapeDtypeStruct`.

    Returns:
        Bytes.
    """
    leaves = jax.tree.leaves(tree)
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


@contextmanager
def naming_what_to_lower(*arguments: str) -> Iterator[None]:
    """Turns running out of memory into an error that names what to lower.

    Args:
        *arguments: The arguments that bound memory, most effective first.

    Raises:
        MemoryError: If the device ran out of memory inside.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Out of memory" not in str(error):
            raise
        listed = ", ".join(arguments)
        raise MemoryError(
            f"out of memory; lower one of: {listed}. {str(error).splitlines()[0]}"
        ) from error


def waits_for_memory(*arguments: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Makes a function wait for its result, and name what to lower if memory ends.

    Devices compute after a call has returned, and would report the lack of memory where
    the result is read. Under a transformation nothing waits.

    Args:
        *arguments: The arguments that bound memory, most effective first.

    Returns:
        A decorator. The function raises MemoryError if the device runs out of memory.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def waiting(*args: _P.args, **options: _P.kwargs) -> _R:
            with naming_what_to_lower(*arguments):
                found = function(*args, **options)
                return found if is_traced(found) else jax.block_until_ready(found)

        return waiting

    return decorate
