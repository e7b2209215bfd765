"""Whether what a program computes of an example depends on how many examples there are.

No equation need mix examples for that: a division by N, a sum over ``ones(N)``, N steps
of a loop. So the program is traced for two numbers of examples, and both have to be the
same, equation by equation, but for the sizes of the axes along which examples lie. Such
an axis must not end: a number that is left of it could depend on its size.

Factors are made from the program of one example, where an axis of size one may be moved
in other ways. That program has to compute the same from the same numbers.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from grsd_jax.jacobian.tracing import MOVES, bodies, is_literal, opened, scan_counts


def depends_on_number(batch: Any, larger: Any, one: Any) -> bool:
    """Whether what is computed of an example may depend on how many there are.

    Args:
        batch: The jaxpr of a whole batch.
        larger: The jaxpr of a batch with more examples.
        one: The jaxpr of one example.
    """
    return not (
        _same_programs(batch, larger)
        and _computed(batch) == _computed(one)
        and _moved(batch) == _moved(one)
        and _same_constants([*_constants(batch)], [*_constants(one)])
    )


def _same_programs(left: Any, right: Any) -> bool:
    """Whether two programs differ in sizes alone, of axes of which none ends."""
    (a, a_consts), (b, b_consts) = opened(left), opened(right)
    return (
        len(a.eqns) == len(b.eqns)
        and _same_constants(a_consts, b_consts)
        and all(map(_same_equations, a.eqns, b.eqns))
    )


def _same_equations(left: Any, right: Any) -> bool:
    heads = [(each.primitive.name, _literals(each)) for each in (left, right)]
    if heads[0] != heads[1]:
        return False
    inner = bodies(left), bodies(right)
    if len(inner[0]) != len(inner[1]) or not all(map(_same_programs, *inner)):
        return False
    axes = _resized(left.invars[:1], right.invars[:1])
    axes += _resized(left.outvars[:1], right.outvars[:1])
    loops_over = left.primitive.name == "scan" and not scan_counts(left)[1]
    same = all(
        _same_numbers(left.params[name], right.params.get(name), axes)
        for name in left.params
        if not (loops_over and name == "length")  # one example a step
    )
    return same and (bool(inner[0]) or _none_ends(left, right))


def _none_ends(left: Any, right: Any) -> bool:
    """Whether all that is resized among the operands is so among the results."""
    operands, outs = (
        [
            (int(np.prod(a.aval.shape)), int(np.prod(b.aval.shape)))
            for a, b in zip(*atoms, strict=True)
        ]
        for atoms in ((left.invars, right.invars), (left.outvars, right.outvars))
    )
    if left.primitive.name == "gather":
        # Rows that each example chooses from a table with one for each.
        table, rows = _resized(left.invars[:2], right.invars[:2])
        paired = left.params["dimension_numbers"].operand_batching_dims
        free = [resized for axis, resized in enumerate(table) if axis not in paired]
        if any(free) and any(rows):
            return False
    return all(a * n >= b * m for a, b in operands for m, n in outs)


def _resized(left: Sequence[Any], right: Sequence[Any]) -> list[Any]:
    """Returns, for each atom, which of its axes differ in size."""
    return [
        [m != n for m, n in zip(a.aval.shape, b.aval.shape, strict=True)]
        for a, b in zip(left, right, strict=True)
    ]


def _same_numbers(left: Any, right: Any, axes: Sequence[Sequence[bool]]) -> bool:
    """Whether the numbers of a parameter agree, but for those of resized axes."""
    if isinstance(left, int | float) or isinstance(right, int | float):
        return str(left) == str(right)  # NaN as well
    if not (isinstance(left, tuple | list) and isinstance(right, tuple | list)):
        return True
    if len(left) != len(right):
        return False
    differ = [not _same_numbers(a, b, ()) for a, b in zip(left, right, strict=True)]
    return not any(differ) or any(
        len(resized) == len(differ)
        and all(r or not d for r, d in zip(resized, differ, strict=True))
        for resized in axes
    )


def _literals(equation: Any) -> list[str]:
    return [str(atom.val) for atom in equation.invars if is_literal(atom)]


def _equations(closed: Any) -> Iterator[Any]:
    """Goes through all equations, those of bodies included."""
    for equation in opened(closed)[0].eqns:
        yield equation
        for body in bodies(equation):
            yield from _equations(body)


def _computed(closed: Any) -> Counter[Any]:
    """Counts the equations that do more than move entries, with their numbers."""
    return Counter(
        (equation.primitive.name, tuple(_literals(equation)), _extent(equation))
        for equation in _equations(closed)
        if equation.primitive.name not in MOVES
    )


def _extent(equation: Any) -> Any:
    """Returns over how many steps or entries an equation works, if that is plain."""
    name = equation.primitive.name
    if name == "scan":
        return equation.params["length"] if scan_counts(equation)[1] else None
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return tuple(equation.invars[0].aval.shape[axis] for axis in contracted)
    if len(equation.invars) != 1 or bodies(equation):
        return None
    sizes = [int(np.prod(a.aval.shape)) for a in (*equation.invars, *equation.outvars)]
    return Fraction(sizes[0], max(sizes[1], 1))


def _moved(closed: Any) -> set[str]:
    """Returns the numbers that are moved."""
    moves = [each for each in _equations(closed) if each.primitive.name in MOVES]
    return {number for equation in moves for number in _literals(equation)}


def _constants(closed: Any) -> Iterator[Any]:
    yield from opened(closed)[1]
    for equation in opened(closed)[0].eqns:
        for body in bodies(equation):
            yield from _constants(body)


def _same_constants(left: Sequence[Any], right: Sequence[Any]) -> bool:
    return len(left) == len(right) and all(
        a is b
        or (np.shape(a) == np.shape(b) and np.array_equal(np.asarray(a), np.asarray(b)))
        for a, b in zip(left, right, strict=True)
    )
