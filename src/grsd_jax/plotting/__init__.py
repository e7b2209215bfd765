"""Figures of results and records, on axes of your own or on new ones.

Every function draws one thing on one pair of axes and returns them, so that titles,
limits and layouts are yours. Nothing of Matplotlib's settings is touched. Matplotlib is
optional, ``pip install 'grsd-jax[plots]'``, and imported when something is drawn.
"""

from grsd_jax.plotting.measured import (
    coupling,
    coupling_limits,
    diagonal,
    noise_floor_of,
    spectrum,
    windows,
)
from grsd_jax.plotting.tracked import eigenvalues, energies, flux, velocity

__all__ = [
    "coupling",
    "coupling_limits",
    "diagonal",
    "eigenvalues",
    "energies",
    "flux",
    "noise_floor_of",
    "spectrum",
    "velocity",
    "windows",
]
