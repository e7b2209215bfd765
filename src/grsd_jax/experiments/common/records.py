"""Files of a run: written whole or not at all, and read without pickle.

Everything that goes wrong with a file is told as a `UserError` of one sentence.
"""

import contextlib
import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grsd_jax.experiments.common.config import UserError

PathLike = str | os.PathLike[str]


@contextlib.contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """Gives a temporary path that replaces ``path`` when the block ends well.

    The temporary file lies in the same folder, so that the replacement is one rename;
    it is synced first, and removed if the block fails. Whoever reads ``path`` sees the
    old contents or the new ones, never a part.

    Args:
        path: The file to write.

    Yields:
        The path to write to.

    Raises:
        UserError: If the folder cannot be written or is full.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: PathLike, value: Any) -> None:
    """Writes JSON, whole or not at all; numbers that are not finite become null.

    Args:
        path: The file.
        value: Nested dicts, lists, tuples, and numpy or JAX numbers and arrays.

    Raises:
        UserError: If the file cannot be written.
    """
    text = json.dumps(plain(value), indent=2, sort_keys=True, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: PathLike) -> Any:
    """Reads a JSON file.

    Args:
        path: The file.

    Returns:
        Its value.

    Raises:
        UserError: If the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise _cannot_read(path, "a JSON file", error.strerror) from error
    except ValueError as error:
        raise _cannot_read(path, "a JSON file", error) from error


def write_npz(path: PathLike, arrays: Mapping[str, Any]) -> None:
    """Writes named arrays as a compressed ``.npz``, whole or not at all.

    Args:
        path: The file.
        arrays: Arrays of numbers by name.

    Raises:
        UserError: If the file cannot be written.
        ValueError: If an array could not be read back without pickle.
    """
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise ValueError(f"{name}: expected an array of numbers, got dtype object.")
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def read_npz(path: PathLike) -> dict[str, np.ndarray]:
    """Reads all arrays of an ``.npz`` file, without pickle.

    Args:
        path: The file.

    Returns:
        The arrays by name.

    Raises:
        UserError: If the file is missing, damaged, or needs pickle.
    """
    wanted = "an .npz file of arrays without pickle"
    try:
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            with loaded:
                return {name: loaded[name] for name in loaded.files}
    except OSError as error:
        raise _cannot_read(path, wanted, error.strerror or error) from error
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _cannot_read(path, wanted, error) from error


def append_jsonl(path: PathLike, line: Mapping[str, Any]) -> None:
    """Appends one line of JSON and syncs it to disk.

    Args:
        path: The file.
        line: The record; see `write_json`.

    Raises:
        UserError: If the file cannot be written.
    """
    text = json.dumps(plain(line), allow_nan=False)
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(path, error) from error


def read_jsonl(path: PathLike) -> list[dict[str, Any]]:
    """Reads the records of a JSON-lines file.

    Args:
        path: The file; a missing one has no records.

    Returns:
        The records. A last line cut short, by a kill in mid-write, is left out.

    Raises:
        UserError: If another line is not a JSON object.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise _cannot_read(path, "a file of JSON lines", error) from error
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise _cannot_read(path, "a JSON object on every line", f"line {number}")
        records.append(record)
    return records


def write_jsonl(path: PathLike, records: list[dict[str, Any]]) -> None:
    """Writes all records of a JSON-lines file, whole or not at all.

    Args:
        path: The file.
        records: Its records.

    Raises:
        UserError: If the file cannot be written.
    """
    text = "".join(f"{json.dumps(plain(r), allow_nan=False)}\n" for r in records)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def rewind_jsonl(path: PathLike, step: int) -> list[dict[str, Any]]:
    """Drops the records after a step, and a last line cut short.

    Args:
        path: The file; a missing one stays missing.
        step: The last step whose records stay.

    Returns:
        The records that stay.

    Raises:
        UserError: If the file cannot be read or written.
    """
    if not Path(path).exists():
        return []
    kept = [x for x in read_jsonl(path) if x.get("step", math.inf) <= step]
    write_jsonl(path, kept)
    return kept


def remove(path: PathLike) -> None:
    """Removes a file, if it is there.

    Args:
        path: The file.

    Raises:
        UserError: If the folder cannot be written.
    """
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def set_aside(folder: Path, names: Sequence[str]) -> None:
    """Renames files of a folder, together, by the next free number: ``name-1.json``.

    Args:
        folder: The folder.
        names: The files; those that are missing are passed over.

    Raises:
        UserError: If the folder cannot be written.
    """
    paths = [folder / name for name in names]
    number = 1
    while any(_numbered(path, number).exists() for path in paths):
        number += 1
    try:
        for path in paths:
            if path.exists():
                os.replace(path, _numbered(path, number))
    except OSError as error:
        raise cannot_write(folder, error) from error


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def plain(value: Any) -> Any:
    """Returns a value as JSON reads it back, with None for what is not finite.

    Args:
        value: Nested dicts, lists, tuples, and numpy or JAX numbers and arrays.

    Returns:
        The value in dicts, lists, strings, numbers and None.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def cannot_write(path: PathLike, error: OSError) -> UserError:
    """Returns the error of a path that cannot be written.

    Args:
        path: The path.
        error: What the system says.

    Returns:
        An error of one sentence.
    """
    why = error.strerror or str(error)
    return UserError(
        f"--workdir: expected to be able to write '{os.fspath(path)}', got: {why}."
    )


def reason(error: Any) -> str:
    """Returns the text of an error on one line, without its full stop.

    Args:
        error: The error.

    Returns:
        The text.
    """
    return " ".join(str(error).split()).rstrip(".")


def _cannot_read(path: PathLike, wanted: str, why: Any) -> UserError:
    return UserError(f"'{os.fspath(path)}': expected {wanted}, got: {reason(why)}.")
