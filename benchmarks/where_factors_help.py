"""Times products with and without factors, over positions and widths of a network.

Factors cost C backward passes when they are made; a column then costs products of
activations with cotangents in place of a pass through the network. The network has two
dense layers at each of T positions and their mean as its output, C classes.

Example:
  python benchmarks/where_factors_help.py --out runs/where_factors_help.json
  python benchmarks/where_factors_help.py --positions 2 --widths 8 --repeats 1
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import grsd_jax as grsd
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from comparison.machine import describe_machine, installed_versions
from frameworks import hidden, measure


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--num_classes", type=int, default=10)
    parser.add_argument("--num_examples", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    sizes = options.num_examples, options.num_classes
    rows = []
    for width in options.widths:
        for positions in options.positions:
            outputs_fn, params, batches = network(positions, width, *sizes)
            forms = {
                "factors": grsd.Problem(outputs_fn, batches),
                "plain": grsd.Problem(hidden(Partial(outputs_fn)), batches),
            }
            pairs = {name: (problem, params) for name, problem in forms.items()}
            found = measure(pairs, options.repeats)
            rows.append({"width": width, "positions": positions, "forms": found})
    report = {
        "machine": describe_machine(),
        "versions": installed_versions(),
        "num_classes": options.num_classes,
        "num_examples": options.num_examples,
        "rows": rows,
    }
    print(table(rows))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")


def network(
    positions: int, width: int, num_examples: int, num_classes: int
) -> tuple[Any, Any, Any]:
    """Returns the outputs function, the parameters and one batch."""
    noise = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> jax.Array:
        values = noise.normal(size=(rows, columns)) / np.sqrt(rows)
        return jnp.asarray(values, jnp.float32)

    params = {
        "first": matrix(width, width),
        "second": matrix(width, width),
        "head": matrix(width, num_classes),
    }
    leading = (1, num_examples)
    batches = {
        "x": jnp.asarray(noise.normal(size=(*leading, positions, width)), jnp.float32),
        "label": jnp.asarray(noise.integers(0, num_classes, leading), jnp.int32),
    }
    return outputs, params, batches


def outputs(params: Any, batch: Any) -> jax.Array:
    """Maps ``[N, T, d]`` to ``[N, C]``."""
    x = jax.nn.gelu(batch["x"] @ params["first"])
    x = jax.nn.gelu(x @ params["second"])
    return jnp.mean(x, axis=1) @ params["head"]


def table(rows: list[dict[str, Any]]) -> str:
    """Returns how many times as fast each operation is with factors."""
    lines = [f"{'width':>6} {'T':>4} {'dense':>8} {'prepare':>8} {'block':>8}"]
    for row in rows:
        factors, plain = (
            row["forms"][name]["seconds"] for name in ("factors", "plain")
        )
        ratios = (
            statistics.median(plain[task]) / statistics.median(factors[task])
            for task in ("dense", "prepare", "block")
        )
        cells = " ".join(f"{ratio:8.2f}" for ratio in ratios)
        lines.append(f"{row['width']:6} {row['positions']:4} {cells}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
