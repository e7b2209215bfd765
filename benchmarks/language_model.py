"""Times products with the kernel of a small GPT beside ones written by hand.

A GPT has too many outputs for factors, so its products go through one linearization.
Beside them stand the same products by `jax.vjp` and `jax.jvp`, prepared ones by
`jax.linearize` and a pullback under `jax.vmap`, and the Gauss-Newton product in the way
of curvlinops; all in units of the gradient of the mean loss on the same batch. All take
turns; a time is the median over the turns.

Example:
  python benchmarks/language_model.py --out runs/language_model.json
  python benchmarks/language_model.py --layers 1 --width 16 --positions 8 --repeats 1
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grsd_jax as grsd
import jax
import jax.numpy as jnp
import numpy as np

from comparison.machine import describe_machine, installed_versions
from gpu import gpt

#: Columns of the prepared block.
_COLUMNS = 8


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=256)
    parser.add_argument("--positions", type=int, default=64)
    parser.add_argument("--num_examples", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    size = gpt.Size(
        options.layers,
        options.width,
        options.vocabulary,
        options.positions,
        options.num_examples,
    )
    seconds, errors = measure(size, options.repeats)
    report = {
        "machine": describe_machine(),
        "versions": installed_versions(),
        "size": size._asdict(),
        "seconds": seconds,
        "errors": errors,
    }
    print(table(seconds, errors))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")


def measure(
    size: gpt.Size, repeats: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Returns the seconds of every operation, a column each, and errors of products."""
    params, batches = gpt.make_params(size), gpt.make_batches(size)
    batch = jax.tree.map(lambda leaf: leaf[0], batches)
    problem = grsd.Problem(gpt.logits, batches)
    shape = (size.dimension, _COLUMNS)
    block = jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32)
    column = block[:, :1]
    kernel = grsd.linearize_kernel(problem, params)
    by_hand = prepared_by_hand(params, batch)
    vectors = gpt.random_vectors(params, _COLUMNS)
    runs: dict[str, tuple[int, Callable[[], Any]]] = {
        "gradient": (1, lambda: gpt.gradient(params, batch)),
        "product": (1, lambda: grsd.kernel_matmat(problem, params, column)),
        "product by hand": (1, lambda: product_by_hand(params, batch, column)),
        "prepared": (_COLUMNS, lambda: kernel.matmat(block)),
        "prepared by hand": (_COLUMNS, lambda: by_hand(block)),
        "Gauss-Newton": (
            _COLUMNS,
            lambda: gpt.gauss_newton(params, batch, vectors),
        ),
    }
    results = {name: jax.block_until_ready(run()) for name, (_, run) in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, (columns, run) in runs.items():
            started = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append((time.perf_counter() - started) / columns)
    errors = {
        name: apart(results[name], results[f"{name} by hand"])
        for name in ("product", "prepared")
    }
    return seconds, errors


def apart(a: jax.Array, b: jax.Array) -> float:
    """Returns the relative difference in the Frobenius norm."""
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def _error(params: Any, batch: Any) -> jax.Array:
    outputs = gpt.logits(params, batch)
    chosen = jax.nn.one_hot(batch["label"], outputs.shape[-1])
    return (jax.nn.softmax(outputs) - chosen).ravel()


@jax.jit
def product_by_hand(params: Any, batch: Any, column: jax.Array) -> jax.Array:
    """Computes ``J J^T v`` by a VJP and a JVP."""

    def error(p: Any) -> jax.Array:
        return _error(p, batch)

    _, pullback = jax.vjp(error, params)
    (tangent,) = pullback(column[:, 0])
    return jax.jvp(error, (params,), (tangent,))[1][:, None]


def prepared_by_hand(params: Any, batch: Any) -> Callable[[jax.Array], jax.Array]:
    """Returns products of blocks with what was linearized once."""

    @jax.jit
    def prepare(params: Any) -> Any:
        _, pullback = jax.vjp(lambda p: _error(p, batch), params)
        _, push = jax.linearize(lambda p: _error(p, batch), params)
        return pullback, push

    @jax.jit
    def product(maps: Any, block: jax.Array) -> jax.Array:
        pullback, push = maps
        return jax.vmap(lambda v: push(*pullback(v)), in_axes=1, out_axes=1)(block)

    maps = prepare(params)
    return lambda block: product(maps, block)


def table(seconds: dict[str, list[float]], errors: dict[str, float]) -> str:
    """Returns medians of a column, in milliseconds and in gradients."""
    gradient = statistics.median(seconds["gradient"])
    lines = [f"{'a column of':20} {'ms':>8} {'gradients':>10} {'error':>8}"]
    for name, times in seconds.items():
        median = statistics.median(times)
        error = format(errors[name], "8.0e") if name in errors else ""
        lines.append(f"{name:20} {1e3 * median:8.2f} {median / gradient:10.2f} {error}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
