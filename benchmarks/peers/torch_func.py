"""torch.func: per-example Jacobians, block products, and the whole measurement."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.func import jacrev, jvp, linearize, vjp, vmap

from comparison.grid import NUM_CLASSES
from comparison.harness import Case, Job
from peers.torch_network import (
    Tensors,
    TorchProblem,
    matrix,
    peak_device_bytes,
    synchronize,
)

_CHUNK = 8
_SHELLS = 12


def make_case(job: Job) -> Case:
    """Returns the case of a task."""
    loaded = TorchProblem(job)
    chunk = _CHUNK if job.variant.endswith(f"chunks of {_CHUNK}") else None
    if job.kind == "dense":
        case = _dense(loaded, chunk)
    elif job.kind == "measurement":
        case = _measurement(loaded)
    elif job.variant == "linearized":
        case = _linearized(loaded)
    else:
        case = _recomputed(loaded, chunk)
    return case._replace(peak_device_bytes=peak_device_bytes(job.device))


def _rows(
    loaded: TorchProblem, chunk: int | None = None
) -> Callable[[Tensors], Tensors]:
    """Returns the function of the parameters that gives the rows of J, by leaf."""

    def one(params: Tensors, image: torch.Tensor) -> torch.Tensor:
        return loaded.outputs(params, image[None])[0]

    per_example = vmap(jacrev(one), in_dims=(None, 0), chunk_size=chunk)

    def rows(params: Tensors) -> Tensors:
        jacobian = per_example(params, loaded.images)
        return {name: leaf.flatten(2).flatten(0, 1) for name, leaf in jacobian.items()}

    return rows


def _inner(left: Tensors, right: Tensors) -> torch.Tensor:
    return sum(leaf @ right[name].T for name, leaf in left.items())


def _dense(loaded: TorchProblem, chunk: int | None) -> Case:
    params = loaded.tensors()
    rows = _rows(loaded, chunk)

    def run(_: None) -> torch.Tensor:
        jacobian = rows(params)
        return synchronize(_inner(jacobian, jacobian))

    return Case(run=run, arrays=matrix)


def _by_columns(block: torch.Tensor) -> torch.Tensor:
    """Returns columns ``[n, b]`` as ``[b, N, C]``."""
    return block.T.reshape(block.shape[1], -1, NUM_CLASSES)


def _recomputed(loaded: TorchProblem, chunk: int | None) -> Case:
    """A VJP and a JVP in one `vmap` over columns; the forward pass is shared."""
    params = loaded.tensors()

    def outputs(p: Tensors) -> torch.Tensor:
        return loaded.outputs(p, loaded.images)

    def product(column: torch.Tensor) -> torch.Tensor:
        _, pullback = vjp(outputs, params)
        return jvp(outputs, (params,), pullback(column))[1]

    def run(_: None) -> torch.Tensor:
        columns = vmap(product, chunk_size=chunk)(_by_columns(loaded.block))
        return synchronize(columns.flatten(1).T)

    return Case(run=run, arrays=matrix)


def _linearized(loaded: TorchProblem) -> Case:
    """Pullback and linearized function are made once, as ours is."""
    params = loaded.tensors()

    def outputs(p: Tensors) -> torch.Tensor:
        return loaded.outputs(p, loaded.images)

    def prepare() -> tuple[Any, Any]:
        _, pullback = vjp(outputs, params)
        _, push = linearize(outputs, params)
        return pullback, push

    def run(state: tuple[Any, Any]) -> torch.Tensor:
        pullback, push = state

        def product(column: torch.Tensor) -> torch.Tensor:
            return push(*pullback(column))

        columns = vmap(product)(_by_columns(loaded.block))
        return synchronize(columns.flatten(1).T)

    return Case(prepare=prepare, run=run, arrays=matrix)


def _measurement(loaded: TorchProblem) -> Case:
    """J and its derivative, M and its derivative, eigenvectors, shells.

    The composition is ours: torch.func gives the Jacobians, everything after them is
    what a user would have to write. Fits, windows and cross-checks are left out.
    """
    params, rows = loaded.tensors(), _rows(loaded)

    def run(_: None) -> dict[str, np.ndarray]:
        jacobian, moved = jvp(rows, (params,), (loaded.direction,))
        kernel = _inner(jacobian, jacobian)
        half = _inner(moved, jacobian)
        values, vectors = torch.linalg.eigh(kernel)
        values, vectors = values.flip(0), vectors.flip(1)
        coupling = (vectors.T @ (half + half.T) @ vectors).cpu().numpy()
        values = values.cpu().numpy()
        return {
            "values": values,
            "coupling": coupling,
            "shells": _shell_means(values, coupling),
        }

    return Case(run=run, arrays=lambda result: result)


def _shell_means(values: np.ndarray, coupling: np.ndarray) -> np.ndarray:
    """Averages the squared coupling over log shells of the resolved eigenvalues."""
    resolved = values > 10 * np.finfo(values.dtype).eps * values[0]
    position = np.log(values[resolved])
    edges = np.linspace(position.min(), position.max(), _SHELLS + 1)
    shell = np.clip(np.searchsorted(edges, position, "right") - 1, 0, _SHELLS - 1)
    member = np.eye(_SHELLS)[shell]
    squares = coupling[np.ix_(resolved, resolved)] ** 2
    counts = np.outer(member.sum(0), member.sum(0))
    return member.T @ squares @ member / np.maximum(counts, 1)
