"""curvlinops: the Jacobian as a linear operator, and its adjoint."""

from argparse import Namespace

import numpy as np
import torch
from curvlinops import JacobianLinearOperator

from comparison.grid import Problem, block_width
from comparison.harness import Case, Inputs
from peers.torch_network import TorchProblem, peak_device_bytes, synchronize

#: Columns multiplied together for the dense matrix; all at once need too much memory.
_CHUNK = 32


def make_case(
    problem: Problem, task: str, variant: str, inputs: Inputs, options: Namespace
) -> Case:
    """Returns the case of a task."""
    del variant
    loaded = TorchProblem(problem, inputs, options)
    targets = torch.zeros(problem.num_examples, device=loaded.images.device)

    def prepare() -> JacobianLinearOperator:
        data = [(loaded.images, targets)]
        return JacobianLinearOperator(loaded, list(loaded.parameters()), data)

    def product(jacobian: JacobianLinearOperator) -> torch.Tensor:
        block = loaded.block[:, : block_width(task)]
        return synchronize(jacobian @ (jacobian.adjoint() @ block))

    def dense(jacobian: JacobianLinearOperator) -> torch.Tensor:
        """All rows of J as ``J^T I``, then their Gram matrix."""
        adjoint = jacobian.adjoint()
        identity = torch.eye(problem.size, device=loaded.images.device)
        rows = torch.cat([(adjoint @ part).T for part in identity.split(_CHUNK, 1)])
        return synchronize(rows @ rows.T)

    def arrays(result: torch.Tensor) -> dict[str, np.ndarray]:
        return {"matrix": result.detach().cpu().numpy()}

    return Case(
        prepare=prepare,
        run=dense if task == "dense" else product,
        arrays=arrays,
        peak_device_bytes=peak_device_bytes(options.device),
    )
