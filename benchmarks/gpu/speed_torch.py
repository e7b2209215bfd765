"""The part of stage 2 that runs in torch; `speed.py` starts it."""

from typing import Any

import common
import numpy as np
import torch

from comparison.grid import parse_problem
from comparison.harness import Job, measure
from peers import torch_func

_COLUMNS = 4


def run(
    folder: Any, clock: common.Clock, precision: str, rehearse: bool, *, wide: bool
) -> list[str]:
    """Measures torch.func on the ResNet of `speed_jax`, with the same weights.

    Without ``wide`` the block of all columns, which takes longest, is left for later.

    Returns:
        What was left out.
    """
    with np.load(folder / "inputs.npz") as file:
        inputs = dict(file)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    total = len(inputs["images"])
    results = common.Results(folder, clock)
    widest = inputs["block"].shape[1] if not rehearse else 4
    narrow = 8 if not rehearse else 2
    eighth = "recomputed, chunks of 8"
    tasks = [
        (total // 16, 1, "dense", "whole batch"),
        *([(total, 4, f"block_{widest}", eighth)] if wide else []),
        (total, 4, f"block_{narrow}", "recomputed"),
        (total // 16, 1, "measurement", "composition"),
        (total // 4, 1, "dense", "chunks of 8"),
    ]
    for examples, copies, task, variant in tasks:
        name = f"torch_k{copies}n{examples // copies}_{task}_{precision}"
        spec = parse_problem(common.problem_name(examples, rehearse=rehearse))
        job = Job(
            peer="torch_func",
            spec=spec,
            task=task,
            variant=variant,
            device="gpu" if device == "cuda" else "cpu",
            inputs=first_images(inputs, examples),
            folder=folder,
        )
        results.measure(
            name,
            lambda j=job, n=name: one(j, precision, folder / f"{n}.npz"),
            needs=6,
        )
        if device == "cuda":
            torch.cuda.empty_cache()
    return results.left_out


def one(job: Job, precision: str, path: Any) -> dict[str, Any]:
    """Measures one task at one precision."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True  # XLA tries its algorithms as well
    if job.device == "gpu":
        torch.cuda.reset_peak_memory_stats()
    record, arrays = measure(torch_func.make_case(job), repeats=5, seconds=3.0)
    if "matrix" in arrays:
        np.savez(path, columns=arrays["matrix"][:, :_COLUMNS])
    if "peak_device_mib" in record:
        record["peak_bytes"] = record["peak_device_mib"] * 2**20
    record["variant"] = job.variant
    return record


def first_images(inputs: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """Returns the inputs with the first images alone, and the columns' rows."""
    return {
        **inputs,
        "images": inputs["images"][:count],
        "labels": inputs["labels"][:count],
        "block": inputs["block"][: 10 * count],
    }
