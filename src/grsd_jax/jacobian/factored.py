"""The factored Jacobian: products, dense blocks and derivatives from layer factors.

An error function that knows its layers yields, after one forward pass and one backward
pass for each output, every parameter's block of J as factors (see `factors`). From then
on nothing is differentiated through the network any more. Parameters that no layer
accounts for keep the plain path, and the parts add up: ``M = sum_l J_l J_l^T``.

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

from grsd_jax._typing import PyTree
from grsd_jax.errors import softmax_basis
from grsd_jax.jacobian.autodiff import (
    PlainDerivative,
    RestrictedErrorFn,
    linearize,
)
from grsd_jax.jacobian.factors import Factor, for_products, like
from grsd_jax.problem import Objective, OutputsObjective, Point, evaluate

_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


#: Outputs C of an example up to which J comes as factors. They take C backward passes
#: and a basis ``[C, C]``; a block of fewer than C / 4 columns is cheaper without them.
_MOST_OUTPUTS = 2048


def has_factors(point: Point) -> bool:
    """Whether the layers behind an error are known, and its outputs few enough."""
    error_fn = point.error_fn
    known = isinstance(error_fn, OutputsObjective) and hasattr(
        error_fn.outputs_fn, "recording"
    )
    return known and point.error.shape[1] <= _MOST_OUTPUTS


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


def factorize(
    error_fn: Objective,
    params: PyTree,
    batch: PyTree,
    *,
    multiplied: bool = False,
) -> FactoredJacobian:
    """Returns J of one batch as factors, each in the form that is cheaper to apply.

    Args:
        error_fn: The error function.
        params: Parameters.
        batch: One batch.
        multiplied: Whether products ``J J^T V`` will be taken, and not ``J^T V`` alone.

    Returns:
        The factored Jacobian, a pytree that crosses `jit` without retracing.
    """
    blocks, basis = _product_blocks(error_fn, params, batch, multiplied=multiplied)
    return _assemble(error_fn, params, batch, blocks, basis)


def factorize_by_groups(
    error_fn: Objective,
    params: PyTree,
    batch: PyTree,
    groups: Sequence[Sequence[int]],
    *,
    multiplied: bool = False,
) -> list[FactoredJacobian]:
    """Returns the columns of J that belong to each group of parameter leaves.

    Args:
        error_fn: The error function.
        params: Parameters.
        batch: One batch.
        groups: The positions of each group's leaves; no group is empty.
        multiplied: As for `factorize`.

    Returns:
        A factored Jacobian for each group, from one set of factors.
    """
    blocks, basis = _product_blocks(error_fn, params, batch, multiplied=multiplied)
    return [
        _assemble(error_fn, params, batch, blocks, basis, group) for group in groups
    ]


def factorize_with_derivative(
    error_fn: Objective, params: PyTree, batch: PyTree, direction: PyTree
) -> tuple[FactoredJacobian, FactoredJacobian]:
    """Returns J and its derivative along ``direction``, from one JVP of the factors.

    ``Jdot_l = <deltadot_l, layer(a_l; .)> + <delta_l, layer(adot_l; .)>``.

    Args:
        error_fn: The error function.
        params: Parameters.
        batch: One batch.
        direction: A params tree.

    Returns:
        ``(J, Jdot)``.
    """
    blocks, moved, basis = _moving_blocks(error_fn, params, batch, direction)
    jacobian = _assemble(error_fn, params, batch, blocks, basis)
    rest = None
    if jacobian.rest is not None:
        rest = _RestDerivative(
            PlainDerivative(error_fn, params, batch, direction),
            jacobian.rest_leaves,
        )
    kept = tuple(block for block in moved if block is not None)
    return jacobian, FactoredJacobian(kept, basis, rest, jacobian.rest_leaves)


def output_basis(error: jax.ShapeDtypeStruct, num_classes: int | None) -> jax.Array:
    """Returns orthonormal directions ``[C, q]`` that hold every row of J."""
    basis = np.eye(error.shape[1])
    if num_classes is not None:
        positions = np.eye(error.shape[1] // num_classes)
        basis = np.kron(positions, softmax_basis(num_classes))
    return jnp.asarray(basis, error.dtype)


def output_blocks(
    error_fn: Objective, params: PyTree, batch: PyTree
) -> tuple[list[Factor | None], jax.Array]:
    """Returns the blocks of J as the layers give them, and their basis."""
    from grsd_jax.jacobian.linen_factors import linen_factors  # needs flax

    assert isinstance(error_fn, OutputsObjective)
    error = evaluate.eval_shape(error_fn, params, batch)
    basis = output_basis(error, error_fn.num_classes(params, batch))
    return linen_factors(error_fn, params, batch, basis), basis


def moving_blocks(
    error_fn: Objective, params: PyTree, batch: PyTree, direction: PyTree
) -> tuple[list[Factor | None], list[Factor | None], jax.Array]:
    """Returns the blocks of J and of Jdot, and their basis."""

    def blocks_at(p: PyTree) -> tuple[list[Factor | None], jax.Array]:
        return output_blocks(error_fn, p, batch)

    (blocks, basis), (tangents, _) = jax.jvp(blocks_at, (params,), (direction,))
    moved = [
        None if block is None else block.derivative(tangent)
        for block, tangent in zip(blocks, tangents, strict=True)
    ]
    return blocks, moved, basis


Blocks = list[Factor | None]


@partial(jax.jit, static_argnames="multiplied")
def _product_blocks(
    error_fn: Objective, params: PyTree, batch: PyTree, *, multiplied: bool
) -> tuple[Blocks, jax.Array]:
    blocks, basis = output_blocks(error_fn, params, batch)
    ready = [block and for_products(block, multiplied=multiplied) for block in blocks]
    return ready, basis


@jax.jit
def _moving_blocks(
    error_fn: Objective, params: PyTree, batch: PyTree, direction: PyTree
) -> tuple[Blocks, Blocks, jax.Array]:
    blocks, moved, basis = moving_blocks(error_fn, params, batch, direction)
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
        padded = [jnp.zeros((width, *leaf.shape), leaf.dtype) for leaf in leaves]
        for index, tangent in zip(self.indices, tangents, strict=True):
            padded[index] = tangent
        return self.derivative.push(jax.tree.unflatten(tree, padded))


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
