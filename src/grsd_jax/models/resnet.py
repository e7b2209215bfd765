"""CIFAR-form ResNet-18 and its plain twin, and linen modules as error functions.

The plain twin keeps every convolution, normalisation and projection shortcut of the
ResNet, in the same parameter tree; it only leaves out the addition of the skip (paper
7.1, "Models"). One checkpoint loads into both.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from grsd_jax._checks import check_at_least, check_choice
from grsd_jax._typing import ErrorFn, LossFn, PyTree
from grsd_jax.errors import output_basis, softmax_cross_entropy, softmax_error
from grsd_jax.jacobian.factors import Factor
from grsd_jax.jacobian.linen_factors import linen_factors
from grsd_jax.models.linen_checks import ACTIVATIONS, refuse_coupled_examples
from grsd_jax.parameter_blocks import ParameterBlocks, partition_by_prefix


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and the skip around them.

    Attributes:
        features: Output channels.
        strides: Stride of the first convolution.
        activation: Name of the activation.
        residual: Whether the skip is added. Without it a projection shortcut keeps its
            parameters and statistics, unused, so that the tree stays the same.
    """

    features: int
    strides: int
    activation: str
    residual: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps ``[N, H, W, in]`` to ``[N, H / strides, W / strides, features]``."""
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        conv = partial(nn.Conv, features=self.features, use_bias=False)
        act = getattr(jax.nn, self.activation)
        y = conv(kernel_size=(3, 3), strides=self.strides, name="conv1")(x)
        y = act(norm(name="norm1")(y))
        y = conv(kernel_size=(3, 3), name="conv2")(y)
        y = norm(name="norm2")(y)
        if x.shape != y.shape:
            x = conv(kernel_size=(1, 1), strides=self.strides, name="shortcut_conv")(x)
            x = norm(name="shortcut_norm")(x)
        return act(x + y if self.residual else y)


class ResNet(nn.Module):
    """CIFAR-form ResNet: a 3x3 stem, no max-pool, four stages of basic blocks.

    Attributes:
        num_classes: Outputs C.
        width: Channels w of the first stage; the stages have w, 2w, 4w, 8w.
        activation: Name of the activation, one of `ACTIVATIONS`.
        stage_sizes: Blocks in each stage.
        residual: Whether the blocks add their skips.
    """

    num_classes: int = 10
    width: int = 64
    activation: str = "relu"
    stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
    residual: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images ``[N, H, W, channels]`` to logits ``[N, C]``.

        Args:
            x: Images.
            train: Whether BatchNorm uses the batch's own statistics and updates the
                running ones; then the ``batch_stats`` collection must be mutable.

        Returns:
            The logits.
        """
        if x.ndim != 4:
            raise ValueError(
                f"x: expected images [N, H, W, channels], got shape {list(x.shape)}."
            )
        act = getattr(jax.nn, self.activation)
        x = nn.Conv(self.width, (3, 3), use_bias=False, name="stem_conv")(x)
        x = nn.BatchNorm(not train, momentum=0.9, name="stem_norm")(x)
        x = act(x)
        for stage, num_blocks in enumerate(self.stage_sizes):
            for index in range(num_blocks):
                x = BasicBlock(
                    features=self.width * 2**stage,
                    strides=2 if stage > 0 and index == 0 else 1,
                    activation=self.activation,
                    residual=self.residual,
                    name=f"stage{stage + 1}_block{index + 1}",
                )(x, train=train)
        return nn.Dense(self.num_classes, name="head")(jnp.mean(x, axis=(1, 2)))

    @nn.nowrap
    def block_prefixes(self) -> dict[str, tuple[str, ...]]:
        """Returns the blocks by depth, for `depth_blocks`: stem, basic blocks, head."""
        blocks: dict[str, tuple[str, ...]] = {"stem": ("stem_conv", "stem_norm")}
        for stage, num_blocks in enumerate(self.stage_sizes, start=1):
            names = [f"stage{stage}_block{i}" for i in range(1, num_blocks + 1)]
            blocks.update({name: (name,) for name in names})
        return {**blocks, "head": ("head",)}


def ResNet18(
    num_classes: int = 10, width: int = 64, activation: str = "relu"
) -> ResNet:
    """ResNet-18 in its CIFAR form: stages of 2-2-2-2 basic blocks.

    Args:
        num_classes: Outputs C.
        width: Channels of the first stage.
        activation: One of `ACTIVATIONS`.

    Returns:
        A linen module, used as ``apply(variables, x, train=False)``. At width 64 with
        10 classes it has 11,173,962 parameters.

    Raises:
        ValueError: If an argument is out of range.

    References:
        He et al. (2016), "Deep Residual Learning"; paper 7.1.
    """
    return _network(num_classes, width, activation, residual=True)


def PlainNet18(
    num_classes: int = 10, width: int = 64, activation: str = "relu"
) -> ResNet:
    """ResNet-18 without its skip additions; the same parameter tree and count.

    The projection shortcuts keep their parameters, which no output depends on: their
    columns of J are zero.

    Args:
        num_classes: Outputs C.
        width: Channels of the first stage.
        activation: One of `ACTIVATIONS`.

    Returns:
        A linen module, used as ``apply(variables, x, train=False)``.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Paper 7.1, "Models".
    """
    return _network(num_classes, width, activation, residual=False)


def _network(num_classes: int, width: int, activation: str, residual: bool) -> ResNet:
    check_at_least("num_classes", num_classes, 1)
    check_at_least("width", width, 1)
    check_choice("activation", activation, ACTIVATIONS)
    return ResNet(num_classes, width, activation, residual=residual)


def depth_blocks(model: nn.Module, params: PyTree) -> ParameterBlocks:
    """Cuts a model's parameters into blocks by depth, from input to output.

    Every bundled model says how by its method ``block_prefixes()``, which
    returns ``{block: (path prefixes)}`` in order of depth; so may any other.

    Args:
        model: A linen module with ``block_prefixes``.
        params: Its ``params`` collection; shapes alone are enough.

    Returns:
        The partition.

    Raises:
        ValueError: If the model has no ``block_prefixes``, or a parameter falls into no
            block or into two.
    """
    prefixes = getattr(model, "block_prefixes", None)
    if prefixes is None:
        raise ValueError(
            "model: expected one with the method block_prefixes(), got "
            f"{type(model).__name__}; cut its parameters with partition or "
            "partition_by_prefix."
        )
    return partition_by_prefix(params, prefixes())


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["state"],
    meta_fields=["model", "error"],
)
@dataclasses.dataclass(frozen=True)
class LinenErrorFn:
    """``error_fn(params, batch)`` of a linen module, itself a pytree.

    The model and the error are static and the state is data, so that new statistics or
    parameters do not retrace anything, and the model stays visible to the operators.

    Attributes:
        model: The linen module.
        state: Its non-parameter collections, such as ``{"batch_stats": ...}``.
        error: ``error(outputs, labels) -> [N, C]``.
    """

    model: nn.Module
    state: PyTree
    error: Callable[[jax.Array, jax.Array], jax.Array]

    def __call__(self, params: PyTree, batch: PyTree) -> jax.Array:
        """Evaluates the error on one batch.

        Args:
            params: The ``params`` collection.
            batch: ``{"image": [N, ...], "label": [N] or [N, C]}``.

        Returns:
            The error ``[N, C]``.
        """
        outputs = _apply(self.model, self.state, params, batch)
        return self.error(outputs, batch["label"])

    def output_basis(self, num_outputs: int) -> np.ndarray:
        """Returns orthonormal directions ``[C, q]`` that hold every row of J.

        Args:
            num_outputs: C.

        Returns:
            See `grsd_jax.errors.output_basis`.
        """
        return output_basis(self.error, num_outputs)

    def jacobian_factors(
        self, params: PyTree, batch: PyTree, basis: jax.Array
    ) -> list[Factor | None]:
        """Returns the blocks of J of one batch, from the module's layers.

        Args:
            params: The ``params`` collection.
            batch: ``{"image": [N, ...], "label": [N] or [N, C]}``.
            basis: Orthonormal directions of one example's outputs, ``[C, q]``.

        Returns:
            A block for each parameter leaf, None where it is not factored.
        """
        return linen_factors(self, params, batch, basis)

    def recording(
        self, params: PyTree, batch: PyTree, collection: str
    ) -> tuple[jax.Array, Mapping[str, Any]]:
        """Evaluates the error, and returns what the module wrote to a collection.

        Args:
            params: The ``params`` collection.
            batch: ``{"image": [N, ...], "label": [N] or [N, C]}``.
            collection: Name of the collection.

        Returns:
            The error ``[N, C]`` and the collection.
        """
        outputs, written = _apply(
            self.model, self.state, params, batch, mutable=[collection]
        )
        return self.error(outputs, batch["label"]), written.get(collection, {})


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["state"],
    meta_fields=["model", "loss"],
)
@dataclasses.dataclass(frozen=True)
class LinenLossFn:
    """``loss_fn(params, batch)``, the mean loss of a linen module; itself a pytree.

    Attributes:
        model: The linen module.
        state: Its non-parameter collections.
        loss: ``loss(outputs, labels) -> [N]``.
    """

    model: nn.Module
    state: PyTree
    loss: Callable[[jax.Array, jax.Array], jax.Array]

    def __call__(self, params: PyTree, batch: PyTree) -> jax.Array:
        """Evaluates the mean loss of one batch, a scalar.

        Args:
            params: The ``params`` collection.
            batch: ``{"image": [N, ...], "label": [N] or [N, C]}``.

        Returns:
            The mean over the N examples.
        """
        outputs = _apply(self.model, self.state, params, batch)
        return jnp.mean(self.loss(outputs, batch["label"]))


def linen_error_fn(
    model: nn.Module,
    state: PyTree,
    *,
    error: Callable[[jax.Array, jax.Array], jax.Array] = softmax_error,
) -> ErrorFn:
    """Turns a linen module into an ``error_fn`` over ``{"image", "label"}`` batches.

    The module runs in evaluation mode: ``train=False`` where its ``__call__`` takes
    ``train``. With BatchNorm on stored statistics the examples are independent.
    Calling it with a layer that couples examples or draws random numbers (dropout,
    BatchNorm on the batch's own statistics) raises ValueError and says why.

    Args:
        model: Any linen module that maps images to ``[N, C]``.
        state: The non-parameter collections, ``{"batch_stats": ...}`` or ``{}``.
        error: The error, static; reuse one function so that nothing retraces.

    Returns:
        A callable that is a pytree: ``error_fn(params, batch) -> [N, C]``.

    Raises:
        ValueError: If ``state`` is not a mapping, or holds ``params``.
    """
    _check_state(state)
    return LinenErrorFn(model, state, error)


def linen_loss_fn(
    model: nn.Module,
    state: PyTree,
    *,
    loss: Callable[[jax.Array, jax.Array], jax.Array] = softmax_cross_entropy,
) -> LossFn:
    """Turns a linen module into the mean loss over ``{"image", "label"}`` batches.

    Args:
        model: Any linen module that maps images to ``[N, C]``.
        state: The non-parameter collections, ``{"batch_stats": ...}`` or ``{}``.
        loss: The loss of every example, ``loss(outputs, labels) -> [N]``, static.

    Returns:
        A callable that is a pytree: ``loss_fn(params, batch) -> []``.

    Raises:
        ValueError: If ``state`` is not a mapping, or holds ``params``.
    """
    _check_state(state)
    return LinenLossFn(model, state, loss)


def _check_state(state: PyTree) -> None:
    if not hasattr(state, "keys") or "params" in state:
        got = list(state.keys()) if hasattr(state, "keys") else type(state).__name__
        raise ValueError(
            "state: expected the non-parameter collections of the module, such as "
            f"{{'batch_stats': ...}} or {{}}, got {got}."
        )


def _apply(
    model: nn.Module, state: PyTree, params: PyTree, batch: PyTree, **options: Any
) -> Any:
    """Applies the module in evaluation mode."""
    if "train" in inspect.signature(type(model).__call__).parameters:
        options["train"] = False
    with nn.intercept_methods(refuse_coupled_examples):
        return model.apply({**state, "params": params}, batch["image"], **options)
