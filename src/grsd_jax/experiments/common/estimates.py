"""What a measurement will take, told before it starts."""

from typing import Any

from jax.sharding import Mesh

from grsd_jax._typing import ErrorFn, PyTree
from grsd_jax.experiments.common.config import Config
from grsd_jax.kernel.operator import error_dimension
from grsd_jax.kernel.solver import Estimate, choose_solver, estimate_measurement


def sentence(
    error_fn: ErrorFn,
    params: PyTree,
    batches: PyTree,
    config: Config,
    mesh: Mesh | None = None,
) -> str:
    """Says which solver a measurement takes, its operations and its memory.

    Args:
        error_fn: The error function.
        params: Parameters.
        batches: A pytree with leading axes ``[K, N]``.
        config: The settings.
        mesh: Devices that share the examples; one device if None.

    Returns:
        One line, such as "n = 320, dense: 1.3e+12 operations, 0.21 GiB
        (lanczos: 2.9e+12 operations, 0.35 GiB)".
    """
    options: dict[str, Any] = {"reduction": config.reduction}
    size = error_dimension(error_fn, params, batches, **options)
    options["num_columns"] = min(config.block_size * config.num_steps, size)
    options["block_size"] = config.block_size
    found = estimate_measurement(error_fn, params, batches, **options)
    if mesh is not None:
        devices = mesh.size
        share = f"{_told(found['lanczos'])} shared by {devices} devices"
        return f"n = {size}, lanczos: {share}"
    solver = config.solver
    if solver == "auto":
        solver = choose_solver(error_fn, params, batches, **options)
    other = "lanczos" if solver == "dense" else "dense"
    return (
        f"n = {size}, {solver}: {_told(found[solver])} ({other}: {_told(found[other])})"
    )


def _told(estimate: Estimate) -> str:
    gibibytes = estimate.bytes / 2**30
    return f"{estimate.operations:.1e} operations, {gibibytes:.2f} GiB"
