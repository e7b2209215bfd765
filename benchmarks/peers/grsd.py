"""This package, as a user calls it."""

from argparse import Namespace
from typing import Any

import grsd_jax
import jax
import numpy as np
from grsd_jax.linalg.eigenpairs import leading_eigenpairs

from comparison.grid import NUM_PAIRS, PAIR_TOLERANCE, Problem, block_width
from comparison.harness import Case, Inputs
from comparison.inputs import load_problem, plain_error
from peers.counting import CountedOperator
from peers.jax_tools import compilation_counter, peak_device_bytes

#: Forward passes timed together, since one alone is over before the caches are warm.
_FORWARDS = 10


def make_case(
    problem: Problem, task: str, variant: str, inputs: Inputs, options: Namespace
) -> Case:
    """Returns the case of a task, by the path that the package takes by itself."""
    return _case(problem, task, variant, inputs, options, plain=False)


def make_plain_case(
    problem: Problem, task: str, variant: str, inputs: Inputs, options: Namespace
) -> Case:
    """Returns the case of a task, with the layers hidden: nothing but JAX's AD."""
    return _case(problem, task, variant, inputs, options, plain=True)


def linearized(loaded: dict[str, Any], jacobian: str = "auto") -> Any:
    """Returns the kernel of a loaded problem, linearised."""
    names = ("error_fn", "params", "batches")
    arguments = [loaded[name] for name in names]
    kernel = grsd_jax.linearize_kernel(*arguments, jacobian=jacobian)
    return jax.block_until_ready(kernel)


def _case(
    problem: Problem,
    task: str,
    variant: str,
    inputs: Inputs,
    options: Namespace,
    *,
    plain: bool,
) -> Case:
    loaded = load_problem(problem, inputs)
    if plain:
        loaded["error_fn"] = jax.tree_util.Partial(plain_error, loaded["error_fn"])
    kind = task.partition("_")[0]
    make = {
        "dense": _dense,
        "block": _plain_block if plain else _block,
        "derivative": _derivative,
        "eigenpairs": _eigenpairs,
        "measurement": _measurement,
    }[kind]
    if kind in ("block", "derivative"):
        loaded["block"] = loaded["block"][:, : block_width(task)]
    if kind == "eigenpairs":
        loaded["start_width"] = int(variant.removeprefix("b = "))
    case = make(loaded)
    moved = {**loaded, "params": jax.tree.map(lambda p: 1.01 * p, loaded["params"])}

    def other_weights() -> None:
        other = make(moved)
        other.run(other.prepare() if other.prepare else None)

    return case._replace(
        compilations=compilation_counter(),
        other_weights=other_weights if problem.width < 64 else None,
        peak_device_bytes=peak_device_bytes(options.device),
    )


def _matrix(result: jax.Array) -> dict[str, np.ndarray]:
    return {"matrix": np.asarray(result)}


def _dense(loaded: dict[str, Any]) -> Case:
    arguments = (loaded["error_fn"], loaded["params"], loaded["batches"])
    return Case(
        run=lambda _: jax.block_until_ready(grsd_jax.kernel_dense(*arguments)),
        arrays=_matrix,
    )


def _block(loaded: dict[str, Any]) -> Case:
    return Case(
        prepare=lambda: linearized(loaded),
        run=lambda kernel: jax.block_until_ready(kernel.matmat(loaded["block"])),
        arrays=_matrix,
    )


def _plain_block(loaded: dict[str, Any]) -> Case:
    """The block product, beside the forward passes whose rate it is to keep."""
    error_fn, params = loaded["error_fn"], loaded["params"]
    batch = jax.tree.map(lambda leaf: leaf[0], loaded["batches"])
    forward = jax.jit(lambda p, b: error_fn(p, b))

    def operations() -> dict[str, float]:
        kernel = linearized(loaded)
        product = jax.jit(lambda k, v: k.matmat(v)).lower(kernel, loaded["block"])
        once = forward.lower(params, batch).cost_analysis()["flops"]
        return {
            "flops": product.cost_analysis()["flops"],
            "beside_flops": _FORWARDS * once,
        }

    def forwards(_: Any) -> None:
        for _ in range(_FORWARDS):
            jax.block_until_ready(forward(params, batch))

    return _block(loaded)._replace(beside=forwards, details=operations)


def _derivative(loaded: dict[str, Any]) -> Case:
    """The projected derivative, beside the plain block product that it is measured in.

    The product is prepared beforehand, as Lanczos uses it; the derivative is not.
    """
    names = ("error_fn", "params", "batches", "direction", "block")
    arguments = [loaded[name] for name in names]

    return Case(
        prepare=lambda: linearized(loaded, "plain"),
        run=lambda _: jax.block_until_ready(grsd_jax.kernel_derivative(*arguments)),
        beside=lambda kernel: jax.block_until_ready(kernel.matmat(loaded["block"])),
        arrays=_matrix,
    )


def _eigenpairs(loaded: dict[str, Any]) -> Case:
    used: list[Any] = []
    size = loaded["block"].shape[0]
    shape = (size, loaded["start_width"])
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
        details=lambda: {
            "columns": used[-1].columns,
            "products": used[-1].products,
            "setting": f"b = {shape[1]}",
        },
    )


def _measurement(loaded: dict[str, Any]) -> Case:
    names = ("error_fn", "params", "batches", "direction")
    arguments = [loaded[name] for name in names]
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
