"""The problem that is measured: a network, a loss and the batches to measure on.

A user states the network once, as its outputs. The error ``e`` (the gradient of the
loss by the outputs), the loss and the direction of its gradient flow follow from it.
"""

import dataclasses
from collections.abc import Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import (
    Seen,
    at_least_single,
    in_explicit_context,
    is_half,
    is_traced,
    on_automatic_mesh,
    with_leaves,
)
from grsd_jax._checks import (
    check_batches,
    check_choice,
    check_floating,
    check_hashable,
    check_leading,
    check_real,
    check_same_tree,
    entry_of,
)
from grsd_jax._targets import check_targets, count_misfits
from grsd_jax._typing import ErrorFn, LossFn, OutputsFn, PyTree, Reduction
from grsd_jax.errors import (
    half_squared_loss,
    softmax_cross_entropy,
    softmax_error,
    squared_error,
)

if TYPE_CHECKING:
    from grsd_jax.jacobian.explain import Explanation

REDUCTIONS = ("mean", "stack")

#: The losses known by name: the error and the loss of every example.
LOSSES: dict[str, tuple[Callable[..., jax.Array], Callable[..., jax.Array]]] = {
    "softmax_cross_entropy": (softmax_error, softmax_cross_entropy),
    "squared": (squared_error, half_squared_loss),
}


#: The targets whose values were checked, beside the error's shape.
_CHECKED_TARGETS = Seen()


class Objective(Protocol):
    """What a problem differentiates; a pytree, so that it crosses `jit`."""

    def __call__(self, params: PyTree, batch: PyTree) -> jax.Array:
        """Returns the error of one batch, ``[N, C]``."""
        ...

    def mean_loss(self, params: PyTree, batch: PyTree) -> jax.Array:
        """Returns the mean loss of one batch, ``[]``."""
        ...

    def outputs(self, params: PyTree, batch: PyTree) -> jax.Array | None:
        """Returns the network's outputs ``[N, ...]``; None for a user's own error."""
        ...

    def num_classes(self, params: PyTree, batch: PyTree) -> int | None:
        """Returns the classes over which the error of a position always sums to zero.

        None if nothing is known of such sums.
        """
        ...

    def num_misfits(self, params: PyTree, batch: PyTree) -> jax.Array:
        """Returns how many targets of one batch fit no output, [] int32."""
        ...


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["outputs_fn"],
    meta_fields=["loss", "target"],
)
@dataclasses.dataclass(frozen=True)
class OutputsObjective:
    """The error and the loss of a network's outputs.

    Attributes:
        outputs_fn: ``outputs_fn(params, batch) -> [N, ...]``, a pytree.
        loss: A key of `LOSSES`, or ``loss(outputs, target) -> []`` of one example.
        target: A key of the batch, or a function of it.
    """

    outputs_fn: OutputsFn
    loss: str | Callable[[jax.Array, Any], jax.Array]
    target: str | Callable[[PyTree], PyTree]

    def __call__(self, params: PyTree, batch: PyTree) -> jax.Array:
        """Returns the error of one batch, ``[N, C]``."""
        outputs, targets = self.outputs(params, batch), self.targets(batch)
        num_examples = _num_examples(batch)
        if isinstance(self.loss, str):
            error = LOSSES[self.loss][0](outputs, targets)
        else:
            losses = jax.eval_shape(jax.vmap(self.loss), outputs, targets)
            _check_losses(losses, num_examples)
            error = jax.vmap(jax.grad(self.loss))(outputs, targets)
        return error.reshape(num_examples, -1)

    def mean_loss(self, params: PyTree, batch: PyTree) -> jax.Array:
        """Returns the mean loss of one batch, summed over an example's positions."""
        outputs, targets = self.outputs(params, batch), self.targets(batch)
        num_examples = _num_examples(batch)
        if isinstance(self.loss, str):
            losses = LOSSES[self.loss][1](outputs, targets)
        else:
            losses = jax.vmap(self.loss)(outputs, targets)
            _check_losses(losses, num_examples)
        return jnp.sum(losses) / num_examples

    def outputs(self, params: PyTree, batch: PyTree) -> jax.Array:
        """Returns the network's outputs ``[N, ...]``, in single precision at least.

        Half precision would lose the digits of the error in a difference of probability
        and target.
        """
        outputs = self.outputs_fn(params, batch)
        _check_outputs(outputs, _num_examples(batch))
        return at_least_single(outputs)

    def num_classes(self, params: PyTree, batch: PyTree) -> int | None:
        """Returns the last axis of the outputs for a softmax error, else None."""
        if self.loss != "softmax_cross_entropy":
            return None
        # Closed over, since a held leaf may be no array.
        return jax.eval_shape(lambda: self.outputs(params, batch)).shape[-1]

    def num_misfits(self, params: PyTree, batch: PyTree) -> jax.Array:
        """Counts classes out of range, or rows that are not one-hot, [] int32."""
        if not isinstance(self.loss, str):
            return jnp.int32(0)
        shape = jax.eval_shape(lambda: self.outputs(params, batch)).shape
        over_classes = self.loss != "squared"
        return count_misfits(self.targets(batch), shape, over_classes=over_classes)

    def targets(self, batch: PyTree) -> PyTree:
        """Returns the targets of a batch."""
        return entry_of("target", batch, self.target)

    def read_by_target(self, batches: PyTree) -> PyTree:
        """Returns the arrays that the target is made of: an entry, or all."""
        if callable(self.target):
            return batches
        return entry_of("target", batches, self.target)

    def check_targets(self, batches: PyTree, outputs: jax.ShapeDtypeStruct) -> None:
        """Raises ValueError if targets whose values are at hand do not fit the loss.

        Args:
            batches: The batches, leading axes ``[K, N]``; nothing is checked of traced
                ones.
            outputs: The shape of one batch's outputs.
        """
        if not isinstance(self.loss, str) or is_traced(batches):
            return
        if in_explicit_context():  # where even a search needs shardings
            return
        if callable(self.target):
            name = "target"
            with jax.ensure_compile_time_eval():
                found = _stacked_targets(batches, target=self.target)
        else:
            name = f"batches[{self.target!r}]"
            found = entry_of("target", batches, self.target)
        shape = (check_batches(batches)[0], *outputs.shape)
        check_targets(name, found, shape, over_classes=self.loss != "squared")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["error_fn", "loss_fn"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class ErrorObjective:
    """An error of the user's own, with the loss that training descends.

    Attributes:
        error_fn: ``error_fn(params, batch) -> [N, C]``, a pytree.
        loss_fn: ``loss_fn(params, batch) -> []``, a pytree, or None.
    """

    error_fn: ErrorFn
    loss_fn: LossFn | None

    def __call__(self, params: PyTree, batch: PyTree) -> jax.Array:
        """Returns the error of one batch, ``[N, C]``."""
        error, num_examples = self.error_fn(params, batch), _num_examples(batch)
        shape = getattr(error, "shape", None)
        if shape is None or len(shape) != 2 or shape[0] != num_examples or 0 in shape:
            got = list(shape) if shape is not None else jax.tree.structure(error)
            raise ValueError(
                "error_fn: expected an array [N, C] with the batch's "
                f"N = {num_examples} examples and C >= 1, got {got}."
            )
        check_floating("error_fn(params, batch)", error)
        return error

    def mean_loss(self, params: PyTree, batch: PyTree) -> jax.Array:
        """Returns the mean loss of one batch."""
        if self.loss_fn is None:
            raise ValueError(
                "loss_fn: expected one for the loss or its gradient flow, got None; "
                "give Problem.from_error a loss_fn, or a direction."
            )
        loss = self.loss_fn(params, batch)
        if getattr(loss, "shape", None) != ():
            raise ValueError(
                "loss_fn: expected a scalar, the mean loss of one batch, got "
                f"{getattr(loss, 'shape', jax.tree.structure(loss))}."
            )
        return loss

    def outputs(self, params: PyTree, batch: PyTree) -> None:
        """Returns None: only the error is known."""

    def num_classes(self, params: PyTree, batch: PyTree) -> None:
        """Returns None: nothing is known of an error of the user's own."""

    def num_misfits(self, params: PyTree, batch: PyTree) -> jax.Array:  # noqa: ARG002
        """Returns 0: targets are the user's own."""
        return jnp.int32(0)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["objective", "held"],
    meta_fields=["fixed"],
)
@dataclasses.dataclass(frozen=True)
class HeldObjective:
    """An objective as a function of the floating parameter leaves alone.

    Attributes:
        objective: The objective.
        held: A tree like the parameters with the other arrays, None elsewhere.
        fixed: The leaves that are no arrays: position, value, and how a number is
            written, since ``1 == True`` and ``0.0 == -0.0``.
    """

    objective: Objective
    held: PyTree
    fixed: tuple[tuple[int, Hashable, str], ...]

    def __call__(self, params: PyTree, batch: PyTree) -> jax.Array:
        """Returns the error of one batch, ``[N, C]``."""
        return self.objective(self._whole(params), batch)

    def mean_loss(self, params: PyTree, batch: PyTree) -> jax.Array:
        """Returns the mean loss of one batch."""
        return self.objective.mean_loss(self._whole(params), batch)

    def outputs(self, params: PyTree, batch: PyTree) -> jax.Array | None:
        """Returns those of the objective."""
        return self.objective.outputs(self._whole(params), batch)

    def num_classes(self, params: PyTree, batch: PyTree) -> int | None:
        """Returns those of the objective."""
        return self.objective.num_classes(self._whole(params), batch)

    def num_misfits(self, params: PyTree, batch: PyTree) -> jax.Array:
        """Returns those of the objective."""
        return self.objective.num_misfits(self._whole(params), batch)

    def _whole(self, params: PyTree) -> PyTree:
        moving, tree = jax.tree.flatten(params, is_leaf=_is_none)
        leaves = enumerate(jax.tree.leaves(self.held, is_leaf=_is_none))
        held = [(index, leaf) for index, leaf in leaves if leaf is not None]
        fixed = [(index, leaf) for index, leaf, _ in self.fixed]
        return with_leaves(tree, moving, [*held, *fixed])


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
        return _one_batch(self.batches)

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
        _check_loss(loss)
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
            _check_loss(inner["loss"])
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
        error_fn, moving = _hold(self.objective, params)
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
        error_fn, moving = _hold(self.objective, params)
        if direction is not None:
            direction = _moving_direction(direction, params, moving)
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
            outputs = _outputs.eval_shape(error_fn, params, _one_batch(batches))
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


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["data"],
    meta_fields=["fixed", "tree"],
)
@dataclasses.dataclass(frozen=True)
class FixedLeaves:
    """A callable pytree some of whose leaves are static.

    Attributes:
        data: Its leaves in order, None in place of the static ones.
        fixed: The static leaves, by position.
        tree: The tree of all.
    """

    data: list[Any]
    fixed: tuple[tuple[int, Hashable], ...]
    tree: Any

    def __call__(self, *args: Any) -> Any:
        """Calls the whole pytree."""
        return with_leaves(self.tree, self.data, self.fixed)(*args)


def as_pytree(name: str, fn: Any) -> Callable[..., Any]:
    """Returns ``fn`` as a callable that may be an argument of a jitted function.

    Arrays and numbers of a callable pytree are data, as `jax.jit` takes them: new ones
    trace nothing again. Its other leaves (truths, names, functions), or a callable that
    is no pytree, are static, compared by equality.

    Raises:
        ValueError: If it is not callable, or holds a leaf that can be neither; it names
            the leaf by its path.
    """
    _check_callable(name, fn)
    leaves, tree = jax.tree.flatten(fn)
    fixed = [(i, leaf) for i, leaf in enumerate(leaves) if not _is_data(leaf)]
    if not fixed:
        return fn
    if tree == jax.tree.structure(0):
        return jax.tree_util.Partial(fn)
    check_hashable(name, fn, unless=_is_data)
    data = [leaf if _is_data(leaf) else None for leaf in leaves]
    return FixedLeaves(data, tuple(fixed), tree)


def split_batches(batches: PyTree, most: int | None = None) -> list[PyTree]:
    """Returns the K batches one by one, or the first few."""
    num_batches, _ = check_batches(batches)
    count = num_batches if most is None else min(most, num_batches)
    leaves, tree = jax.tree.flatten(batches)
    if is_traced(batches):
        cut = _split(leaves, count)
    else:  # what NumPy holds keeps its dtype
        arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
        cut = [
            [next(parts) if isinstance(leaf, jax.Array) else leaf[k] for leaf in leaves]
            for k, parts in enumerate(map(iter, _split_arrays(arrays, count)))
        ]
    return [jax.tree.unflatten(tree, part) for part in cut]


def _split(leaves: list[Any], count: int) -> list[list[Any]]:
    return [[leaf[k] for leaf in leaves] for k in range(count)]


#: One program, where each leaf alone would take two.
_split_arrays = jax.jit(_split, static_argnums=1)


@jax.jit
def evaluate(error_fn: Objective, params: PyTree, batch: PyTree) -> jax.Array:
    """Evaluates ``e``, ``[N, C]``, on one batch."""
    return error_fn(params, batch)


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


@partial(jax.jit, static_argnames="target")
def _stacked_targets(batches: PyTree, *, target: Callable[[PyTree], PyTree]) -> PyTree:
    """Returns the targets that a function finds in each batch, leading axis K."""
    found = [target(batch) for batch in split_batches(batches)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


@jax.jit
def _mean_loss(error_fn: Objective, params: PyTree, batch: PyTree) -> jax.Array:
    return error_fn.mean_loss(params, batch)


def _hold(objective: Objective, params: PyTree) -> tuple[Objective, PyTree]:
    """Returns the objective of the floating leaves alone, and these leaves."""
    leaves, tree = jax.tree.flatten(params, is_leaf=_is_none)
    moves = [_is_floating(leaf) for leaf in leaves]
    if not all(moves):
        _check_no_complex(params)
    if not any(moves):
        raise ValueError("params: expected at least one floating array, got none.")
    if all(m or leaf is None for leaf, m in zip(leaves, moves, strict=True)):
        return objective, params
    moving, held, fixed = [], [], []
    for index, (leaf, moves_along) in enumerate(zip(leaves, moves, strict=True)):
        moving.append(leaf if moves_along else None)
        held.append(leaf if _is_array(leaf) and not moves_along else None)
        if not (_is_array(leaf) or moves_along or leaf is None):
            written = repr(leaf) if isinstance(leaf, int | float | complex) else ""
            fixed.append((index, leaf, written))
    check_hashable("params", params, unless=_is_array)
    held_objective = HeldObjective(
        objective, jax.tree.unflatten(tree, held), tuple(fixed)
    )
    return held_objective, jax.tree.unflatten(tree, moving)


def _check_no_complex(params: PyTree) -> None:
    """Raises ValueError if a parameter is complex: training would move it, J not."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        if _is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)}: expected real numbers, got "
                f"{leaf.dtype}; pass its real and its imaginary part, or a constant "
                "outside of params."
            )


def moving_part(params: PyTree) -> PyTree:
    """Returns the floating leaves of parameters, None in place of what is held."""
    return jax.tree.map(lambda leaf: leaf if _is_floating(leaf) else None, params)


def _moving_direction(direction: PyTree, params: PyTree, moving: PyTree) -> PyTree:
    """Returns the floating leaves of a direction, in the dtypes of the parameters."""
    # What is held may be anything in a direction: a number, None, or the leaf itself.
    leaves, tree = jax.tree.flatten(direction, is_leaf=_is_none)
    own, own_tree = jax.tree.flatten(moving, is_leaf=_is_none)
    if tree != own_tree:
        check_same_tree("direction", direction, params, "params")
    chosen = [None if leaf is None else d for leaf, d in zip(own, leaves, strict=True)]
    direction = jax.tree.unflatten(tree, chosen)
    check_same_tree("direction", direction, moving, "params")
    for path, leaf in jax.tree_util.tree_flatten_with_path(direction)[0]:
        check_real(f"direction{jax.tree_util.keystr(path)}", leaf)
    return jax.tree.map(
        lambda d, p: jnp.asarray(d).astype(jnp.result_type(p)), direction, moving
    )


def _error_struct(
    error_fn: Objective, params: PyTree, batches: PyTree
) -> jax.ShapeDtypeStruct:
    error = evaluate.eval_shape(error_fn, params, _one_batch(batches))
    return jax.ShapeDtypeStruct(error.shape, error.dtype)


def _one_batch(batches: PyTree) -> PyTree:
    """Returns the shapes of one batch."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf)[1:], jnp.result_type(leaf)),
        batches,
    )


def check_digits(dtype: jax.typing.DTypeLike) -> None:
    """Raises ValueError if an error comes in half precision, too coarse to move."""
    if is_half(dtype):
        raise ValueError(
            "error_fn: expected an error in float32 or float64, whose derivative is "
            f"taken, got {jnp.dtype(dtype)}; cast the network's outputs to float32 "
            "before the error is formed, or state them by Problem(outputs_fn, ...)."
        )


def _check_callable(name: str, fn: Any) -> None:
    if not callable(fn):
        raise ValueError(f"{name}: expected a callable, got {type(fn).__name__}.")


def _check_loss(loss: Any) -> None:
    if isinstance(loss, str):
        check_choice("loss", loss, tuple(LOSSES))
    elif not callable(loss):
        names = ", ".join(map(repr, LOSSES))
        raise ValueError(
            f"loss: expected one of {names}, or a function of one example, got "
            f"{loss!r}."
        )


def _check_losses(losses: Any, num_examples: int) -> None:
    shape = getattr(losses, "shape", None)
    if shape != (num_examples,):
        got = list(shape[1:]) if shape is not None else jax.tree.structure(losses)
        raise ValueError(
            f"loss: expected a scalar of every example, got shape {got} of one."
        )


def _check_outputs(outputs: Any, num_examples: int) -> None:
    shape = getattr(outputs, "shape", None)
    if shape is None or len(shape) < 1 or shape[0] != num_examples or 0 in shape:
        got = list(shape) if shape is not None else jax.tree.structure(outputs)
        raise ValueError(
            "outputs_fn: expected an array [N, ...] with the batch's "
            f"N = {num_examples} examples, got {got}."
        )
    check_floating("outputs_fn(params, batch)", outputs)


def _num_examples(batch: PyTree) -> int:
    return jax.tree.leaves(batch)[0].shape[0]


def _is_array(leaf: Any) -> bool:
    """Whether a leaf holds numbers that a jitted function takes as data."""
    arrays = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct
    # Objects, strings and dates are no numbers; a key's dtype has no kind at all.
    return isinstance(leaf, arrays) and getattr(leaf.dtype, "kind", "V") not in "OSUMm"


def _is_data(leaf: Any) -> bool:
    """Whether a leaf of a callable is data: an array, or a number that is no truth."""
    is_number = isinstance(leaf, int | float | complex) and not isinstance(leaf, bool)
    return is_number or _is_array(leaf)


def _is_floating(leaf: Any) -> bool:
    return _is_array(leaf) and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _is_none(leaf: Any) -> bool:
    return leaf is None
