"""What is written down about the machine, its load and the installed packages.

The standard library is enough, so that every environment can read it.
"""

import importlib.metadata
import os
import platform
import resource
from pathlib import Path
from typing import Any

_PACKAGES = (
    "curvlinops-for-pytorch",
    "flax",
    "grsd-jax",
    "jax",
    "jaxlib",
    "matfree",
    "neural-tangents",
    "numpy",
    "scipy",
    "torch",
)


def describe_machine() -> dict[str, Any]:
    """Returns the processor, its cores, the memory and the system."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def installed_versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that matter here."""
    installed = {d.name.lower() for d in importlib.metadata.distributions()}
    return {
        "python": platform.python_version(),
        **{n: importlib.metadata.version(n) for n in _PACKAGES if n in installed},
    }


def others_seconds() -> float:
    """Returns the CPU seconds of the machine that no child of this process took.

    Children count once they have ended. Zero where the system does not tell, which is
    not Linux.
    """
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0
    user, nice, system = (int(t) for t in path.read_text().split()[1:4])
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = (user + nice + system) / os.sysconf("SC_CLK_TCK")
    return total - own.ru_utime - own.ru_stime
