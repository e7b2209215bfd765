"""One parameter's share of the Jacobian, kept as the factors it is a product of.

A layer affine in its parameter, ``y = W^T a``, has for example i and output c the
Jacobian row ``sum_x a_i[x] (x) delta_ic[x]``, the sum over positions x of the outer
product of its input and of ``delta_ic = d e_ic / d y``. Three forms hold such a block
``[N q, p]`` of J:

- `Rows`: the sum over positions carried out. Cheapest once there are more positions
  than outputs, and the only form of small parameters (scales, biases).
- `Outer`: inputs and deltas as they are, for maps with few positions. Where they are
  fewer in the whole batch than inputs, products ``J J^T V`` go by the inner products of
  the inputs and never see the size of W.
- `Lookup`: the same for an embedding, whose inputs are indices of rows of W.

Three more are made of these: `Stacked` blocks of equal parts of a parameter (stacked
layers, groups of a convolution, experts), `Pieces` of other parts, and a `Composite` of
weights that overlap in a parameter or are computed from it.

All have `pull`, `push` and `multiply`. ``q`` counts the outputs, or the directions of a
basis of them. Columns of the error space are ``[N, q, b]`` here. The derivative of a
block along a direction is a block as well, so Mdot needs no operation of its own.
"""

import dataclasses
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax.jacobian.adjoint import adjoint

_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

#: How much faster one large matrix product runs than the batched ones of `Outer`,
#: measured on two CPU cores: 85 GFLOP/s against 28 to 44.
_BATCHED_COST = 3.0

#: Positions up to which all deltas are multiplied with all.
_FEW_POSITIONS = 2

#: Bytes between the two contractions of `_few_by_few` on an accelerator.
_SPREAD_BYTES = 2**30

#: The memory that rows may take, in units of the factors'.
_ROW_BYTES = 8


@partial(jax.tree_util.register_dataclass, data_fields=["rows"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Rows:
    """A block of J with its rows written out.

    Attributes:
        rows: ``[N, q, p]``.
    """

    #: The axis of the columns in what `pull` returns.
    column_axis: ClassVar[int] = 0

    rows: jax.Array

    def pull(self, columns: jax.Array) -> jax.Array:
        """Computes ``J^T V`` of columns ``[N, q, b]``, as ``[b, p]``."""
        return _einsum("nqp,nqb->bp", self.rows, columns)

    def push(self, tangents: jax.Array) -> jax.Array:
        """Computes ``J G`` of what `pull` returns, as ``[N, q, b]``."""
        # Where XLA sees the pull as well, it has that write the layout which suits the
        # push, at the price of a transposed copy of the rows.
        tangents = jax.lax.optimization_barrier(tangents)
        return _einsum("nqp,bp->nqb", self.rows, tangents)

    def multiply(self, columns: jax.Array) -> jax.Array:
        """Computes ``J J^T V`` of columns ``[N, q, b]``."""
        return self.push(self.pull(columns))

    def derivative(self, tangent: Any) -> "Rows":
        """Returns the block's derivative, given the derivative of its arrays."""
        return tangent

    def cotangents(self) -> jax.Array:
        """Returns the rows in the coordinates of `pull`, ``[N, q, p]``."""
        return self.rows

    def as_rows(self) -> "Rows":
        """Returns the block itself."""
        return self


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["inputs", "deltas", "similarity"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Outer:
    """A block of J of a weight ``[k, o]`` that multiplies its inputs.

    Attributes:
        inputs: a, ``[N, X, k]``.
        deltas: ``d e / d y``, ``[N, q, X, o]``.
        similarity: ``a_i[x] . a_j[y]``, ``[N, X, N, X]``, by which `multiply` goes;
            None where the way over W is cheaper.
    """

    column_axis: ClassVar[int] = 1

    inputs: jax.Array
    deltas: jax.Array
    similarity: jax.Array | None = None

    def pull(self, columns: jax.Array) -> jax.Array:
        """Computes ``J^T V`` of columns ``[N, q, b]``, as ``[k, b, o]``."""
        return _einsum("nxk,nxbo->kbo", self.inputs, self._combined(columns))

    def push(self, tangents: jax.Array) -> jax.Array:
        """Computes ``J G`` of what `pull` returns, as ``[N, q, b]``."""
        moved = _einsum("nxk,kbo->nxbo", self.inputs, tangents)
        return _einsum("nqxo,nxbo->nqb", self.deltas, moved)

    def multiply(self, columns: jax.Array) -> jax.Array:
        """Computes ``J J^T V`` of columns ``[N, q, b]``."""
        if self.similarity is None:
            return self.push(self.pull(columns))
        combined = self._combined(columns)
        moved = _einsum("nxmy,mybo->nxbo", self.similarity, combined)
        return _einsum("nqxo,nxbo->nqb", self.deltas, moved)

    def _combined(self, columns: jax.Array) -> jax.Array:
        return _einsum("nqxo,nqb->nxbo", self.deltas, columns)

    def with_similarity(self) -> "Outer":
        """Returns the same block with the inner products of its inputs."""
        similarity = _einsum("nxk,myk->nxmy", self.inputs, self.inputs)
        return Outer(self.inputs, self.deltas, similarity)

    def derivative(self, tangent: Any) -> "Outer":
        """Returns ``adot (x) delta + a (x) deltadot``, as twice as many positions."""
        return Outer(
            jnp.concatenate([tangent.inputs, self.inputs], axis=1),
            jnp.concatenate([self.deltas, tangent.deltas], axis=2),
        )

    def cotangents(self) -> jax.Array:
        """Returns the rows in the coordinates of `pull`, ``[N, q, k, o]``."""
        return _einsum("nxk,nqxo->nqko", self.inputs, self.deltas)

    def as_rows(self) -> Rows:
        """Returns the same block with its rows written out, o before k."""
        rows = _einsum("nxk,nqxo->nqok", self.inputs, self.deltas)
        return Rows(rows.reshape(*rows.shape[:2], -1))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["indices", "deltas"],
    meta_fields=["size"],
)
@dataclasses.dataclass(frozen=True)
class Lookup:
    """A block of J of an embedding ``[size, o]``.

    Attributes:
        indices: The rows looked up, integers ``[N, X]`` inside the table.
        deltas: ``d e / d y``, ``[N, q, X, o]``.
        size: The number of rows of the embedding.
    """

    column_axis: ClassVar[int] = 1

    indices: jax.Array
    deltas: jax.Array
    size: int

    def pull(self, columns: jax.Array) -> jax.Array:
        """Computes ``J^T V`` of columns ``[N, q, b]``, as ``[size, b, o]``."""
        combined = _einsum("nqxo,nqb->nxbo", self.deltas, columns)
        zeros = jnp.zeros((self.size, *combined.shape[2:]), combined.dtype)
        return zeros.at[self.indices].add(combined)

    def push(self, tangents: jax.Array) -> jax.Array:
        """Computes ``J G`` of what `pull` returns, as ``[N, q, b]``."""
        return _einsum("nqxo,nxbo->nqb", self.deltas, tangents[self.indices])

    def multiply(self, columns: jax.Array) -> jax.Array:
        """Computes ``J J^T V`` of columns ``[N, q, b]``."""
        return self.push(self.pull(columns))

    def derivative(self, tangent: Any) -> "Lookup":
        """Returns the block's derivative: indices do not move."""
        return Lookup(self.indices, tangent.deltas, self.size)

    def cotangents(self) -> jax.Array:
        """Returns the rows in the coordinates of `pull`, ``[N, q, size, o]``."""

        def one(indices: jax.Array, deltas: jax.Array) -> jax.Array:
            zeros = jnp.zeros((self.size, deltas.shape[-1]), deltas.dtype)
            return jax.vmap(lambda delta: zeros.at[indices].add(delta))(deltas)

        return jax.vmap(one)(self.indices, self.deltas)

    def as_rows(self) -> Rows:
        """Returns the same block with its rows written out."""
        rows = self.cotangents()
        return Rows(rows.reshape(*rows.shape[:2], -1))


@partial(jax.tree_util.register_dataclass, data_fields=["block"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Stacked:
    """A block of J of a parameter made of G equal parts, each with one of its own.

    Attributes:
        block: The blocks of all parts, an `Outer` or a `Lookup` whose arrays have a
            leading axis G.
    """

    block: "Outer | Lookup"

    @property
    def column_axis(self) -> int:
        """The axis of the columns in what `pull` returns."""
        return self.block.column_axis + 1

    def pull(self, columns: jax.Array) -> jax.Array:
        """Computes ``J^T V`` of columns ``[N, q, b]``, with a leading axis G."""
        return jax.vmap(lambda block: block.pull(columns))(self.block)

    def push(self, tangents: jax.Array) -> jax.Array:
        """Computes ``J G`` of what `pull` returns, as ``[N, q, b]``."""
        pushed = jax.vmap(lambda block, part: block.push(part))(self.block, tangents)
        return jnp.sum(pushed, axis=0)

    def multiply(self, columns: jax.Array) -> jax.Array:
        """Computes ``J J^T V`` of columns ``[N, q, b]``."""
        multiplied = jax.vmap(lambda block: block.multiply(columns))(self.block)
        return jnp.sum(multiplied, axis=0)

    def derivative(self, tangent: Any) -> "Stacked":
        """Returns the block's derivative, part by part."""
        if isinstance(self.block, Lookup):
            return Stacked(self.block.derivative(tangent.block))
        return Stacked(jax.vmap(Outer.derivative)(self.block, tangent.block))

    def with_similarity(self) -> "Stacked":
        """Returns the same block with the inner products of its inputs."""
        block: Any = self.block  # an `Outer`
        return Stacked(jax.vmap(Outer.with_similarity)(block))

    def cotangents(self) -> jax.Array:
        """Returns the rows in the coordinates of `pull`, ``[N, q, G, k, o]``."""
        return jax.vmap(lambda block: block.cotangents(), out_axes=2)(self.block)

    def as_rows(self) -> Rows:
        """Returns the same block with its rows written out, part after part."""
        rows = jax.vmap(lambda block: block.as_rows().rows, out_axes=2)(self.block)
        return Rows(rows.reshape(*rows.shape[:2], -1))


Part = Rows | Outer | Lookup | Stacked


@partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Pieces:
    """A block of J of a parameter whose parts have blocks of different forms.

    Attributes:
        parts: Their blocks; no two hold the same entry of the parameter.
    """

    parts: tuple[Part, ...]

    def pull(self, columns: jax.Array) -> tuple[jax.Array, ...]:
        """Computes ``J^T V`` of columns ``[N, q, b]``, part by part."""
        return tuple(part.pull(columns) for part in self.parts)

    def push(self, tangents: tuple[jax.Array, ...]) -> jax.Array:
        """Computes ``J G`` of what `pull` returns, as ``[N, q, b]``."""
        pairs = zip(self.parts, tangents, strict=True)
        return reduce(jnp.add, [part.push(tangent) for part, tangent in pairs])

    def multiply(self, columns: jax.Array) -> jax.Array:
        """Computes ``J J^T V`` of columns ``[N, q, b]``."""
        return reduce(jnp.add, [part.multiply(columns) for part in self.parts])

    def derivative(self, tangent: Any) -> "Pieces":
        """Returns the block's derivative, part by part."""
        pairs = zip(self.parts, tangent.parts, strict=True)
        return Pieces(tuple(part.derivative(moved) for part, moved in pairs))

    def as_rows(self) -> Rows:
        """Returns the same block with its rows written out, part after part."""
        rows = [part.as_rows().rows for part in self.parts]
        return Rows(jnp.concatenate(rows, axis=-1))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["pullback", "tangent"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class _MovedPullback:
    """The derivative of a pullback whose residuals move; a linear map as well.

    Attributes:
        pullback: The pullback, a pytree of residuals.
        tangent: The derivatives of its floating leaves, None for the others.
    """

    pullback: Any
    tangent: tuple[jax.Array | None, ...]

    @classmethod
    def of(cls, pullback: Any, tangent: Any) -> "_MovedPullback":
        """Returns the map, of a tangent as `jax.jvp` gives it."""
        leaves = jax.tree.leaves(tangent)
        moved = [None if leaf.dtype == jax.dtypes.float0 else leaf for leaf in leaves]
        return cls(pullback, tuple(moved))

    def __call__(self, cotangent: Any) -> Any:
        """Applies the map."""
        leaves, tree = jax.tree.flatten(self.pullback)
        moved = [
            np.zeros(jnp.shape(leaf), jax.dtypes.float0) if motion is None else motion
            for leaf, motion in zip(leaves, self.tangent, strict=True)
        ]

        def applied(pullback: Any) -> Any:
            return pullback(cotangent)

        tangent = jax.tree.unflatten(tree, moved)
        return jax.jvp(applied, (self.pullback,), (tangent,))[1]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["blocks", "pullbacks"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Composite:
    """A block of J of a parameter from which several weights are computed.

    ``J = sum_u B_u D_u``, with ``D_u`` the Jacobian of the weight u by the parameter.
    Tangents are those of the parameter, with a leading axis of columns.

    Attributes:
        blocks: ``B_u``, each in the coordinates of its weight.
        pullbacks: ``D_u^T``, as `jax.vjp` returns it; None where ``B_u`` holds rows of
            the parameter itself.
    """

    blocks: tuple[Part, ...]
    pullbacks: tuple[Callable[[Any], Any] | None, ...]

    def pull(self, columns: jax.Array) -> jax.Array:
        """Computes ``J^T V`` of columns ``[N, q, b]``, as ``[b, *shape]``."""
        return self._led_back(
            [(block.pull(columns), block.column_axis) for block in self.blocks]
        )

    def push(self, tangents: jax.Array) -> jax.Array:
        """Computes ``J G`` of what `pull` returns, as ``[N, q, b]``."""
        pushed = []
        for block, pullback in zip(self.blocks, self.pullbacks, strict=True):
            if pullback is None:
                own = tangents.reshape(len(tangents), -1)
            else:
                one = jax.eval_shape(block.pull, _one_column(block))
                axis = block.column_axis
                shape = (*one.shape[:axis], *one.shape[axis + 1 :])
                example = jax.ShapeDtypeStruct(shape, one.dtype)
                back = partial(_forwards, pullback, example)
                own = jax.vmap(back, out_axes=axis)(tangents)
            pushed.append(block.push(own))
        return reduce(jnp.add, pushed)

    def multiply(self, columns: jax.Array) -> jax.Array:
        """Computes ``J J^T V`` of columns ``[N, q, b]``."""
        return self.push(self.pull(columns))

    def derivative(self, tangent: Any) -> "Composite":
        """Returns ``sum_u Bdot_u D_u + B_u Ddot_u``."""
        pairs = zip(self.blocks, tangent.blocks, strict=True)
        moved = [block.derivative(motion) for block, motion in pairs]
        computed = [
            (block, _MovedPullback.of(pullback, motion))
            for block, pullback, motion in zip(
                self.blocks, self.pullbacks, tangent.pullbacks, strict=True
            )
            if pullback is not None
        ]
        return Composite(
            (*moved, *(block for block, _ in computed)),
            (*self.pullbacks, *(pullback for _, pullback in computed)),
        )

    def as_rows(self) -> Rows:
        """Returns the same block with its rows written out."""
        total = None
        for block, pullback in zip(self.blocks, self.pullbacks, strict=True):
            rows = block.cotangents()
            if pullback is not None:
                rows = jax.vmap(jax.vmap(lambda one, p=pullback: p(one)[0]))(rows)
            rows = rows.reshape(*rows.shape[:2], -1)
            total = rows if total is None else total + rows.astype(total.dtype)
        assert total is not None
        return Rows(total)

    def _led_back(self, pulled: list[tuple[jax.Array, int]]) -> jax.Array:
        """Adds up the tangents of the parameter that the weights' make."""
        found, own = [], []
        for (tangents, axis), pullback in zip(pulled, self.pullbacks, strict=True):
            if pullback is None:
                own.append(tangents)
            else:
                led = jax.vmap(lambda t, p=pullback: p(t)[0], in_axes=axis)(tangents)
                found.append(led.astype(tangents.dtype))
        total = reduce(jnp.add, found)
        return reduce(jnp.add, [rows.reshape(total.shape) for rows in own], total)


def _one_column(block: Part) -> jax.ShapeDtypeStruct:
    """Returns the shape of one column ``[N, q, 1]`` that a block pulls."""
    inner = block.block if isinstance(block, Stacked) else block
    if isinstance(inner, Rows):
        shape, dtype = inner.rows.shape[:2], inner.rows.dtype
    else:
        shape, dtype = inner.deltas.shape[-4:-2], inner.deltas.dtype
    return jax.ShapeDtypeStruct((*shape, 1), dtype)


def _forwards(pullback: Any, example: jax.ShapeDtypeStruct, tangent: jax.Array) -> Any:
    """Computes ``D g`` from the pullback ``w -> D^T w``."""
    out = jax.eval_shape(lambda w: pullback(w)[0], example)
    forwards = adjoint(lambda w: pullback(w)[0], example)
    return forwards(tangent.astype(out.dtype))


Factor = Part | Pieces | Composite


def joined(left: Part, right: Part) -> Part:
    """Returns the block of a parameter that is used twice, the sum of its uses.

    Args:
        left: One use, an `Outer`, a `Lookup`, or a stack of them.
        right: The other, in the same form.

    Returns:
        The block, in that form.
    """
    if isinstance(left, Stacked) and isinstance(right, Stacked):
        both: Any = jax.vmap(joined)(left.block, right.block)
        return Stacked(both)
    if isinstance(left, Outer) and isinstance(right, Outer):
        inputs = jnp.concatenate([left.inputs, right.inputs], axis=1)
        return Outer(inputs, jnp.concatenate([left.deltas, right.deltas], axis=2))
    assert isinstance(left, Lookup)
    assert isinstance(right, Lookup)
    indices = jnp.concatenate([left.indices, right.indices], axis=1)
    deltas = jnp.concatenate([left.deltas, right.deltas], axis=2)
    return Lookup(indices, deltas, left.size)


def like(block: Factor, reference: Factor) -> Factor:
    """Returns ``block`` in rows where ``reference`` is, so that the two can meet."""
    if isinstance(block, Pieces) and isinstance(reference, Pieces):
        pairs = zip(block.parts, reference.parts, strict=True)
        return Pieces(tuple(_like(part, other) for part, other in pairs))
    return block.as_rows() if isinstance(reference, Rows) else block


def _like(part: Part, reference: Part) -> Part:
    return part.as_rows() if isinstance(reference, Rows) else part


def inner(left: Factor, right: Factor) -> jax.Array:
    """Computes ``A B^T`` of two blocks of one parameter.

    Two `Outer` blocks are contracted without writing out their rows:
    ``sum_xy (a_i[x] . a_j[y]) (delta_ic[x] . delta_jd[y])``. Of one or two positions,
    as in dense layers, all inner products of the deltas come first, in one product of
    matrices; of more, the sum over x, few examples of A at a time, so that what lies
    between stays in the cache, or in the memory of an accelerator.

    Args:
        left: A, ``[N, q, p]`` in any form but `Composite`, which `for_gram` writes out.
        right: B, ``[N', q, p]`` in the same form.

    Returns:
        ``[N q, N' q]``.
    """
    if isinstance(left, Pieces) and isinstance(right, Pieces):
        pairs = zip(left.parts, right.parts, strict=True)
        return reduce(jnp.add, [inner(a, b) for a, b in pairs])
    if isinstance(left, Stacked) and isinstance(right, Stacked):
        return _inner_of_stacks(left, right)
    if isinstance(left, Rows) and isinstance(right, Rows):
        # Sizes in full, since a parameter may be empty.
        rows = [
            block.rows.reshape(int(np.prod(block.rows.shape[:2])), -1)
            if block.rows.size
            else jnp.zeros((int(np.prod(block.rows.shape[:2])), 1), block.rows.dtype)
            for block in (left, right)
        ]
        return _einsum("ip,jp->ij", *rows)
    if isinstance(left, Outer) and isinstance(right, Outer):
        similar = _einsum("nxk,myk->nxmy", left.inputs, right.inputs)
    else:
        assert isinstance(left, Lookup)
        assert isinstance(right, Lookup)
        same = left.indices[:, :, None, None] == right.indices[None, None]
        similar = same.astype(left.deltas.dtype)
    if max(left.deltas.shape[2], right.deltas.shape[2]) <= _FEW_POSITIONS:
        aligned = _einsum("nqxo,mryo->nqxmry", left.deltas, right.deltas)
        gram = jnp.sum(aligned * similar[:, None, :, :, None, :], axis=(2, 5))
    else:
        gram = _few_by_few(left.deltas, similar, right.deltas)
    rows = gram.shape[0] * gram.shape[1]
    return gram.reshape(rows, -1)


def _inner_of_stacks(left: Stacked, right: Stacked) -> jax.Array:
    """Adds up the inner products of the parts, one part at a time."""

    def add(total: jax.Array, parts: tuple[Any, Any]) -> tuple[jax.Array, None]:
        return total + inner(*parts), None

    first, rest = (
        jax.tree.map(lambda array, at=at: array[at], (left.block, right.block))
        for at in (0, slice(1, None))
    )
    return jax.lax.scan(add, inner(*first), rest)[0]


def _few_by_few(left: jax.Array, similar: jax.Array, right: jax.Array) -> jax.Array:
    """Contracts ``[N, q, X, o]``, ``[N, X, N', Y]`` and ``[N', q, Y, o]``."""

    def one_example(parts: tuple[jax.Array, jax.Array]) -> jax.Array:
        deltas, overlap = parts
        spread = _einsum("qxo,xmy->myqo", deltas, overlap)
        return _einsum("myqo,mryo->qmr", spread, right)

    count, width, itemsize = len(left), left.shape[1], right.dtype.itemsize
    few = _at_once(count, right.shape[0] * right[0, 0].size * width * itemsize)
    return jax.lax.map(one_example, (left, similar), batch_size=few)


def _at_once(count: int, bytes_each: int) -> int | None:
    """Returns how many of the examples are contracted at once, a divisor of them.

    None, one at a time, on a CPU, whose cache holds no more. An accelerator, which
    small products leave idle, takes as many as fit a share of its memory.
    """
    if jax.default_backend() == "cpu":
        return None
    most = max(1, _SPREAD_BYTES // bytes_each)
    return max(few for few in range(1, count + 1) if few <= most and count % few == 0)


def for_products(factor: Factor, *, multiplied: bool = False) -> Factor:
    """Returns the form whose products with columns are cheaper, see `_product_costs`.

    Args:
        factor: The block.
        multiplied: Whether it will be multiplied, and not pulled and pushed.

    Returns:
        The block. Rows are not taken if they need more than eight times the memory of
        the factors; a similarity, where it is cheaper, is at most twice the inputs.
    """
    if isinstance(factor, Composite):
        return factor
    if isinstance(factor, Pieces):
        parts = [_for_products(part, multiplied=multiplied) for part in factor.parts]
        return Pieces(tuple(parts))
    return _for_products(factor, multiplied=multiplied)


def _for_products(factor: Part, *, multiplied: bool) -> Part:
    outer = _outer_of(factor)
    if outer is None:
        return factor
    positions, inputs, outputs, q = _sizes(outer)
    row_size = q * inputs * outputs
    factor_size = positions * (inputs + q * outputs)
    small = row_size <= _ROW_BYTES * factor_size
    row_cost, factor_cost, similar_cost = _product_costs(outer)
    rows = small and row_cost < factor_cost
    if multiplied and similar_cost < (row_cost if rows else factor_cost):
        assert isinstance(factor, Outer | Stacked)
        return factor.with_similarity()
    return factor.as_rows() if rows else factor


def product_operations(factor: Factor) -> int:
    """Returns the operations of one column's product with a block, from its shapes.

    Those of leading a composite's weights back to its parameter are left out.
    """
    if isinstance(factor, Pieces):
        return sum(map(product_operations, factor.parts))
    if isinstance(factor, Composite):
        return sum(map(product_operations, factor.blocks))
    if isinstance(factor, Rows):
        return 4 * int(np.prod(factor.rows.shape))
    block = factor.block if isinstance(factor, Stacked) else factor
    parts = int(np.prod(block.deltas.shape[:-4]))
    num_examples = block.deltas.shape[-4]
    if isinstance(block, Lookup):
        return 4 * parts * int(np.prod(block.deltas.shape[-4:]))
    costs = _product_costs(block)
    cost = costs[1] if block.similarity is None else costs[2]
    return parts * num_examples * int(cost)


def for_gram(factor: Factor, num_examples: int) -> Factor:
    """Returns the form whose Gram product is cheaper, see `_gram_costs`."""
    if isinstance(factor, Composite):
        return factor.as_rows()
    if isinstance(factor, Pieces):
        return Pieces(tuple(_for_gram(part, num_examples) for part in factor.parts))
    return _for_gram(factor, num_examples)


def _for_gram(factor: Part, num_examples: int) -> Part:
    outer = _outer_of(factor)
    if outer is None:
        return factor
    row_cost, factor_cost = _gram_costs(outer, num_examples)
    return factor.as_rows() if row_cost <= factor_cost else factor


def _outer_of(factor: Part) -> Outer | None:
    """Returns the outer block of one of several parts, None if there is none."""
    found = factor.block if isinstance(factor, Stacked) else factor
    return found if isinstance(found, Outer) else None


def _product_costs(factor: Outer) -> tuple[float, float, float]:
    """Returns the operations of one column's product, for one example.

    ``4 q k o`` in rows, ``4 X (k + q) o`` as factors, ``2 X (N X + 2 q) o`` by their
    similarity.
    """
    positions, inputs, outputs, q = _sizes(factor)
    everywhere = factor.inputs.shape[-3] * positions
    return (
        4.0 * q * inputs * outputs,
        4.0 * positions * (inputs + q) * outputs,
        2.0 * positions * (everywhere + 2 * q) * outputs,
    )


def _gram_costs(factor: Outer, num_examples: int) -> tuple[float, float]:
    """Returns the operations of the Gram product by rows and by factors.

    For one of ``num_examples`` examples. Its rows cost ``2 X q k o`` and their Gram
    product ``2 n q k o``, with ``n = num_examples q``. As factors it costs ``2 X Y k``
    for the inputs, ``2 X Y q o`` for the sum over x and ``2 n q X o`` for the rest,
    where Y counts the positions of all examples; these count three times, since they
    run in small batched products.
    """
    positions, inputs, outputs, q = _sizes(factor)
    n, all_positions = num_examples * q, num_examples * positions
    rows = (positions + n) * q * inputs * outputs
    spread = positions * all_positions * (inputs + q * outputs)
    return 2.0 * rows, 2.0 * _BATCHED_COST * (spread + n * q * positions * outputs)


def _sizes(factor: Outer) -> tuple[int, int, int, int]:
    """Returns X, k, o and q."""
    q, positions, outputs = factor.deltas.shape[-3:]
    return positions, factor.inputs.shape[-1], outputs, q
