"""This package, as a user calls it, by its default path and by the plain one."""

from typing import Any

import grsd_jax
import jax
import jax.numpy as jnp
import numpy as np
from grsd_jax.linalg import leading_eigenpairs

from comparison.grid import NUM_PAIRS, PAIR_TOLERANCE
from comparison.harness import Case, Job
from comparison.inputs import Loaded, load
from peers.counting import CountedOperator
from peers.jax_tools import counters

#: Forward passes timed together, since one alone is over before the caches are warm.
_FORWARDS = 10


def make_case(job: Job) -> Case:
    """Returns the case of a task, for ``grsd_jax_plain`` with the layers hidden."""
    loaded = load(job.spec, job.inputs)
    moved = loaded._replace(params=jax.tree.map(lambda p: 1.01 * p, loaded.params))
    make = {
        "dense": _dense,
        "block": _plain_block if _is_plain(job) else _block,
        "derivative": _derivative,
        "eigenpairs": _eigenpairs,
        "measurement": _measurement,
    }[job.kind]

    def other_weights() -> None:
        other = make(job, moved)
        other.run(other.prepare() if other.prepare else None)

    return make(job, loaded)._replace(
        other_weights=other_weights if job.spec.width < 64 else None,
        **counters(job.device),
    )


def linearized(loaded: Loaded, *, plain: bool = False) -> Any:
    """Returns the kernel of a loaded problem, linearized."""
    problem = loaded.problem(plain=plain)
    return jax.block_until_ready(grsd_jax.linearize_kernel(problem, loaded.params))


def _is_plain(job: Job) -> bool:
    return job.peer == "grsd_jax_plain"


def _dense(job: Job, loaded: Loaded) -> Case:
    problem = loaded.problem(plain=_is_plain(job))
    return Case(
        run=lambda _: jax.block_until_ready(
            grsd_jax.kernel_dense(problem, loaded.params)
        )
    )


def _block(job: Job, loaded: Loaded) -> Case:
    block = jnp.asarray(job.block)
    return Case(
        prepare=lambda: linearized(loaded, plain=_is_plain(job)),
        run=lambda kernel: jax.block_until_ready(kernel.matmat(block)),
    )


def _plain_block(job: Job, loaded: Loaded) -> Case:
    """The block product, beside the forward passes whose rate it is to keep."""
    forward = jax.jit(loaded.problem(plain=True).error)
    batch = jax.tree.map(lambda leaf: leaf[0], loaded.batches)

    def operations() -> dict[str, float]:
        kernel = linearized(loaded, plain=True)
        product = jax.jit(lambda k, v: k.matmat(v)).lower(kernel, job.block)
        once = forward.lower(loaded.params, batch).cost_analysis()["flops"]
        return {
            "flops": product.cost_analysis()["flops"],
            "beside_flops": _FORWARDS * once,
        }

    def forwards(_: Any) -> None:
        for _ in range(_FORWARDS):
            jax.block_until_ready(forward(loaded.params, batch))

    return _block(job, loaded)._replace(beside=forwards, details=operations)


def _derivative(job: Job, loaded: Loaded) -> Case:
    """The projected derivative, beside the plain block product that it is measured in.

    The product is prepared beforehand, as Lanczos uses it; the derivative is not.
    """
    problem, block = loaded.problem(plain=_is_plain(job)), jnp.asarray(job.block)
    arguments = (problem, loaded.params, loaded.direction, block)
    return Case(
        prepare=lambda: linearized(loaded, plain=True),
        run=lambda _: jax.block_until_ready(grsd_jax.kernel_derivative(*arguments)),
        beside=lambda kernel: jax.block_until_ready(kernel.matmat(block)),
    )


def _eigenpairs(job: Job, loaded: Loaded) -> Case:
    used: list[CountedOperator] = []
    shape = (job.spec.size, int(job.variant.removeprefix("b = ")))
    start = jax.random.normal(jax.random.key(0), shape, np.float32)

    def prepare() -> Any:
        kernel = linearized(loaded)
        jax.block_until_ready(kernel.matmat(start))  # compiles
        return kernel

    def run(kernel: Any) -> Any:
        operator = CountedOperator(kernel.matmat)
        pairs = leading_eigenpairs(
            operator,
            start,
            NUM_PAIRS,
            key=jax.random.key(1),
            tolerance=PAIR_TOLERANCE,
            relative_to="largest",
        )
        used[:] = [operator]
        return jax.block_until_ready(pairs)

    return Case(
        prepare=prepare,
        run=run,
        warm=True,
        arrays=lambda pairs: {
            "values": np.asarray(pairs.values),
            "vectors": np.asarray(pairs.vectors),
        },
        details=lambda: {**used[-1].counts, "setting": f"b = {shape[1]}"},
    )


def _measurement(job: Job, loaded: Loaded) -> Case:
    del job
    arguments = (loaded.problem(), loaded.params, loaded.direction)
    solvers: list[str] = []

    def run(_: None) -> Any:
        result = grsd_jax.measure_coupling(*arguments, key=jax.random.key(0))
        solvers.append(result.solver)
        return jax.block_until_ready(result)

    return Case(
        run=run,
        arrays=lambda result: {
            "values": np.asarray(result.values),
            "coupling": np.asarray(result.coupling),
        },
        details=lambda: {"setting": f"solver {solvers[-1]}"},
    )
