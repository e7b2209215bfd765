"""Which solver is cheaper, by operations and memory.

A pass g through the network is its floating-point operations, and 7 for each byte that
it accesses, as the compiler counts both for a CPU before it fuses anything; small
networks are bound by the latter. With q the outputs differentiated (C, or ``C - 1`` for
a softmax error) and r Krylov columns, b at a time, one batch takes, with derivative:

| | plain | factored |
| :--- | :--- | :--- |
| dense | ``6 C g`` | ``4.5 (1 + q) g`` |
| and | ``3 n N C P`` | 1.5 times the blocks' `gram_cost` |
| Lanczos | ``4 g r`` | ``6 (1 + q) g`` and ``r / 2`` times the blocks' `product_cost` |
| and | ``6 g r`` | ``0.75 r`` times the same, of pulls and pushes |

A stack has pulls and pushes only. Matrix products count half, since they run at twice
the rate of a network. A byte of J counts 150 where it is made: three times for the
dense matrices, four times for factors that serve Lanczos. A byte read by a factored
product counts 40, of the derivative 60. The dense eigenvectors add ``20 n^3``, the
basis of Lanczos ``6 n r^2 + 5000 n r`` and each step 1.5e8. These numbers were fitted
to measured times (``scripts/solver_grid.py``); the counts of rows and of factors, those
of one example, are in `factors`.
"""

import contextlib
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._checks import check_at_least, check_batches, check_choice
from grsd_jax._memory import default_bytes, tree_bytes
from grsd_jax._typing import ErrorFn, PyTree, Reduction
from grsd_jax.jacobian.autodiff import as_pytree, check_problem
from grsd_jax.jacobian.factored import (
    FactoredErrorFn,
    JacobianForm,
    output_blocks,
    uses_factors,
)
from grsd_jax.jacobian.factors import (
    Factor,
    for_products,
    gram_cost,
    product_bytes,
    product_cost,
)
from grsd_jax.kernel.operator import REDUCTIONS

SOLVERS = ("auto", "dense", "lanczos")

#: n x n arrays alive at once in the dense solver: M, Mdot, V, and work space.
_DENSE_MATRICES = 8

# What follows is in operations: those of a pass that take as long.

#: The eigenvectors of a dense matrix, over n^3.
_EIGENVECTORS = 20.0

#: A step of Lanczos, and an entry of its basis.
_STEP, _ENTRY = 1.5e8, 5000.0

#: A byte that a pass through the network accesses, a byte that is written of J, and a
#: byte that a factored product reads.
_ACCESS, _WRITE, _READ = 7.0, 150.0, 40.0

#: An operation of a matrix product.
_PRODUCT = 0.5

#: A pass that makes factors, and so keeps all it sees.
_KEPT_PASS = 1.5


class Estimate(NamedTuple):
    """What one solver's measurement will take.

    Attributes:
        operations: Its time, in that of one floating-point operation of a pass.
        bytes: Memory held at once, beyond parameters and batches.
    """

    operations: float
    bytes: int


class _Products(NamedTuple):
    """What products of J ready for them take, of one batch.

    Attributes:
        column: Operations of one column's pull and push.
        read: Operations that reading J once, for one product, is worth.
        held: Bytes held.
    """

    column: float
    read: float
    held: int


class _Costs(NamedTuple):
    """Operations and bytes of one batch.

    Attributes:
        rows: Operations of what makes J: backward passes, and writing it down.
        prepared: The same where J is made once for products; none if it is not held.
        gram: Those of the Gram product over one error space.
        multiplied: Products ``J J^T V``.
        pulled: Products of ``J^T V`` with another Jacobian, as for the derivative.
    """

    rows: float
    prepared: float
    gram: float
    multiplied: _Products
    pulled: _Products


def estimate_measurement(
    error_fn: ErrorFn,
    params: PyTree,
    batches: PyTree,
    *,
    reduction: Reduction = "mean",
    num_columns: int,
    block_size: int = 8,
    jacobian: JacobianForm = "auto",
) -> dict[str, Estimate]:
    """Estimates what a measurement with exact derivative takes, from shapes alone.

    The counts are those of the module's docstring; a pass's come from the compiler's
    own cost analysis.

    Args:
        error_fn: ``error_fn(params, batch) -> [N, C]``.
        params: Parameters.
        batches: A pytree with leading axes ``[K, N]``.
        reduction: ``"mean"`` or ``"stack"``.
        num_columns: The Krylov dimension r that Lanczos would have.
        block_size: The columns b of one of its products.
        jacobian: ``"factored"``, ``"plain"`` or ``"auto"``.

    Returns:
        An `Estimate` for ``"dense"`` and one for ``"lanczos"``.

    Raises:
        ValueError: If a shape, leading axis or choice does not fit.

    References:
        Ours.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_at_least("num_columns", num_columns, 1)
    check_at_least("block_size", block_size, 1)
    num_batches, num_examples = check_batches(batches)
    error = check_problem(error_fn, params, batches)
    copies = 1 if reduction == "mean" else num_batches
    size = copies * num_examples * error.shape[1]
    costs = _batch_costs(
        error_fn, params, batches, copies * num_examples, error.shape[1], jacobian
    )
    item = error.dtype.itemsize
    width = tree_bytes(params)
    dense = num_batches * 3 * (costs.rows + costs.gram)
    products = costs.multiplied if reduction == "mean" else costs.pulled
    column = sum(
        factor * (kind.column + kind.read / block_size)  # a column's share of a read
        for factor, kind in ((1.0, products), (1.5, costs.pulled))
    )
    lanczos = num_batches * (4 * costs.prepared + num_columns * column)
    basis = 6.0 * size * num_columns**2 + _ENTRY * size * num_columns
    steps = -(-num_columns // block_size)
    return {
        "dense": Estimate(
            dense + _EIGENVECTORS * size**3,
            _DENSE_MATRICES * size**2 * item + 2 * costs.pulled.held,
        ),
        "lanczos": Estimate(
            lanczos + basis + _STEP * steps,
            3 * size * num_columns * item
            + num_batches * products.held
            + 2 * block_size * width,
        ),
    }


def choose_solver(
    error_fn: ErrorFn,
    params: PyTree,
    batches: PyTree,
    *,
    reduction: Reduction = "mean",
    num_columns: int,
    block_size: int = 8,
    jacobian: JacobianForm = "auto",
    max_bytes: int | None = None,
) -> Literal["dense", "lanczos"]:
    """Chooses between the dense solver and Lanczos, from shapes alone.

    The one that costs less by `estimate_measurement`; Lanczos if the dense one's
    matrices do not fit; dense if Lanczos would span the whole space.

    Args:
        error_fn: ``error_fn(params, batch) -> [N, C]``.
        params: Parameters.
        batches: A pytree with leading axes ``[K, N]``.
        reduction: ``"mean"`` or ``"stack"``.
        num_columns: The Krylov dimension r that Lanczos would have.
        block_size: The columns b of one of its products.
        jacobian: ``"factored"``, ``"plain"`` or ``"auto"``.
        max_bytes: Memory that the dense solver may take; half of what is free if None.

    Returns:
        ``"dense"`` or ``"lanczos"``.

    Raises:
        ValueError: If a shape, leading axis or choice does not fit.

    References:
        Ours.
    """
    estimates = estimate_measurement(
        error_fn,
        params,
        batches,
        reduction=reduction,
        num_columns=num_columns,
        block_size=block_size,
        jacobian=jacobian,
    )
    dense, lanczos = estimates["dense"], estimates["lanczos"]
    if dense.bytes > (default_bytes() if max_bytes is None else max_bytes):
        return "lanczos"
    num_batches, num_examples = check_batches(batches)
    size = num_examples * check_problem(error_fn, params, batches).shape[1]
    if num_columns >= (size if reduction == "mean" else num_batches * size):
        return "dense"
    return "dense" if dense.operations <= lanczos.operations else "lanczos"


def held_bytes(
    error_fn: ErrorFn,
    params: PyTree,
    batches: PyTree,
    *,
    jacobian: JacobianForm = "auto",
    multiplied: bool = False,
) -> int:
    """Returns the bytes that J ready for products takes: factors, or residuals.

    Args:
        error_fn: ``error_fn(params, batch) -> [N, C]``.
        params: Parameters.
        batches: A pytree with leading axes ``[K, N]``.
        jacobian: ``"factored"``, ``"plain"`` or ``"auto"``.
        multiplied: Whether for ``J J^T V`` on one device, as `linearize_kernel` does
            for the mean, and not for ``J^T V`` alone.

    Returns:
        Bytes, for all K batches.

    Raises:
        ValueError: If a shape, leading axis or choice does not fit.

    References:
        Ours.
    """
    num_batches, num_examples = check_batches(batches)
    num_outputs = check_problem(error_fn, params, batches).shape[1]
    costs = _batch_costs(error_fn, params, batches, num_examples, num_outputs, jacobian)
    return num_batches * (costs.multiplied if multiplied else costs.pulled).held


def _batch_costs(
    error_fn: ErrorFn,
    params: PyTree,
    batches: PyTree,
    space_examples: int,
    num_outputs: int,
    jacobian: JacobianForm,
) -> _Costs:
    """Counts one batch, in an error space of ``space_examples`` examples."""
    _, num_examples = check_batches(batches)
    forward = _pass_cost(error_fn, params, batches)
    one_batch = jax.tree.map(lambda leaf: _struct(leaf, drop=1), batches)
    shapes = jax.tree.map(_struct, params)
    if not uses_factors(error_fn, jacobian):
        num_params = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
        n, rows = space_examples * num_outputs, num_examples * num_outputs
        held = tree_bytes(_residuals.eval_shape(as_pytree(error_fn), shapes, one_batch))
        products = _Products(4 * forward, 0.0, held)
        return _Costs(
            rows=2 * num_outputs * forward + _WRITE * rows * tree_bytes(shapes),
            prepared=0.0,
            gram=_PRODUCT * 2.0 * n * rows * num_params,
            multiplied=products,
            pulled=products,
        )
    found, basis = _blocks.eval_shape(error_fn, shapes, one_batch)
    blocks: list[Factor] = [block for block in found if block is not None]
    gram = sum(gram_cost(block, space_examples) for block in blocks)
    pulled = _factored_products(blocks, num_examples, multiplied=False)
    made = _KEPT_PASS * (1 + basis.shape[1]) * forward + _WRITE * pulled.held
    return _Costs(
        rows=made,
        prepared=made,
        gram=_PRODUCT * num_examples * gram,
        multiplied=_factored_products(blocks, num_examples, multiplied=True),
        pulled=pulled,
    )


def _factored_products(
    blocks: list[Factor], num_examples: int, *, multiplied: bool
) -> _Products:
    ready = _ready.eval_shape(blocks, multiplied=multiplied)
    return _Products(
        column=_PRODUCT * num_examples * sum(product_cost(block) for block in ready),
        read=_READ * sum(product_bytes(block) for block in ready),
        held=tree_bytes(ready),
    )


# Jitted, so that the shapes of a problem are traced once.
@jax.jit
def _residuals(error_fn: ErrorFn, params: PyTree, batch: PyTree) -> Any:
    return jax.vjp(lambda p: error_fn(p, batch), params)[1]


@jax.jit
def _blocks(error_fn: FactoredErrorFn, params: PyTree, batch: PyTree) -> Any:
    return output_blocks(error_fn, params, batch)


@functools.partial(jax.jit, static_argnames="multiplied")
def _ready(blocks: list[Factor], *, multiplied: bool) -> list[Factor]:
    return [for_products(block, multiplied=multiplied) for block in blocks]


def _pass_cost(error_fn: ErrorFn, params: PyTree, batches: PyTree) -> float:
    """Returns the cost of one batch's error; 2 P N if the backend is silent."""
    one_batch = jax.tree.map(lambda leaf: _struct(leaf, drop=1), batches)
    arguments = (as_pytree(error_fn), jax.tree.map(_struct, params), one_batch)
    leaves, tree = jax.tree.flatten(jax.tree.map(_struct, arguments))
    flops, accessed = _counted(tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
    if flops > 0:
        return flops + _ACCESS * accessed
    num_params = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
    return 2.0 * num_params * check_batches(batches)[1]


@functools.lru_cache(maxsize=64)
def _counted(tree: Any, avals: tuple[tuple[Any, Any], ...]) -> tuple[float, float]:
    """Returns the operations and the bytes accessed, zeros where nobody counts."""
    leaves = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in avals]
    error_fn, params, batch = jax.tree.unflatten(tree, leaves)
    try:
        with _on_host():
            lowered = jax.jit(lambda f, p, x: f(p, x)).lower(error_fn, params, batch)
            found = lowered.cost_analysis() or {}
    except (NotImplementedError, RuntimeError, ValueError):
        return 0.0, 0.0  # written for accelerators alone
    flops, accessed = (found.get(key, 0.0) for key in ("flops", "bytes accessed"))
    return float(flops), max(float(accessed), 0.0)


def _on_host() -> contextlib.AbstractContextManager[Any]:
    """Returns a context for the CPU, if JAX has it: accelerators count nothing."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return contextlib.nullcontext()


def _struct(leaf: Any, drop: int = 0) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf)[drop:], jnp.result_type(leaf))
