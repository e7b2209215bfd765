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

from grsd_jax import (
    Problem,
    gradient_flow_direction,
    kernel_dense,
    kernel_derivative,
    kernel_matmat,
    linearize_kernel,
    measure_coupling,
)
from grsd_jax._memory import peak_bytes
from grsd_jax._typing import PyTree
from grsd_jax.experiments.common.config import Config
from grsd_jax.experiments.common.measurement import (
    measurement_options,
    network_problem,
)
from grsd_jax.experiments.common.networks import (
    check_weights,
    init_weights,
    make_model,
)
from grsd_jax.experiments.common.sizes import check_measurement
from grsd_jax.kernel.operator import linearize_point
from grsd_jax.kernel.solver import COLUMNS_A_PAIR
from grsd_jax.linalg import block_lanczos

_CLASSES = 10
_REPEATS = 3

#: Steps of the Lanczos case.
_NUM_STEPS = 20


class Setup(NamedTuple):
    """An untrained network on random images, and what the cases need of it."""

    config: Config
    problem: Problem
    params: PyTree
    direction: PyTree
    vectors: jax.Array

    @property
    def dimension(self) -> int:
        """The error dimension n."""
        return len(self.vectors)


def make_setup(config: Config) -> Setup:
    """Builds the network of the settings, with random weights, images and vectors.

    Args:
        config: The settings; ``num_batches`` batches of ``batch_size`` images.

    Returns:
        The setup.
    """
    model = make_model(config.model, _CLASSES, config)
    rng = np.random.default_rng(config.seed)
    leading = (config.num_batches, config.batch_size)
    images = rng.normal(size=(*leading, 32, 32, 3)).astype(np.float32)
    batches = {
        "image": jnp.asarray(images),
        "label": jnp.asarray(rng.integers(0, _CLASSES, leading), jnp.int32),
    }
    check_weights(model, images.shape[2:])
    weights = init_weights(model, images.shape[2:], config.seed)
    problem = network_problem(model, weights, batches, config)
    params = weights.params
    check_measurement(config, problem.dimension(params))
    shape = (problem.dimension(params), config.block_size)
    vectors = np.linalg.qr(rng.normal(size=shape))[0]
    return Setup(
        config,
        problem,
        params,
        gradient_flow_direction(problem, params),
        jnp.asarray(vectors, jnp.float32),
    )


def run_case(name: str, config: Config) -> dict[str, Any]:
    """Runs one case in this process.

    Args:
        name: A key of `CASES`.
        config: The settings.

    Returns:
        ``seconds`` (minimum of three), ``first_seconds`` (compilation included),
        ``gradients`` (in units of one gradient of the same batches), ``flops_share``
        (of the forward pass's rate, None where it means nothing), ``peak_mib`` of the
        process, and what the case adds.
    """
    setup = make_setup(config)
    problem, params = setup.problem, setup.params
    forward = jax.jit(lambda q, p: jax.vmap(lambda b: q.error(p, b))(q.batches))
    compiled = forward.lower(problem, params).cost_analysis()
    flops = float((compiled or {}).get("flops", np.nan))
    _, forward_seconds = _timed(lambda: forward(problem, params))
    _, gradient_seconds = _timed(lambda: gradient_flow_direction(problem, params))
    case = CASES[name](setup)
    first, seconds = _timed(case.run)
    share = None
    if case.operations is not None:
        share = (case.operations(flops) / seconds) / (flops / forward_seconds)
    return {
        "case": name,
        "seconds": seconds,
        "first_seconds": first,
        "gradients": seconds / gradient_seconds,
        "gradient_seconds": gradient_seconds,
        "forward_seconds": forward_seconds,
        "flops_share": share,
        "peak_mib": peak_bytes() / 2**20,
        **case.extra(seconds),
    }


class Case(NamedTuple):
    """What is timed.

    Attributes:
        run: The function.
        operations: From the operations f of a forward pass to those of a run; None
            where the rate means nothing.
        extra: From the seconds of a run to what else the row says.
    """

    run: Callable[[], Any]
    operations: Callable[[float], float] | None = None
    extra: Callable[[float], dict[str, Any]] = lambda _: {}


def _block_product(setup: Setup) -> Case:
    kernel = linearize_kernel(setup.problem, setup.params)
    run = jax.tree_util.Partial(kernel.matmat, setup.vectors)
    return Case(run, lambda f: 4 * f * setup.config.block_size)


def _plain_block_product(setup: Setup) -> Case:
    """The same without factors."""
    kernel = linearize_point(setup.problem.at(setup.params), plan=None)
    run = jax.tree_util.Partial(kernel.matmat, setup.vectors)
    return Case(run, lambda f: 4 * f * setup.config.block_size)


def _gram_operations(setup: Setup) -> float:
    """Returns the operations of ``J J^T``, batch by batch under the mean."""
    num_params = sum(leaf.size for leaf in jax.tree.leaves(setup.params))
    averaged = setup.problem.reduction == "mean"
    copies = setup.config.num_batches if averaged else 1
    return 2.0 * copies * setup.dimension**2 * num_params


def _dense(setup: Setup) -> Case:
    return Case(
        lambda: kernel_dense(setup.problem, setup.params),
        lambda f: 2 * _CLASSES * f + _gram_operations(setup),
    )


def _dense_with_derivative(setup: Setup) -> Case:
    return Case(
        lambda: kernel_dense(setup.problem, setup.params, setup.direction),
        lambda f: 3 * (2 * _CLASSES * f + _gram_operations(setup)),
    )


def _derivative(setup: Setup) -> Case:
    problem, params, vectors = setup.problem, setup.params, setup.vectors

    def run() -> jax.Array:
        return kernel_derivative(problem, params, setup.direction, vectors)

    def extra(seconds: float) -> dict[str, Any]:
        prepared = _plain_block_product(setup).run
        single = _timed(lambda: kernel_matmat(problem, params, vectors))[1]
        return {  # the derivative prepares itself, and so does the first of these
            "in_plain_block_products": seconds / single,
            "in_prepared_products": seconds / _timed(prepared)[1],
        }

    return Case(run, lambda f: 6 * f * setup.config.block_size, extra)


def _lanczos(setup: Setup) -> Case:
    kernel = linearize_kernel(setup.problem, setup.params)
    steps, vectors = _NUM_STEPS, setup.vectors

    def run() -> Any:
        return block_lanczos(
            kernel.matmat, vectors, steps, key=jax.random.key(0), driver="host"
        )

    def products() -> list[jax.Array]:
        return [kernel.matmat(vectors) for _ in range(steps)]

    def extra(seconds: float) -> dict[str, Any]:
        return {"in_bare_products": seconds / _timed(products)[1]}

    return Case(run, lambda f: 4 * f * setup.config.block_size * steps, extra)


def _measurement(setup: Setup) -> Case:
    """The whole measurement, and the share of its operator products, by solver."""
    config, problem, params = setup.config, setup.problem, setup.params
    options = measurement_options(problem, params, config)
    found: dict[str, Any] = {}

    def run() -> jax.Array:
        result = measure_coupling(
            problem, params, setup.direction, key=jax.random.key(0), **options
        )
        found.update(solver=result.solver, vectors=result.vectors)
        return result.coupling

    def checks() -> tuple[jax.Array, jax.Array]:
        product = kernel_matmat(problem, params, setup.vectors)
        secant = kernel_derivative(
            problem,
            params,
            setup.direction,
            setup.vectors,
            method="finite_difference",
        )
        return product, secant

    def whole_derivative() -> jax.Array:
        return kernel_derivative(
            problem,
            params,
            setup.direction,
            found["vectors"],
            column_chunk=config.block_size,
        )

    def extra(seconds: float) -> dict[str, Any]:
        if found["solver"] == "dense":
            products = _timed(_dense_with_derivative(setup).run)[1]
        else:
            step = _timed(_block_product(setup).run)[1]
            columns = COLUMNS_A_PAIR * config.num_pairs
            products = columns / config.block_size * step
            products += _timed(whole_derivative)[1]
        products += _timed(checks)[1]
        return {"solver": found["solver"], "operator_share": products / seconds}

    return Case(run, extra=extra)


CASES: dict[str, Callable[[Setup], Case]] = {
    "block_product": _block_product,
    "plain_block_product": _plain_block_product,
    "dense": _dense,
    "dense_with_derivative": _dense_with_derivative,
    "derivative": _derivative,
    "lanczos": _lanczos,
    "measurement": _measurement,
}


def _timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Returns the first call's seconds and the minimum of the repeats'."""
    seconds = []
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - started)
    return seconds[0], min(seconds[1:])
