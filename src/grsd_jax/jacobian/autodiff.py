"""Products with the Jacobian of one batch: ``J^T V``, ``J G`` and ``Jdot G``.

J is linearized once, and J^T is the linear transpose of that. Functions with a custom
VJP have no JVP: for them it is the other way round. Each program is jitted here once
and takes the error function as a pytree, so that eager loops over batches and column
chunks compile it once, and an enclosing `jit` inlines it.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from grsd_jax._arrays import is_traced, with_leaves
from grsd_jax._typing import ErrorFn, PyTree
from grsd_jax.jacobian.adjoint import adjoint, settled

#: Columns that pass through a network together in an eager call on a CPU. On two cores
#: a column of an MLP took 5.0 ms among eight and 6.8 ms among 32; a GPT's and a
#: ResNet-18's took the same alone and among eight.
_CPU_COLUMNS = 8


class JacobianMap(Protocol):
    """What a tangent of the parameters is pushed through: J of one batch, or Jdot."""

    def push(self, tangents: PyTree) -> jax.Array:
        """Computes ``J G`` of what a Jacobian pulled: columns ``[N, C, b]``."""
        ...


class Jacobian(JacobianMap, Protocol):
    """J of one batch as a linear map; a pytree.

    What lies between `pull` and `push`, the tangents, is the map's own affair: a pytree
    of arrays that add up over batches.
    """

    def pull(self, columns: jax.Array) -> PyTree:
        """Computes ``J^T V`` of columns ``[N, C, b]``."""
        ...

    def multiply(self, columns: jax.Array) -> jax.Array:
        """Computes ``J J^T V`` of columns ``[N, C, b]``."""
        ...


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["linear"],
    meta_fields=["params", "error", "pushes"],
)
@dataclasses.dataclass(frozen=True)
class PlainJacobian:
    """J of one batch at fixed parameters, by automatic differentiation.

    Attributes:
        linear: ``g -> J g``; of a function that has no JVP, ``u -> J^T u``. A pytree of
            residuals.
        params: Shapes and dtypes of the parameters' leaves, and their tree.
        error: Shape ``[N, C]`` and dtype of the error.
        pushes: Whether ``linear`` is J, and not its transpose.
    """

    linear: Callable[[PyTree], PyTree]
    params: tuple[tuple[jax.ShapeDtypeStruct, ...], Any]
    error: jax.ShapeDtypeStruct
    pushes: bool

    def pull(self, columns: jax.Array) -> PyTree:
        """Computes ``J^T V`` of columns ``[N, C, b]``: a params tree, leading b."""
        return _pull(self, columns)

    def push(self, tangents: PyTree) -> jax.Array:
        """Computes ``J G`` of a params tree with leading axis b."""
        return _push(self, tangents)

    def multiply(self, columns: jax.Array) -> jax.Array:
        """Computes ``J J^T V`` of columns ``[N, C, b]``.

        Eager calls on a CPU take a few columns at a time.
        """
        parts = [_multiply(self, part) for part in _cached_parts(columns)]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)

    def pull_one(self, column: jax.Array) -> PyTree:
        """Computes ``J^T u`` of one column ``[N, C]``."""
        if not self.pushes:
            return self.linear(column)
        shapes, tree = self.params
        example = jax.tree.unflatten(tree, [_zeros(shape) for shape in shapes])
        return jax.linear_transpose(self.linear, example)(column)[0]

    def push_one(self, tangent: PyTree) -> jax.Array:
        """Computes ``J g`` of a params tree."""
        if self.pushes:
            return self.linear(tangent)
        return jax.linear_transpose(self.linear, _zeros(self.error))(tangent)[0]


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["error"])
@dataclasses.dataclass(frozen=True)
class ZeroJacobian:
    """J of one batch in no parameters at all: every product is zero.

    Attributes:
        error: Shape ``[N, C]`` and dtype of the error.
    """

    error: jax.ShapeDtypeStruct

    def pull(self, columns: jax.Array) -> PyTree:
        """Returns zeros ``[b]``, which stand for ``J^T V``."""
        return jnp.zeros(columns.shape[-1], columns.dtype)

    def push(self, tangents: PyTree) -> jax.Array:
        """Returns zeros ``[N, C, b]``."""
        return jnp.zeros((*self.error.shape, tangents.shape[0]), self.error.dtype)

    def multiply(self, columns: jax.Array) -> jax.Array:
        """Returns zeros ``[N, C, b]``."""
        return jnp.zeros_like(columns)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["error_fn", "params", "batch", "direction"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class PlainDerivative:
    """``Jdot`` of one batch, the derivative of J along a direction.

    Attributes:
        error_fn: The error function, a pytree.
        params: Parameters.
        batch: One batch.
        direction: A params tree.
    """

    error_fn: ErrorFn
    params: PyTree
    batch: PyTree
    direction: PyTree

    def pull(self, columns: jax.Array) -> PyTree:
        """Computes ``Jdot^T V`` of columns ``[N, C, b]``: a params tree, leading b."""
        return pull_derivative(
            self.error_fn, self.params, self.batch, self.direction, columns
        )

    def push(self, tangents: PyTree) -> jax.Array:
        """Computes ``Jdot G`` of a params tree with leading axis b."""
        return push_derivative(
            self.error_fn, self.params, self.batch, self.direction, tangents
        )

    def multiply(self, columns: jax.Array) -> jax.Array:
        """Computes ``Jdot Jdot^T V`` of columns ``[N, C, b]``."""
        return self.push(self.pull(columns))


@partial(jax.tree_util.register_dataclass, data_fields=["pullback"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class PlainPair:
    """J of one batch together with ``Jdot``, by automatic differentiation.

    Attributes:
        pullback: ``u -> (J^T u, Jdot^T u)``, a pytree of residuals.
    """

    pullback: Callable[[jax.Array], tuple[PyTree, PyTree]]

    def pull(self, columns: jax.Array) -> tuple[PyTree, PyTree]:
        """Computes ``J^T V`` and ``Jdot^T V`` of columns ``[N, C, b]``.

        Params trees with leading axis b. As many columns at a time as
        `PlainJacobian.multiply` takes.
        """
        parts = [_pull_pair(self.pullback, part) for part in _cached_parts(columns)]
        if len(parts) == 1:
            return parts[0]
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["error_fn", "params"],
    meta_fields=["indices"],
)
@dataclasses.dataclass(frozen=True)
class RestrictedErrorFn:
    """The error as a function of some of the parameter leaves; a pytree.

    Attributes:
        error_fn: The error function, a pytree.
        params: All parameters, for the leaves that stay as they are.
        indices: The leaves that are arguments, by their positions in the tree.
    """

    error_fn: ErrorFn
    params: PyTree
    indices: tuple[int, ...]

    def selected(self) -> list[jax.Array]:
        """Returns the leaves that are arguments, where they stand."""
        leaves = jax.tree.leaves(self.params)
        return [leaves[index] for index in self.indices]

    def __call__(self, selected: list[jax.Array], batch: PyTree) -> jax.Array:
        """Evaluates the error with the selected leaves put in their places."""
        leaves, tree = jax.tree.flatten(self.params)
        places = zip(self.indices, selected, strict=True)
        return self.error_fn(with_leaves(tree, leaves, places), batch)


def linearize(error_fn: ErrorFn, params: PyTree, batch: PyTree) -> PlainJacobian:
    """Returns J of one batch, linearized at ``params``.

    Because it leaves a jitted function, those at other parameters of the same shapes
    have the same tree structure: passing them to `jit` traces nothing again.
    """
    return _linearize(error_fn, params, batch)


def linearize_pair(
    error_fn: ErrorFn, params: PyTree, batch: PyTree, direction: PyTree
) -> PlainPair:
    """Returns J of one batch, linearized at ``params``, and its derivative."""
    return PlainPair(_linearize_pair(error_fn, params, batch, direction))


def _zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns zeros, which know the mesh that they are made on, unlike a shape."""
    return jnp.zeros(like.shape, like.dtype)


def _cached_parts(columns: jax.Array) -> list[jax.Array]:
    """Cuts columns ``[N, C, b]`` into those that an eager call on a CPU takes."""
    width = max(columns.shape[-1], 1)
    taken = width
    if jax.default_backend() == "cpu" and not is_traced(columns):
        # A divisor of the width: one program for all parts.
        taken = max(d for d in range(1, _CPU_COLUMNS + 1) if width % d == 0)
    return [columns[..., start : start + taken] for start in range(0, width, taken)]


@jax.jit
def _linearize(error_fn: ErrorFn, params: PyTree, batch: PyTree) -> PlainJacobian:
    def error_of(p: PyTree) -> jax.Array:
        return error_fn(p, batch)

    try:
        error, linear = jax.linearize(error_of, params)
        # A function with a custom VJP is found out no earlier than here.
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf]), params)
        jax.eval_shape(jax.vmap(linear), stacked)
        pushes = True
    except TypeError:  # no JVP; a fault of the function's own is raised once more
        error, pullback = jax.vjp(error_of, params)
        linear = jax.tree_util.Partial(_only, pullback)
        pushes = False
    linear = settled(linear, params if pushes else error)
    leaves, tree = jax.tree.flatten(params)
    shapes = tuple(
        jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves
    )
    return PlainJacobian(
        linear,
        (shapes, tree),
        jax.ShapeDtypeStruct(error.shape, error.dtype),
        pushes,
    )


def _only(pullback: Callable[[jax.Array], tuple[PyTree]], column: jax.Array) -> PyTree:
    return pullback(column)[0]


@jax.jit
def _linearize_pair(
    error_fn: ErrorFn, params: PyTree, batch: PyTree, direction: PyTree
) -> Any:
    """Returns the transpose of ``(g, g') -> J g + Jdot g'``.

    Which is the derivative of ``J(theta) g'`` along ``theta -> d``, ``g' -> g``.
    """
    pushed = _pushing(error_fn, batch)

    def both(g: PyTree, moved: PyTree) -> jax.Array:
        return jax.jvp(pushed, (params, moved), (direction, g))[1]

    nothing = jax.tree.map(jnp.zeros_like, params)
    return jax.vjp(both, nothing, nothing)[1]


@jax.jit
def _pull_pair(pullback: Any, block: jax.Array) -> tuple[PyTree, PyTree]:
    return jax.vmap(pullback, in_axes=-1)(block)


@jax.jit
def _pull(jacobian: PlainJacobian, block: jax.Array) -> PyTree:
    return jax.vmap(jacobian.pull_one, in_axes=-1)(block)


@jax.jit
def _push(jacobian: PlainJacobian, tangents: PyTree) -> jax.Array:
    return jax.vmap(jacobian.push_one, out_axes=-1)(tangents)


@jax.jit
def _multiply(jacobian: PlainJacobian, block: jax.Array) -> jax.Array:
    # One program, whose tangents take the layout that costs least.
    return _push(jacobian, _pull(jacobian, block))


@jax.jit
def pull(
    error_fn: ErrorFn, params: PyTree, batch: PyTree, columns: jax.Array
) -> PyTree:
    """Computes ``J^T V`` in one program, of which nothing is kept for later.

    Args:
        error_fn: The error function, a pytree.
        params: Parameters.
        batch: One batch.
        columns: V, ``[N, C, b]``.

    Returns:
        A params tree with leading axis b.
    """
    _, pullback = jax.vjp(lambda p: error_fn(p, batch), params)
    return jax.vmap(lambda u: pullback(u)[0], in_axes=-1)(columns)


@jax.jit
def pull_derivative(
    error_fn: ErrorFn,
    params: PyTree,
    batch: PyTree,
    direction: PyTree,
    columns: jax.Array,
) -> PyTree:
    """Computes ``Jdot^T V``, with ``Jdot`` the derivative of J along ``direction``.

    Args:
        error_fn: The error function, a pytree.
        params: Parameters.
        batch: One batch.
        direction: A params tree.
        columns: V, ``[N, C, b]``.

    Returns:
        A params tree with leading axis b.
    """

    def derivative(column: jax.Array) -> PyTree:
        def pulled(p: PyTree) -> PyTree:
            return jax.vjp(lambda q: error_fn(q, batch), p)[1](column)[0]

        return jax.jvp(pulled, (params,), (direction,))[1]

    return jax.vmap(derivative, in_axes=-1)(columns)


@jax.jit
def push_derivative(
    error_fn: ErrorFn,
    params: PyTree,
    batch: PyTree,
    direction: PyTree,
    tangents: PyTree,
) -> jax.Array:
    """Computes ``Jdot G``, with ``Jdot`` the derivative of J along ``direction``.

    Args:
        error_fn: The error function, a pytree.
        params: Parameters.
        batch: One batch.
        direction: A params tree.
        tangents: G, a params tree with leading axis b.

    Returns:
        Columns ``[N, C, b]``.
    """
    pushed = _pushing(error_fn, batch)

    def derivative(tangent: PyTree) -> jax.Array:
        return jax.jvp(lambda p: pushed(p, tangent), (params,), (direction,))[1]

    return jax.vmap(derivative, out_axes=-1)(tangents)


def _pushing(error_fn: ErrorFn, batch: PyTree) -> Callable[[PyTree, PyTree], jax.Array]:
    """Returns ``(theta, g) -> J(theta) g``, of functions without a JVP too."""

    def pushed(params: PyTree, tangent: PyTree) -> jax.Array:
        error, pullback = jax.vjp(lambda p: error_fn(p, batch), params)
        return _transpose(pullback, tangent, error)

    return pushed


def _transpose(pullback: Any, tangent: PyTree, example: jax.Array) -> jax.Array:
    """Computes ``J g``, the linear transpose of ``u -> J^T u``."""
    return adjoint(lambda u: pullback(u)[0], example)(tangent)
