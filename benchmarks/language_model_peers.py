"""Times the products of `benchmarks/language_model.py` in torch.func and curvlinops.

The same GPT in PyTorch, with attention written out, since its fused form has no forward
derivative. Run it with the Python of an environment that has both (see
`benchmarks/environments.py`); it needs no JAX. Times are in units of PyTorch's own
gradient of the mean loss on the same batch, and all take turns.

Example:
  python benchmarks/environments.py --only curvlinops
  PYTHON benchmarks/language_model_peers.py --out runs/language_model_peers.json
"""

import argparse
import importlib.metadata
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from curvlinops import JacobianLinearOperator
from torch import nn
from torch.func import functional_call, grad, jvp, vjp

#: Columns of the wide block.
_COLUMNS = 8


class Block(nn.Module):
    """A pre-norm block with causal attention, in heads of 64 features."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = max(1, width // 64)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[N, T, d]`` to ``[N, T, d]``."""
        count, positions, width = x.shape
        parts = self.qkv(self.norm1(x))
        parts = parts.reshape(count, positions, 3, self.heads, width // self.heads)
        query, key, value = (part.transpose(1, 2) for part in parts.unbind(2))
        scores = query @ key.transpose(2, 3) / math.sqrt(width // self.heads)
        past = torch.ones(positions, positions, dtype=torch.bool).tril()
        mixed = torch.softmax(scores.masked_fill(~past, -1e30), -1) @ value
        mixed = mixed.transpose(1, 2).reshape(count, positions, width)
        x = x + self.out(mixed)
        hidden = nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh")
        return x + self.down(hidden)


class GPT(nn.Module):
    """A GPT whose embedding is its output layer; outputs ``[N, T V]``."""

    def __init__(self, layers: int, width: int, vocabulary: int, positions: int):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Maps tokens ``[N, T]`` to logits ``[N, T V]``."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return (self.norm(self.blocks(x)) @ self.tokens.weight.T).flatten(1)


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=256)
    parser.add_argument("--positions", type=int, default=64)
    parser.add_argument("--num_examples", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    seconds = measure(options)
    gradient = statistics.median(seconds["gradient"])
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:34} {1e3 * median:8.1f} ms {median / gradient:6.2f} gradients")
    if options.out:
        packages = ("torch", "curvlinops-for-pytorch")
        report = {
            "versions": {name: importlib.metadata.version(name) for name in packages},
            "python": platform.python_version(),
            "settings": vars(options) | {"out": None},
            "seconds": seconds,
        }
        options.out.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Returns the seconds of every operation, a column each."""
    sizes = options.layers, options.width, options.vocabulary, options.positions
    model = GPT(*sizes)
    shape = options.num_examples, options.positions + 1
    drawn = torch.randint(0, options.vocabulary, shape)
    tokens, labels = drawn[:, :-1], drawn[:, 1:]
    params = {name: leaf.detach() for name, leaf in model.named_parameters()}
    chosen = nn.functional.one_hot(labels, options.vocabulary)

    def logits(params: dict[str, torch.Tensor]) -> torch.Tensor:
        flat = functional_call(model, params, (tokens,))
        return flat.reshape(*labels.shape, options.vocabulary)

    def error(params: dict[str, torch.Tensor]) -> torch.Tensor:
        return (torch.softmax(logits(params), -1) - chosen).flatten()

    def loss(params: dict[str, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(logits(params).flatten(0, 1), drawn_labels)

    drawn_labels = labels.flatten()
    block = torch.randn(chosen.numel(), _COLUMNS)

    def recomputed() -> torch.Tensor:
        _, pullback = vjp(error, params)
        (tangent,) = pullback(block[:, 0])
        return jvp(error, (params,), (tangent,))[1]

    jacobian = JacobianLinearOperator(
        model,
        list(model.parameters()),
        [(tokens, torch.zeros(len(tokens)))],
        check_deterministic=False,
    )
    adjoint = jacobian.adjoint()
    runs: dict[str, tuple[int, Callable[[], Any]]] = {
        "gradient": (1, lambda: grad(loss)(params)),
        "torch.func, a VJP and a JVP": (1, recomputed),
        "curvlinops, one column": (1, lambda: jacobian @ (adjoint @ block[:, :1])),
        "curvlinops, a column of eight": (
            _COLUMNS,
            lambda: jacobian @ (adjoint @ block),
        ),
    }
    for _, run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.repeats):
        for name, (columns, run) in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append((time.perf_counter() - started) / columns)
    return seconds


if __name__ == "__main__":
    main()
