"""Checks of linen modules: what they are built from, and what they must not do.

The factored and the dense path take every example's rows of J from that example alone,
and every path evaluates the error more than once. A layer that mixes examples, or that
draws random numbers, makes their answers wrong without a sign; it is refused instead.
"""

import contextlib
import inspect
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from flax import linen as nn

#: Names of the activations that the bundled models take, all of `jax.nn`.
ACTIVATIONS = ("relu", "gelu", "silu", "softplus", "tanh")

_SLICED_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
_ATTENTION = nn.MultiHeadDotProductAttention


class _Thread(threading.local):
    """What a thread does: whether it refuses layers, and whether it always looks."""

    refuses = False
    looks = False


_thread = _Thread()


@contextlib.contextmanager
def coupled_examples_refused() -> Iterator[None]:
    """Refuses layers that are called inside and that mix examples or draw.

    Raises:
        ValueError: If a layer is a dropout that draws, a BatchNorm on the batch's own
            statistics, or a normalization over the axis of the examples.
    """
    # Flax removes interceptors in an assert, which ``python -O`` leaves out. There one
    # stays, and lets pass what is called elsewhere.
    looking = contextlib.nullcontext()
    if not _thread.looks:
        looking = nn.intercept_methods(_refuse_coupled_examples)
        _thread.looks = not __debug__
    before, _thread.refuses = _thread.refuses, True
    try:
        with looking:
            yield
    finally:
        _thread.refuses = before


def _refuse_coupled_examples(
    next_fun: Any, args: Any, kwargs: Any, context: Any
) -> Any:
    """Lets a layer's call pass, or refuses it; the interceptor."""
    module = context.module
    if _thread.refuses and context.method_name == "__call__":
        call = inspect.signature(type(module).__call__)
        given = call.bind_partial(module, *args, **kwargs).arguments
        if isinstance(module, nn.Dropout):
            _check_dropout(module, module.rate, given.get("deterministic"))
        elif isinstance(module, _ATTENTION):
            _check_dropout(module, module.dropout_rate, given.get("deterministic"))
        elif isinstance(module, nn.BatchNorm):
            _check_batch_norm(module, given.get("use_running_average"))
        elif isinstance(module, _SLICED_NORMS):
            _check_reduced_axes(module, given.get("x"))
    return next_fun(*args, **kwargs)


def _check_dropout(module: Any, rate: float, given: bool | None) -> None:
    still = module.deterministic if given is None else given
    if rate > 0 and not still:
        raise ValueError(
            f"model: expected dropout with deterministic=True, got rate {rate} "
            f"drawing at {_place(module)}; the error must be one function of the "
            "parameters, the same in every product with its Jacobian."
        )


def _check_batch_norm(module: nn.BatchNorm, given: bool | None) -> None:
    stored = module.use_running_average if given is None else given
    if stored is False:
        raise ValueError(
            "model: expected BatchNorm on stored statistics, use_running_average=True, "
            f"got the batch's own at {_place(module)}; they couple the examples, and "
            "each row of the Jacobian is taken from its example alone."
        )


def _check_reduced_axes(module: Any, x: Any) -> None:
    axes = module.reduction_axes
    # One axis is that of the features: of a parameter, or of one example under a vmap.
    if axes is None or np.ndim(x) < 2:
        return
    if any(int(axis) % np.ndim(x) == 0 for axis in np.ravel(axes)):
        raise ValueError(
            "model: expected reduction_axes without axis 0, the examples, got "
            f"{axes} at {_place(module)}; it couples the examples, and each row of the "
            "Jacobian is taken from its example alone."
        )


def _place(module: nn.Module) -> str:
    return f"'{'/'.join(module.path)}'" if module.path else type(module).__name__
