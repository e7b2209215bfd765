"""The networks in PyTorch, functional, on the weights of the exported arrays.

Convolution kernels and images go from channels last to channels first, dense kernels
are transposed. BatchNorm runs on the stored statistics. Outputs are softmax values: the
error less its constant, the labels.
"""

import os
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F

from comparison.harness import Job, subtree

Tensors = dict[str, torch.Tensor]


class TorchProblem(torch.nn.Module):
    """A problem in PyTorch, a module whose parameters are the trained arrays alone.

    Attributes:
        images: ``[N, 3, 32, 32]``.
        block: The columns of a task for a block, ``[n, b]``; else None.
        direction: The tangent, by the names of the parameters.
    """

    def __init__(self, job: Job) -> None:
        super().__init__()
        torch.set_num_threads(os.cpu_count() or 1)
        device = torch.device("cuda" if job.device == "gpu" else "cpu")
        self.model = job.spec.model
        arrays = _tensors(subtree(job.inputs, "params"), device)
        self.names = {name: name.replace("/", "_") for name in arrays}
        for name, tensor in arrays.items():
            self.register_parameter(self.names[name], torch.nn.Parameter(tensor))
        self.statistics = _tensors(subtree(job.inputs, "batch_stats"), device)
        moved = _tensors(subtree(job.inputs, "direction"), device)
        self.direction = {self.names[name]: tensor for name, tensor in moved.items()}
        images = torch.as_tensor(job.inputs["images"], device=device)
        self.images = images.permute(0, 3, 1, 2).contiguous()
        self.block = None
        if job.kind == "block":
            self.block = torch.as_tensor(job.block, device=device)

    def tensors(self) -> Tensors:
        """Returns the parameters as plain tensors, by name."""
        return {name: p.detach() for name, p in self.named_parameters()}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Maps images ``[N, 3, 32, 32]`` to softmax outputs ``[N, C]``."""
        return self.outputs(dict(self.named_parameters()), images)

    def outputs(self, params: Mapping[str, torch.Tensor], images: torch.Tensor):
        """Maps parameters and images to softmax outputs ``[N, C]``."""
        by_path = {path: params[name] for path, name in self.names.items()}
        if self.model == "mlp":
            logits = _mlp(by_path, images)
        else:
            logits = _resnet18(by_path, self.statistics, images)
        return F.softmax(logits, dim=-1)


def synchronize(value: torch.Tensor) -> torch.Tensor:
    """Returns a tensor once it is there."""
    if value.is_cuda:
        torch.cuda.synchronize()
    return value


def matrix(result: torch.Tensor) -> dict[str, np.ndarray]:
    """Returns the arrays of a task whose result is one matrix."""
    return {"matrix": result.detach().cpu().numpy()}


def peak_device_bytes(device: str) -> Callable[[], int] | None:
    """Returns a function that tells an accelerator's peak memory; None on CPU."""
    return torch.cuda.max_memory_allocated if device == "gpu" else None


def _tensors(arrays: Mapping[str, np.ndarray], device: torch.device) -> Tensors:
    axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
    return {
        name: torch.as_tensor(
            np.ascontiguousarray(array.transpose(axes[array.ndim])), device=device
        )
        for name, array in arrays.items()
    }


def _mlp(params: Tensors, images: torch.Tensor) -> torch.Tensor:
    # Flattened as the arrays were: the channels are the fastest.
    x = images.permute(0, 2, 3, 1).flatten(1)
    for index in range(3):
        layer = f"hidden{index + 1}"
        x = F.relu(F.linear(x, params[f"{layer}/kernel"], params[f"{layer}/bias"]))
    return F.linear(x, params["head/kernel"], params["head/bias"])


def _resnet18(
    params: Tensors, statistics: Tensors, images: torch.Tensor
) -> torch.Tensor:
    def conv(path: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        kernel = params[f"{path}/kernel"]
        size = kernel.shape[-1]
        if stride == 2 and size == 3:
            # "SAME" padding of an even side puts the odd row and column at the end.
            x = F.pad(x, (0, 1, 0, 1))
            return F.conv2d(x, kernel, stride=2)
        return F.conv2d(x, kernel, stride=stride, padding=size // 2)

    def norm(path: str, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(
            x,
            statistics[f"{path}/mean"],
            statistics[f"{path}/var"],
            params[f"{path}/scale"],
            params[f"{path}/bias"],
            training=False,
            eps=1e-5,
        )

    x = F.relu(norm("stem_norm", conv("stem_conv", images)))
    for stage in range(4):
        for index in range(2):
            block = f"stage{stage + 1}_block{index + 1}"
            stride = 2 if stage > 0 and index == 0 else 1
            y = F.relu(norm(f"{block}/norm1", conv(f"{block}/conv1", x, stride)))
            y = norm(f"{block}/norm2", conv(f"{block}/conv2", y))
            if f"{block}/shortcut_conv/kernel" in params:
                x = conv(f"{block}/shortcut_conv", x, stride)
                x = norm(f"{block}/shortcut_norm", x)
            x = F.relu(x + y)
    x = x.mean(dim=(2, 3))
    return F.linear(x, params["head/kernel"], params["head/bias"])
