"""The problem that is measured: a network, a loss and the batches to measure on.

A user states the network once, as its outputs. The error ``e`` (the gradient of the
loss by the outputs), the loss and the direction of its gradient flow follow from it.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import Seen, is_traced, on_automatic_mesh
from grsd_jax._batches import one_batch_shapes, split_batches
from grsd_jax._checks import check_batches, check_choice, check_leading
from grsd_jax._typing import ErrorFn, LossFn, OutputsFn, PyTree, Reduction
from grsd_jax.objective import (
    ErrorObjective,
    Objective,
    OutputsObjective,
    as_pytree,
    check_digits,
    check_loss,
    evaluate,
    hold,
    moving_direction,
)

if TYPE_CHECKING:
    from grsd_jax.jacobian.explain import Explanation

REDUCTIONS = ("mean", "stack")


#: The targets whose values were checked, beside the error's shape.
_CHECKED_TARGETS = Seen()


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["error_fn", "params", "batches", "direction"],
    meta_fields=["error", "reduction"],
)
@dataclasses.dataclass(frozen=True)
class Point:
    """A problem at given parameters: checked, and ready to be differentiated.

    A pytree, whose shape and dtype of the error are static.

    Attributes:
        error_fn: The objective, as a function of ``params``.
        params: The floating leaves of the parameters, None in place of the others.
        batches: The batches, leading axes ``[K, N]``.
        direction: The tangent d like ``params``, or None.
        error: Shape ``[N, C]`` and dtype of one batch's error.
        reduction: ``"mean"`` or ``"stack"``.
    """

    error_fn: Objective
    params: PyTree
    batches: PyTree
    direction: PyTree | None
    error: jax.ShapeDtypeStruct
    reduction: Reduction

    @property
    def num_batches(self) -> int:
        """The number K of batches."""
        return jax.tree.leaves(self.batches)[0].shape[0]

    @property
    def copies(self) -> int:
        """How many error spaces of one batch make up the whole, K or 1."""
        return self.num_batches if self.reduction == "stack" else 1

    @property
    def dimension(self) -> int:
        """The dimension n of the error space."""
        return self.copies * int(np.prod(self.error.shape))

    @property
    def num_classes(self) -> int | None:
        """The classes over which a position's error always sums to zero, or None."""
        # As a shape, which a jitted function finds once for many calls.
        shapes = self.batch_shapes
        (size,) = _classes.eval_shape(self.error_fn, self.params, shapes).shape
        return size or None

    @property
    def batch_shapes(self) -> PyTree:
        """The shapes and dtypes of one batch."""
        return one_batch_shapes(self.batches)

    @property
    def parts(self) -> list[PyTree]:
        """The K batches one by one.

        A list, not a scan: XLA runs convolutions inside a loop body on its slow path on
        CPU, and K is small.
        """
        return split_batches(self.batches)

    def moved(self, params: PyTree) -> "Point":
        """Returns the same problem at other parameters of the same shapes."""
        return dataclasses.replace(self, params=params)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, init=False, eq=False)
class Problem:
    """A network, its loss, and the batches on which its kernel is measured.

    The error is the gradient of the loss by the outputs of one example, flattened to C
    numbers; J is its Jacobian, ``M = J J^T`` the kernel. A pytree: what ``outputs_fn``
    holds (arrays and numbers, as in a `jax.tree_util.Partial`), ``batches`` and
    ``preconditioner`` are data, so that new BatchNorm statistics or batches retrace
    nothing; ``loss``, ``target`` and ``reduction`` are static. A function that is made
    for every problem (a lambda in a loop) traces each time.

    Leaves of the parameters that are not floating arrays are held constant: arrays as
    data, anything else (numbers, names, functions) as static values. Complex arrays are
    refused: pass their real and imaginary parts.

    Attributes:
        objective: The error and the loss as functions of parameters and batch.
        batches: A pytree whose leaves have leading axes ``[K, N]``.
        reduction: ``"stack"`` or ``"mean"``.
        preconditioner: None; reserved for the kernel ``J P J^T``.

    References:
        Paper 2.1, 3.1 and 7.1; ``docs/theory.md``.
    """

    objective: OutputsObjective | ErrorObjective
    batches: PyTree
    reduction: Reduction
    preconditioner: PyTree

    def __init__(
        self,
        outputs_fn: OutputsFn,
        batches: PyTree,
        *,
        loss: str | Callable[[jax.Array, Any], jax.Array] = "softmax_cross_entropy",
        target: str | Callable[[PyTree], PyTree] = "label",
        reduction: Reduction = "stack",
        preconditioner: None = None,
    ) -> None:
        """States the problem of a network by its outputs.

        Args:
            outputs_fn: ``outputs_fn(params, batch) -> [N, ...]``, a function or a
                pytree that is callable.
            batches: A pytree whose leaves have leading axes ``[K, N]``; K is 1 for a
                single batch.
            loss: ``"softmax_cross_entropy"`` over the last axis of the outputs, summed
                over an example's positions; ``"squared"``, half the squared distance;
                or a function of one example, ``loss(outputs, target) -> []``.
            target: The key of the batch's targets, or a function of the batch that
                returns any pytree of them (labels and weights, say), leading axis N.
            reduction: ``"stack"``: the batches are one set, ``M = J J^T`` in
                ``R^{K N C}``. ``"mean"`` (the paper's): ``(1/K) sum_k J_k J_k^T`` in
                ``R^{N C}``.
            preconditioner: Reserved.

        Raises:
            ValueError: If a choice is not known. What depends on parameters and batches
                is checked where the problem is used.
        """
        check_loss(loss)
        objective = OutputsObjective(as_pytree("outputs_fn", outputs_fn), loss, target)
        self._set(objective, batches, reduction, preconditioner)

    @classmethod
    def from_error(
        cls,
        error_fn: ErrorFn,
        batches: PyTree,
        *,
        loss_fn: LossFn | None = None,
        reduction: Reduction = "stack",
    ) -> Self:
        """Returns the problem of an error of the user's own.

        Args:
            error_fn: ``error_fn(params, batch) -> [N, C]``.
            batches: A pytree whose leaves have leading axes ``[K, N]``.
            loss_fn: ``loss_fn(params, batch) -> []``, the mean loss of one batch, for
                the direction of its gradient flow; None if directions are always given.
            reduction: ``"stack"`` or ``"mean"``.

        Returns:
            The problem.

        Raises:
            ValueError: If a choice is not known.
        """
        objective = ErrorObjective(
            as_pytree("error_fn", error_fn),
            None if loss_fn is None else as_pytree("loss_fn", loss_fn),
        )
        problem = object.__new__(cls)
        problem._set(objective, batches, reduction, None)
        return problem

    def replace(self, **changes: Any) -> Self:
        """Returns the problem with other fields, without checking data again.

        Args:
            **changes: ``batches``, ``reduction``; and ``outputs_fn``, ``loss``,
                ``target``, or after `from_error` ``error_fn``, ``loss_fn``.

        Returns:
            The new problem; new data of the same shapes retraces nothing.

        Raises:
            ValueError: If the problem has no such field, or a choice is not known.
        """
        own = ("batches", "reduction", "preconditioner")
        known = {field.name for field in dataclasses.fields(self.objective)}
        for name in changes:
            check_choice("replace", name, (*own, *sorted(known)))
        inner = {k: changes[k] for k in changes if k not in own}
        for name in inner.keys() & {"outputs_fn", "error_fn", "loss_fn"}:
            if name != "loss_fn" or inner[name] is not None:
                inner[name] = as_pytree(name, inner[name])
        if "loss" in inner:
            check_loss(inner["loss"])
        problem = object.__new__(type(self))
        problem._set(
            dataclasses.replace(self.objective, **inner),
            *(changes.get(name, getattr(self, name)) for name in own),
        )
        return problem

    def dimension(self, params: PyTree) -> int:
        """Returns n, the dimension of the error space: ``K N C``, or ``N C`` (mean)."""
        return self.at(params).dimension

    def error(self, params: PyTree, batch: PyTree) -> jax.Array:
        """Returns the error ``[N, C]`` of one batch, without the axis K."""
        check_leading("batch", batch, {"N": "examples"})
        error_fn, moving = hold(self.objective, params)
        alone = jax.tree.map(lambda leaf: leaf[None], batch)
        self._check_targets(error_fn, moving, alone)
        return evaluate(error_fn, moving, batch)

    def loss(self, params: PyTree) -> jax.Array:
        """Returns the mean loss over the K batches, ``[]``."""
        point = self.at(params)
        losses = [_mean_loss(point.error_fn, point.params, b) for b in point.parts]
        return jnp.mean(jnp.stack(losses))

    def explain(self, params: PyTree) -> "Explanation":
        """Returns how J comes for every parameter leaf, and what that costs.

        J is held as factors where the parameter meets the activations in a product, a
        convolution, a gather of rows, or an equation on single numbers; every other
        leaf is differentiated plainly. The factors are checked against `jax.vjp` once.

        Args:
            params: Parameters.

        Returns:
            An explanation, which prints as a table and has one row a leaf.

        Raises:
            ValueError: As `at`.
        """
        # The one import against the arrows: what a problem is does not depend on it.
        from grsd_jax.jacobian.explain import explain_point

        return explain_point(self.at(params))

    def split(self, columns: jax.Array) -> jax.Array:
        """Splits columns ``[n, ...]`` into ``[K, N, C, ...]``, or ``[N, C, ...]``."""
        leading, shape = self._leading(), np.shape(columns)
        if not shape or shape[0] % int(np.prod(leading)):
            raise ValueError(
                f"columns: expected {int(np.prod(leading))} C rows, C for each "
                f"example, got shape {list(shape)}."
            )
        return columns.reshape(*leading, -1, *shape[1:])

    def join(self, blocks: jax.Array) -> jax.Array:
        """Joins ``[K, N, C, ...]``, or ``[N, C, ...]``, into columns ``[n, ...]``."""
        leading, shape = self._leading(), np.shape(blocks)
        axes = len(leading)
        if shape[:axes] != leading or len(shape) <= axes:
            wanted = ", ".join(map(str, leading))
            raise ValueError(
                f"blocks: expected shape [{wanted}, C, ...], got {list(shape)}."
            )
        return blocks.reshape(-1, *shape[axes + 1 :])

    def at(self, params: PyTree, direction: PyTree | None = None) -> Point:
        """Checks the problem at given parameters, and holds what does not move.

        Args:
            params: Parameters, any pytree.
            direction: The tangent d, a tree like ``params``, or None.

        Returns:
            The point, for the functions of this package.

        Raises:
            ValueError: If no leaf of params is floating or one is complex, the batches
                do not share leading axes, or the outputs, a target or the direction
                does not fit.
        """
        if isinstance(params, Problem):
            raise ValueError(
                "params: expected parameters, got a Problem, which comes before."
            )
        check_batches(self.batches)
        error_fn, moving = hold(self.objective, params)
        if direction is not None:
            direction = moving_direction(direction, params, moving)
        error = _error_struct(error_fn, moving, self.batches)
        if direction is not None:
            check_digits(error.dtype)
        self._check_targets_once(error_fn, moving, error)
        point = Point(error_fn, moving, self.batches, direction, error, self.reduction)
        placed = {
            name: on_automatic_mesh(getattr(point, name))
            for name in ("error_fn", "params", "batches", "direction")
        }
        return dataclasses.replace(point, **placed)

    def __repr__(self) -> str:
        """Returns the problem in one line, without its arrays."""
        leaves = jax.tree.leaves(self.batches)
        leading = list(np.shape(leaves[0]))[:2] if leaves else []
        stated = "an error"
        if isinstance(self.objective, OutputsObjective):
            loss = self.objective.loss
            stated = f"outputs, loss={loss if isinstance(loss, str) else 'a function'}"
        return f"Problem({stated}, [K, N]={leading}, reduction={self.reduction})"

    def tree_flatten_with_keys(self) -> Any:
        """Returns data with their names, and what is static."""
        names = ("objective", "batches", "preconditioner")
        keyed = [(jax.tree_util.GetAttrKey(n), getattr(self, n)) for n in names]
        return keyed, self.reduction

    @classmethod
    def tree_unflatten(cls, reduction: Reduction, children: Any) -> Self:
        """Returns the problem; nothing is checked, since leaves may be placeholders."""
        problem = object.__new__(cls)
        for name, value in zip(
            ("objective", "batches", "preconditioner"), children, strict=True
        ):
            object.__setattr__(problem, name, value)
        object.__setattr__(problem, "reduction", reduction)
        return problem

    def _check_targets_once(
        self, error_fn: Objective, params: PyTree, error: jax.ShapeDtypeStruct
    ) -> None:
        """Checks targets unless these arrays passed before.

        A look at their values waits for the device, in every eager product.
        """
        if not isinstance(self.objective, OutputsObjective):
            return
        about = (self.objective.loss, self.objective.target, error.shape)
        read = self.objective.read_by_target(self.batches)
        if not _CHECKED_TARGETS.knows(about, read):
            self._check_targets(error_fn, params, self.batches)
            _CHECKED_TARGETS.note(about, read)

    def _check_targets(
        self, error_fn: Objective, params: PyTree, batches: PyTree
    ) -> None:
        """Raises ValueError if a target of a loss known by name cannot be one."""
        if isinstance(self.objective, OutputsObjective) and not is_traced(batches):
            outputs = _outputs.eval_shape(error_fn, params, one_batch_shapes(batches))
            self.objective.check_targets(on_automatic_mesh(batches), outputs)

    def _leading(self) -> tuple[int, ...]:
        """Returns the axes of a split block before C: ``(K, N)``, or ``(N,)``."""
        axes = check_batches(self.batches)
        return axes if self.reduction == "stack" else axes[1:]

    def _set(
        self,
        objective: OutputsObjective | ErrorObjective,
        batches: PyTree,
        reduction: Reduction,
        preconditioner: PyTree,
    ) -> None:
        check_choice("reduction", reduction, REDUCTIONS)
        if preconditioner is not None:
            raise ValueError("preconditioner: expected None, since it is reserved.")
        for name, value in (
            ("objective", objective),
            ("batches", batches),
            ("reduction", reduction),
            ("preconditioner", preconditioner),
        ):
            object.__setattr__(self, name, value)


def point_at(
    problem: Problem, params: PyTree, direction: PyTree | None = None
) -> Point:
    """Returns `Problem.at`, for functions whose first argument is the problem.

    Raises:
        ValueError: As there, or if something else was given as the problem.
    """
    check_problem(problem)
    return problem.at(params, direction)


def check_problem(problem: Any) -> None:
    """Raises ValueError unless ``problem`` is a `Problem`: params come second."""
    if not isinstance(problem, Problem):
        got = type(problem).__name__
        raise ValueError(f"problem: expected a Problem before params, got {got}.")


@jax.jit
def _outputs(error_fn: Objective, params: PyTree, batch: PyTree) -> jax.Array | None:
    return error_fn.outputs(params, batch)


@jax.jit
def _classes(error_fn: Objective, params: PyTree, batch: PyTree) -> jax.Array:
    return jnp.zeros(error_fn.num_classes(params, batch) or 0)


def misfits(point: Point) -> jax.Array:
    """Counts the targets of all batches that fit no output, [] int32.

    Values at hand were checked when the point was made: they need no program.
    """
    held = (point.error_fn, point.params, point.batches)
    arrays = [leaf for leaf in jax.tree.leaves(held) if isinstance(leaf, jax.Array)]
    if not is_traced(held) and all(array.is_fully_addressable for array in arrays):
        return jnp.int32(0)
    return _misfits(point.error_fn, point.params, point.parts)


@jax.jit
def _misfits(error_fn: Objective, params: PyTree, parts: list[PyTree]) -> jax.Array:
    return sum((error_fn.num_misfits(params, b) for b in parts), jnp.int32(0))


@jax.jit
def _mean_loss(error_fn: Objective, params: PyTree, batch: PyTree) -> jax.Array:
    return error_fn.mean_loss(params, batch)


def _error_struct(
    error_fn: Objective, params: PyTree, batches: PyTree
) -> jax.ShapeDtypeStruct:
    error = evaluate.eval_shape(error_fn, params, one_batch_shapes(batches))
    return jax.ShapeDtypeStruct(error.shape, error.dtype)
