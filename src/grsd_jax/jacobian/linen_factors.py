"""The factors of a Flax linen module's Jacobian, taken from its leaf layers.

Every layer that is affine in its parameters is intercepted as it is called: its input
is recorded and a zero perturbation is added to its output, whose cotangents are the
deltas. One forward pass and one backward pass for each output then give all factors,
without a single weight gradient. Everything else in the module is left to the plain
path: other layers, parameters that are also read outside their layer's call, and calls
whose leading axis is not the examples.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from grsd_jax._typing import PyTree
from grsd_jax.jacobian.factors import Factor, Lookup, Outer, Rows, joined
from grsd_jax.jacobian.linen_layers import READERS, Inputs, called_with
from grsd_jax.problem import OutputsObjective

_RECORD = "grsd_layer_inputs"

Path = tuple[str, ...]


class LayerCall(NamedTuple):
    """One call of a layer, found by tracing.

    Attributes:
        path: The module's path.
        name: Which of its calls, ``call0`` for the first.
        shape: Shape ``[N, ...]`` of the output.
        dtype: Its dtype.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: Any


class _Record(NamedTuple):
    """What one call leaves behind.

    Attributes:
        inputs: For each parameter leaf of the layer, what multiplies it.
        output: The output, or None where it is not asked for.
    """

    inputs: Inputs
    output: jax.Array | None


def linen_factors(
    error_fn: OutputsObjective,
    params: PyTree,
    batch: PyTree,
    basis: jax.Array,
) -> list[Factor | None]:
    """Returns the blocks of J of one batch, one for each parameter leaf.

    Args:
        error_fn: The module's error function.
        params: The ``params`` collection.
        batch: One batch.
        basis: Orthonormal directions of one example's outputs, ``[C, q]``.

    Returns:
        In the order of the leaves of ``params``: a block, or None for a leaf that has
        to be differentiated by the plain path.
    """
    calls = layer_calls(error_fn, params, batch)
    keys = [(call.path, call.name) for call in calls]

    def perturbed(perturbations: list[jax.Array]) -> tuple[jax.Array, PyTree]:
        lookup = dict(zip(keys, perturbations, strict=True))
        return _record(error_fn, params, batch, perturbations=lookup)

    zeros = [jnp.zeros(call.shape, call.dtype) for call in calls]
    error, pullback, recorded = jax.vjp(perturbed, zeros, has_aux=True)
    seeds = jnp.broadcast_to(
        basis.T[:, None, :].astype(error.dtype), (basis.shape[1], *error.shape)
    )
    deltas = jax.vmap(lambda seed: pullback(seed)[0])(seeds)
    blocks: dict[Path, Factor] = {}
    shapes = _leaf_shapes(params)
    for key, delta in zip(keys, deltas, strict=True):
        for leaf, inputs in recorded[key].inputs.items():
            path = (*key[0], leaf)
            block = _block(leaf, inputs, jnp.moveaxis(delta, 0, 1), shapes[path])
            blocks[path] = joined(blocks[path], block) if path in blocks else block
    return [blocks.get(path) for path in shapes]


def layer_calls(
    error_fn: OutputsObjective, params: PyTree, batch: PyTree
) -> tuple[LayerCall, ...]:
    """Finds the layer calls whose parameters can be factored, from shapes alone.

    Traces the module three times: to find the calls; with one example more, since the
    leading axis of a call must be the examples; and with the parameters of the layers
    made unusable outside their calls, since a parameter that is also read elsewhere (a
    tied embedding, say) has a share of J that no call shows.

    Args:
        error_fn: The module's error function.
        params: The ``params`` collection.
        batch: One batch.

    Returns:
        The calls, in the order of tracing.
    """
    leaves, tree = jax.tree.flatten((error_fn, params, batch))
    avals = tuple((np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
    return _layer_calls(tree, avals)


@functools.lru_cache(maxsize=64)
def _layer_calls(tree: Any, avals: tuple[Any, ...]) -> tuple[LayerCall, ...]:
    structs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in avals]
    error_fn, params, batch = jax.tree.unflatten(tree, structs)
    more = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            (leaf.shape[0] + 1, *leaf.shape[1:]), leaf.dtype
        ),
        batch,
    )
    found = jax.eval_shape(_trace, error_fn, params, batch)
    grown = jax.eval_shape(_trace, error_fn, params, more)
    calls = [
        LayerCall(path, name, record.output.shape, record.output.dtype)
        for (path, name), record in found.items()
        if (path, name) in grown and _batched(record, grown[path, name])
    ]
    paths = {call.path for call in calls}
    if _readable_without(error_fn, params, batch, paths):
        return tuple(calls)
    paths = {
        path for path in paths if _readable_without(error_fn, params, batch, {path})
    }
    return tuple(call for call in calls if call.path in paths)


def _batched(small: PyTree, large: PyTree) -> bool:
    """Whether one example more makes the leading axis of every array one longer."""
    pairs = zip(jax.tree.leaves(small), jax.tree.leaves(large), strict=True)
    return all(
        a.ndim > 0 and (a.shape[0] + 1, *a.shape[1:]) == b.shape for a, b in pairs
    )


def _trace(error_fn: OutputsObjective, params: PyTree, batch: PyTree) -> PyTree:
    return _record(error_fn, params, batch, with_outputs=True)[1]


def _readable_without(
    error_fn: OutputsObjective, params: PyTree, batch: PyTree, hidden: set[Path]
) -> bool:
    """Whether nothing but the layers' own calls reads the parameters at these paths."""

    def masked(
        error_fn: OutputsObjective, params: PyTree, batch: PyTree, unusable: PyTree
    ) -> PyTree:
        return _record(error_fn, unusable, batch, own_params=(hidden, params))[0]

    key_dtype = jax.eval_shape(lambda: jax.random.key(0)).dtype

    def unusable(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        # No arithmetic takes a random key, so a read outside the calls fails to trace.
        dtype = key_dtype if _names(path)[:-1] in hidden else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype)

    try:
        jax.eval_shape(
            masked,
            error_fn,
            params,
            batch,
            jax.tree_util.tree_map_with_path(unusable, params),
        )
    except (TypeError, ValueError):
        return False
    return True


def _record(
    error_fn: OutputsObjective,
    params: PyTree,
    batch: PyTree,
    *,
    perturbations: Mapping[tuple[Path, str], jax.Array] | None = None,
    own_params: tuple[set[Path], PyTree] | None = None,
    with_outputs: bool = False,
) -> tuple[jax.Array, dict[tuple[Path, str], Any]]:
    """Evaluates the error and records every layer call's inputs.

    The record travels in a variable collection, as lifted transforms need; a transform
    that does not pass it on leaves its layers unrecorded.
    """
    num_examples = jax.tree.leaves(batch)[0].shape[0]

    def interceptor(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        reader = READERS.get(type(module))  # a copy's own call has no path
        if reader is None or context.method_name != "__call__" or not module.path:
            return next_fun(*args, **kwargs)
        if own_params is not None and module.path in own_params[0]:
            return called_with(module, _at(own_params[1], module.path), args, kwargs)
        output = next_fun(*args, **kwargs)
        if args and not _holds_examples(module, args[0], num_examples):
            return output  # inside a vmap over the examples: left to the plain path
        inputs = reader(module, args, kwargs, output)
        if inputs is None:
            return output
        name = _next_name(module)
        if perturbations is not None:
            if (module.path, name) not in perturbations:
                return output
            output = output + perturbations[module.path, name]
        record = _Record(inputs, output if with_outputs else None)
        module.sow(_RECORD, name, record, init_fn=tuple, reduce_fn=lambda _, new: new)
        return output

    with nn.intercept_methods(interceptor):
        model: Any = error_fn.outputs_fn
        outputs, recorded = model.recording(params, batch, _RECORD)
    return error_fn.error_of(outputs, batch), dict(_calls(recorded))


def _holds_examples(module: nn.Module, x: Any, num_examples: int) -> bool:
    """Whether an input has an axis of examples, and features unless it is indices."""
    shape = np.shape(x)
    features = len(shape) > 1 or isinstance(module, nn.Embed)
    return features and shape[:1] == (num_examples,)


def _calls(
    tree: Mapping[str, Any], path: Path = ()
) -> Iterator[tuple[tuple[Path, str], Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _calls(value, (*path, name))
        else:
            yield (path, name), value


def _next_name(module: nn.Module) -> str:
    count = 0
    while module.has_variable(_RECORD, f"call{count}"):
        count += 1
    return f"call{count}"


def _at(tree: Mapping[str, Any], path: Path) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _names(path: Any) -> Path:
    """Returns a key path of a nested dictionary as its names."""
    return tuple(str(key.key) for key in path)


def _leaf_shapes(params: PyTree) -> dict[Path, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {_names(path): np.shape(leaf) for path, leaf in leaves}


def _block(
    leaf: str, inputs: jax.Array, deltas: jax.Array, shape: tuple[int, ...]
) -> Factor:
    """Builds the block of one parameter from what multiplies it and the deltas.

    Args:
        leaf: The parameter's name in its layer, as all linen layers name them.
        inputs: ``[N, X, k]``, ``[N, X]`` (indices), or ``[N, X, o]`` (of a scale).
        deltas: ``[N, q, ...]``, as the layer's output.
        shape: The parameter's shape.
    """
    size = int(np.prod(shape))
    if leaf == "kernel":
        size //= inputs.shape[-1]
    elif leaf == "embedding":
        size = shape[-1]
    deltas = deltas.reshape(*deltas.shape[:2], -1, size)
    if leaf == "kernel":
        return Outer(inputs, deltas)
    if leaf == "embedding":
        return Lookup(inputs, deltas, shape[0])
    return Rows(jnp.sum(inputs[:, None] * deltas, axis=2))
