"""curvlinops: the Jacobian as a linear operator, and its adjoint."""

import torch
from curvlinops import JacobianLinearOperator

from comparison.harness import Case, Job
from peers.torch_network import TorchProblem, matrix, peak_device_bytes, synchronize

#: Columns multiplied together for the dense matrix; all at once need too much memory.
_CHUNK = 32


def make_case(job: Job) -> Case:
    """Returns the case of a task."""
    loaded = TorchProblem(job)
    targets = torch.zeros(job.spec.num_examples, device=loaded.images.device)

    def prepare() -> JacobianLinearOperator:
        data = [(loaded.images, targets)]
        return JacobianLinearOperator(loaded, list(loaded.parameters()), data)

    def product(jacobian: JacobianLinearOperator) -> torch.Tensor:
        return synchronize(jacobian @ (jacobian.adjoint() @ loaded.block))

    def dense(jacobian: JacobianLinearOperator) -> torch.Tensor:
        """All rows of J as ``J^T I``, then their Gram matrix."""
        adjoint = jacobian.adjoint()
        identity = torch.eye(job.spec.size, device=loaded.images.device)
        rows = torch.cat([(adjoint @ part).T for part in identity.split(_CHUNK, 1)])
        return synchronize(rows @ rows.T)

    return Case(
        prepare=prepare,
        run=dense if job.kind == "dense" else product,
        arrays=matrix,
        peak_device_bytes=peak_device_bytes(job.device),
    )
