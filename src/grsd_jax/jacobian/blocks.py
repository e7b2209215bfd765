"""The blocks of J of every parameter leaf, from the meetings of a walked program.

One run of the program with zero perturbations and one backward pass for each output
give, for every meeting, the deltas ``d e / d y`` of its result y, and the operands that
were recorded. A product or a convolution becomes an outer block of inputs and deltas, a
gather of rows a lookup; anything else is turned into rows by the derivative of that one
equation. A weight that is not the leaf itself, but computed from it or a part of it, is
led back to the leaf by the derivative of that computation.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import GatherScatterMode

from grsd_jax._typing import PyTree
from grsd_jax.jacobian.factors import (
    Composite,
    Factor,
    Lookup,
    Outer,
    Part,
    Pieces,
    Rows,
    Stacked,
    joined,
)
from grsd_jax.jacobian.tracing import (
    Meeting,
    Program,
    Use,
    applied,
    entries_of,
    is_injective,
)


class Traced(NamedTuple):
    """A program with the arrays that it is run on.

    Attributes:
        program: The program.
        state: Leaves of what the error function holds.
        leaves: The parameter leaves.
        dtype: That of the error, and of all blocks.
    """

    program: Program
    state: list[Any]
    leaves: list[Any]
    dtype: Any

    def weights(self, leaves: Sequence[Any], uses: Sequence[int]) -> list[jax.Array]:
        """Computes the weights of some uses from parameter leaves."""
        return self.program.weights(self.state, leaves, uses)

    def pullback(self, weight: Callable[[Sequence[Any]], Any], leaf: int) -> Any:
        """Returns the pullback of what is computed from the leaves, to one of them."""

        def of_leaf(value: Any) -> Any:
            moved = [*self.leaves]
            moved[leaf] = value
            return weight(moved)

        return jax.vjp(of_leaf, self.leaves[leaf])[1]


class _Share(NamedTuple):
    """A use with its block, in the coordinates of its weight.

    Attributes:
        use: Which use.
        block: An outer block or a lookup, stacked where there are several.
        arrange: Brings the weight into the coordinates in which `block` pulls.
    """

    use: int
    block: Part
    arrange: Callable[[Any], Any]


def leaf_blocks(
    program: Program,
    plain: frozenset[int],
    error_fn: Any,
    params: PyTree,
    batch: PyTree,
    basis: jax.Array,
) -> list[Factor | None]:
    """Returns the block of J of every parameter leaf, in one batch.

    Args:
        program: The walked error of one example.
        plain: Leaves that are left out.
        error_fn: The error function, a pytree.
        params: Parameters.
        batch: One batch.
        basis: Directions of one example's outputs, ``[C, q]``.

    Returns:
        In the order of the leaves: a block, or None for a leaf that is left out.
    """
    traced, parts, rows, _ = _collected(program, plain, error_fn, params, batch, basis)
    num_examples, q = jax.tree.leaves(batch)[0].shape[0], basis.shape[1]
    nothing = Rows(jnp.zeros((num_examples, q, 1), basis.dtype))
    return [
        None
        if leaf in plain
        else _leaf_block(leaf, parts[leaf], rows.get(leaf), traced) or nothing
        for leaf in range(len(traced.leaves))
    ]


class LeafTangents(NamedTuple):
    """``J_l^T u`` of every leaf that has factors, None for the others.

    Attributes:
        tangents: In the shape of the leaf, with all uses added up in its coordinates.
        squares: ``|J_l^T u|^2`` from the leaf's block.
        strays: For each leaf that is looked up ``[3]``, whether rows are read outside
            the table, where what JAX gives is undefined, one of their indices, and the
            number of rows.
    """

    tangents: list[jax.Array | None]
    squares: list[jax.Array | None]
    strays: dict[int, jax.Array]


def leaf_tangents(
    program: Program,
    plain: frozenset[int],
    error_fn: Any,
    params: PyTree,
    batch: PyTree,
    column: jax.Array,
    weights: jax.Array,
) -> LeafTangents:
    """Returns ``J_l^T u`` of every leaf from the factors, for their check.

    Args:
        program: The walked error of one example.
        plain: Leaves that are left out.
        error_fn: The error function, a pytree.
        params: Parameters.
        batch: One batch.
        column: ``[C, 1]``, and
        weights: ``[N, 1, 1]``, whose product is u.
    """
    traced, parts, rows, strays = _collected(
        program, plain, error_fn, params, batch, column
    )
    found = LeafTangents([], [], strays)
    for leaf, value in enumerate(traced.leaves):
        if leaf in plain:
            found.tangents.append(None)
            found.squares.append(None)
            continue
        added = _composite(leaf, parts[leaf], rows.get(leaf), traced)
        pulled = jnp.zeros(value.shape) if added is None else added.pull(weights)
        found.tangents.append(pulled.reshape(value.shape))
        block = _leaf_block(leaf, parts[leaf], rows.get(leaf), traced)
        square = jnp.zeros(()) if block is None else block.multiply(weights) * weights
        found.squares.append(jnp.sum(square))
    return found


def count_strays(
    program: Program, error_fn: Any, params: PyTree, batch: PyTree
) -> jax.Array:
    """Returns how often an undefined row of a table is read, [] int32.

    Args:
        program: The walked error of one example.
        error_fn: The error function, a pytree.
        params: Parameters.
        batch: One batch.
    """
    state, leaves = jax.tree.leaves(error_fn), jax.tree.leaves(params)
    meetings = program.meetings

    def one(example: list[jax.Array]) -> list[tuple[jax.Array, ...]]:
        zeros = [jnp.zeros((*m.loops, *m.shape), m.dtype) for m in meetings]
        return program.perturbed(state, leaves, example, zeros)[1]

    records = jax.vmap(one)(jax.tree.leaves(batch))
    counts = [
        jnp.sum(_is_stray(meeting.equation, record[0]), dtype=jnp.int32)
        for meeting, record in zip(meetings, records, strict=True)
        if meeting.kind == "lookup"
    ]
    return sum(counts, jnp.int32(0))


def _collected(
    program: Program,
    plain: frozenset[int],
    error_fn: Any,
    params: PyTree,
    batch: PyTree,
    basis: jax.Array,
) -> tuple[Traced, list[list[_Share]], dict[int, Rows], dict[int, jax.Array]]:
    """Runs the program, and returns parts, rows and strays of every leaf."""
    state, leaves = jax.tree.leaves(error_fn), jax.tree.leaves(params)
    traced = Traced(program, state, leaves, basis.dtype)
    records, deltas = _run(traced, jax.tree.leaves(batch), basis)
    parts: list[list[_Share]] = [[] for _ in leaves]
    cotangents: dict[int, jax.Array] = {}
    strays: dict[int, jax.Array] = {}
    for index, use in enumerate(program.uses):
        wanted = use.weight.leaves - plain
        if not wanted:
            continue
        meeting = program.meetings[use.meeting]
        record, delta = records[use.meeting], deltas[use.meeting]
        if meeting.kind in ("outer", "lookup"):
            part = _factored(index, use, meeting, record[0], delta, traced)
            for leaf in wanted:
                parts[leaf].append(part)
            if meeting.kind == "lookup":
                stray = _stray(meeting.equation, record[0])
                for leaf in wanted:
                    earlier = strays.get(leaf, stray)
                    strays[leaf] = jnp.where(earlier[0] > 0, earlier, stray)
        else:
            cotangents[index] = _cotangent(use, meeting, record, delta)
    return traced, parts, _rows(traced, cotangents, plain), strays


def _run(
    traced: Traced, examples: list[jax.Array], basis: jax.Array
) -> tuple[list[tuple[jax.Array, ...]], list[jax.Array]]:
    """Returns the records ``[N, ...]`` and the deltas ``[N, q, ...]`` of all meetings.

    The axes of the scans around a meeting come next.
    """
    num_examples = examples[0].shape[0]

    def error(perturbations: list[jax.Array], leaves: list[Any]) -> Any:
        def one(example: list[jax.Array], perturbation: list[jax.Array]) -> Any:
            value, records = traced.program.perturbed(
                traced.state, leaves, example, perturbation
            )
            return value[0], records

        return jax.vmap(one)(examples, perturbations)

    zeros = [
        jnp.zeros((num_examples, *meeting.loops, *meeting.shape), meeting.dtype)
        for meeting in traced.program.meetings
    ]
    if traced.program.custom:
        # As `jax.vjp` of the parameters, so that the derivative of J sees the program
        # of the call's own rule, and not the rule.
        value, pullback, records = jax.vjp(error, zeros, traced.leaves, has_aux=True)
    else:
        value, pullback, records = jax.vjp(
            lambda zeros: error(zeros, traced.leaves), zeros, has_aux=True
        )
    seeds = jnp.broadcast_to(
        basis.T[:, None, :].astype(value.dtype), (basis.shape[1], *value.shape)
    )
    deltas = jax.vmap(lambda seed: pullback(seed)[0])(seeds)
    return records, [jnp.moveaxis(delta, 0, 1) for delta in deltas]


def _factored(
    index: int,
    use: Use,
    meeting: Meeting,
    record: jax.Array,
    delta: jax.Array,
    traced: Traced,
) -> _Share:
    """Returns the block of a product, a convolution or a gather of rows."""
    loops = meeting.loops
    merged_record = record.reshape(-1, *record.shape[1 + len(loops) :])
    moved = jnp.moveaxis(delta, 1, 1 + len(loops))
    merged_delta = moved.reshape(-1, *moved.shape[1 + len(loops) :])
    name = meeting.equation.primitive.name
    read = {"gather": _lookup, "conv_general_dilated": _convolution}.get(name, _product)
    found, arrange = read(meeting.equation, use.operand, merged_record, merged_delta)
    inputs, deltas = (
        _by_groups(array, loops, use.weight.scanned, axis)
        for array, axis in zip(found, (0, 1), strict=True)
    )
    deltas = deltas.astype(traced.dtype)
    if meeting.kind == "lookup":
        block: Any = Lookup(inputs, deltas, meeting.equation.invars[0].aval.shape[0])
    else:
        block = Outer(inputs.astype(traced.dtype), deltas)
    if len(inputs) == 1:
        block = jax.tree.map(lambda array: array[0], block)
    else:
        block = Stacked(block)
    scanned = sum(use.weight.scanned)
    arranged = partial(_arranged, arrange, scanned=scanned, grouped=len(inputs) > 1)
    return _Share(index, block, arranged)


def _by_groups(
    array: jax.Array, loops: tuple[int, ...], scanned: tuple[bool, ...], lead: int
) -> jax.Array:
    """Sorts the steps of scans into groups and positions.

    Args:
        array: ``[N L.., G, X, ...]``, or with one more axis after the first
            (``lead`` 1).
        loops: The lengths L of the scans.
        scanned: For each, whether every step has a weight of its own, and so is a
            group; elsewhere it is a position.
        lead: The number of axes between the first and G.

    Returns:
        ``[groups, N, ..., positions, ...]``.
    """
    own = [1 + i for i, each in enumerate(scanned) if each]
    shared = [1 + i for i, each in enumerate(scanned) if not each]
    first = 1 + len(loops)
    whole = array.reshape(-1, *loops, *array.shape[1:])
    middle = list(range(first, first + lead))
    group, position = first + lead, first + lead + 1
    rest = list(range(position + 1, whole.ndim))
    whole = whole.transpose(*own, group, 0, *middle, *shared, position, *rest)
    groups = int(np.prod([whole.shape[i] for i in range(len(own) + 1)]))
    start = len(own) + 1
    kept = whole.shape[start : start + 1 + lead]
    tail = whole.shape[whole.ndim - len(rest) :]
    return whole.reshape(groups, *kept, -1, *tail)


def _arranged(
    arrange: Callable[[Any], Any], weight: Any, *, scanned: int, grouped: bool
) -> Any:
    """Returns a weight as ``[k, o]`` (``[groups, k, o]`` if ``grouped``)."""
    for _ in range(scanned):
        arrange = jax.vmap(arrange)
    found = arrange(weight)
    found = found.reshape(-1, *found.shape[scanned + 1 :])
    return found if grouped else found[0]


def _product(
    equation: Any, operand: int, inputs: jax.Array, deltas: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], Callable[[Any], Any]]:
    """Returns inputs and deltas of a `dot_general` by groups, positions and features.

    Args:
        equation: The equation.
        operand: Which operand is the weight.
        inputs: The other operand, ``[N, ...]``.
        deltas: ``[N, q, ...]``.

    Returns:
        ``[N, G, X, k]`` and ``[N, q, G, X, o]``, and what turns the weight into
        ``[G, k, o]``. The groups are the batch axes of the product.
    """
    contracted, batch = equation.params["dimension_numbers"]
    ours, theirs = operand, 1 - operand
    shapes = [atom.aval.shape for atom in equation.invars]
    free = [
        [axis for axis in range(len(shape)) if axis not in (*used, *shared)]
        for shape, used, shared in zip(shapes, contracted, batch, strict=True)
    ]
    groups = _size(shapes[ours], batch[ours])
    k = _size(shapes[ours], contracted[ours])
    order = (*batch[theirs], *free[theirs], *contracted[theirs])
    inputs = inputs.transpose(0, *(1 + axis for axis in order))
    inputs = inputs.reshape(len(inputs), groups, -1, k)
    # The result has the batch axes, then the left's free ones, then the right's.
    shared, left = len(batch[0]), len(free[0])
    lefts = [2 + shared + i for i in range(left)]
    rights = [2 + shared + left + i for i in range(len(free[1]))]
    positions, features = (lefts, rights) if operand == 1 else (rights, lefts)
    leading = range(2 + shared)
    deltas = deltas.transpose(*leading, *positions, *features)
    deltas = deltas.reshape(*deltas.shape[:2], groups, inputs.shape[2], -1)

    def arrange(weight: Any) -> Any:
        axes = (*batch[ours], *contracted[ours], *free[ours])
        return weight.transpose(*axes).reshape(groups, k, -1)

    return (inputs, deltas), arrange


def _convolution(
    equation: Any, operand: int, inputs: jax.Array, deltas: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], Callable[[Any], Any]]:
    """Returns inputs and deltas of a convolution, as `_product` does.

    The inputs are its patches; the groups are its feature groups.
    """
    del operand  # the kernel is the second
    params = equation.params
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    window = [equation.invars[1].aval.shape[axis] for axis in numbers.rhs_spec[2:]]
    images, channels, *space = numbers.lhs_spec
    x = inputs.transpose(0, 1 + images, *(1 + axis for axis in space), 1 + channels)
    patches = _patches(x, window, params)
    # [N, images, sizes.., window, channels]: groups first, then positions, then k.
    split = patches.reshape(*patches.shape[:-1], groups, -1)
    split = jnp.moveaxis(split, -2, 1)
    features = split.shape[-2] * split.shape[-1]
    found = split.reshape(len(split), groups, -1, features)
    images, channels, *space = numbers.out_spec
    deltas = deltas.transpose(
        0, 1, 2 + images, *(2 + axis for axis in space), 2 + channels
    )
    deltas = deltas.reshape(*deltas.shape[:2], found.shape[2], groups, -1)
    deltas = jnp.moveaxis(deltas, 3, 2)

    def arrange(weight: Any) -> Any:
        outs, ins, *space = numbers.rhs_spec
        kernel = weight.transpose(*space, ins, outs)
        return jnp.moveaxis(kernel.reshape(features, groups, -1), 1, 0)

    return (found, deltas), arrange


def _patches(x: jax.Array, window: Sequence[int], params: Any) -> jax.Array:
    """Returns the patches ``[N, images, sizes.., window, channels]`` of images.

    Args:
        x: ``[N, images, *space, channels]``.
        window: The sizes of the kernel.
        params: Those of the convolution.
    """
    dilation, strides = params["rhs_dilation"], params["window_strides"]
    pads = [
        (low, high, step - 1)
        for (low, high), step in zip(
            params["padding"], params["lhs_dilation"], strict=True
        )
    ]
    nothing = (0, 0, 0)
    zero = jnp.zeros((), x.dtype)
    x = jax.lax.pad(x, zero, [nothing, nothing, *pads, nothing])
    reach = [(size - 1) * step + 1 for size, step in zip(window, dilation, strict=True)]
    sizes = [
        (size - r) // stride + 1
        for size, r, stride in zip(x.shape[2:-1], reach, strides, strict=True)
    ]
    slices = []
    for offset in itertools.product(*map(range, window)):
        taken = [
            slice(at * step, at * step + (size - 1) * stride + 1, stride)
            for at, step, size, stride in zip(
                offset, dilation, sizes, strides, strict=True
            )
        ]
        slices.append(x[:, :, *taken])
    return jnp.stack(slices, axis=-2)


def _lookup(
    equation: Any, operand: int, indices: jax.Array, deltas: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], Callable[[Any], Any]]:
    """Returns the rows that a gather reads, and its deltas, as `_product` does.

    An index outside the table is clipped to it if the gather's mode says so. Otherwise
    it reads no row, or is undefined, and then as in the transpose of the gather.
    """
    del operand  # the table is the first
    rows = indices.reshape(len(indices), -1)
    size = equation.invars[0].aval.shape[0]
    offset = equation.params["dimension_numbers"].offset_dims
    axes = range(deltas.ndim - 2)
    order = [axis for axis in axes if axis not in offset] + list(offset)
    deltas = deltas.transpose(0, 1, *(2 + axis for axis in order))
    deltas = deltas.reshape(*deltas.shape[:2], rows.shape[1], -1)
    inside = (rows >= 0) & (rows < size)
    rows = jnp.clip(rows, 0, size - 1).astype(jnp.int32)
    mode = GatherScatterMode.from_any(equation.params["mode"])
    if mode != GatherScatterMode.CLIP:
        deltas = deltas * inside[:, None, :, None].astype(deltas.dtype)

    def arrange(weight: Any) -> Any:
        return weight.reshape(1, size, -1)

    return (rows[:, None], deltas[:, :, None]), arrange


def _stray(equation: Any, indices: jax.Array) -> jax.Array:
    """Returns whether a gather reads what is undefined, such an index, and the size."""
    size, indices = equation.invars[0].aval.shape[0], indices.reshape(-1)
    outside = _is_stray(equation, indices)
    found = (jnp.any(outside), indices[jnp.argmax(outside)], size)
    return jnp.stack([jnp.asarray(each, jnp.int32) for each in found])


def _is_stray(equation: Any, indices: jax.Array) -> jax.Array:
    """Returns which indices lie outside the table of a gather, where this is undefined.

    A mode that says what it reads there is the caller's wish.
    """
    mode = GatherScatterMode.from_any(equation.params["mode"])
    outside = (indices < 0) | (indices >= equation.invars[0].aval.shape[0])
    return outside & (mode == GatherScatterMode.PROMISE_IN_BOUNDS)


def _cotangent(
    use: Use, meeting: Meeting, record: tuple[jax.Array, ...], delta: jax.Array
) -> jax.Array:
    """Returns the cotangents of the weight of any other meeting.

    ``[N, q, *scanned loops, *shape of the weight]``.
    """
    first = 2
    if meeting.kind == "elementwise":
        found = _elementwise(use, meeting, record, delta)
    elif meeting.kind == "local":
        found = _local(use, meeting, record, delta)
    else:
        found = delta
    shared = [first + i for i, each in enumerate(use.weight.scanned) if not each]
    return jnp.sum(found, axis=tuple(shared)) if shared else found


def _elementwise(
    use: Use, meeting: Meeting, record: tuple[jax.Array, ...], delta: jax.Array
) -> jax.Array:
    """Returns the cotangents of an operand of a sum, a product or a quotient."""
    name = meeting.equation.primitive.name
    if name == "sub" and use.operand == 1:
        delta = -delta
    elif name in ("mul", "div"):
        other = record[0][:, None]
        other = other.reshape(*other.shape, *[1] * (delta.ndim - other.ndim))
        delta = delta * other if name == "mul" else delta / other
    shape = meeting.equation.invars[use.operand].aval.shape
    extra = delta.ndim - len(meeting.shape)
    missing = [
        extra + axis
        for axis, size in enumerate(meeting.shape)
        if not shape or shape[axis] != size
    ]
    summed = jnp.sum(delta, axis=tuple(missing), keepdims=bool(shape))
    return summed if missing else delta


def _local(
    use: Use, meeting: Meeting, record: tuple[jax.Array, ...], delta: jax.Array
) -> jax.Array:
    """Returns the cotangents of an operand by the derivative of its equation."""

    def one(operands: tuple[jax.Array, ...], seeds: jax.Array) -> jax.Array:
        def result(weight: jax.Array) -> jax.Array:
            values = [*operands]
            values[use.operand] = weight
            return applied(meeting.equation, values)

        _, pullback = jax.vjp(result, operands[use.operand])
        return jax.vmap(lambda seed: pullback(seed)[0])(seeds)

    over_loops = one
    for _ in meeting.loops:
        over_loops = jax.vmap(over_loops, in_axes=(0, 1), out_axes=1)
    return jax.vmap(over_loops)(record, delta)


def _rows(
    traced: Traced, cotangents: dict[int, jax.Array], plain: frozenset[int]
) -> dict[int, Rows]:
    """Leads the cotangents of weights back to the rows of the leaves they come from."""
    uses = sorted(cotangents)
    own = [traced.program.uses[use].weight.leaves for use in uses]
    moved = sorted(frozenset[int]().union(*own) - plain) if uses else []
    if not moved:
        return {}

    def weights(selected: list[Any]) -> list[Any]:
        leaves = [*traced.leaves]
        for leaf, value in zip(moved, selected, strict=True):
            leaves[leaf] = value
        return traced.weights(leaves, uses)

    _, pullback = jax.vjp(weights, [traced.leaves[leaf] for leaf in moved])
    seeds = [cotangents[use] for use in uses]
    found = jax.vmap(jax.vmap(lambda seed: pullback(seed)[0]))(seeds)
    return {
        leaf: Rows(rows.reshape(*rows.shape[:2], -1).astype(traced.dtype))
        for leaf, rows in zip(moved, found, strict=True)
    }


def _leaf_block(
    leaf: int, parts: list[_Share], rows: Rows | None, traced: Traced
) -> Factor | None:
    """Puts the parts of one leaf together, in the cheapest form."""
    apart = _apart(leaf, parts, traced) if parts and rows is None else None
    return apart or _composite(leaf, parts, rows, traced)


def _composite(
    leaf: int, parts: list[_Share], rows: Rows | None, traced: Traced
) -> Rows | Composite | None:
    """Adds up all the parts of one leaf, in the coordinates of the leaf."""
    if not parts:
        return rows
    blocks: list[Any] = [part.block for part in parts]
    pullbacks = [_back(leaf, part, traced) for part in parts]
    if rows is not None:
        blocks.append(rows)
        pullbacks.append(None)
    return Composite(tuple(blocks), tuple(pullbacks))


def _apart(leaf: int, parts: list[_Share], traced: Traced) -> Factor | None:
    """Returns the block of parts that are entries of the leaf, none of them shared.

    Parts of the same entries in the same order are one block; None where parts overlap
    otherwise, or compute something.
    """
    weights = [traced.program.uses[part.use].weight for part in parts]
    if not all(w.moves is not None and is_injective(w) for w in weights):
        return None
    if len(parts) == 1:
        return parts[0].block
    shape = traced.leaves[leaf].shape
    found: dict[Any, tuple[np.ndarray, Part]] = {}
    for part, weight in zip(parts, weights, strict=True):
        positions = entries_of(weight, shape)
        with jax.ensure_compile_time_eval():
            positions = np.asarray(part.arrange(positions))
        key = (type(part.block), positions.shape, positions.tobytes())
        block = part.block
        if key in found:
            block = joined(found[key][1], block)
        found[key] = positions, block
    taken = np.concatenate([positions.ravel() for positions, _ in found.values()])
    if len(np.unique(taken)) < len(taken):
        return None
    blocks = tuple(block for _, block in found.values())
    return blocks[0] if len(blocks) == 1 else Pieces(blocks)


def _back(leaf: int, part: _Share, traced: Traced) -> Any:
    """Returns the pullback from the coordinates of a part to its leaf."""

    def arranged(leaves: Sequence[Any]) -> Any:
        (weight,) = traced.weights(leaves, [part.use])
        return part.arrange(weight).astype(traced.dtype)

    return traced.pullback(arranged, leaf)


def _size(shape: Sequence[int], axes: Sequence[int]) -> int:
    return int(np.prod([shape[axis] for axis in axes]))
