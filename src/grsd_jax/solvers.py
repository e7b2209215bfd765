"""Which solver is cheaper, by operations and memory; and null spaces.

With f the operations of one batch's forward pass, q the outputs differentiated (C, or
``C - 1`` for a softmax error), and r Krylov columns, one batch takes, with derivative:

| | plain | factored |
| :--- | :--- | :--- |
| dense | ``6 C f`` | ``3 (1 + q) f`` |
| and | ``6 n^2 P`` | three times the blocks' `gram_cost` |
| Lanczos | ``4 f r`` | ``4 (1 + q) f`` and ``r`` times the blocks' `product_cost` |
| and | ``6 f r`` | 1.5 times the same, of pulls and pushes |

A factored product of b columns also reads all factors once, which takes as long as 30
operations a byte. Dense eigenvectors add ``70 n^3`` (they run at a small part of the
products' rate), the basis of Lanczos ``6 n r^2``. The counts of rows and of factors are
in `factors`.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._checks import check_at_least, check_batches, check_choice
from grsd_jax._jacobian import as_pytree, check_problem, split_batches
from grsd_jax._typing import ErrorFn, PyTree, Reduction
from grsd_jax.factored import (
    FactoredErrorFn,
    JacobianForm,
    output_blocks,
    uses_factors,
)
from grsd_jax.factors import (
    Factor,
    for_products,
    gram_cost,
    product_bytes,
    product_cost,
)
from grsd_jax.kernel import REDUCTIONS
from grsd_jax.memory import default_bytes, tree_bytes

SOLVERS = ("auto", "dense", "lanczos")

#: n x n arrays alive at once in the dense solver: M, Mdot, V, and work space.
_DENSE_MATRICES = 8

#: Operations in the time that a byte of factors takes to be read for one product: two
#: cores took 45 ms and 5.2 ms a column with 230 MB of factors and 8e8 operations.
_READ = 30.0

#: Operations of the eigenvectors over n^3, at the rate of convolutions.
_EIGENVECTORS = 70.0


class Estimate(NamedTuple):
    """What one solver's measurement will take.

    Attributes:
        operations: Floating-point operations, weighed by how fast they run.
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
        rows: Operations of what makes J ready: backward passes, written-out rows.
        gram: Those of the Gram product over one error space.
        multiplied: Products ``J J^T V``.
        pulled: Products of ``J^T V`` with another Jacobian, as for the derivative.
    """

    rows: float
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

    The counts of operations are those of the module's docstring; the forward pass's
    come from the compiler's own cost analysis.

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
    lanczos = num_batches * (4 * costs.rows + num_columns * column)
    return {
        "dense": Estimate(
            dense + _EIGENVECTORS * size**3,
            _DENSE_MATRICES * size**2 * item + 2 * costs.pulled.held,
        ),
        "lanczos": Estimate(
            lanczos + 6.0 * size * num_columns**2,
            3 * size * num_columns * item + num_batches * products.held + 16 * width,
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

    The one with fewer operations by `estimate_measurement`; Lanczos if the dense one's
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
    forward = _forward_flops(error_fn, params, batches)
    one_batch = jax.tree.map(lambda leaf: _struct(leaf, drop=1), batches)
    shapes = jax.tree.map(_struct, params)
    if not uses_factors(error_fn, jacobian):
        num_params = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
        n = space_examples * num_outputs
        held = tree_bytes(_residuals.eval_shape(as_pytree(error_fn), shapes, one_batch))
        products = _Products(4 * forward, 0.0, held)
        return _Costs(
            rows=2 * num_outputs * forward,
            gram=2.0 * n * num_examples * num_outputs * num_params,
            multiplied=products,
            pulled=products,
        )
    found, basis = _blocks.eval_shape(error_fn, shapes, one_batch)
    blocks: list[Factor] = [block for block in found if block is not None]
    gram = sum(gram_cost(block, space_examples) for block in blocks)
    return _Costs(
        rows=(1 + basis.shape[1]) * forward,
        gram=num_examples * gram,
        multiplied=_factored_products(blocks, num_examples, multiplied=True),
        pulled=_factored_products(blocks, num_examples, multiplied=False),
    )


def _factored_products(
    blocks: list[Factor], num_examples: int, *, multiplied: bool
) -> _Products:
    ready = jax.eval_shape(
        lambda parts: [for_products(part, multiplied=multiplied) for part in parts],
        blocks,
    )
    return _Products(
        column=num_examples * sum(product_cost(block) for block in ready),
        read=_READ * sum(product_bytes(block) for block in ready),
        held=tree_bytes(ready),
    )


def class_sums_vanish(
    error_fn: ErrorFn, params: PyTree, batches: PyTree, key: jax.Array
) -> jax.Array:
    """Finds out whether ``sum_c de_ic / dtheta = 0``, as for a softmax error.

    Then the constant over classes is an exact null vector of M for every example. An
    error function whose outputs lie in fewer directions says so itself. Else a random
    tangent u decides it: ``sum_c (J u)_ic`` vanishes with probability one only if every
    row sum does.

    Args:
        error_fn: ``error_fn(params, batch) -> [N, C]``.
        params: Parameters.
        batches: A pytree with leading axes ``[K, N]``; the first batch is used.
        key: Consumed for the tangent.

    Returns:
        [] bool.

    References:
        Paper 7.1; the observation is ours.
    """
    if uses_factors(error_fn, "auto"):
        num_outputs = check_problem(error_fn, params, batches).shape[1]
        if error_fn.output_basis(num_outputs).shape[1] < num_outputs:
            return jnp.asarray(True)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    tangent = [
        jax.random.normal(k, np.shape(leaf), jnp.result_type(leaf))
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return _class_sums_vanish(
        as_pytree(error_fn),
        params,
        split_batches(batches)[0],
        jax.tree.unflatten(tree, tangent),
    )


@jax.jit
def _class_sums_vanish(
    error_fn: ErrorFn, params: PyTree, batch: PyTree, tangent: PyTree
) -> jax.Array:
    # J u as the transpose of the pullback, which custom VJPs have and JVPs lack.
    error, pullback = jax.vjp(lambda p: error_fn(p, batch), params)
    moved = jax.linear_transpose(lambda u: pullback(u)[0], error)(tangent)[0]
    tolerance = 100 * jnp.finfo(moved.dtype).eps * jnp.max(jnp.abs(moved))
    return jnp.max(jnp.abs(jnp.sum(moved, axis=1))) <= tolerance


# Jitted, so that the shapes of a problem are traced once.
@jax.jit
def _residuals(error_fn: ErrorFn, params: PyTree, batch: PyTree) -> Any:
    return jax.vjp(lambda p: error_fn(p, batch), params)[1]


@jax.jit
def _blocks(error_fn: FactoredErrorFn, params: PyTree, batch: PyTree) -> Any:
    return output_blocks(error_fn, params, batch)


def _forward_flops(error_fn: ErrorFn, params: PyTree, batches: PyTree) -> float:
    """Returns the operations of one batch's error; 2 P N if the backend is silent."""
    one_batch = jax.tree.map(lambda leaf: _struct(leaf, drop=1), batches)
    arguments = (as_pytree(error_fn), jax.tree.map(_struct, params), one_batch)
    leaves, tree = jax.tree.flatten(jax.tree.map(_struct, arguments))
    flops = _counted_flops(tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
    if flops > 0:
        return flops
    num_params = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
    return 2.0 * num_params * check_batches(batches)[1]


@functools.lru_cache(maxsize=64)
def _counted_flops(tree: Any, avals: tuple[tuple[Any, Any], ...]) -> float:
    leaves = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in avals]
    error_fn, params, batch = jax.tree.unflatten(tree, leaves)
    lowered = jax.jit(lambda f, p, x: f(p, x)).lower(error_fn, params, batch)
    analysis = lowered.cost_analysis() or {}
    return float(analysis.get("flops", 0.0))


def _struct(leaf: Any, drop: int = 0) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf)[drop:], jnp.result_type(leaf))
