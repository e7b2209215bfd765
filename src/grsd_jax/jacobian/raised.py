"""The same error with every number of half precision raised to float32.

Two orders of the same sums in half precision differ by a hundredth, which would hide a
wrong rule of that size. The check of the factors tests the structure of a program and
not its rounding, so it runs the program equation by equation in float32.

Calls that hold half precision are written out, so that derivatives of their own are
those of their bodies. A bit pattern of a half number cannot be raised.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import at_least_single, is_half
from grsd_jax._typing import ErrorFn, PyTree
from grsd_jax.jacobian.tracing import (
    bind,
    bodies,
    body_of,
    is_call,
    is_literal,
    opened,
    scan_counts,
)

#: Products, which a device may round more than their operands.
_PRODUCTS = ("dot_general", "conv_general_dilated")

_HIGHEST = (jax.lax.Precision.HIGHEST,) * 2


@partial(
    jax.tree_util.register_dataclass, data_fields=["error_fn"], meta_fields=["dtypes"]
)
@dataclasses.dataclass(frozen=True)
class RaisedErrorFn:
    """An error with half precision raised, as a function of raised parameters.

    Attributes:
        error_fn: The error function, a pytree.
        dtypes: The dtypes of the parameter leaves for which it is traced.
    """

    error_fn: ErrorFn
    dtypes: tuple[Any, ...]

    @classmethod
    def of(cls, error_fn: ErrorFn, params: PyTree) -> tuple[Any, PyTree]:
        """Returns the error function and the parameters, both raised."""
        dtypes = tuple(jnp.result_type(leaf) for leaf in jax.tree.leaves(params))
        return cls(error_fn, dtypes), jax.tree.map(raised, params)

    def __call__(self, params: PyTree, batch: PyTree) -> jax.Array:
        """Returns the error of one batch, ``[N, C]``, in float32 at least."""
        leaves, tree = jax.tree.flatten(params)
        pairs = zip(leaves, self.dtypes, strict=True)
        stated = [jax.ShapeDtypeStruct(np.shape(leaf), dtype) for leaf, dtype in pairs]
        closed = jax.make_jaxpr(lambda error_fn, *args: error_fn(*args))(
            self.error_fn, jax.tree.unflatten(tree, stated), batch
        )
        args = jax.tree.leaves((self.error_fn, params, batch))
        (error,) = _run(closed, args)
        return error


def raised(array: Any) -> Any:
    """Returns numbers of half precision in float32, others unchanged."""
    return at_least_single(jnp.asarray(array)) if _is_half(array) else array


def _is_half(array: Any) -> bool:
    dtype = array.dtype if hasattr(array, "dtype") else jnp.result_type(array)
    return jnp.issubdtype(dtype, jnp.floating) and is_half(dtype)


def _run(closed: Any, values: Sequence[Any]) -> list[Any]:
    """Runs a jaxpr with every half number raised."""
    jaxpr, consts = opened(closed)
    known: dict[Any, Any] = {}
    known.update(zip(jaxpr.constvars, map(raised, consts), strict=True))
    known.update(zip(jaxpr.invars, map(raised, values), strict=True))

    def read(atom: Any) -> Any:
        return raised(atom.val) if is_literal(atom) else known[atom]

    for equation in jaxpr.eqns:
        outs = _equation(equation, [read(atom) for atom in equation.invars])
        known.update(zip(equation.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _equation(equation: Any, values: list[Any]) -> list[Any]:
    name = equation.primitive.name
    if bodies(equation) and _holds_half(equation):
        if is_call(equation):
            return _run(body_of(equation), values)
        if name in _LOOPS:
            return list(_LOOPS[name](equation, values))
        raise NotImplementedError(f"{name} in half precision")
    if name == "bitcast_convert_type" and _holds_half(equation):
        raise NotImplementedError(f"{name} of half precision")
    if name == "reduce_precision" and equation.params["mantissa_bits"] < 23:
        return values
    changes: dict[str, Any] = {
        key: jnp.dtype(jnp.float32)
        for key, value in equation.params.items()
        if isinstance(value, np.dtype) and _is_half(np.empty(0, value))
    }
    if name in _PRODUCTS:
        changes["precision"] = _HIGHEST
    return [raised(out) for out in bind(equation, values, **changes)]


def _holds_half(equation: Any) -> bool:
    """Whether half precision goes in, comes out or is inside."""
    atoms = (*equation.invars, *equation.outvars)
    if any(hasattr(atom.aval, "dtype") and _is_half(atom.aval) for atom in atoms):
        return True
    inner = [opened(body)[0] for body in bodies(equation)]
    return any(_holds_half(each) for jaxpr in inner for each in jaxpr.eqns)


def _scan(equation: Any, values: list[Any]) -> list[Any]:
    num_consts, num_carry = scan_counts(equation)
    last = num_consts + num_carry

    def body(carry: Any, each: Any) -> Any:
        given = [*values[:num_consts], *carry, *each]
        outs = _run(equation.params["jaxpr"], given)
        return outs[:num_carry], outs[num_carry:]

    length, reverse = equation.params["length"], equation.params["reverse"]
    carry, outs = jax.lax.scan(
        body, values[num_consts:last], values[last:], length=length, reverse=reverse
    )
    return [*carry, *outs]


def _while(equation: Any, values: list[Any]) -> list[Any]:
    params = equation.params
    split = params["cond_nconsts"]
    last = split + params["body_nconsts"]
    return jax.lax.while_loop(
        lambda carry: _run(params["cond_jaxpr"], [*values[:split], *carry])[0],
        lambda carry: _run(params["body_jaxpr"], [*values[split:last], *carry]),
        values[last:],
    )


def _cond(equation: Any, values: list[Any]) -> list[Any]:
    def of(branch: Any) -> Callable[..., list[Any]]:
        return lambda *operands: _run(branch, operands)

    branches = [of(branch) for branch in equation.params["branches"]]
    return jax.lax.switch(values[0], branches, *values[1:])


_LOOPS: dict[str, Callable[[Any, list[Any]], Sequence[Any]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
