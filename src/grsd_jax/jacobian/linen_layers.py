"""What multiplies each parameter of a linen layer that is affine in its parameters.

A reader takes a layer, the arguments of its call and its output. It returns, for each
parameter leaf by name, the array that the parameter multiplies, or None if this layer
as configured is not one that it knows.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from grsd_jax._typing import PyTree

Inputs = dict[str, jax.Array]


def called_with(module: nn.Module, params: PyTree, args: Any, kwargs: Any) -> Any:
    """Calls a copy of the module with other parameters."""
    unbound, variables = module.unbind()
    return unbound.apply({**variables, "params": params}, *args, **kwargs)


def _read_matmul(
    module: Any, args: Any, kwargs: Any, output: jax.Array
) -> Inputs | None:
    """Reads a Dense, DenseGeneral or Conv layer: inputs ``[N, X, k]``."""
    params = module.variables["params"]
    if len(args) != 1 or kwargs or not _plain_product(module, params["kernel"].dtype):
        return None
    x = args[0]
    if isinstance(module, nn.Conv):
        rows = _conv_patches(module, x)
    elif isinstance(module, nn.DenseGeneral):
        axes = np.ravel(module.axis)
        axes = np.where(axes >= 0, axes - x.ndim, axes)
        if module.batch_dims or not np.array_equal(axes, np.arange(-len(axes), 0)):
            return None
        rows = x.reshape(x.shape[0], -1, int(np.prod(x.shape[-len(axes) :])))
    else:
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
    if rows is None:
        return None
    bias = {"bias": jnp.ones((len(rows), 1, 1), output.dtype)}
    return {"kernel": rows} | (bias if "bias" in params else {})


def _plain_product(module: Any, dtype: Any) -> bool:
    """Whether the layer multiplies in its parameters' dtype, by JAX's own product."""
    injected = ("dot_general", "dot_general_cls", "conv_general_dilated")
    injected = (*injected, "conv_general_dilated_cls", "promote_dtype")
    defaults = {field.name: field.default for field in dataclasses.fields(module)}
    own = all(getattr(module, name, None) is defaults.get(name) for name in injected)
    return own and module.dtype in (None, dtype)


def _conv_patches(module: Any, x: jax.Array) -> jax.Array | None:
    """Returns the patches ``[N, X, k]`` that a convolution multiplies, in its order."""
    spatial = len(module.kernel_size) if not isinstance(module.kernel_size, int) else 1
    window = np.broadcast_to(module.kernel_size, (spatial,))
    strides = np.broadcast_to(module.strides or 1, (spatial,))
    dilation = np.broadcast_to(module.kernel_dilation or 1, (spatial,))
    grouped = module.feature_group_count != 1 or module.mask is not None
    if grouped or np.any(np.asarray(module.input_dilation or 1) != 1):
        return None
    if x.ndim != spatial + 2 or module.padding in ("CIRCULAR", "CAUSAL", "REFLECT"):
        return None
    reach = (window - 1) * dilation + 1
    pads = _paddings(module.padding, x.shape[1:-1], reach, strides)
    x = jnp.pad(x, [(0, 0), *pads, (0, 0)])
    sizes = (np.array(x.shape[1:-1]) - reach) // strides + 1
    slices = []
    for offset in itertools.product(*(range(int(size)) for size in window)):
        start = np.array(offset) * dilation
        stop = start + (sizes - 1) * strides + 1
        window_slice = [
            slice(int(i), int(j), int(s))
            for i, j, s in zip(start, stop, strides, strict=True)
        ]
        slices.append(x[:, *window_slice])
    patches = jnp.stack(slices, axis=-2)
    return patches.reshape(len(x), int(np.prod(sizes)), -1)


def _paddings(
    padding: Any, shape: Sequence[int], reach: np.ndarray, strides: np.ndarray
) -> list[tuple[int, int]]:
    """Returns (low, high) for each spatial axis, as flax reads ``padding``."""
    if isinstance(padding, str):
        return list(jax.lax.padtype_to_pads(shape, reach, strides, padding))
    if isinstance(padding, int):
        return [(padding, padding)] * len(shape)
    return [(p, p) if isinstance(p, int) else tuple(p) for p in padding]


def _read_embedding(module: Any, args: Any, kwargs: Any, _: jax.Array) -> Inputs | None:
    """Reads an Embed layer: indices ``[N, X]``."""
    dtype = module.variables["params"]["embedding"].dtype
    if len(args) != 1 or kwargs or module.dtype not in (None, dtype):
        return None
    return {"embedding": args[0].reshape(args[0].shape[0], -1).astype(dtype)}


def _read_norm(module: Any, args: Any, kwargs: Any, output: jax.Array) -> Inputs | None:
    """Reads a normalisation: what its scale multiplies, ``[N, X, o]``."""
    params = module.variables.get("params", {})
    sizes = {leaf: value.shape for leaf, value in params.items()}
    if not sizes or set(sizes.values()) != {output.shape[-1:]}:
        return None
    if module.dtype not in (None, output.dtype):
        return None
    inputs = {"bias": jnp.ones((len(output), 1, 1), output.dtype)}
    unit = {
        leaf: jnp.full_like(value, 1.0 if leaf == "scale" else 0.0)
        for leaf, value in params.items()
    }
    normalized = called_with(module, unit, args, kwargs)
    inputs["scale"] = normalized.reshape(len(output), -1, output.shape[-1])
    return {leaf: inputs[leaf] for leaf in params}


#: Readers of the layers that are affine in their parameters, by exact type, since a
#: subclass may differ.
READERS = {
    nn.Dense: _read_matmul,
    nn.DenseGeneral: _read_matmul,
    nn.Conv: _read_matmul,
    nn.Embed: _read_embedding,
    nn.BatchNorm: _read_norm,
    nn.LayerNorm: _read_norm,
    nn.GroupNorm: _read_norm,
    nn.RMSNorm: _read_norm,
}
