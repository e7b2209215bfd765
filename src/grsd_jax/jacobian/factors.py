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

All three have `pull`, `push` and `multiply`. ``q`` counts the outputs, or the
directions of a basis of them. Columns of the error space are ``[N, q, b]`` here. The
derivative of a block along a direction is a block of the same form, so Mdot needs no
operation of its own.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

#: How much faster one large matrix product runs than the batched ones of `Outer`,
#: measured on two CPU cores: 85 GFLOP/s against 28 to 44.
_BATCHED_COST = 3.0

#: Positions up to which all deltas are multiplied with all.
_FEW_POSITIONS = 2

#: The memory that rows may take, in units of the factors'.
_ROW_BYTES = 8


@partial(jax.tree_util.register_dataclass, data_fields=["rows"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Rows:
    """A block of J with its rows written out.

    Attributes:
        rows: ``[N, q, p]``.
    """

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

    def derivative(self, tangent: "Rows") -> "Rows":
        """Returns the block's derivative, given the derivative of its arrays."""
        return tangent


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

    def derivative(self, tangent: "Outer") -> "Outer":
        """Returns ``adot (x) delta + a (x) deltadot``, as twice as many positions."""
        return Outer(
            jnp.concatenate([tangent.inputs, self.inputs], axis=1),
            jnp.concatenate([self.deltas, tangent.deltas], axis=2),
        )

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
        indices: The rows looked up, ``[N, X]``, held in the dtype of ``deltas`` so that
            the block can be differentiated.
        deltas: ``d e / d y``, ``[N, q, X, o]``.
        size: The number of rows of the embedding.
    """

    indices: jax.Array
    deltas: jax.Array
    size: int

    def pull(self, columns: jax.Array) -> jax.Array:
        """Computes ``J^T V`` of columns ``[N, q, b]``, as ``[size, b, o]``."""
        combined = _einsum("nqxo,nqb->nxbo", self.deltas, columns)
        zeros = jnp.zeros((self.size, *combined.shape[2:]), combined.dtype)
        return zeros.at[self._rows_read()].add(combined)

    def push(self, tangents: jax.Array) -> jax.Array:
        """Computes ``J G`` of what `pull` returns, as ``[N, q, b]``."""
        return _einsum("nqxo,nxbo->nqb", self.deltas, tangents[self._rows_read()])

    def multiply(self, columns: jax.Array) -> jax.Array:
        """Computes ``J J^T V`` of columns ``[N, q, b]``."""
        return self.push(self.pull(columns))

    def derivative(self, tangent: "Lookup") -> "Lookup":
        """Returns the block's derivative: indices do not move."""
        return Lookup(self.indices, tangent.deltas, self.size)

    def _rows_read(self) -> jax.Array:
        return self.indices.astype(jnp.int32)


Factor = Rows | Outer | Lookup


def joined(left: Factor, right: Factor) -> Factor:
    """Returns the block of a parameter that is used twice, the sum of its uses.

    Args:
        left: One use, in any of the three forms.
        right: The other, in the same form.

    Returns:
        The block, in that form.
    """
    if isinstance(left, Rows) and isinstance(right, Rows):
        return Rows(left.rows + right.rows)
    deltas = [block.deltas for block in (left, right) if not isinstance(block, Rows)]
    both = jnp.concatenate(deltas, axis=2)
    if isinstance(left, Outer) and isinstance(right, Outer):
        return Outer(jnp.concatenate([left.inputs, right.inputs], axis=1), both)
    assert isinstance(left, Lookup)
    assert isinstance(right, Lookup)
    indices = jnp.concatenate([left.indices, right.indices], axis=1)
    return Lookup(indices, both, left.size)


def like(block: Factor, reference: Factor) -> Factor:
    """Returns ``block`` in rows where ``reference`` is, so that the two can meet."""
    if isinstance(reference, Rows) and isinstance(block, Outer):
        return block.as_rows()
    return block


def inner(left: Factor, right: Factor) -> jax.Array:
    """Computes ``A B^T`` of two blocks of one parameter.

    Two `Outer` blocks are contracted without writing out their rows:
    ``sum_xy (a_i[x] . a_j[y]) (delta_ic[x] . delta_jd[y])``. Of one or two positions,
    as in dense layers, all inner products of the deltas come first, in one product of
    matrices; of more, the sum over x, example by example of A, so that what lies
    between stays in the cache.

    Args:
        left: A, ``[N, q, p]`` in one of the three forms.
        right: B, ``[N', q, p]`` in the same form.

    Returns:
        ``[N q, N' q]``.
    """
    if isinstance(left, Rows) and isinstance(right, Rows):
        size = left.rows.shape[-1]
        return _einsum(
            "ip,jp->ij", left.rows.reshape(-1, size), right.rows.reshape(-1, size)
        )
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
        gram = _one_by_one(left.deltas, similar, right.deltas)
    rows = gram.shape[0] * gram.shape[1]
    return gram.reshape(rows, -1)


def _one_by_one(left: jax.Array, similar: jax.Array, right: jax.Array) -> jax.Array:
    """Contracts ``[N, q, X, o]``, ``[N, X, N', Y]`` and ``[N', q, Y, o]``."""

    def one_example(parts: tuple[jax.Array, jax.Array]) -> jax.Array:
        deltas, overlap = parts
        spread = _einsum("qxo,xmy->myqo", deltas, overlap)
        return _einsum("myqo,mryo->qmr", spread, right)

    return jax.lax.map(one_example, (left, similar))


def for_products(factor: Factor, *, multiplied: bool = False) -> Factor:
    """Returns the form whose products with columns are cheaper, see `_product_costs`.

    Args:
        factor: The block.
        multiplied: Whether it will be multiplied, and not pulled and pushed.

    Returns:
        The block. Rows are not taken if they need more than eight times the memory of
        the factors; a similarity, where it is cheaper, is at most twice the inputs.
    """
    if not isinstance(factor, Outer):
        return factor
    positions, inputs, outputs, q = _sizes(factor)
    row_size = q * inputs * outputs
    factor_size = positions * (inputs + q * outputs)
    small = row_size <= _ROW_BYTES * factor_size
    row_cost, factor_cost, similar_cost = _product_costs(factor)
    rows = small and row_cost < factor_cost
    if multiplied and similar_cost < (row_cost if rows else factor_cost):
        return factor.with_similarity()
    return factor.as_rows() if rows else factor


def for_gram(factor: Factor, num_examples: int) -> Factor:
    """Returns the form whose Gram product is cheaper, see `_gram_costs`."""
    if not isinstance(factor, Outer):
        return factor
    row_cost, factor_cost = _gram_costs(factor, num_examples)
    return factor.as_rows() if row_cost <= factor_cost else factor


def _product_costs(factor: Outer) -> tuple[float, float, float]:
    """Returns the operations of one column's product, for one example.

    ``4 q k o`` in rows, ``4 X (k + q) o`` as factors, ``2 X (N X + 2 q) o`` by their
    similarity.
    """
    positions, inputs, outputs, q = _sizes(factor)
    everywhere = factor.inputs.shape[0] * positions
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
    _, q, positions, outputs = factor.deltas.shape
    return positions, factor.inputs.shape[-1], outputs, q
