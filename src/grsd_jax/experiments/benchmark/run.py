"""Times of the operations, each in units of one gradient of the same batch.

Every case runs in a process of its own, so that its peak memory is its own. Floating
point operations are counted as multiples of the forward pass's f (the compiler's own
count): 4 f a column for a product, 6 f for a derivative, 2 C f for dense rows plus
``2 n^2 P`` for their Gram product, three times as much with the derivative. They are
the plain path's; a factored one needs fewer, so that its rate can exceed any machine's.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax import models
from grsd_jax._memory import peak_bytes
from grsd_jax._typing import ErrorFn, LossFn, PyTree
from grsd_jax.experiments.common.config import Config
from grsd_jax.experiments.common.networks import make_model
from grsd_jax.experiments.common.steps import init_state, make_optimizer
from grsd_jax.experiments.reproduce.pipeline import measurement_options
from grsd_jax.jacobian.factored import JacobianForm
from grsd_jax.kernel.dense import kernel_dense, kernel_with_derivative_dense
from grsd_jax.kernel.derivative import gradient_flow_direction, kernel_derivative
from grsd_jax.kernel.operator import kernel_matmat, linearize_kernel
from grsd_jax.linalg.lanczos import block_lanczos
from grsd_jax.shells.measurement import measure_coupling

_CLASSES = 10
_REPEATS = 3


class Problem(NamedTuple):
    """An untrained network on random images, and what the cases need of it."""

    config: Config
    error_fn: ErrorFn
    loss_fn: LossFn
    params: PyTree
    batches: PyTree
    direction: PyTree
    vectors: jax.Array


def make_problem(config: Config) -> Problem:
    """Builds the network of the settings, with random weights, images and vectors.

    Args:
        config: The settings; ``num_batches`` batches of ``batch_size`` images.

    Returns:
        The problem.
    """
    model = make_model(config.model, _CLASSES, config)
    rng = np.random.default_rng(config.seed)
    leading = (config.num_batches, config.batch_size)
    images = rng.normal(size=(*leading, 32, 32, 3)).astype(np.float32)
    batches = {
        "image": jnp.asarray(images),
        "label": jnp.asarray(rng.integers(0, _CLASSES, leading), jnp.int32),
    }
    optimizer = make_optimizer(config, total_steps=1)
    start = init_state(model, optimizer, images[0, 0], seed=config.seed)
    params, state = start.params, {"batch_stats": start.batch_stats}
    loss_fn = models.linen_loss_fn(model, state)
    size = config.batch_size * _CLASSES
    vectors = np.linalg.qr(rng.normal(size=(size, config.block_size)))[0]
    return Problem(
        config,
        models.linen_error_fn(model, state),
        loss_fn,
        params,
        batches,
        gradient_flow_direction(loss_fn, params, batches),
        jnp.asarray(vectors, jnp.float32),
    )


def run_case(name: str, config: Config) -> dict[str, Any]:
    """Runs one case in this process.

    Args:
        name: A key of `CASES`.
        config: The settings; the reduction is the mean.

    Returns:
        ``seconds`` (minimum of three), ``first_seconds`` (compilation included),
        ``gradients`` (in units of one gradient of the same batches), ``flops_share``
        (of the forward pass's rate, None where it means nothing), ``peak_mib`` of the
        process, and what the case adds.
    """
    problem = make_problem(config)
    forward = jax.jit(lambda f, p, x: jax.vmap(lambda b: f(p, b))(x))
    compiled = forward.lower(
        problem.error_fn, problem.params, problem.batches
    ).cost_analysis()
    flops = float((compiled or {}).get("flops", np.nan))
    _, forward_seconds = _timed(
        lambda: forward(problem.error_fn, problem.params, problem.batches)
    )
    _, gradient_seconds = _timed(
        lambda: gradient_flow_direction(
            problem.loss_fn, problem.params, problem.batches
        )
    )
    run, multiple, extra = CASES[name](problem)
    first, seconds = _timed(run)
    counted = multiple(flops, problem)
    share = None
    if counted is not None:
        share = (counted / seconds) / (flops / forward_seconds)
    return {
        "case": name,
        "seconds": seconds,
        "first_seconds": first,
        "gradients": seconds / gradient_seconds,
        "gradient_seconds": gradient_seconds,
        "forward_seconds": forward_seconds,
        "flops_share": share,
        "peak_mib": peak_bytes() / 2**20,
        **extra(seconds),
    }


Run = Callable[[], Any]
Count = Callable[[float, Problem], float | None]
Extra = Callable[[float], dict[str, Any]]
Case = tuple[Run, Count, Extra]


def _nothing(_: float) -> dict[str, Any]:
    return {}


def _block_product(p: Problem, jacobian: JacobianForm = "auto") -> Case:
    kernel = linearize_kernel(p.error_fn, p.params, p.batches, jacobian=jacobian)
    run = jax.tree_util.Partial(kernel.matmat, p.vectors)
    return run, lambda f, q: 4 * f * q.config.block_size, _nothing


def _plain_block_product(p: Problem) -> Case:
    return _block_product(p, "plain")


def _gram_flops(p: Problem) -> float:
    size = p.config.batch_size * _CLASSES
    num_params = sum(leaf.size for leaf in jax.tree.leaves(p.params))
    return 2.0 * p.config.num_batches * size**2 * num_params


def _dense(p: Problem) -> Case:
    def run() -> jax.Array:
        return kernel_dense(p.error_fn, p.params, p.batches)

    return run, lambda f, q: 2 * _CLASSES * f + _gram_flops(q), _nothing


def _dense_with_derivative(p: Problem) -> Case:
    def run() -> tuple[jax.Array, jax.Array]:
        return kernel_with_derivative_dense(
            p.error_fn, p.params, p.batches, p.direction
        )

    return run, lambda f, q: 3 * (2 * _CLASSES * f + _gram_flops(q)), _nothing


def _derivative(p: Problem) -> Case:
    def run() -> jax.Array:
        return kernel_derivative(
            p.error_fn, p.params, p.batches, p.direction, p.vectors
        )

    def product() -> jax.Array:
        return kernel_matmat(p.error_fn, p.params, p.batches, p.vectors)

    def extra(seconds: float) -> dict[str, Any]:
        prepared = _plain_block_product(p)[0]
        return {  # the derivative prepares itself, and so does the first of these
            "in_plain_block_products": seconds / _timed(product)[1],
            "in_prepared_products": seconds / _timed(prepared)[1],
        }

    return run, lambda f, q: 6 * f * q.config.block_size, extra


def _lanczos(p: Problem) -> Case:
    kernel = linearize_kernel(p.error_fn, p.params, p.batches)
    steps = p.config.num_steps

    def run() -> Any:
        return block_lanczos(
            kernel.matmat, p.vectors, steps, key=jax.random.key(0), driver="host"
        )

    def products() -> list[jax.Array]:
        return [kernel.matmat(p.vectors) for _ in range(steps)]

    def extra(seconds: float) -> dict[str, Any]:
        return {"in_bare_products": seconds / _timed(products)[1]}

    return run, lambda f, q: 4 * f * q.config.block_size * steps, extra


def _measurement(p: Problem) -> Case:
    """The whole measurement, and the share of its operator products, by solver."""
    config, found = p.config, {}

    def run() -> jax.Array:
        result = measure_coupling(
            p.error_fn,
            p.params,
            p.batches,
            p.direction,
            key=jax.random.key(0),
            **measurement_options(config),
        )
        found.update(solver=result.solver, vectors=result.vectors)
        return result.coupling

    def checks() -> tuple[jax.Array, jax.Array]:
        product = kernel_matmat(p.error_fn, p.params, p.batches, p.vectors)
        secant = kernel_derivative(
            p.error_fn,
            p.params,
            p.batches,
            p.direction,
            p.vectors,
            method="finite_difference",
        )
        return product, secant

    def whole_derivative() -> jax.Array:
        vectors = found["vectors"]
        return kernel_derivative(
            p.error_fn,
            p.params,
            p.batches,
            p.direction,
            vectors,
            column_chunk=config.block_size,
        )

    def extra(seconds: float) -> dict[str, Any]:
        if found["solver"] == "dense":
            products = _timed(_dense_with_derivative(p)[0])[1]
        else:
            step = _timed(_block_product(p)[0])[1]
            products = config.num_steps * step + _timed(whole_derivative)[1]
        products += _timed(checks)[1]
        return {"solver": found["solver"], "operator_share": products / seconds}

    return run, lambda _f, _q: None, extra


CASES: dict[str, Callable[[Problem], Case]] = {
    "block_product": _block_product,
    "plain_block_product": _plain_block_product,
    "dense": _dense,
    "dense_with_derivative": _dense_with_derivative,
    "derivative": _derivative,
    "lanczos": _lanczos,
    "measurement": _measurement,
}


def format_benchmark(rows: list[dict[str, Any]]) -> str:
    """Formats the rows of `run_case` as a Markdown table.

    Args:
        rows: One for each case.

    Returns:
        The table.
    """
    known = {"case", "seconds", "first_seconds", "gradients", "gradient_seconds"}
    known |= {"forward_seconds", "flops_share", "peak_mib"}
    lines = [
        "| case | seconds | first | gradients | FLOP rate / forward's | peak MiB | |",
        "| :--- | ---: | ---: | ---: | ---: | ---: | :--- |",
    ]
    for row in rows:
        share = row["flops_share"]
        notes = [
            f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}"
            for key, value in row.items()
            if key not in known
        ]
        lines.append(
            f"| {row['case']} | {row['seconds']:.3f} | {row['first_seconds']:.2f} "
            f"| {row['gradients']:.1f} | {'' if share is None else f'{share:.2f}'} "
            f"| {row['peak_mib']:.0f} | {', '.join(notes)} |"
        )
    return "\n".join(lines)


def _timed(run: Run) -> tuple[float, float]:
    """Returns the first call's seconds and the minimum of the repeats'."""
    seconds = []
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - started)
    return seconds[0], min(seconds[1:])
