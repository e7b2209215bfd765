"""The factored Jacobian: products, dense blocks and derivatives from factors.

One forward pass and one backward pass for each output give every parameter's block of J
as factors (see `blocks`). From then on nothing is differentiated through the network
any more. Parameters that the plan leaves out keep the plain path, and the parts add up:
``M = sum_l J_l J_l^T``.

Relatives: the structured derivatives of Novak et al. (2022), "Fast finite width neural
tangent kernel"; BackPACK; the captures of K-FAC.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import with_leaves
from grsd_jax._typing import PyTree
from grsd_jax.errors import softmax_basis
from grsd_jax.jacobian.autodiff import (
    Jacobian,
    JacobianMap,
    PlainDerivative,
    RestrictedErrorFn,
    linearize,
)
from grsd_jax.jacobian.blocks import leaf_blocks
from grsd_jax.jacobian.factors import Factor, for_products, like
from grsd_jax.jacobian.plan import Plan
from grsd_jax.objective import Objective, evaluate

_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["blocks", "basis", "rest"],
    meta_fields=["rest_leaves"],
)
@dataclasses.dataclass(frozen=True)
class FactoredJacobian:
    """J of one batch, or its derivative, as one block for each parameter.

    Attributes:
        blocks: The factored blocks.
        basis: Orthonormal directions of one example's outputs, ``[C, q]``.
        rest: The other parameters' share by the plain path, None if there is none.
        rest_leaves: Indices of these parameters' leaves.
    """

    blocks: tuple[Factor, ...]
    basis: jax.Array
    rest: Any
    rest_leaves: tuple[int, ...]

    def pull(self, columns: jax.Array) -> PyTree:
        """Computes ``J^T V`` of columns ``[N, C, b]``."""
        return _pull(self, columns)

    def push(self, tangents: PyTree) -> jax.Array:
        """Computes ``J G`` of what `pull` returned: columns ``[N, C, b]``."""
        return _push(self, tangents)

    def multiply(self, columns: jax.Array) -> jax.Array:
        """Computes ``J J^T V`` of columns ``[N, C, b]``."""
        return _multiply(self, columns)


def held_jacobian(
    error_fn: Objective,
    params: PyTree,
    batch: PyTree,
    *,
    plan: Plan | None,
    multiplied: bool = False,
) -> Jacobian:
    """Returns J of one batch, ready for products.

    Args:
        error_fn: The error function.
        params: Parameters.
        batch: One batch.
        plan: Its factors, which come in the form that is cheaper to apply; None to
            linearize plainly.
        multiplied: Whether products ``J J^T V`` will be taken, and not ``J^T V`` alone.

    Returns:
        The Jacobian, a pytree that crosses `jit` without retracing.
    """
    if plan is None:
        return linearize(error_fn, params, batch)
    blocks, basis = product_blocks(
        error_fn, params, batch, plan=plan, multiplied=multiplied
    )
    return _assemble(error_fn, params, batch, blocks, basis)


def factorize_by_groups(
    error_fn: Objective,
    params: PyTree,
    batch: PyTree,
    groups: Sequence[Sequence[int]],
    *,
    plan: Plan,
    multiplied: bool = False,
) -> list[FactoredJacobian]:
    """Returns the columns of J that belong to each group of parameter leaves.

    Args:
        error_fn: The error function.
        params: Parameters.
        batch: One batch.
        groups: The positions of each group's leaves; no group is empty.
        plan: The factors.
        multiplied: As for `held_jacobian`.

    Returns:
        A factored Jacobian for each group, from one set of factors.
    """
    blocks, basis = product_blocks(
        error_fn, params, batch, plan=plan, multiplied=multiplied
    )
    return [
        _assemble(error_fn, params, batch, blocks, basis, group) for group in groups
    ]


def held_pair(
    error_fn: Objective,
    params: PyTree,
    batch: PyTree,
    direction: PyTree,
    *,
    plan: Plan | None,
) -> tuple[Jacobian, JacobianMap]:
    """Returns J and its derivative along ``direction``.

    By factors both come from one JVP of the factors:
    ``Jdot_l = <deltadot_l, layer(a_l; .)> + <delta_l, layer(adot_l; .)>``.

    Args:
        error_fn: The error function.
        params: Parameters.
        batch: One batch.
        direction: A params tree.
        plan: The factors, None to linearize plainly.

    Returns:
        ``(J, Jdot)``.
    """
    plainly = PlainDerivative(error_fn, params, batch, direction)
    if plan is None:
        return linearize(error_fn, params, batch), plainly
    blocks, moved, basis = _moving_blocks(error_fn, params, batch, direction, plan=plan)
    jacobian = _assemble(error_fn, params, batch, blocks, basis)
    rest = None
    if jacobian.rest is not None:
        rest = _RestDerivative(plainly, jacobian.rest_leaves)
    kept = tuple(block for block in moved if block is not None)
    return jacobian, FactoredJacobian(kept, basis, rest, jacobian.rest_leaves)


def output_basis(error: jax.ShapeDtypeStruct, num_classes: int | None) -> jax.Array:
    """Returns orthonormal directions ``[C, q]`` that hold every row of J."""
    basis = np.eye(error.shape[1])
    if num_classes is not None:
        positions = np.eye(error.shape[1] // num_classes)
        basis = np.kron(positions, softmax_basis(num_classes))
    return jax.device_put(basis.astype(error.dtype))


def output_blocks(
    error_fn: Objective, params: PyTree, batch: PyTree, *, plan: Plan
) -> tuple[list[Factor | None], jax.Array]:
    """Returns the blocks of J as the meetings give them, and their basis."""
    error = evaluate.eval_shape(error_fn, params, batch)
    basis = output_basis(error, error_fn.num_classes(params, batch))
    blocks = leaf_blocks(plan.program, plan.plain, error_fn, params, batch, basis)
    return blocks, basis


def moving_blocks(
    error_fn: Objective, params: PyTree, batch: PyTree, direction: PyTree, *, plan: Plan
) -> tuple[list[Factor | None], list[Factor | None], jax.Array]:
    """Returns the blocks of J and of Jdot, and their basis."""

    def blocks_at(p: PyTree) -> tuple[list[Factor | None], jax.Array]:
        return output_blocks(error_fn, p, batch, plan=plan)

    (blocks, basis), (tangents, _) = jax.jvp(blocks_at, (params,), (direction,))
    moved = [
        None if block is None else block.derivative(tangent)
        for block, tangent in zip(blocks, tangents, strict=True)
    ]
    return blocks, moved, basis


Blocks = list[Factor | None]


@partial(jax.jit, static_argnames=("plan", "multiplied"))
def product_blocks(
    error_fn: Objective, params: PyTree, batch: PyTree, *, plan: Plan, multiplied: bool
) -> tuple[Blocks, jax.Array]:
    """Returns the blocks of J in the form of cheaper products, and their basis."""
    blocks, basis = output_blocks(error_fn, params, batch, plan=plan)
    ready = [block and for_products(block, multiplied=multiplied) for block in blocks]
    return ready, basis


@partial(jax.jit, static_argnames="plan")
def _moving_blocks(
    error_fn: Objective, params: PyTree, batch: PyTree, direction: PyTree, *, plan: Plan
) -> tuple[Blocks, Blocks, jax.Array]:
    blocks, moved, basis = moving_blocks(error_fn, params, batch, direction, plan=plan)
    cheapest = [block and for_products(block) for block in blocks]
    # Jdot acts on the tangents that J pulls, so both take the same form.
    moved = [
        motion if block is None or motion is None else like(motion, block)
        for block, motion in zip(cheapest, moved, strict=True)
    ]
    return cheapest, moved, basis


def _assemble(
    error_fn: Objective,
    params: PyTree,
    batch: PyTree,
    blocks: Blocks,
    basis: jax.Array,
    group: Sequence[int] | None = None,
) -> FactoredJacobian:
    """Puts the blocks of the leaves in ``group``, all of them if None, together."""
    group = range(len(blocks)) if group is None else group
    missing = tuple(i for i in group if blocks[i] is None)
    rest = None
    if missing:
        restricted = RestrictedErrorFn(error_fn, params, missing)
        rest = linearize(restricted, restricted.selected(), batch)
    kept = tuple(block for i in group if (block := blocks[i]) is not None)
    return FactoredJacobian(kept, basis, rest, missing)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["derivative"],
    meta_fields=["indices"],
)
@dataclasses.dataclass(frozen=True)
class _RestDerivative:
    """``Jdot`` acting on tangents of some of the parameter leaves."""

    derivative: PlainDerivative
    indices: tuple[int, ...]

    def push(self, tangents: list[jax.Array]) -> jax.Array:
        leaves, tree = jax.tree.flatten(self.derivative.params)
        width = tangents[0].shape[0]
        zeros = [jnp.zeros((width, *leaf.shape), leaf.dtype) for leaf in leaves]
        places = zip(self.indices, tangents, strict=True)
        return self.derivative.push(with_leaves(tree, zeros, places))


@jax.jit
def _pull(jacobian: FactoredJacobian, columns: jax.Array) -> PyTree:
    coordinates = _einsum("cq,ncb->nqb", jacobian.basis, columns)
    tangents = [block.pull(coordinates) for block in jacobian.blocks]
    rest = None if jacobian.rest is None else jacobian.rest.pull(columns)
    return tangents, rest


@jax.jit
def _multiply(jacobian: FactoredJacobian, columns: jax.Array) -> jax.Array:
    # Block by block, so that a block is still in the cache when it is read again.
    coordinates = _einsum("cq,ncb->nqb", jacobian.basis, columns)
    pushed = [block.multiply(coordinates) for block in jacobian.blocks]
    rest = None if jacobian.rest is None else jacobian.rest.multiply(columns)
    return _total(jacobian, pushed, rest)


@jax.jit
def _push(jacobian: FactoredJacobian, tangents: PyTree) -> jax.Array:
    parts, rest = tangents
    pushed = [
        block.push(part) for block, part in zip(jacobian.blocks, parts, strict=True)
    ]
    columns = None if jacobian.rest is None else jacobian.rest.push(rest)
    return _total(jacobian, pushed, columns)


def _total(
    jacobian: FactoredJacobian, pushed: list[jax.Array], rest: jax.Array | None
) -> jax.Array:
    """Adds up what the blocks pushed, ``[N, q, b]``, and the rest's columns."""
    if not pushed:
        assert rest is not None  # every parameter is in one of the two
        return rest
    columns = _einsum("cq,nqb->ncb", jacobian.basis, reduce(jnp.add, pushed))
    return columns if rest is None else columns + rest
