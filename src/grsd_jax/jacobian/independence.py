"""Whether the examples of a batch are independent, read off the program.

The program of a whole batch is followed equation by equation. Every value that depends
on the examples has one axis along which they lie, and an equation keeps them apart if
each slice of its result along that axis comes from the same slice of its operands. What
is not known to keep them apart may mix them: a sum over the examples does, and an
equation that is not in the tables below counts as one that does. So this can prove that
examples are independent, at all values of the parameters, and never that they are not.

The program that is read is that of ``J d``, so that the rules of custom derivatives are
read as well. One that has no rule for ``J d`` counts as one that may mix.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from grsd_jax.jacobian.batch_size import depends_on_number
from grsd_jax.jacobian.tracing import (
    body_of,
    is_call,
    is_literal,
    opened,
    scan_counts,
)

#: Equations that compute entry by entry.
_BY_ENTRY = frozenset(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
    cbrt ceil clamp clz complex conj convert_element_type copy copy_p cos cosh
    digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac imag
    integer_pow is_finite le lgamma log log1p log2 logistic lt max min mul mulhi
    name ne neg nextafter not one_minus_square or polygamma population_count pow
    real reduce_precision regularized_incomplete_beta rem round rsqrt select_n
    shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square
    stop_gradient sub tan tanh xor zeta
    """.split()  # noqa: SIM905  (a line for each name otherwise)
)

#: Equations that work along axes, with the parameter that names these.
_ALONG = {
    **dict.fromkeys(
        ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and"), "axes"
    ),
    **dict.fromkeys(("reduce_or", "reduce_xor", "argmax", "argmin"), "axes"),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin"), "axis"),
    **dict.fromkeys(("cumlogsumexp", "split", "unstack"), "axis"),
    **dict.fromkeys(("sort", "concatenate"), "dimension"),
    "rev": "dimensions",
}

#: Those of them that drop the axes.
_DROP = ("reduce_", "argmax", "argmin", "unstack")


class _Apart(NamedTuple):
    """A value whose examples are apart.

    Attributes:
        axis: The axis along which they lie.
        count: How many they are.
        minor: How many entries of that axis follow each other in one example, where
            others are merged with it.
    """

    axis: int
    count: int
    minor: int = 1


class _Still(NamedTuple):
    """A value that does not depend on the examples.

    Attributes:
        uniform: The axes along which all its entries are the same.
    """

    uniform: frozenset[int]


_Value = _Apart | _Still


class _MayMix(Exception):
    """An equation may mix the examples."""


def what_may_mix(
    batch: Any, larger: Any, one: Any, num_still: int, num_examples: int
) -> str:
    """Returns what may make the examples of a program depend on each other.

    Args:
        batch: The jaxpr of ``(*still, *examples) -> J d [N, C]``, where the leaves of
            the examples have the leading axis N.
        larger: The jaxpr of the same for more examples.
        one: The jaxpr of the same for one example.
        num_still: The number of operands that are no examples.
        num_examples: N.

    Returns:
        A description for a message; empty if the examples are independent.
    """
    if num_examples == 1:
        return ""
    if depends_on_number(batch, larger, one):
        return "what is computed depends on the number of examples"
    jaxpr = opened(batch)[0]
    apart = _Apart(0, num_examples)
    num_apart = len(jaxpr.invars) - num_still
    try:
        (error,) = _read(jaxpr, [_Still(frozenset())] * num_still + [apart] * num_apart)
    except _MayMix as mixed:
        return str(mixed)
    same = isinstance(error, _Still) and 0 in error.uniform
    return "" if same or error == apart else "the order of the examples changes"


def _read(jaxpr: Any, ins: Sequence[_Value]) -> list[_Value]:
    """Returns where the examples lie in the results."""
    known: dict[Any, _Value] = {}
    known.update((var, _Still(frozenset())) for var in jaxpr.constvars)
    known.update(zip(jaxpr.invars, ins, strict=True))

    def value(atom: Any) -> _Value:
        if is_literal(atom):
            return _Still(frozenset(range(np.ndim(atom.val))))
        return known[atom]

    for equation in jaxpr.eqns:
        outs = _equation(equation, [value(atom) for atom in equation.invars])
        known.update(zip(equation.outvars, outs, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _equation(equation: Any, ins: list[_Value]) -> Sequence[_Value]:
    """Returns where the examples lie in the results of an equation."""
    name, num_outs = equation.primitive.name, len(equation.outvars)
    if is_call(equation):
        return _read(opened(body_of(equation))[0], ins)
    if name in _BY_ENTRY:
        return [_together(equation, ins)] * num_outs
    if name == "optimization_barrier":
        return ins
    if name in _EITHER:
        return [_EITHER[name](equation, ins)] * num_outs
    if not any(isinstance(each, _Apart) for each in ins):
        return [_Still(frozenset())] * num_outs
    if name in _LOOPS:
        return _LOOPS[name](equation, ins)
    if name in _APART:
        return [_APART[name](equation, ins)] * num_outs
    raise _mixing(equation)


def _together(equation: Any, ins: Sequence[_Value]) -> _Value:
    """Returns where the examples lie in what is computed entry by entry."""
    out = len(_shape(equation.outvars[0]))
    return _joined(
        [
            _stretched(value, _shape(atom), out)
            for value, atom in zip(ins, equation.invars, strict=True)
        ],
        equation,
    )


def _stretched(value: _Value, shape: tuple[int, ...], rank: int) -> _Value:
    """Returns an operand with the axes along which it is repeated: a number, all."""
    if isinstance(value, _Apart):
        return value
    if not shape:
        return _Still(frozenset(range(rank)))
    return _Still(value.uniform | {axis for axis, n in enumerate(shape) if n == 1})


def _joined(values: Sequence[_Value], equation: Any) -> _Value:
    """Returns where the examples lie in values of one shape that meet."""
    apart = {each for each in values if isinstance(each, _Apart)}
    still = [each.uniform for each in values if isinstance(each, _Still)]
    if not apart:
        return _Still(frozenset.intersection(*still))
    (first, *others) = apart
    if others or any(first.axis not in uniform for uniform in still):
        raise _mixing(equation)  # places differ, or one matters
    return first


def _along(equation: Any, ins: Sequence[_Value]) -> _Value:
    """Returns where the examples lie after work along some axes."""
    name = equation.primitive.name
    axes = equation.params[_ALONG[name]]
    axes = (axes,) if isinstance(axes, int) else axes
    found = _joined(ins, equation)
    drops = name.startswith(_DROP)

    def place(axis: int) -> int:
        return axis - sum(a < axis for a in axes) if drops else axis

    if isinstance(found, _Still):
        return _Still(frozenset(place(axis) for axis in found.uniform - {*axes}))
    if found.axis in axes:
        raise _mixing(equation)
    return found._replace(axis=place(found.axis))


def _scan(equation: Any, ins: list[_Value]) -> list[_Value]:
    """Returns where the examples lie in the results of a scan."""
    num_consts, num_carry = scan_counts(equation)
    body = opened(equation.params["jaxpr"])[0]
    last = num_consts + num_carry
    consts, carry, scanned = ins[:num_consts], ins[num_consts:last], ins[last:]
    if any(isinstance(each, _Apart) and each.axis == 0 for each in scanned):
        # One example a step, and nothing goes from one to the next.
        first = _joined(scanned, equation)
        coupled = num_carry or any(isinstance(each, _Apart) for each in consts)
        if coupled or first != _Apart(0, equation.params["length"]):
            raise _mixing(equation)
        return [first] * len(equation.outvars)
    inside = [_shifted(each, -1) for each in scanned]
    carry, outs = _carried(body, consts, carry, inside, equation)
    return [*carry, *(_shifted(each, 1) for each in outs)]


def _carried(
    body: Any,
    consts: Sequence[_Value],
    carry: Sequence[_Value],
    rest: Sequence[_Value],
    equation: Any,
) -> tuple[list[_Value], list[_Value]]:
    """Follows the body of a loop until what it carries stays where it is."""
    carry = list(carry)
    while True:
        outs = _read(body, [*consts, *carry, *rest])
        pairs = zip(carry, outs[: len(carry)], strict=True)
        after = [_joined(pair, equation) for pair in pairs]
        if after == carry:
            return carry, outs[len(carry) :]
        carry = after


def _cond(equation: Any, ins: list[_Value]) -> list[_Value]:
    """Returns where the examples lie in the results of a branch."""
    branches = equation.params["branches"]
    found = [_read(opened(each)[0], ins[1:]) for each in branches]
    return [_joined(outs, equation) for outs in zip(*found, strict=True)]


def _loop(equation: Any, ins: list[_Value]) -> list[_Value]:
    """Returns where the examples lie in the results of a `while`."""
    split = equation.params["cond_nconsts"]
    last = split + equation.params["body_nconsts"]
    body = opened(equation.params["body_jaxpr"])[0]
    carry, _ = _carried(body, ins[split:last], ins[last:], [], equation)
    _read(opened(equation.params["cond_jaxpr"])[0], [*ins[:split], *carry])
    return carry


def _mixing(equation: Any) -> _MayMix:
    return _MayMix(equation.primitive.name)


def _shifted(value: _Value, by: int) -> _Value:
    """Returns a value with a leading axis more, or less."""
    if isinstance(value, _Apart):
        return value._replace(axis=value.axis + by)
    return _Still(frozenset(axis + by for axis in value.uniform if axis + by >= 0))


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)


def _rearranged(
    value: _Value, place: Callable[[int], int], added: Sequence[int] = ()
) -> _Value:
    """Returns a value whose axes lie elsewhere, with some on which it is uniform."""
    if isinstance(value, _Apart):
        return value._replace(axis=place(value.axis))
    return _Still(frozenset({*map(place, value.uniform), *added}))


def _broadcast(equation: Any, ins: Sequence[_Value]) -> _Value:
    kept = equation.params["broadcast_dimensions"]
    before, after = _shape(equation.invars[0]), _shape(equation.outvars[0])
    repeated = [o for i, o in enumerate(kept) if before[i] != after[o]]
    added = [o for o in range(len(after)) if o not in kept]
    return _rearranged(ins[0], lambda a: kept[a], [*repeated, *added])


def _transpose(equation: Any, ins: Sequence[_Value]) -> _Value:
    order = tuple(equation.params["permutation"])
    return _rearranged(ins[0], order.index)


def _stack(equation: Any, ins: Sequence[_Value]) -> _Value:
    at = equation.params["axis"]
    return _rearranged(_joined(ins, equation), lambda a: a + (a >= at))


def _squeeze(equation: Any, ins: Sequence[_Value]) -> _Value:
    gone = equation.params["dimensions"]
    value = ins[0]
    if isinstance(value, _Still):
        value = _Still(value.uniform - set(gone))
    return _rearranged(value, lambda a: a - sum(g < a for g in gone))


def _reshape(equation: Any, ins: Sequence[_Value]) -> _Value:
    before, after = _shape(equation.invars[0]), _shape(equation.outvars[0])
    value = ins[0]
    if isinstance(value, _Still):
        everywhere = len(value.uniform) == len(before)
        return _Still(frozenset(range(len(after)) if everywhere else ()))
    order = equation.params["dimensions"] or range(len(before))
    last = [before[a] for a in order[order.index(value.axis) + 1 :]]
    step = value.minor * int(np.prod(last))
    for axis, size in enumerate(after):
        rest = int(np.prod(after[axis + 1 :]))
        minor, remainder = divmod(step, max(rest, 1))
        if minor and not remainder and not size % (minor * value.count):
            return _Apart(axis, value.count, minor)
    raise _mixing(equation)


def _iota(equation: Any, _: Sequence[_Value]) -> _Value:
    axes = set(range(len(_shape(equation.outvars[0]))))
    return _Still(frozenset(axes - {equation.params["dimension"]}))


def _product(equation: Any, ins: Sequence[_Value]) -> _Value:
    contracted, batch = equation.params["dimension_numbers"]
    free = [
        [a for a in range(len(_shape(atom))) if a not in (*used, *shared)]
        for atom, used, shared in zip(equation.invars, contracted, batch, strict=True)
    ]
    orders = [[*batch[0], *free[0]], [*batch[1], *[None] * len(free[0]), *free[1]]]
    placed: list[_Value] = []
    for value, used, order in zip(ins, contracted, orders, strict=True):
        if isinstance(value, _Apart):
            if value.axis in used:
                raise _mixing(equation)  # a sum over the examples
            placed.append(value._replace(axis=order.index(value.axis)))
        else:
            own = {o for o, a in enumerate(order) if a is not None}
            uniform = {o for o in own if order[o] in value.uniform}
            every = set(range(len(_shape(equation.outvars[0]))))
            placed.append(_Still(frozenset(uniform | (every - own))))
    return _joined(placed, equation)


def _convolution(equation: Any, ins: Sequence[_Value]) -> _Value:
    numbers = equation.params["dimension_numbers"]
    images, kernel = ins
    grouped = equation.params["batch_group_count"] != 1
    if isinstance(images, _Still) or isinstance(kernel, _Apart) or grouped:
        raise _mixing(equation)
    if images.axis != numbers.lhs_spec[0]:
        raise _mixing(equation)
    return images._replace(axis=numbers.out_spec[0])


def _gather(equation: Any, ins: Sequence[_Value]) -> _Value:
    numbers = equation.params["dimension_numbers"]
    source, indices = map(_shape, equation.invars)
    positions = range(len(_shape(equation.outvars[0])))
    places = [axis for axis in positions if axis not in numbers.offset_dims]
    table, rows = ins
    paired = dict(
        zip(
            numbers.operand_batching_dims,
            numbers.start_indices_batching_dims,
            strict=True,
        )
    )
    if isinstance(table, _Apart) and table.axis not in paired:
        gone = (*numbers.collapsed_slice_dims, *paired)
        window = [axis for axis in range(len(source)) if axis not in gone]
        whole = equation.params["slice_sizes"][table.axis] == source[table.axis]
        moved = table.axis in numbers.start_index_map or table.axis not in window
        if isinstance(rows, _Apart) or moved or not whole:
            raise _mixing(equation)
        return table._replace(axis=numbers.offset_dims[window.index(table.axis)])
    if isinstance(table, _Apart):
        found: _Value = table._replace(axis=paired[table.axis])
    else:
        shared = {i for o, i in paired.items() if o in table.uniform}
        others = set(range(len(indices))) - set(paired.values())
        found = _Still(frozenset(shared | others))
    met = _joined([found, rows], equation)
    last = len(indices) - 1
    if isinstance(met, _Still):
        return _Still(frozenset(places[axis] for axis in met.uniform - {last}))
    if met.axis == last:
        raise _mixing(equation)
    return met._replace(axis=places[met.axis])


def _window(equation: Any, ins: Sequence[_Value]) -> _Value:
    """A part of some axes, which has to be the whole of that of the examples."""
    params, before = equation.params, _shape(equation.invars[0])
    name = equation.primitive.name
    found = _joined(ins, equation) if name == "select_and_gather_add" else ins[0]
    if not isinstance(found, _Apart):
        raise _mixing(equation)
    axis = found.axis
    if name == "slice":
        steps = params["strides"] or (1,) * len(before)
        part = params["start_indices"][axis], params["limit_indices"][axis], steps[axis]
        whole = part == (0, before[axis], 1)
    elif name == "dynamic_slice":
        whole = params["slice_sizes"][axis] == before[axis]
    elif name == "pad":
        whole = tuple(params["padding_config"][axis]) == (0, 0, 0)
    elif name == "top_k":
        whole = axis != params.get("axis", len(before) - 1) % len(before)
    else:
        sizes = ("window_dimensions", "window_strides", "base_dilation")
        whole = all(params[each][axis] == 1 for each in sizes)
        whole &= tuple(params["padding"][axis]) == (0, 0)
    if not whole:
        raise _mixing(equation)
    return found


def _update(equation: Any, ins: Sequence[_Value]) -> _Value:
    found = _joined(ins[:2], equation)
    whole, part = map(_shape, equation.invars[:2])
    if not isinstance(found, _Apart) or whole[found.axis] != part[found.axis]:
        raise _mixing(equation)
    return found


_Rule = Callable[[Any, Sequence[_Value]], _Value]

#: Where examples lie in the results, and where values without examples are uniform.
_EITHER: dict[str, _Rule] = {
    **dict.fromkeys(_ALONG, _along),
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "reshape": _reshape,
    "stack": _stack,
    "dot_general": _product,
    "gather": _gather,
    "iota": _iota,
}

#: Where examples lie in the results of what takes some.
_APART: dict[str, _Rule] = {
    "conv_general_dilated": _convolution,
    "dynamic_update_slice": _update,
    **dict.fromkeys(("slice", "dynamic_slice", "pad", "top_k"), _window),
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max"), _window),
    **dict.fromkeys(("reduce_window_min", "select_and_gather_add"), _window),
}

_LOOPS = {"scan": _scan, "cond": _cond, "while": _loop}
