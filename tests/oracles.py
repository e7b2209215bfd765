"""Dense oracles and small problems that several test files share."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax import Problem, models


class MLP(nn.Module):
    """A small dense network without a ``train`` argument."""

    activation: str = "gelu"
    num_classes: int = 3

    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        x = getattr(jax.nn, self.activation)(nn.Dense(7)(x))
        return nn.Dense(self.num_classes)(x)


def random_batches(num_batches, num_examples, shape, num_classes, dtype=jnp.float32):
    image_key, label_key = jax.random.split(jax.random.key(3))
    leading = (num_batches, num_examples)
    return {
        "image": jax.random.normal(image_key, (*leading, *shape), dtype),
        "label": jax.random.randint(label_key, leading, 0, num_classes),
    }


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def network_problem(
    name, dtype, *, activation="gelu", loss="softmax_cross_entropy", reduction="stack"
):
    """Returns ``(problem, params)`` of a small linen network with known layers."""
    if name == "mlp":
        model, shape, num_classes = MLP(activation), (4,), 3
        batches = random_batches(2, 5, shape, num_classes, dtype)
    else:
        make = {"resnet18": models.ResNet18, "plainnet18": models.PlainNet18}[name]
        num_classes = 3
        model = make(num_classes, width=2, activation=activation)
        batches = random_batches(2, 3, (8, 8, 3), num_classes, dtype)
    variables = _initialize(model, batches["image"][0].astype(jnp.float32))
    variables = cast(dict(variables), dtype)
    params = variables.pop("params")
    outputs_fn = models.linen_outputs(model, variables)
    return Problem(outputs_fn, batches, loss=loss, reduction=reduction), params


@functools.partial(jax.jit, static_argnums=0)
def _initialize(model, images):
    return model.init(jax.random.key(0), images)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["outputs_fn"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class _Opaque:
    outputs_fn: Callable

    def __call__(self, params, batch):
        return _opaque(params, self.outputs_fn, batch)


@jax.custom_jvp
def _opaque(params, outputs_fn, batch):
    return outputs_fn(params, batch)


@_opaque.defjvp
def _opaque_jvp(primals, tangents):
    def outputs(params, outputs_fn, batch):
        return outputs_fn(params, batch)

    return jax.jvp(outputs, primals, tangents)


def plain(problem):
    """Returns the same problem without factors: a custom derivative is not entered."""
    return problem.replace(outputs_fn=_Opaque(problem.objective.outputs_fn))


def dense_jacobians(problem, params):
    """Returns J of every batch, ``[K, n, P]``, by plain reverse mode."""

    num_batches = jax.tree.leaves(problem.batches)[0].shape[0]
    return [
        _rows(problem, params, jax.tree.map(lambda leaf, k=k: leaf[k], problem.batches))
        for k in range(num_batches)
    ]


@jax.jit
def _rows(problem, params, batch):
    """Returns J of one batch, ``[n, P]``, compiled as one program."""
    jacobian = jax.jacrev(lambda p: problem.error(p, batch).reshape(-1))(params)
    rows = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(jacobian)]
    return jnp.concatenate(rows, axis=1)


def dense_kernel(problem, params):
    """Returns M from `dense_jacobians`, by the problem's reduction."""
    jacobians = dense_jacobians(problem, params)
    if problem.reduction == "stack":
        jacobians = [jnp.concatenate(jacobians)]
    grams = [jnp.matmul(j, j.T, precision="highest") for j in jacobians]
    return sum(grams[1:], grams[0]) / len(grams)


def relative_error(got, expected):
    """Returns ``max |got - expected| / max |expected|`` in float64."""
    got, expected = (np.asarray(array, np.float64) for array in (got, expected))
    return np.max(np.abs(got - expected)) / np.max(np.abs(expected))


def symmetric_with_spectrum(values, seed=0):
    """Returns ``(A, eigenvectors)`` in float64, with the given eigenvalues."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(len(values), len(values))))
    return (basis * values) @ basis.T, basis


def degree(one, two):
    """Returns p of ``two = 2^(8 p) one``, 0 where nothing can be told."""
    known = np.isfinite(one) & (one != 0)
    if not known.any():
        return 0.0
    largest = np.argmax(np.where(known, np.abs(one), 0))
    found = np.log2(two.flat[largest] / one.flat[largest]) / 8
    nearest = np.round(2 * found) / 2
    return nearest if abs(found - nearest) < 1e-5 else found
