"""The problem that is measured, and its products: on one device or over a mesh."""

from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grsd_jax._typing import Derivative, ErrorFn, Matmat, PyTree, Reduction
from grsd_jax.jacobian.autodiff import as_pytree
from grsd_jax.jacobian.factored import JacobianForm
from grsd_jax.kernel.derivative import kernel_derivative
from grsd_jax.kernel.mesh import check_mesh
from grsd_jax.kernel.operator import kernel_matmat, linearize_kernel
from grsd_jax.kernel.sharded import (
    shard_batches,
    sharded_kernel,
    sharded_kernel_derivative,
)
from grsd_jax.kernel.solver import held_bytes


class Problem(NamedTuple):
    """What every solver is given; ``jacobian`` is resolved, never ``"auto"``."""

    error_fn: ErrorFn
    params: PyTree
    batches: PyTree
    direction: PyTree
    reduction: Reduction
    derivative: Derivative
    step: float | None
    jacobian: JacobianForm
    max_bytes: int
    mesh: Mesh | None

    def placed(self) -> "Problem":
        """Returns the problem on its mesh: examples spread, the rest everywhere."""
        assert self.mesh is not None
        check_mesh(self.batches, self.mesh, None)
        held = (as_pytree(self.error_fn), self.params, self.direction)
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        error_fn, params, direction = jax.device_put(held, everywhere)
        return self._replace(
            error_fn=error_fn,
            params=params,
            direction=direction,
            batches=shard_batches(self.batches, self.mesh),
        )

    def by_rows(self, columns: jax.Array) -> jax.Array:
        """Puts columns ``[n, b]`` on the mesh, if there is one."""
        if self.mesh is None:
            return columns
        rows = NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names[0]))
        return jax.device_put(columns, rows)

    def matmat(self, block: jax.Array) -> jax.Array:
        """Applies the kernel, linearised anew by plain differentiation."""
        if self.mesh is None:
            return kernel_matmat(*self[:3], block, reduction=self.reduction)
        return sharded_kernel(
            *self[:3], self.mesh, reduction=self.reduction, jacobian="plain"
        ).matmat(block)

    def products(self) -> Matmat:
        """Returns the products with M: from a held Jacobian if it fits, else anew."""
        forms: tuple[JacobianForm, ...] = (self.jacobian, "plain")
        for jacobian in dict.fromkeys(forms):
            held = self._held_bytes(
                jacobian, multiplied=self.mesh is None and self.reduction == "mean"
            )
            if held > self.max_bytes:
                continue
            options: dict[str, Any] = {
                "reduction": self.reduction,
                "jacobian": jacobian,
            }
            if self.mesh is None:
                return linearize_kernel(*self[:3], **options).matmat
            return sharded_kernel(*self[:3], self.mesh, **options).matmat
        return self.matmat

    def projected_derivative(
        self, vectors: jax.Array, method: Derivative, width: int
    ) -> jax.Array:
        """Computes ``V^T Mdot V``, ``width`` columns at a time."""
        # J and Jdot, of all batches for the stack and of one for the mean.
        held = 3 * self._held_bytes(self.jacobian)
        num_batches = jax.tree.leaves(self.batches)[0].shape[0]
        fits = held <= self.max_bytes * (num_batches if self.reduction == "mean" else 1)
        options: dict[str, Any] = {
            "method": method,
            "step": self.step,
            "reduction": self.reduction,
            "column_chunk": width,
            "jacobian": "auto" if fits and self.jacobian == "factored" else "plain",
        }
        if self.mesh is None:
            return kernel_derivative(*self[:4], vectors, **options)
        return sharded_kernel_derivative(*self[:4], vectors, self.mesh, **options)

    def _held_bytes(self, jacobian: JacobianForm, *, multiplied: bool = False) -> int:
        """Returns the bytes that one device holds of J ready for products."""
        devices = 1 if self.mesh is None else self.mesh.shape[self.mesh.axis_names[0]]
        held = held_bytes(*self[:3], jacobian=jacobian, multiplied=multiplied)
        return held // devices
