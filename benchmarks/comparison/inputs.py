"""Makes the inputs of a problem, and its reference in float64.

Weights, statistics, images, labels, direction and blocks are made once and written to
one npz, which every peer reads. The reference comes from the plain path of this package
in float64, which shares no code with the path that is timed as ours by default.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from unittest import mock

import flax.linen as nn
import grsd_jax
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from grsd_jax import models

from comparison.grid import MAX_COLUMNS, NUM_CLASSES, ProblemSpec, is_wide
from comparison.harness import subtree

Arrays = dict[str, np.ndarray]
_SEED = 0

#: Images drawn for each that is taken, for a wide network.
_CANDIDATES = 4

#: Images of one forward pass in float64.
_FORWARD = 8
_IMAGE = (32, 32, 3)


class MLP(nn.Module):
    """Three hidden layers of the same width, on flattened images."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images ``[N, ...]`` to logits ``[N, C]``."""
        x = x.reshape(x.shape[0], -1)
        for index in range(3):
            x = jax.nn.relu(nn.Dense(self.width, name=f"hidden{index + 1}")(x))
        return nn.Dense(NUM_CLASSES, name="head")(x)


def make_model(spec: ProblemSpec) -> nn.Module:
    """Returns the linen module of a problem."""
    if spec.model == "mlp":
        return MLP(spec.width)
    return models.ResNet18(NUM_CLASSES, spec.width)


def make_inputs(spec: ProblemSpec) -> Arrays:
    """Makes everything that the peers are given.

    A wide network has so many units that rounding alone decides the sign of some, which
    changes M by a part in a thousand for the image concerned; no two libraries round
    alike. So its images are those, of four times as many, whose units are furthest from
    zero.

    Untrained weights, with biases, scales and statistics away from zero and one, so
    that a peer that leaves one of them out is found. Images are smooth random
    fields, those of one class around a common one.

    Args:
        spec: The problem.

    Returns:
        ``images`` ``[N, 32, 32, 3]``, ``labels`` ``[N]``, ``block`` ``[n, 160]`` (fewer
        columns if n is smaller) with orthonormal columns, and ``params/...``,
        ``batch_stats/...`` and ``direction/...`` by the paths of the linen module.
    """
    rng = np.random.default_rng(_SEED)
    model = make_model(spec)
    drawn = spec.num_examples * (_CANDIDATES if is_wide(spec) else 1)
    labels = rng.integers(0, NUM_CLASSES, drawn).astype(np.int32)
    centers = _smooth_fields(rng, NUM_CLASSES)
    images = centers[labels] + _smooth_fields(rng, drawn)
    shapes = jax.eval_shape(model.init, jax.random.key(_SEED), images[:1])
    params = _weights(shapes["params"], rng)
    state = {}
    if "batch_stats" in shapes:
        statistics = _gathered_statistics(model, params, shapes["batch_stats"], images)
        state = {"batch_stats": statistics}
    if drawn > spec.num_examples:
        margins = sign_margins(model, {"params": params, **state}, images)
        chosen = np.sort(np.argsort(-margins)[: spec.num_examples])
        images, labels = images[chosen], labels[chosen]
    direction = _gradient_flow(model, params, state, images, labels)
    columns = min(MAX_COLUMNS, spec.size)
    block = np.linalg.qr(rng.normal(size=(spec.size, columns)))[0]
    trees = {"params": params, "direction": direction, **state}
    flat = flatten_dict(trees, sep="/")
    return {
        "images": images,
        "labels": labels,
        "block": block.astype(np.float32),
        **{name: np.asarray(array) for name, array in flat.items()},
    }


def sign_margins(model: nn.Module, variables: Any, images: np.ndarray) -> np.ndarray:
    """Returns how far each image's units are from changing sign.

    Args:
        model: A linen module with relus.
        variables: Its variables.
        images: ``[N, ...]``.

    Returns:
        ``[N]``, over all relus the smallest ``|z|``, in units of the layer's root mean
        square; in float64.
    """
    found: list[np.ndarray] = []

    def recording(z: jax.Array) -> jax.Array:
        scale = jnp.sqrt(jnp.mean(jnp.square(z)))
        smallest = jnp.min(jnp.abs(z.reshape(len(z), -1)), axis=1)
        found[-1] = np.minimum(found[-1], np.asarray(smallest / scale))
        return relu(z)

    relu = jax.nn.relu
    with jax.enable_x64(True), mock.patch.object(jax.nn, "relu", recording):
        doubled = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), variables)
        for start in range(0, len(images), _FORWARD):
            part = jnp.asarray(images[start : start + _FORWARD], jnp.float64)
            found.append(np.full(len(part), np.inf))
            model.apply(doubled, part)
    return np.concatenate(found)


class Loaded(NamedTuple):
    """The arrays of a problem as this package's functions take them.

    Attributes:
        model: The linen module.
        params: Its parameters.
        state: Its BatchNorm statistics, if it has any.
        batches: One batch of images and labels, leading axes ``[1, N]``.
        direction: The tangent of the derivative, a tree like ``params``.
        block: Orthonormal columns, ``[n, b]``.
    """

    model: nn.Module
    params: Any
    state: dict[str, Any]
    batches: dict[str, jax.Array]
    direction: Any
    block: jax.Array

    def problem(self, *, plain: bool = False) -> Any:
        """Returns the `grsd_jax.Problem`; with ``plain`` its layers are hidden."""
        outputs_fn = models.linen_outputs(self.model, self.state)
        if plain:
            outputs_fn = jax.tree_util.Partial(_call, outputs_fn)
        return grsd_jax.Problem(outputs_fn, self.batches)


def load(spec: ProblemSpec, inputs: Mapping[str, np.ndarray]) -> Loaded:
    """Returns the arrays of `make_inputs` as trees of JAX arrays."""
    params, direction, statistics = (
        unflatten_dict(_arrays(subtree(inputs, name)), sep="/")
        for name in ("params", "direction", "batch_stats")
    )
    return Loaded(
        make_model(spec),
        params,
        {"batch_stats": statistics} if statistics else {},
        {name: jnp.asarray(inputs[f"{name}s"])[None] for name in ("image", "label")},
        direction,
        jnp.asarray(inputs["block"]),
    )


def make_reference(
    spec: ProblemSpec, inputs: Mapping[str, np.ndarray], *, derivative: bool
) -> Arrays:
    """Computes M, and its derivative if asked, in float64 by the plain path.

    Args:
        spec: The problem.
        inputs: The arrays of `make_inputs`.
        derivative: Whether a task needs the derivative.

    Returns:
        ``kernel`` ``[n, n]`` and, if asked, ``derivative`` ``[n, n]``.
    """
    with jax.enable_x64(True):
        double = {
            name: array.astype(np.float64) if array.dtype == np.float32 else array
            for name, array in inputs.items()
        }
        loaded = load(spec, double)
        problem, params = loaded.problem(plain=True), loaded.params
        if not derivative:
            return {"kernel": np.asarray(grsd_jax.kernel_dense(problem, params))}
        kernel, moved = grsd_jax.kernel_dense(problem, params, loaded.direction)
        return {"kernel": np.asarray(kernel), "derivative": np.asarray(moved)}


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Returns a fingerprint of names, shapes, dtypes and values."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total.update(f"{name}{array.shape}{array.dtype}".encode())
        total.update(array.tobytes())
    return total.hexdigest()[:16]


def _arrays(flat: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(array) for name, array in flat.items()}


@jax.custom_jvp
def _call(outputs_fn: Callable[..., jax.Array], params: Any, batch: Any) -> jax.Array:
    """Calls ``outputs_fn``; no factors are made of what has a custom derivative."""
    return outputs_fn(params, batch)


@_call.defjvp
def _call_jvp(primals: Any, tangents: Any) -> Any:
    return jax.jvp(lambda fn, params, batch: fn(params, batch), primals, tangents)


def _gradient_flow(
    model: nn.Module, params: Any, state: Any, images: np.ndarray, labels: np.ndarray
) -> Any:
    """Returns ``-grad L``, L the mean cross-entropy, without this package's help."""

    @jax.jit
    def log_likelihood(params: Any) -> jax.Array:
        logits = model.apply({**state, "params": params}, images)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
        return jnp.mean(chosen)

    return jax.grad(log_likelihood)(params)


def _smooth_fields(rng: np.random.Generator, count: int) -> np.ndarray:
    """Returns images of Gaussian noise without its high frequencies, variance one."""
    noise = np.fft.fft2(rng.normal(size=(count, *_IMAGE)), axes=(1, 2))
    frequency = np.fft.fftfreq(_IMAGE[0])
    decay = np.exp(-50 * (frequency[:, None] ** 2 + frequency[None] ** 2))
    fields = np.fft.ifft2(noise * decay[None, :, :, None], axes=(1, 2)).real
    return (fields / fields.std()).astype(np.float32)


def _weights(shapes: Any, rng: np.random.Generator) -> Any:
    """Draws weights: kernels by He et al. (2015), scales near one, biases near zero."""

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        fan_in = np.prod(leaf.shape[:-1])
        noise = rng.normal(size=leaf.shape)
        if path[-1].key == "kernel":
            noise *= np.sqrt(2 / fan_in)
        else:
            noise = 0.1 * noise + (path[-1].key == "scale")
        return jnp.asarray(noise, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _gathered_statistics(
    model: nn.Module, params: Any, shapes: Any, images: np.ndarray
) -> Any:
    """Returns BatchNorm statistics near those of the images, by running updates."""

    @jax.jit
    def update(params: Any, statistics: Any, images: jax.Array) -> Any:
        _, updated = model.apply(
            {"params": params, "batch_stats": statistics},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        return updated["batch_stats"]

    statistics = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)
    for _ in range(50):  # at a momentum of 0.9 little is left of the ones
        statistics = update(params, statistics, images)
    return statistics
