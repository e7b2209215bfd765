"""Linear maps whose transposes are their adjoints, indices out of range included.

JAX takes an index for one inside the array unless it is told otherwise. Where one is
not, a gather reads the nearest row, and its transpose, a scatter, drops what would go
there: J and J^T, as JAX makes them, are then two maps, and ``J J^T`` is not symmetric.
Here a row that does not exist gives and gets nothing, as in `jax.grad`.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import GatherScatterMode

from grsd_jax.jacobian.tracing import (
    body_of,
    is_call,
    is_literal,
    opened,
    run_jaxpr,
    scan_counts,
)

_SCATTERS = ("scatter-add", "scatter_add")


def settled(linear: Callable[..., Any], *examples: Any) -> Callable[..., Any]:
    """Returns a linear function that reads and writes no row out of range.

    Args:
        linear: A linear function, a pytree of residuals.
        *examples: Arguments, or their shapes.

    Returns:
        The function, a pytree as well; ``linear`` itself where no index can be out of
        range.
    """
    closed, shape = jax.make_jaxpr(linear, return_shape=True)(*examples)
    jaxpr, consts = opened(closed)
    try:
        changed, _ = _settle(jaxpr, [True] * len(jaxpr.invars))
    except Exception as error:  # jaxprs are JAX's own affair, and change
        warnings.warn(
            f"grsd_jax: a linearized program could not be read: {error!r}; where an "
            "index lies out of range, J and J^T may not be adjoint.",
            RuntimeWarning,
            stacklevel=2,
        )
        return linear
    if changed is jaxpr:
        return linear
    applied = partial(_applied, changed, jax.tree.structure(shape))
    return jax.tree_util.Partial(applied, consts)


def adjoint(linear: Callable[[Any], Any], example: Any) -> Callable[[Any], Any]:
    """Returns the adjoint ``w -> L^T w`` of a linear function of one argument.

    Args:
        linear: ``v -> L v``, a pytree of residuals.
        example: v, or its shape.
    """
    transposed = jax.linear_transpose(settled(linear, example), example)
    return lambda w: transposed(w)[0]


def _applied(jaxpr: Any, tree: Any, consts: Sequence[Any], *args: Any) -> Any:
    return jax.tree.unflatten(tree, run_jaxpr(jaxpr, consts, jax.tree.leaves(args)))


def _settle(jaxpr: Any, moves: Sequence[bool]) -> tuple[Any, list[bool]]:
    """Returns a jaxpr without reads out of range, and which results move.

    A value moves if it depends on the arguments of the linear function. What does not
    is left alone: a layer that is computed once more reads what it read before.
    """
    known = dict(zip(jaxpr.invars, moves, strict=True))

    def reads(atom: Any) -> bool:
        return not is_literal(atom) and known.get(atom, False)

    equations = []
    for equation in jaxpr.eqns:
        changed, outs = _equation(equation, [reads(atom) for atom in equation.invars])
        equations.append(changed)
        known.update(zip(equation.outvars, outs, strict=True))
    same = all(a is b for a, b in zip(equations, jaxpr.eqns, strict=True))
    outs = [reads(atom) for atom in jaxpr.outvars]
    return (jaxpr if same else jaxpr.replace(eqns=equations)), outs


def _equation(equation: Any, moves: list[bool]) -> tuple[Any, list[bool]]:
    name, params = equation.primitive.name, equation.params
    everything = [any(moves)] * len(equation.outvars)
    if is_call(equation):
        return _inside(equation, body_of(equation), moves)
    if name == "scan":
        num_consts, num_carry = scan_counts(equation)
        while True:
            changed, outs = _inside(equation, params["jaxpr"], moves)
            carried = [
                before or after
                for before, after in zip(
                    moves[num_consts:], outs[:num_carry], strict=False
                )
            ]
            after = [*moves[:num_consts], *carried, *moves[num_consts + num_carry :]]
            if after == moves:
                return changed, outs
            moves = after
    if name == "cond":
        found = [_settle(opened(each)[0], moves[1:]) for each in params["branches"]]
        branches = tuple(
            _like(branch, jaxpr)
            for branch, (jaxpr, _) in zip(params["branches"], found, strict=True)
        )
        same = all(a is b for a, b in zip(branches, params["branches"], strict=True))
        outs = [any(each) for each in zip(*(outs for _, outs in found), strict=True)]
        changed = equation.replace(params=params | {"branches": branches})
        return equation if same else changed, outs
    open_index = params.get("mode") == GatherScatterMode.PROMISE_IN_BOUNDS
    if not (open_index and any(moves)):
        return equation, everything
    if not jnp.issubdtype(equation.invars[0].aval.dtype, jnp.inexact):
        return equation, everything
    drop: dict[str, Any] = {"mode": GatherScatterMode.FILL_OR_DROP}
    if name == "gather" and moves[0]:
        drop["fill_value"] = 0
    elif name not in _SCATTERS:
        return equation, everything
    return equation.replace(params=params | drop), everything


def _inside(equation: Any, body: Any, moves: list[bool]) -> tuple[Any, list[bool]]:
    """Settles the one body of an equation."""
    jaxpr, outs = _settle(opened(body)[0], moves)
    changed = _like(body, jaxpr)
    if changed is body:
        return equation, outs
    params = {
        name: changed if value is body else value
        for name, value in equation.params.items()
    }
    return equation.replace(params=params), outs


def _like(body: Any, jaxpr: Any) -> Any:
    """Returns a jaxpr, closed as the given one is."""
    if jaxpr is opened(body)[0]:
        return body
    return jaxpr if jaxpr.__class__ is body.__class__ else body.replace(jaxpr=jaxpr)
