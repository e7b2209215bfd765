"""Error vectors ``e(theta)``, and the losses whose output gradients they are.

An error maps a model's outputs ``[N, ..., C]`` and the labels to ``[N, ..., C]``; each
is the gradient, output by output, of the loss beside it (paper 3.1 and 7.1). Axes
between N and C are positions, such as those of a sequence. Outputs of half precision
are raised to float32 first.

Nothing cancels for a fitted example: the probability of the likeliest class enters as
what the others leave of 1, so errors and losses of 1e-7 and below, and all their
derivatives, are as accurate as the logits.
"""

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import at_least_single
from grsd_jax._targets import class_targets


def softmax_error(logits: jax.Array, labels: jax.typing.ArrayLike) -> jax.Array:
    """Softmax error ``e = softmax(z) - onehot(y)``.

    For soft targets t that do not sum to one, ``sum(t) softmax(z) - t``.

    It is the gradient of the cross-entropy with respect to the logits. Each example's
    entries sum to zero whatever the parameters, so ``M`` has one exact null vector per
    example: the constant over classes.

    Args:
        logits: Model outputs z, ``[N, ..., C]``.
        labels: Integer classes ``[N, ...]`` in ``[0, C)``, or one-hot (or soft)
            targets of the shape of the outputs.

    Returns:
        The error ``[N, ..., C]``, dimensionless, each entry in ``[-1, 1]``. A class out
        of range that could not be seen at trace time gives its position a row of NaN,
        as does a logit that is NaN or plus infinity.

    Raises:
        ValueError: If the shapes or dtypes do not fit, or a concrete integer label lies
            outside ``[0, C)``.

    References:
        Paper 7.1, "Error representation".
    """
    targets = class_targets(logits, labels, min_axes=2)
    weight = jnp.sum(targets, axis=-1, keepdims=True)  # 1, or 0 where nothing counts
    likeliest, gaps = _below_likeliest(at_least_single(jnp.asarray(logits)))
    odds = jnp.exp(gaps)
    total = jnp.sum(odds, axis=-1, keepdims=True)
    others = weight * jnp.where(likeliest, 0, odds) / total
    left = weight - targets - jnp.sum(others, axis=-1, keepdims=True)
    return jnp.where(likeliest, left, others - targets)


def squared_error(outputs: jax.Array, targets: jax.typing.ArrayLike) -> jax.Array:
    """Residual ``e = z - target``, the gradient of ``|z - target|^2 / 2``.

    Args:
        outputs: Model outputs z, ``[N, ..., C]``, or one number an example, ``[N]``.
        targets: Targets of the shape of the outputs, or integer classes ``[N, ...]``
            taken as one-hot rows.

    Returns:
        The error, in the shape and the units of the outputs. A class out of range that
        could not be seen at trace time gives its position a row of NaN.

    Raises:
        ValueError: If the shapes or dtypes do not fit, or a concrete integer label lies
            outside ``[0, C)``.

    References:
        Paper 3.1, the setting of the theorem.
    """
    targets = class_targets(outputs, targets, names=("outputs", "targets"))
    return at_least_single(jnp.asarray(outputs)) - targets


def softmax_basis(num_classes: int) -> np.ndarray:
    """Returns orthonormal directions that hold the motion of a softmax error.

    Its entries always sum to zero, so the rows of J lie in the ``C - 1`` dimensions
    orthogonal to the constant; here as Helmert contrasts.

    Args:
        num_classes: C, the classes of one position.

    Returns:
        ``[C, C - 1]`` float64 on the host, columns orthonormal; ``[1, 1]`` for one
        class, whose error is always zero.

    References:
        Ours.
    """
    if num_classes == 1:
        return np.eye(1)
    column = np.arange(1, num_classes)
    contrasts = np.triu(np.ones((num_classes, num_classes - 1)))
    contrasts[column, column - 1] = -column
    return contrasts / np.sqrt(column * (column + 1))


def softmax_cross_entropy(logits: jax.Array, labels: jax.typing.ArrayLike) -> jax.Array:
    """Cross-entropy ``-sum_c onehot(y)_c log softmax(z)_c`` of every position.

    Its gradient by the logits is `softmax_error`, to the last bits for targets that sum
    to one.

    Args:
        logits: Model outputs z, ``[N, ..., C]``.
        labels: Integer classes ``[N, ...]``, or one-hot (or soft) ``[N, ..., C]``.

    Returns:
        One loss per position, ``[N, ...]``, in nats.

    Raises:
        ValueError: As for `softmax_error`.
    """
    targets = class_targets(logits, labels, min_axes=2)
    likeliest, gaps = _below_likeliest(at_least_single(jnp.asarray(logits)))
    others = jnp.sum(jnp.where(likeliest, 0, jnp.exp(gaps)), axis=-1)
    # -log p of a class is how far its logit lies below the top, and log sum exp of it.
    shares = targets * jnp.where(targets == 0, 0, -gaps)
    return jnp.sum(shares, axis=-1) + jnp.sum(targets, axis=-1) * jnp.log1p(others)


def half_squared_loss(outputs: jax.Array, targets: jax.typing.ArrayLike) -> jax.Array:
    """Squared loss ``|z - target|^2 / 2`` of every example.

    Args:
        outputs: Model outputs z, ``[N, ..., C]``, or one number an example, ``[N]``.
        targets: Targets of the shape of the outputs, or integer classes ``[N, ...]``
            taken as one-hot rows.

    Returns:
        One loss per example, ``[N]``, in the squared units of the outputs.

    Raises:
        ValueError: As for `squared_error`.
    """
    squares = squared_error(outputs, targets) ** 2
    return jnp.sum(squares, axis=tuple(range(1, squares.ndim))) / 2


def _below_likeliest(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the one likeliest class as a mask, and how far each logit lies below.

    Its own gap of 0 does not move, so that it adds no large derivatives that cancel.
    """
    classes = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    highest = jnp.argmax(logits, axis=-1, keepdims=True).astype(jnp.int32)
    likeliest = highest == classes.reshape((1,) * (logits.ndim - 1) + (-1,))
    top = jnp.sum(jnp.where(likeliest, logits, 0), axis=-1, keepdims=True)
    gaps = logits - top
    return likeliest, jnp.where(likeliest, jax.lax.stop_gradient(gaps), gaps)
