"""How examples and the rows of error vectors lie on the devices of a mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from grsd_jax._arrays import is_traced
from grsd_jax._checks import (
    check_batches,
    check_choice,
    check_not_explicit,
    check_shape,
)
from grsd_jax._typing import PyTree, Reduction
from grsd_jax.problem import Point


@dataclasses.dataclass(frozen=True)
class Layout:
    """How examples and rows lie on the mesh; static.

    Attributes:
        mesh: The mesh.
        axis: The name of its axis over which the examples are spread.
        error: Shape ``[N, C]`` and dtype of one batch's error.
        num_batches: K.
        reduction: ``"mean"`` or ``"stack"``.
    """

    mesh: Mesh
    axis: str
    error: jax.ShapeDtypeStruct
    num_batches: int
    reduction: Reduction

    @property
    def copies(self) -> int:
        """How many error spaces of one batch make up the whole."""
        return self.num_batches if self.reduction == "stack" else 1

    @property
    def dimension(self) -> int:
        """The dimension n of the error space."""
        return self.copies * int(np.prod(self.error.shape))

    @property
    def local_error(self) -> jax.ShapeDtypeStruct:
        """Shape ``[N / D, C]`` and dtype of a device's share of one batch's error."""
        num_examples, num_outputs = self.error.shape
        share = num_examples // self.mesh.shape[self.axis]
        return jax.ShapeDtypeStruct((share, num_outputs), self.error.dtype)

    @property
    def by_rows(self) -> PartitionSpec:
        """The first axis spread over the devices."""
        return PartitionSpec(self.axis)

    @property
    def row_sharding(self) -> NamedSharding:
        """The sharding of columns ``[n, b]``, by rows."""
        return NamedSharding(self.mesh, self.by_rows)

    def check_columns(self, name: str, columns: jax.Array) -> None:
        """Raises ValueError unless ``columns`` are ``[n, any]``, of the right dtype."""
        check_shape(name, columns, [self.dimension, None])
        if jnp.result_type(columns) != self.error.dtype:
            raise ValueError(
                f"{name}: expected dtype {self.error.dtype}, that of the error, "
                f"got {jnp.result_type(columns)}."
            )

    def on_devices(
        self, fn: Callable[..., Any], in_specs: Any, out_specs: Any
    ) -> Callable[..., Any]:
        """Returns ``fn`` written for one device, run by every device on its share."""
        # Unchecked, because the check refuses error functions with a `lax.scan` whose
        # carry starts as a constant.
        return jax.shard_map(
            fn, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )


def layout_of(point: Point) -> Layout | None:
    """Returns how a problem lies on the devices of a mesh, None for one device.

    Args:
        point: The problem at its parameters.

    Returns:
        The layout of the first leaf of the batches whose examples are spread over an
        axis of a mesh. A traced array does not say where it lies, so that a problem
        that is an argument of the caller's `jit` is left to the compiler.

    Raises:
        ValueError: If N is not a multiple of the axis's devices, or the caller's `jit`
            or `jax.set_mesh` makes the mesh explicit.
    """
    check_not_explicit(point.batches)
    for leaf in jax.tree.leaves(point.batches):
        placed = None if is_traced(leaf) else getattr(leaf, "sharding", None)
        if isinstance(placed, NamedSharding) and isinstance(placed.mesh, Mesh):
            axis = (*placed.spec, None, None)[1]
            if isinstance(axis, tuple) and len(axis) == 1:
                (axis,) = axis
            if isinstance(axis, str):
                mesh, error = placed.mesh, point.error
                check_mesh(point.batches, mesh, axis)
                return Layout(mesh, axis, error, point.num_batches, point.reduction)
    return None


def shard_batches(batches: PyTree, mesh: Mesh, *, axis: str | None = None) -> PyTree:
    """Puts batches on a mesh, the examples spread over one of its axes.

    A problem of such batches has its products made device by device. With several
    processes each passes the same batches, and keeps its devices' share.

    Args:
        batches: A pytree with leading axes ``[K, N]``, N a multiple of the D devices
            along the axis.
        mesh: A mesh, whose axis is of type Auto or Explicit.
        axis: The name of the mesh axis, the first if None.

    Returns:
        The same tree, every leaf sharded as ``PartitionSpec(None, axis)``.

    Raises:
        ValueError: If there is no such axis, or N does not fit.

    References:
        Ours.
    """
    axis = check_mesh(batches, mesh, axis)
    return jax.device_put(batches, NamedSharding(mesh, PartitionSpec(None, axis)))


def check_mesh(batches: PyTree, mesh: Mesh, axis: str | None) -> str:
    """Returns the axis, the first if None, over which the examples can be spread.

    Raises:
        ValueError: If there is no such axis, or N is not a multiple of its devices.
    """
    axis = mesh.axis_names[0] if axis is None else axis
    check_choice("axis", axis, mesh.axis_names)
    kind = mesh.axis_types[mesh.axis_names.index(axis)]
    if kind == AxisType.Manual:
        raise ValueError(
            f"mesh: expected the axis {axis!r} to be of type Auto or Explicit, got "
            f"{kind}; leave the shard_map first."
        )
    num_examples, num_devices = check_batches(batches)[1], mesh.shape[axis]
    if num_examples % num_devices:
        raise ValueError(
            f"batches: expected N to be a multiple of the {num_devices} devices along "
            f"{axis!r}, got N = {num_examples}."
        )
    return axis
