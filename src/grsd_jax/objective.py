"""What a problem differentiates: the error and the loss as functions of parameters.

Stated by a network's outputs and a loss, or by an error of the user's own; with the
leaves of the parameters that do not move held constant.
"""

import dataclasses
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import (
    at_least_single,
    in_explicit_context,
    is_half,
    is_traced,
    with_leaves,
)
from grsd_jax._batches import num_examples_of, split_batches
from grsd_jax._checks import (
    check_batches,
    check_choice,
    check_floating,
    check_hashable,
    check_real,
    check_same_tree,
    entry_of,
)
from grsd_jax._targets import check_targets, count_misfits
from grsd_jax._typing import ErrorFn, LossFn, OutputsFn, PyTree
from grsd_jax.errors import (
    half_squared_loss,
    softmax_cross_entropy,
    softmax_error,
    squared_error,
)

#: The losses known by name: the error and the loss of every example.
LOSSES: dict[str, tuple[Callable[..., jax.Array], Callable[..., jax.Array]]] = {
    "softmax_cross_entropy": (softmax_error, softmax_cross_entropy),
    "squared": (squared_error, half_squared_loss),
}


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
        num_examples = num_examples_of(batch)
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
        num_examples = num_examples_of(batch)
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
        _check_outputs(outputs, num_examples_of(batch))
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
        error, num_examples = self.error_fn(params, batch), num_examples_of(batch)
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


@jax.jit
def evaluate(error_fn: Objective, params: PyTree, batch: PyTree) -> jax.Array:
    """Evaluates ``e``, ``[N, C]``, on one batch."""
    return error_fn(params, batch)


@partial(jax.jit, static_argnames="target")
def _stacked_targets(batches: PyTree, *, target: Callable[[PyTree], PyTree]) -> PyTree:
    """Returns the targets that a function finds in each batch, leading axis K."""
    found = [target(batch) for batch in split_batches(batches)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


def hold(objective: Objective, params: PyTree) -> tuple[Objective, PyTree]:
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


def moving_direction(direction: PyTree, params: PyTree, moving: PyTree) -> PyTree:
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


def check_loss(loss: Any) -> None:
    """Raises ValueError unless it is a known name or a function."""
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
