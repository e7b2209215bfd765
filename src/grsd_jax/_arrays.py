"""Arguments as checked arrays, and small operations that several modules share."""

import weakref
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from grsd_jax._checks import check_floating, check_real, check_shape
from grsd_jax._typing import PyTree


def as_floating(
    name: str, array: jax.typing.ArrayLike, shape: Sequence[int | None]
) -> jax.Array:
    """Returns ``array`` as a floating-point JAX array of the given shape.

    Half precision is raised to float32: its squares leave the dtype at 256.

    Raises:
        ValueError: If the dtype is not a real floating one, or the shape differs.
    """
    result = jnp.asarray(array)
    check_floating(name, result)
    check_shape(name, result, shape)
    return at_least_single(result)


def is_half(dtype: jax.typing.DTypeLike) -> bool:
    """Whether a floating dtype holds fewer digits than float32."""
    return jnp.finfo(dtype).bits < 32


def at_least_single(array: jax.Array) -> jax.Array:
    """Returns floating numbers of less than 32 bits as float32, others unchanged."""
    return array.astype(jnp.float32) if is_half(array.dtype) else array


def as_mask(
    name: str, mask: jax.typing.ArrayLike | None, shape: Sequence[int | None]
) -> jax.Array:
    """Returns ``mask`` as a boolean JAX array of the given shape, all True for None.

    Raises:
        ValueError: If the dtype is not bool, or the shape differs.
    """
    if mask is None:
        return jnp.ones(tuple(size for size in shape if size is not None), bool)
    result = jnp.asarray(mask)
    if result.dtype != jnp.bool_:
        raise ValueError(f"{name}: expected a bool dtype, got {result.dtype}.")
    check_shape(name, result, shape)
    return result


def as_scalar(
    name: str, value: jax.typing.ArrayLike, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Returns one real number as a JAX array of the given floating dtype.

    Raises:
        ValueError: If it is not a single real number.
    """
    check_shape(name, value, [])
    check_real(name, value)
    if isinstance(value, int):  # JAX would hold it in 32 bits
        return jnp.asarray(float(value), dtype)
    return jnp.asarray(value).astype(dtype)


def as_square(
    name: str, matrix: jax.typing.ArrayLike, size: int | None = None
) -> jax.Array:
    """Returns ``matrix`` as a floating-point JAX array of shape ``[size, size]``.

    Raises:
        ValueError: If the dtype is not a real floating one, or the shape differs.
    """
    result = as_floating(name, matrix, [size, size])
    return as_floating(name, result, [result.shape[0]] * 2)


def matmul(left: jax.Array, right: jax.Array) -> jax.Array:
    """Multiplies matrices at the highest precision, whatever the default is."""
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def divisor(values: jax.Array) -> jax.Array:
    """Returns ``values``, with 1 where they are not positive."""
    return jnp.where(values > 0, values, 1)


def ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Divides, with 0 where the denominator is not positive."""
    return jnp.where(denominator > 0, numerator / divisor(denominator), 0)


def unit_vectors(
    vectors: jax.Array, axes: int | tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Returns the vectors that lie along ``axes`` with norm 1 or 0, and their norms.

    The norms keep the axes, with length 1.
    """
    unit = magnitude(vectors, axes)
    scaled = vectors / unit
    norms = jnp.sqrt(jnp.sum(jnp.square(scaled), axis=axes, keepdims=True))
    return scaled / divisor(norms), norms * unit


def outside(vectors: jax.Array, block: jax.Array) -> jax.Array:
    """Returns columns ``[n, b]`` without their part in orthonormal ones ``[n, k]``."""
    for _ in range(2):  # once leaves the rounding of the part that is removed
        block = block - matmul(vectors, matmul(vectors.T, block))
    return block


def magnitude(array: jax.Array, axes: int | tuple[int, ...] | None = None) -> jax.Array:
    """Returns the power of two at or below the largest absolute value along ``axes``.

    Divided by it, numbers can be squared: none overflows, and what underflows does not
    count beside the largest. The division is exact. It is 1 where all are zero or one
    is not finite, and a constant to derivatives. The axes are kept, with length 1, or
    all dropped for None.
    """
    sizes = jnp.abs(jax.lax.stop_gradient(array))
    largest = jnp.max(sizes, axis=axes, keepdims=axes is not None, initial=0)
    usable = jnp.isfinite(largest) & (largest > 0)
    _, exponent = jnp.frexp(jnp.where(usable, largest, 1))
    # In two factors, since the smallest exponent alone has no normal number.
    half = exponent // 2
    one = jnp.ones_like(largest)
    power = jnp.ldexp(jnp.ldexp(one, half), exponent - 1 - half)
    return jnp.where(usable, power, 1)


def norm(array: jax.Array, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """Returns the Euclidean (or Frobenius) norm, whose squares never leave the dtype.

    Its gradient at zero is zero.
    """
    unit = magnitude(array, axis)
    total = jnp.sum(jnp.square(array / unit), axis=axis, keepdims=axis is not None)
    root = jnp.where(total > 0, jnp.sqrt(jnp.where(total > 0, total, 1)), total)
    return jnp.squeeze(root * unit, axis=() if axis is None else axis)


def blank_like(tree: PyTree) -> PyTree:
    """Returns arrays of the same shapes, of zeros and False."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


def where_defined(mask: jax.typing.ArrayLike, values: Any) -> jax.Array:
    """Returns values, NaN where the mask is False; infinity there inside `jit`.

    A NaN that a program computes would stop it under `jax_debug_nans`.
    """
    if is_traced((mask, values)):
        return jnp.where(mask, values, jnp.inf)
    values = np.asarray(values)
    return jax.device_put(np.where(mask, values, np.full((), np.nan, values.dtype)))


def all_finite(tree: PyTree) -> jax.Array:
    """Returns whether every number of a tree is finite, [] bool."""
    leaves = on_host(tree)
    if leaves is None:
        return _all_finite(tree)
    finite = all(np.isfinite(leaf).all() for leaf in leaves)
    with jax.ensure_compile_time_eval():
        return jax.device_put(np.asarray(finite))


@jax.jit
def _all_finite(tree: PyTree) -> jax.Array:
    checks = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(checks))


def on_host(tree: PyTree) -> list[np.ndarray] | None:
    """Returns the leaves as NumPy arrays if that copies nothing, else None.

    On one CPU device a pass over them by NumPy is as fast as a compiled one, which
    takes half a second to compile for the leaves of a ResNet-18.
    """
    leaves = jax.tree.leaves(tree)
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    if is_traced(tree) or any(len(leaf.devices()) > 1 for leaf in arrays):
        return None
    if any(device.platform != "cpu" for leaf in arrays for device in leaf.devices()):
        return None
    return [np.asarray(leaf) for leaf in leaves]


def owned(tree: PyTree) -> PyTree:
    """Returns a tree with copies of its NumPy arrays, which may change in place."""
    return jax.tree.map(
        lambda leaf: jnp.array(leaf) if isinstance(leaf, np.ndarray) else leaf, tree
    )


def on_automatic_mesh(tree: PyTree) -> PyTree:
    """Returns a tree without arrays on explicit meshes: on automatic ones, not copied.

    An explicit mesh has every operation say where its result lies. A `vmap` over the
    examples, or a block with its axes joined, does not say; the compiler knows.
    """

    def moved(leaf: Any) -> Any:
        mesh = _explicit_mesh(leaf)
        if mesh is None:
            return leaf
        kinds = (AxisType.Auto,) * len(mesh.axis_names)
        automatic = Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)
        placed = NamedSharding(
            automatic, leaf.sharding.spec, memory_kind=leaf.sharding.memory_kind
        )
        return jax.device_put(leaf, placed)

    return jax.tree.map(moved, tree)


def on_mesh_of(leaf: Any, array: jax.Array) -> jax.Array:
    """Returns an array, placed as a leaf of its shape if that has an explicit mesh."""
    if _explicit_mesh(leaf) is None or is_traced(array):
        return array
    return jax.device_put(array, leaf.sharding)


def in_explicit_context() -> bool:
    """Whether the caller is under `jax.set_mesh` of a mesh with an explicit axis."""
    return AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def _explicit_mesh(leaf: Any) -> Mesh | None:
    """Returns the mesh of an array at hand that has an axis of type Explicit.

    None in an explicit context, where arrays on automatic meshes are refused.
    """
    if not isinstance(leaf, jax.Array) or is_traced(leaf) or in_explicit_context():
        return None
    mesh = getattr(leaf.sharding, "mesh", None)
    explicit = isinstance(mesh, Mesh) and AxisType.Explicit in mesh.axis_types
    return mesh if explicit else None


def with_leaves(
    structure: Any, leaves: Iterable[Any], places: Iterable[tuple[int, Any]]
) -> PyTree:
    """Returns a tree of a structure, with other leaves at some positions.

    Args:
        structure: What `jax.tree.flatten` returned.
        leaves: Its leaves; those that are replaced may be anything.
        places: Positions, and what stands there.
    """
    chosen = list(leaves)
    for index, leaf in places:
        chosen[index] = leaf
    return jax.tree.unflatten(structure, chosen)


def is_traced(tree: PyTree) -> bool:
    """Whether any leaf is an abstract value of an enclosing transformation."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            try:
                leaf.devices()  # an abstract value lies on no device
            except jax.errors.ConcretizationTypeError:
                return True
    return False


class Seen:
    """Remembers which arrays came before, by identity and only while they live.

    Arrays of NumPy are never known, since their numbers may change in place.

    Attributes:
        most: How many sets of arrays are remembered; the oldest is forgotten.
    """

    def __init__(self, most: int = 64) -> None:
        self.most = most
        self._known: dict[Hashable, list[weakref.ref[jax.Array]]] = {}

    def knows(self, about: Hashable, tree: PyTree) -> bool:
        """Whether exactly these arrays were noted under ``about``."""
        leaves = jax.tree.leaves(tree)
        known = self._known.get((about, *map(id, leaves)))
        return known is not None and all(
            ref() is leaf for ref, leaf in zip(known, leaves, strict=True)
        )

    def note(self, about: Hashable, tree: PyTree) -> None:
        """Remembers arrays under ``about``."""
        leaves = jax.tree.leaves(tree)
        if is_traced(leaves) or not all(isinstance(x, jax.Array) for x in leaves):
            return
        if len(self._known) >= self.most:
            del self._known[next(iter(self._known))]
        key = (about, *map(id, leaves))
        self._known[key] = [weakref.ref(leaf) for leaf in leaves]
