"""The exact dense kernel and its derivative, whole or layer by layer.

Examples are independent (BatchNorm runs on stored statistics), so row block i of J
depends on example i alone, and all n rows cost C backward passes over the batch, not n.
Where J comes as factors not even these need weight gradients (see
`grsd_jax.jacobian.factored`). Parameter leaves are taken in groups and examples in
chunks, so that what is held of J at a time stays under a bound; Gram products add up
over the leaves: ``M = sum_l J_l J_l^T``.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._checks import check_at_least, check_batches
from grsd_jax._memory import check_fits, default_bytes, tree_bytes
from grsd_jax._typing import PyTree
from grsd_jax.jacobian.factored import moving_blocks, output_basis, output_blocks
from grsd_jax.jacobian.factors import Factor, Rows, for_gram, inner, like
from grsd_jax.jacobian.plan import Plan, check_independent, plan_of
from grsd_jax.objective import Objective
from grsd_jax.parameter_blocks import parameter_paths
from grsd_jax.problem import Point, Problem, point_at

#: ``(M,)`` or ``(M, Mdot)`` under each label.
Matrices = dict[str, tuple[jax.Array, ...]]

#: Chunks of examples by default, and the fewest and most examples of one: on a CPU
#: small chunks stay in the caches, an accelerator needs large products to be busy.
_CHUNKS, _CHUNK_RANGE, _LARGE_CHUNK_RANGE = 8, (8, 32), (32, 64)

#: Bytes of all blocks up to which a chunk takes the most examples.
_SMALL = 16 * 2**20

_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class Chunking(NamedTuple):
    """What bounds the memory of a dense kernel.

    Attributes:
        example_chunk: Examples differentiated together; if None, an eighth of all,
            within bounds, or the most if the blocks of all are small.
        max_bytes: Bytes of blocks of J held at a time; if None, a quarter of the memory
            that is free, since what makes them takes as much again.
    """

    example_chunk: int | None = None
    max_bytes: int | None = None


@overload
def kernel_dense(
    problem: Problem,
    params: PyTree,
    direction: None = None,
    *,
    example_chunk: int | None = None,
    max_bytes: int | None = None,
) -> jax.Array: ...


@overload
def kernel_dense(
    problem: Problem,
    params: PyTree,
    direction: PyTree,
    *,
    example_chunk: int | None = None,
    max_bytes: int | None = None,
) -> tuple[jax.Array, jax.Array]: ...


def kernel_dense(
    problem: Problem,
    params: PyTree,
    direction: PyTree | None = None,
    *,
    example_chunk: int | None = None,
    max_bytes: int | None = None,
) -> Any:
    """Forms the kernel exactly, ``M = J J^T``, and its derivative if asked for.

    With a direction also ``Mdot = Jdot J^T + J Jdot^T``, from the same pass. Under
    ``mean`` both are averages over the K batches.

    Example i of the error must depend on example i of the batch alone, which is checked
    once; a network that couples examples (BatchNorm in training mode, say) needs the
    matrix-free `kernel_matmat`.

    Args:
        problem: The problem.
        params: Parameters.
        direction: The tangent d of Mdot, a tree like ``params``, or None for M alone.
        example_chunk: Examples differentiated together, which bounds the activations
            held; by default about an eighth of them, from 8 to 32 on a CPU and from 32
            to 64 on an accelerator.
        max_bytes: Bytes of blocks of J (and Jdot) held at a time; by default a quarter
            of the memory that is free. If they need more, the backward passes are
            repeated for each group of parameter leaves.

    Returns:
        M, ``[n, n]``, symmetric positive semidefinite to rounding; with a direction
        ``(M, Mdot)``, Mdot in units of M per unit of s.

    Raises:
        ValueError: If a shape, tree, dtype, leading axis or bound does not fit, or the
            examples are coupled.
        MemoryError: If the matrices are larger than all memory, before any work.

    References:
        Paper 7.2 and B.5; the layer-wise sum and the exact derivative are ours.
    """
    chunking = Chunking(example_chunk, max_bytes)
    matrices = dense_at(point_at(problem, params, direction), chunking)
    return matrices[0] if direction is None else matrices


def dense_at(point: Point, chunking: Chunking = Chunking()) -> tuple[jax.Array, ...]:
    """Returns ``(M,)`` of a checked problem, or ``(M, Mdot)`` if it has a direction."""
    labels = [""] * len(jax.tree.leaves(point.params))
    return accumulate(point, labels, chunking)[""]


def layer_kernels(
    problem: Problem,
    params: PyTree,
    direction: PyTree | None = None,
    *,
    layer_of: Callable[[tuple[str, ...]], str] | None = None,
) -> dict[str, Any]:
    """Forms every layer's own kernel, ``M_l = J_l J_l^T``, and derivative if asked for.

    With a direction also ``Mdot_l = Jdot_l J_l^T + J_l Jdot_l^T``, where all parameters
    move. They add up: ``M = sum_l M_l``, ``Mdot = sum_l Mdot_l``. One pass makes them
    all, at no more operations than M alone; each takes the memory of M.

    Args:
        problem: The problem, examples independent.
        params: Parameters.
        direction: The tangent d, a tree like ``params``, or None for the kernels alone.
        layer_of: ``layer_of(path) -> name`` of the layer that a parameter belongs to,
            from the names along its path; the path without its last name if None.

    Returns:
        ``{name: M_l}``, or ``{name: (M_l, Mdot_l)}``, each ``[n, n]``, in the order of
        the tree (`jax.jit` around it sorts the names).

    Raises:
        ValueError: If a shape, tree, dtype or leading axis does not fit.
        MemoryError: If the matrices are larger than all memory, before any work.

    References:
        Paper 3.2 and A.3, the additive structure.
    """
    point = point_at(problem, params, direction)
    labels = [(layer_of or _parent)(path) for path in parameter_paths(point.params)]
    matrices = accumulate(point, labels, Chunking())
    if direction is not None:
        return dict(matrices)
    return {label: kernel for label, (kernel,) in matrices.items()}


def check_dense_fits(point: Point, num_kernels: int = 1, extra: int = 0) -> None:
    """Raises MemoryError if the matrices ``[n, n]`` of a problem cannot fit in memory.

    Args:
        point: The problem; with a direction each kernel has its derivative.
        num_kernels: Kernels that are held.
        extra: Other matrices beside them.
    """
    matrices = num_kernels * (1 if point.direction is None else 2) + extra
    check_fits(
        f"problem: {matrices} dense matrices of n = {point.dimension}",
        matrices * float(point.dimension) ** 2 * point.error.dtype.itemsize,
        "measure fewer batches or examples",
        *(["name fewer layers by layer_of"] if num_kernels > 1 else []),
        "use kernel_matmat, or solver=Lanczos(...) in a measurement",
    )


class _Blocks(NamedTuple):
    """The blocks of J, and of Jdot, of some leaves and examples.

    Attributes:
        kernel: The blocks of J.
        moved: Those of Jdot, none if no derivative is wanted.
    """

    kernel: tuple[Factor, ...]
    moved: tuple[Factor, ...]


def accumulate(point: Point, labels: Sequence[str], chunking: Chunking) -> Matrices:
    """Sums the leaves' kernels, and their derivatives, under each leaf's label.

    Args:
        point: The problem, examples independent, with a direction for Mdot.
        labels: One for each leaf of the point's parameters.
        chunking: What bounds the memory.

    Returns:
        ``(M_l,)``, or ``(M_l, Mdot_l)``, for each label l.

    Raises:
        ValueError: If a bound does not fit.
        MemoryError: If the matrices are larger than all memory.
    """
    max_bytes = chunking.max_bytes
    max_bytes = default_bytes() // 2 if max_bytes is None else max_bytes
    max_bytes = check_at_least("max_bytes", max_bytes, 1, sys.maxsize)
    if chunking.example_chunk is not None:
        check_at_least("example_chunk", chunking.example_chunk, 1)
    check_dense_fits(point, len(dict.fromkeys(labels)))
    check_independent(point)
    num_batches, num_examples = check_batches(point.batches)
    num_spaces = num_batches // point.copies
    num_examples *= point.copies
    plan = plan_of(point)
    basis = output_basis(point.error, None if plan is None else point.num_classes)
    fixed = (point.error_fn, point.params, point.direction, basis, num_examples)
    blocks_of = partial(_blocks, *fixed, plan=plan)
    shapes_of = partial(_blocks.eval_shape, *fixed, plan=plan)
    bytes_of = partial(_leaf_bytes, shapes_of, len(labels))
    batches = jax.device_put(point.batches)
    chunk_size = chunking.example_chunk or _default_chunk(
        bytes_of, batches, num_examples
    )
    total: Matrices = {}
    for chunks in _chunked(batches, num_spaces, num_examples, chunk_size):
        sizes = bytes_of(chunks)
        for group in _leaf_groups(sizes, max_bytes):
            held: list[_Blocks] = [blocks_of(chunk, group=group) for chunk in chunks]
            names = tuple(labels[index] for index in group)
            for label, matrices in _gram(held, names).items():
                earlier = total.get(label)
                total[label] = matrices if earlier is None else _add(earlier, matrices)
    return {  # in the order of the tree: a compiled function sorts the names it returns
        label: tuple(_finish(matrix, basis, num_spaces) for matrix in total[label])
        for label in dict.fromkeys(labels)
    }


def _add(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


@partial(jax.jit, static_argnames="scale")
def _finish(matrix: jax.Array, basis: jax.Array, scale: int) -> jax.Array:
    """Turns ``[N q, N q]`` into the symmetric ``[N C, N C]``, scaled."""
    num_outputs, q = basis.shape
    examples = matrix.shape[0] // q
    split = matrix.reshape(examples, q, examples, q)
    full = _einsum("cq,nqmr,dr->ncmd", basis, split, basis)
    full = full.reshape(examples * num_outputs, -1)
    return (full + full.T) / (2 * scale)


def _default_chunk(
    bytes_of: Callable[[list[PyTree]], list[int]], batches: PyTree, num_examples: int
) -> int:
    """Returns the examples of a chunk: an eighth of all, or the most if small."""
    on_cpu = jax.default_backend() == "cpu"
    least, most = _CHUNK_RANGE if on_cpu else _LARGE_CHUNK_RANGE
    most = min(most, num_examples)
    size = min(max(num_examples // _CHUNKS, least), most)
    one = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            (size, *np.shape(leaf)[2:]), jnp.result_type(leaf)
        ),
        batches,
    )
    small = sum(bytes_of([one])) * num_examples <= _SMALL * size
    return most if small else size


def _leaf_bytes(shapes_of: Any, num_leaves: int, chunks: list[PyTree]) -> list[int]:
    """Returns the bytes that each leaf's blocks take over all chunks."""
    group = tuple(range(num_leaves))
    shapes = shapes_of(chunks[0], group=group)
    kernel = [tree_bytes(block) for block in shapes.kernel]
    moved = [tree_bytes(block) for block in shapes.moved] or [0] * num_leaves
    return [len(chunks) * (a + b) for a, b in zip(kernel, moved, strict=True)]


def _leaf_groups(sizes: Sequence[int], max_bytes: int) -> list[tuple[int, ...]]:
    """Groups the leaves' indices so that a group stays under the bound."""
    groups: list[tuple[int, ...]] = []
    held = 0
    for index, size in enumerate(sizes):
        if groups and held + size <= max_bytes:
            groups[-1], held = (*groups[-1], index), held + size
        else:
            groups.append((index,))
            held = size
    return groups


def _chunked(
    batches: PyTree, num_spaces: int, num_examples: int, example_chunk: int
) -> Iterator[list[PyTree]]:
    """Yields the examples of each space in chunks of almost equal sizes."""
    num_chunks = -(-num_examples // example_chunk)
    bounds = [num_examples * i // num_chunks for i in range(num_chunks + 1)]
    for k in range(num_spaces):
        yield [
            _examples(batches, k * num_examples + i, size=j - i)
            for i, j in itertools.pairwise(bounds)
        ]


@partial(jax.jit, static_argnames="size")
def _examples(batches: PyTree, start: int, *, size: int) -> PyTree:
    """Returns some of the examples of all batches, one after the other."""

    def some(leaf: jax.Array) -> jax.Array:
        examples = leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])
        return jax.lax.dynamic_slice_in_dim(examples, start, size)

    return jax.tree.map(some, batches)


@partial(jax.jit, static_argnames=("num_examples", "group", "plan"))
def _blocks(
    error_fn: Any,
    params: PyTree,
    direction: PyTree | None,
    basis: jax.Array,
    num_examples: int,
    chunk: PyTree,
    *,
    group: tuple[int, ...],
    plan: Plan | None,
) -> _Blocks:
    """Returns the blocks of a group of leaves and a chunk of examples.

    A factored block takes the form whose Gram product over all ``num_examples``
    examples is cheaper.
    """
    if plan is None:
        rows, moved_rows = _row_blocks(error_fn, params, direction, group, chunk)
        return _Blocks(tuple(rows), tuple(moved_rows))
    if direction is None:
        found, motions = output_blocks(error_fn, params, chunk, plan=plan)[0], []
    else:
        found, motions, _ = moving_blocks(error_fn, params, chunk, direction, plan=plan)
    missing = tuple(index for index in group if found[index] is None)
    rows, moved_rows = [], []
    if missing:
        rows, moved_rows = _row_blocks(error_fn, params, direction, missing, chunk)
    plain = dict(zip(missing, _in_basis(rows, basis), strict=True))
    plain_moved = dict(zip(missing, _in_basis(moved_rows, basis), strict=False))
    kernel: list[Factor] = []
    moved: list[Factor] = []
    for index in group:
        block = found[index]
        kernel.append(plain[index] if block is None else for_gram(block, num_examples))
        if motions:
            motion = motions[index]
            moved.append(
                plain_moved[index] if motion is None else like(motion, kernel[-1])
            )
    return _Blocks(tuple(kernel), tuple(moved))


def _in_basis(blocks: list[Rows], basis: jax.Array) -> list[Rows]:
    """Turns rows of all C outputs into rows of the q directions of the basis."""
    return [Rows(_einsum("ncp,cq->nqp", block.rows, basis)) for block in blocks]


def _row_blocks(
    error_fn: Objective,
    params: PyTree,
    direction: PyTree | None,
    group: tuple[int, ...],
    chunk: PyTree,
) -> tuple[list[Rows], list[Rows]]:
    """Returns the rows ``[c, C, p]`` of J and Jdot by the plain path.

    Args:
        error_fn: The error function, a pytree.
        params: Parameters.
        direction: The tangent of Jdot, or None.
        group: Indices of the parameter leaves to differentiate with respect to.
        chunk: Examples, leading axis ``[c]``.
    """

    def jacobian(p: PyTree) -> list[Rows]:
        leaves, tree = jax.tree.flatten(p)

        def error(selected: Sequence[Any], example: PyTree) -> jax.Array:
            merged = list(leaves)
            for index, leaf in zip(group, selected, strict=True):
                merged[index] = leaf
            batch = jax.tree.map(lambda leaf: leaf[None], example)
            return error_fn(jax.tree.unflatten(tree, merged), batch)[0]

        selected = [leaves[index] for index in group]
        per_example = jax.vmap(jax.jacrev(error), in_axes=(None, 0))(selected, chunk)
        return [
            Rows(rows.reshape(*rows.shape[:2], leaf.size))
            for rows, leaf in zip(per_example, selected, strict=True)
        ]

    if direction is None:
        return jacobian(params), []
    return jax.jvp(jacobian, (params,), (direction,))


def _gram(chunks: list[_Blocks], labels: tuple[str, ...]) -> Matrices:
    """Returns ``J J^T``, and ``Jdot J^T + J Jdot^T`` if wanted, for each label.

    Two programs, blocks first, run faster than one: XLA schedules the joint one worse.
    Tiles below the diagonal are the transposes of those above.
    """
    count, moving = len(chunks), bool(chunks[0].moved)
    if count == 1:
        return _gram_tile(chunks[0], chunks[0], labels, diagonal=moving)
    upper = {
        (i, j): _gram_tile(chunks[i], chunks[j], labels, diagonal=moving and i == j)
        for i in range(count)
        for j in range(i, count)
    }

    def tile(i: int, j: int, label: str, which: int) -> jax.Array:
        if i <= j:
            return upper[i, j][label][which]
        return upper[j, i][label][which].T

    return {
        label: tuple(
            jnp.block(
                [[tile(i, j, label, which) for j in range(count)] for i in range(count)]
            )
            for which in range(2 if moving else 1)
        )
        for label in dict.fromkeys(labels)
    }


@partial(jax.jit, static_argnames=("labels", "diagonal"))
def _gram_tile(
    left: _Blocks, right: _Blocks, labels: tuple[str, ...], *, diagonal: bool
) -> Matrices:
    """Returns a tile of each label's matrices; ``diagonal`` spares half of Mdot's."""
    total: Matrices = {}
    for index, label in enumerate(labels):
        a, b = left.kernel[index], right.kernel[index]
        found = (inner(a, b),)
        if left.moved:
            half = inner(left.moved[index], b)
            other = half.T if diagonal else inner(a, right.moved[index])
            found = (*found, half + other)
        total[label] = _add(total[label], found) if label in total else found
    return total


def _parent(path: tuple[str, ...]) -> str:
    return "/".join(path[:-1]) or "/".join(path)
