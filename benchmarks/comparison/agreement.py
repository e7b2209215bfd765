"""Checks a result against the reference in float64, before its time counts."""

from collections.abc import Mapping

import numpy as np

from comparison.grid import NUM_PAIRS, PAIR_TOLERANCE, block_width, task_kind

Arrays = Mapping[str, np.ndarray]

#: Largest error of each kind of task. Single precision is at 1e-7 to 1e-6; a wrong
#: layer, label or normalization is at 1e-1.
TOLERANCES = {
    "dense": 1e-5,
    "block": 1e-5,
    "derivative": 1e-4,
    "eigenpairs": PAIR_TOLERANCE,
    "measurement": 1e-3,
}


def tolerance(task: str) -> float:
    """Returns the largest error with which a result of a task counts."""
    return TOLERANCES[task_kind(task)]


def disagreement(task: str, result: Arrays, inputs: Arrays, reference: Arrays) -> float:
    """Measures how far a result is from the reference.

    - ``dense``, ``block_b``, ``derivative_b``: the relative Frobenius error of M, of
      ``M V`` and of ``V^T Mdot V``.
    - ``eigenpairs``: the largest of ``|M v - lambda v| / lambda_max``,
      ``|lambda - exact| / lambda_max`` and ``|V^T V - I|``; the second sees a member
      that was missed.
    - ``measurement``: of the leading pairs, the largest error of the eigenvalues and of
      the spectrum of ``V^T Mdot V``, each relative to its largest. A spectrum is not
      changed by the signs and rotations that eigenvectors are free in.

    Args:
        task: One of the tasks.
        result: The arrays of the peer.
        inputs: Those of the problem.
        reference: ``kernel`` and, where a task needs it, ``derivative``, in float64.

    Returns:
        The error, infinite if a shape differs or a value is not finite.
    """
    kind = task_kind(task)
    result = {name: np.asarray(array, np.float64) for name, array in result.items()}
    if not all(np.all(np.isfinite(array)) for array in result.values()):
        return float("inf")
    if kind == "eigenpairs":
        return pair_error(result["values"], result["vectors"], reference["kernel"])
    if kind == "measurement":
        return _measurement_error(result, reference)
    expected = reference["kernel"]
    if kind != "dense":
        block = inputs["block"][:, : block_width(task)].astype(np.float64)
        if kind == "derivative":
            expected = block.T @ reference["derivative"] @ block
        else:
            expected = expected @ block
    matrix = result["matrix"]
    if matrix.shape != expected.shape:
        return float("inf")
    return float(np.linalg.norm(matrix - expected) / np.linalg.norm(expected))


def pair_error(values: np.ndarray, vectors: np.ndarray, kernel: np.ndarray) -> float:
    """Returns the error of 20 eigenpairs in any order, see `disagreement`."""
    if values.shape != (NUM_PAIRS,) or vectors.shape != (len(kernel), NUM_PAIRS):
        return float("inf")
    exact = np.linalg.eigvalsh(kernel)[::-1][:NUM_PAIRS]
    missed = np.sort(values)[::-1] - exact
    residuals = np.linalg.norm(kernel @ vectors - vectors * values, axis=0)
    gram = vectors.T @ vectors - np.eye(NUM_PAIRS)
    return max(
        float(np.max(residuals) / np.max(np.abs(values))),
        float(np.max(np.abs(missed)) / exact[0]),
        float(np.max(np.abs(gram))),
    )


def _measurement_error(result: Arrays, reference: Arrays) -> float:
    exact, vectors = np.linalg.eigh(reference["kernel"])
    exact, vectors = exact[::-1][:NUM_PAIRS], vectors[:, ::-1][:, :NUM_PAIRS]
    moved = np.linalg.eigvalsh(vectors.T @ reference["derivative"] @ vectors)
    values, coupling = result["values"], result["coupling"]
    if values.shape[0] < NUM_PAIRS or coupling.shape != (len(values), len(values)):
        return float("inf")
    found = np.linalg.eigvalsh(coupling[:NUM_PAIRS, :NUM_PAIRS])
    return max(
        float(np.max(np.abs(values[:NUM_PAIRS] - exact)) / exact[0]),
        float(np.max(np.abs(found - moved)) / np.max(np.abs(moved))),
    )
