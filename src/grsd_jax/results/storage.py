"""Results in files: one archive of arrays without pickle, whole or not at all."""

import importlib
import inspect
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grsd_jax._arrays import is_traced
from grsd_jax._files import PathLike, as_path, atomic_path, packed, reason, unpacked
from grsd_jax.results.fields import is_key, names_of

#: Of the layout of the file: how values are written as JSON and arrays.
_VERSION = 1

_KIND = "grsd_jax result"

#: Where the classes of results and of their options are listed.
_TOPICS = ("conditions", "dynamics", "kernel", "linalg", "shells")


def save(result: Any, path: PathLike) -> None:
    """Writes a result to one file, whole or not at all; `grsd_jax.load` reads it.

    The file is an ``.npz`` archive with a header of JSON and a checksum, without
    pickle. Arrays keep every bit and their dtype, in the byte order of this machine.

    Args:
        result: The result.
        path: The file, which is replaced if it is there.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If the result is traced, or holds what no result holds.
    """
    arrays: dict[str, np.ndarray] = {}
    tree = _encoded(result, arrays, type(result).__name__)
    header = {"kind": _KIND, "version": _VERSION, "result": tree}
    text = json.dumps(header, allow_nan=False).encode()
    whole = packed({"header": np.frombuffer(text, np.uint8), **arrays})
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(whole)
    except OSError as error:
        why = reason(error.strerror or error)
        raise type(error)(
            f"'{path}': expected to be able to write it, got: {why}."
        ) from error


def load(path: PathLike) -> Any:
    """Returns the result that a file holds, of the class that was saved.

    Arrays have every bit and the dtype they had. What was a JAX array is one again, on
    the default device, but for 64-bit numbers where JAX does not have them enabled:
    these are NumPy arrays.

    Args:
        path: The file that ``.save(path)`` of a result has written.

    Returns:
        The result.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is damaged, was not written by ``save``, or was written
            by a newer version; one sentence that names the file.
    """
    try:
        whole = as_path(path).read_bytes()
    except OSError as error:
        why = reason(error.strerror or error)
        raise type(error)(f"'{path}': expected a saved result, got: {why}.") from error
    try:
        return _read(whole)
    except MemoryError:
        raise
    except Exception as error:
        why = reason(error)[:200]
        if not isinstance(error, ValueError):
            why = f"{type(error).__name__}: {why}"
        raise ValueError(f"'{path}': expected a saved result, got: {why}.") from error


def _read(whole: bytes) -> Any:
    arrays = unpacked(whole)
    foreign = "a file that grsd_jax did not save"
    if "header" not in arrays:
        raise ValueError(foreign)
    header = json.loads(arrays["header"].tobytes().decode())
    if not isinstance(header, dict) or header.get("kind") != _KIND:
        raise ValueError(foreign)
    if header["version"] > _VERSION:
        raise ValueError(
            f"version {header['version']} of the format, which is newer than "
            f"version {_VERSION}, the last that this grsd_jax reads"
        )
    return _decoded(header["result"], arrays)


def _encoded(value: Any, arrays: dict[str, np.ndarray], name: str) -> Any:
    """Returns a value as JSON, and adds its arrays to ``arrays``."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return _encoded_array(value, arrays, name)
    if isinstance(value, float):  # which np.float64 is too
        return {"float": value.hex()}
    kind = type(value)
    if _public().get(kind.__name__) is kind:
        named = {field: getattr(value, field) for field in names_of(kind)}
        fields = {
            field: _encoded(item, arrays, f"{name}.{field}")
            for field, item in named.items()
        }
        return {"class": kind.__name__, "fields": fields}
    if kind in (list, tuple):
        items = [_encoded(x, arrays, f"{name}[{i}]") for i, x in enumerate(value)]
        return {kind.__name__: items}
    if kind is dict and all(isinstance(key, str) for key in value):
        return {
            "dict": [[k, _encoded(x, arrays, f"{name}.{k}")] for k, x in value.items()]
        }
    raise ValueError(
        f"{name}: expected arrays, numbers, text, results, or lists, tuples and dicts "
        f"of them, got a {kind.__name__}."
    )


def _encoded_array(
    value: Any, arrays: dict[str, np.ndarray], name: str
) -> dict[str, Any]:
    if is_traced(value):
        raise ValueError(f"{name}: expected numbers, got a traced array.")
    if isinstance(value, np.ma.MaskedArray):
        raise ValueError(
            f"{name}: expected an array without a mask, got a masked one; save its "
            "data and its mask."
        )
    place = f"array{len(arrays)}"
    about: dict[str, Any] = {"array": place}
    if isinstance(value, jax.Array):
        about["jax"] = True
        if is_key(value):
            about["key"] = str(jax.random.key_impl(value))
            value = jax.random.key_data(value)
    elif isinstance(value, np.generic):
        about["scalar"] = True
    # By its name: a dtype of another byte order is no builtin one.
    array = np.array(value, np.dtype(value.dtype.name), order="C")
    about["dtype"] = array.dtype.name
    if array.dtype.isbuiltin != 1:  # such as bfloat16, which .npz files do not know
        array = array.view(f"u{array.dtype.itemsize}")
    arrays[place] = array
    return about


def _decoded(tree: Any, arrays: dict[str, np.ndarray]) -> Any:
    """Returns the value that `_encoded` wrote."""
    if not isinstance(tree, dict):
        return tree
    if "float" in tree:
        return float.fromhex(tree["float"])
    if "array" in tree:
        return _decoded_array(tree, arrays)
    if "class" in tree:
        kind = _public().get(tree["class"])
        fields = {name: _decoded(item, arrays) for name, item in tree["fields"].items()}
        if kind is None or not set(fields) <= set(names_of(kind)):
            raise ValueError(f"a {tree['class']} of another version of grsd_jax")
        return kind(**fields)
    if "dict" in tree:
        return {key: _decoded(item, arrays) for key, item in tree["dict"]}
    kind = {"list": list, "tuple": tuple}[next(iter(tree))]
    return kind(_decoded(item, arrays) for item in tree[kind.__name__])


def _decoded_array(about: dict[str, Any], arrays: dict[str, np.ndarray]) -> Any:
    array, dtype = arrays[about["array"]], jnp.dtype(about["dtype"])
    if array.dtype != dtype:
        array = array.view(dtype)
    if "scalar" in about:
        return array[()]
    if "key" in about:
        return jax.random.wrap_key_data(jnp.asarray(array), impl=about["key"])
    if "jax" in about and jax.dtypes.canonicalize_dtype(dtype) == dtype:
        return jnp.asarray(array)
    return array


def _public() -> dict[str, type]:
    """Returns the public classes that files can hold, by name."""
    modules = [importlib.import_module(f"grsd_jax.{topic}") for topic in _TOPICS]
    pairs = [
        (name, getattr(module, name)) for module in modules for name in module.__all__
    ]
    return {
        name: value
        for name, value in pairs
        if inspect.isclass(value)
        and (hasattr(value, "_fields") or hasattr(value, "__dataclass_fields__"))
    }
