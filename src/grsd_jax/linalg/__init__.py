"""Symmetric eigenproblems by block Lanczos: a product in, arrays out."""

from grsd_jax.linalg.density import SpectralDensity, spectral_density
from grsd_jax.linalg.eigenpairs import LeadingEigenpairs, leading_eigenpairs
from grsd_jax.linalg.lanczos import (
    LanczosResult,
    LanczosState,
    block_lanczos,
    lanczos_block,
    lanczos_finish,
    lanczos_init,
    lanczos_step,
)
from grsd_jax.linalg.ritz import (
    RitzPairs,
    default_floor,
    resolved_pairs,
    ritz_pairs,
)

__all__ = [
    "LanczosResult",
    "LanczosState",
    "LeadingEigenpairs",
    "RitzPairs",
    "SpectralDensity",
    "block_lanczos",
    "default_floor",
    "lanczos_block",
    "lanczos_finish",
    "lanczos_init",
    "lanczos_step",
    "leading_eigenpairs",
    "resolved_pairs",
    "ritz_pairs",
    "spectral_density",
]
