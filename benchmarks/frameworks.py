"""Times one ResNet-18, written in four frameworks, with its factors and without.

The networks are the CIFAR form of `grsd_jax.models.ResNet18`, with BatchNorm on stored
statistics, each with random weights of its own. After compilation all take turns, so
that a machine that slows down slows all of them; a time is the median over the turns.
``plain`` is the linen network whose factors are hidden behind a custom derivative. Each
product is checked against `kernel_matmat`, which makes no factors.

Example:
  python benchmarks/frameworks.py --out runs/frameworks.json
  python benchmarks/frameworks.py --width 2 --num_examples 4 --repeats 1
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
from grsd_jax import models

from comparison.machine import describe_machine, installed_versions

#: Columns of the block.
_COLUMNS = 8

#: Strides of the eight basic blocks, and their widths in units of the first's.
_BLOCKS = ((1, 1), (1, 1), (2, 2), (1, 2), (2, 4), (1, 4), (2, 8), (1, 8))

Made = tuple[Callable[..., jax.Array], Any]


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--num_examples", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    networks = make_networks(options.width, options.num_examples)
    report = {
        "machine": describe_machine(),
        "versions": installed_versions(),
        "width": options.width,
        "num_examples": options.num_examples,
        "networks": measure(networks, options.repeats),
    }
    print(table(report["networks"]))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")


def make_networks(width: int, num_examples: int) -> dict[str, tuple[Any, Any]]:
    """Returns a problem and parameters for every framework."""
    noise = np.random.default_rng(0)
    batches = {
        "image": jnp.asarray(
            noise.normal(size=(1, num_examples, 32, 32, 3)), jnp.float32
        ),
        "label": jnp.asarray(noise.integers(0, 10, (1, num_examples))),
    }
    makers = {"linen": linen, "nnx": nnx, "equinox": equinox, "haiku": haiku}
    made = {name: make(width, batches["image"][0]) for name, make in makers.items()}
    outputs_fn, params = made["linen"]
    made["plain"] = (hidden(outputs_fn), params)
    return {
        name: (grsd.Problem(outputs_fn, batches), params)
        for name, (outputs_fn, params) in made.items()
    }


def measure(
    networks: dict[str, tuple[Any, Any]], repeats: int
) -> dict[str, dict[str, Any]]:
    """Returns first calls, medians and errors of all networks, which take turns."""
    runs: dict[str, dict[str, Callable[[], Any]]] = {}
    report: dict[str, dict[str, Any]] = {}
    for name, (problem, params) in networks.items():
        shape = (problem.dimension(params), _COLUMNS)
        block = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
        kernel = grsd.linearize_kernel(problem, params)
        runs[name] = {
            "dense": lambda q=problem, p=params: grsd.kernel_dense(q, p),
            "prepare": lambda q=problem, p=params: grsd.linearize_kernel(q, p),
            "block": lambda k=kernel, v=block: k.matmat(v),
        }
        explained = problem.explain(params)
        expected = grsd.kernel_matmat(problem, params, block)
        apart = jnp.linalg.norm(kernel.matmat(block) - expected)
        report[name] = {
            "num_leaves": explained.num_leaves,
            "num_factored": explained.num_factored,
            "error": float(apart / jnp.linalg.norm(expected)),
            "seconds": {task: [] for task in runs[name]},
        }
        for run in runs[name].values():
            jax.block_until_ready(run())
    for _ in range(repeats):
        for name, tasks in runs.items():
            for task, run in tasks.items():
                started = time.perf_counter()
                jax.block_until_ready(run())
                taken = time.perf_counter() - started
                report[name]["seconds"][task].append(taken)
    return report


def table(report: dict[str, dict[str, Any]]) -> str:
    """Returns medians in seconds, and their ratios to those of the linen network."""
    tasks = list(report["linen"]["seconds"])
    lines = [f"{'':10}" + "".join(f"{task:>18}" for task in tasks) + "   error  leaves"]

    def median(name: str, task: str) -> float:
        return statistics.median(report[name]["seconds"][task])

    for name, told in report.items():
        medians = {task: (median(name, task), median("linen", task)) for task in tasks}
        cells = [f"{own:9.4f} ({own / of:5.2f})" for own, of in medians.values()]
        leaves = f"{told['num_factored']}/{told['num_leaves']}"
        cells = "".join(f"{cell:>18}" for cell in cells)
        lines.append(f"{name:10}{cells} {told['error']:7.0e}  {leaves}")
    return "\n".join(lines)


def hidden(outputs_fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns the function without factors, behind a custom derivative."""
    return jax.tree_util.Partial(_hidden, outputs_fn)


@jax.custom_jvp
def _hidden(outputs_fn: Callable[..., jax.Array], params: Any, batch: Any) -> jax.Array:
    """Calls ``outputs_fn``; no factors are made of what has a custom derivative."""
    return outputs_fn(params, batch)


@_hidden.defjvp
def _hidden_jvp(primals: Any, tangents: Any) -> Any:
    return jax.jvp(lambda fn, params, batch: fn(params, batch), primals, tangents)


def linen(width: int, images: jax.Array) -> Made:
    """Returns the bundled network."""
    model = models.ResNet18(10, width)
    variables = dict(jax.jit(model.init)(jax.random.key(0), images))
    params = variables.pop("params")
    return models.linen_outputs(model, variables), params


def nnx(width: int, images: jax.Array) -> Made:
    """Returns the network in Flax NNX."""
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, ins: int, outs: int, strides: int, rngs: nnx.Rngs) -> None:
            def conv(ins: int, size: int, strides: int) -> nnx.Conv:
                shape = (size, size)
                return nnx.Conv(
                    ins, outs, shape, strides=strides, use_bias=False, rngs=rngs
                )

            self.conv1, self.conv2 = conv(ins, 3, strides), conv(outs, 3, 1)
            self.norm1 = nnx.BatchNorm(outs, rngs=rngs)
            self.norm2 = nnx.BatchNorm(outs, rngs=rngs)
            projects = ins != outs
            self.shortcut = conv(ins, 1, strides) if projects else None
            self.norm = nnx.BatchNorm(outs, rngs=rngs) if projects else None

        def __call__(self, x: jax.Array) -> jax.Array:
            y = jax.nn.relu(self.norm1(self.conv1(x)))
            y = self.norm2(self.conv2(y))
            if self.shortcut is not None and self.norm is not None:
                x = self.norm(self.shortcut(x))
            return jax.nn.relu(x + y)

    class Network(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.stem = nnx.Conv(3, width, (3, 3), use_bias=False, rngs=rngs)
            self.norm = nnx.BatchNorm(width, rngs=rngs)
            self.blocks = nnx.List(
                Block(ins * width, outs * width, strides, rngs)
                for ins, outs, strides in _chained()
            )
            self.head = nnx.Linear(8 * width, 10, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            x = jax.nn.relu(self.norm(self.stem(x)))
            for block in self.blocks:
                x = block(x)
            return self.head(jnp.mean(x, axis=(1, 2)))

    del images
    model = Network(nnx.Rngs(0))
    model.eval()
    return models.nnx_outputs(model)


def equinox(width: int, images: jax.Array) -> Made:
    """Returns the network in Equinox, whose axes are channels first."""
    import equinox as eqx

    keys = iter(jax.random.split(jax.random.key(0), 32))

    def conv(ins: int, outs: int, size: int, strides: int) -> eqx.nn.Conv2d:
        return eqx.nn.Conv2d(
            ins, outs, size, strides, padding="SAME", use_bias=False, key=next(keys)
        )

    def norm(features: int) -> eqx.nn.BatchNorm:
        return eqx.nn.BatchNorm(features, "examples", mode="batch")

    class Block(eqx.Module):
        convs: list[Any]
        norms: list[Any]

        def __init__(self, ins: int, outs: int, strides: int) -> None:
            self.convs = [conv(ins, outs, 3, strides), conv(outs, outs, 3, 1)]
            self.convs += [conv(ins, outs, 1, strides)] if ins != outs else []
            self.norms = [norm(outs) for _ in self.convs]

        def __call__(self, x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
            y, state = self.norms[0](self.convs[0](x), state)
            y, state = self.norms[1](self.convs[1](jax.nn.relu(y)), state)
            if len(self.convs) == 3:
                x, state = self.norms[2](self.convs[2](x), state)
            return jax.nn.relu(x + y), state

    class Network(eqx.Module):
        stem: Any
        norm: Any
        blocks: list[Block]
        head: Any

        def __init__(self) -> None:
            self.stem, self.norm = conv(3, width, 3, 1), norm(width)
            self.blocks = [
                Block(ins * width, outs * width, strides)
                for ins, outs, strides in _chained()
            ]
            self.head = eqx.nn.Linear(8 * width, 10, key=next(keys))

        def __call__(self, x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
            x, state = self.norm(self.stem(x), state)
            x = jax.nn.relu(x)
            for block in self.blocks:
                x, state = block(x, state)
            return self.head(jnp.mean(x, axis=(1, 2))), state

    del images
    model, state = eqx.nn.make_with_state(Network)()
    return models.equinox_outputs(
        model, state, inputs=lambda batch: jnp.moveaxis(batch["image"], -1, 1)
    )


def haiku(width: int, images: jax.Array) -> Made:
    """Returns the network in Haiku."""
    import haiku as hk

    def conv(x: jax.Array, features: int, size: int, strides: int) -> jax.Array:
        return hk.Conv2D(features, size, strides, with_bias=False)(x)

    def network(x: jax.Array, is_training: bool) -> jax.Array:
        def norm(x: jax.Array) -> jax.Array:
            return hk.BatchNorm(True, True, 0.9)(x, is_training)

        x = jax.nn.relu(norm(conv(x, width, 3, 1)))
        for ins, outs, strides in _chained():
            y = jax.nn.relu(norm(conv(x, outs * width, 3, strides)))
            y = norm(conv(y, outs * width, 3, 1))
            if ins != outs:
                x = norm(conv(x, outs * width, 1, strides))
            x = jax.nn.relu(x + y)
        return hk.Linear(10)(jnp.mean(x, axis=(1, 2)))

    transformed = hk.transform_with_state(network)
    init = jax.jit(lambda key, x: transformed.init(key, x, is_training=True))
    params, state = init(jax.random.key(0), images)
    return models.haiku_outputs(transformed, state), params


def _chained() -> list[tuple[int, int, int]]:
    """Returns the widths into and out of every block, and its stride."""
    outs = [1, *(width for _, width in _BLOCKS)]
    return [
        (ins, width, strides)
        for ins, (strides, width) in zip(outs, _BLOCKS, strict=False)
    ]


if __name__ == "__main__":
    main()
