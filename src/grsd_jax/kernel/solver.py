"""What is cheaper for a measurement: the dense kernel, or products with it."""

import contextlib
import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._checks import check_at_least, make_plain
from grsd_jax._memory import default_bytes
from grsd_jax._typing import PyTree
from grsd_jax.jacobian.plan import are_coupled
from grsd_jax.problem import Point, Problem, point_at

#: n x n arrays alive at once in the dense solver: M, Mdot, V, and work space.
_DENSE_MATRICES = 8

#: Columns of a Krylov space for each pair that is to converge, as a first guess.
COLUMNS_A_PAIR = 2


@dataclasses.dataclass(frozen=True)
class Lanczos:
    """Block Lanczos as the solver of a measurement.

    Attributes:
        block_size: Columns b of a block; also the columns differentiated at a time.
        num_steps: Steps m, which span ``r = m b`` dimensions. If None, as many as the
            pairs that are asked for need to converge; inside `jit`, which cannot wait
            for that, enough for two columns a pair.
    """

    block_size: int = 8
    num_steps: int | None = None

    def __post_init__(self) -> None:
        """Checks the options."""
        make_plain(self)
        check_at_least("block_size", self.block_size, 1)
        if self.num_steps is not None:
            check_at_least("num_steps", self.num_steps, 1)


def choose_solver(
    problem: Problem, params: PyTree, *, num_columns: int
) -> Literal["dense", "lanczos"]:
    """Returns the solver that needs fewer operations, from shapes alone.

    Args:
        problem: The problem.
        params: Parameters.
        num_columns: The Krylov dimension r that Lanczos would have.

    Returns:
        ``"dense"`` or ``"lanczos"``; Lanczos if the dense solver's matrices do not fit
        in half of the free memory or the examples are coupled, dense if Lanczos would
        span half of the space.

    Raises:
        ValueError: If the problem does not fit or there is no column.

    References:
        Ours; see `count_operations`.
    """
    num_columns = check_at_least("num_columns", num_columns, 1)
    return solver_at(point_at(problem, params), num_columns)


def solver_at(point: Point, num_columns: int) -> Literal["dense", "lanczos"]:
    """Returns the cheaper solver of a checked problem, see `choose_solver`."""
    if not _matrices_fit(point):
        return "lanczos"
    if 2 * num_columns < point.dimension:
        dense, lanczos = count_operations(point, num_columns)
        if lanczos < dense:
            return "lanczos"
    return "lanczos" if are_coupled(point) else "dense"


def matrices_are_cheaper(
    point: Point, kernel_columns: int, derivative_columns: int
) -> bool:
    """Whether to form M and Mdot once, rather than multiply by that many columns.

    Args:
        point: The problem at its parameters.
        kernel_columns: Columns that M is multiplied by.
        derivative_columns: Columns that Mdot is multiplied by.

    Returns:
        Whether it takes fewer operations, the matrices fit in half of the free memory,
        and the examples are independent.
    """
    if not _matrices_fit(point):
        return False
    products = _product_operations(point, kernel_columns, derivative_columns)
    matrices = _matrix_operations(point)
    matrices += 2.0 * point.dimension**2 * (kernel_columns + derivative_columns)
    return matrices < products and not are_coupled(point)


def _matrices_fit(point: Point) -> bool:
    """Whether the matrices of a dense measurement fit in half of the free memory."""
    held = _DENSE_MATRICES * point.dimension**2 * point.error.dtype.itemsize
    return held <= default_bytes()


def count_operations(point: Point, num_columns: int) -> tuple[float, float]:
    """Counts the operations of a measurement with derivative, by both solvers.

    With g those of a forward pass of all batches, the dense kernel takes ``6 C g`` for
    the rows of J and Jdot, ``3 n K N C P`` for their Gram products (``n = K N C`` for a
    stack) and ``20 n^3`` for the eigenvectors; Lanczos takes ``10 g`` a column, 4 for M
    and 6 for Mdot, and ``6 n r^2`` for its basis. Factors save both about as much, so
    they do not count.

    Args:
        point: The problem at its parameters.
        num_columns: The Krylov dimension r.

    Returns:
        Those of the dense solver and of Lanczos.
    """
    n = point.dimension
    dense = _matrix_operations(point) + 20.0 * n**3
    lanczos = _product_operations(point, num_columns, num_columns)
    return dense, lanczos + 6.0 * n * num_columns**2


def _matrix_operations(point: Point) -> float:
    """Returns the operations that form M and Mdot."""
    num_params = sum(np.size(leaf) for leaf in jax.tree.leaves(point.params))
    rows = point.num_batches * int(np.prod(point.error.shape))
    passes = 6.0 * point.error.shape[1] * _forward_operations(point)
    return passes + 3.0 * point.dimension * rows * num_params


def _product_operations(
    point: Point, kernel_columns: int, derivative_columns: int
) -> float:
    """Returns the operations of products with M and Mdot, over all batches."""
    passes = 4.0 * kernel_columns + 6.0 * derivative_columns
    return passes * _forward_operations(point)


def _forward_operations(point: Point) -> float:
    """Returns the operations of all errors; 2 P N a batch if the backend is silent."""
    arguments = (point.error_fn, point.params, point.parts[0])
    leaves, tree = jax.tree.flatten(arguments)
    avals = tuple((np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
    counted = _counted(tree, avals)
    if counted <= 0:
        num_params = sum(np.size(leaf) for leaf in jax.tree.leaves(point.params))
        counted = 2.0 * num_params * point.error.shape[0]
    return point.num_batches * counted


@functools.lru_cache(maxsize=64)
def _counted(tree: Any, avals: tuple[tuple[Any, Any], ...]) -> float:
    """Returns the compiler's count of operations, 0 where it counts none."""
    leaves = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in avals]
    error_fn, params, batch = jax.tree.unflatten(tree, leaves)
    try:
        with _on_host():
            lowered = jax.jit(lambda f, p, x: f(p, x)).lower(error_fn, params, batch)
            found = lowered.cost_analysis() or {}
    except (NotImplementedError, RuntimeError, ValueError):
        return 0.0  # written for accelerators alone
    return float(found.get("flops", 0.0))


def _on_host() -> contextlib.AbstractContextManager[Any]:
    """Returns a context for the CPU, if JAX has it: accelerators count nothing."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return contextlib.nullcontext()
