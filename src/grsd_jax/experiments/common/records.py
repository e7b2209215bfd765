"""What the files of a run hold: JSON, arrays and lines, with checksums, no pickle.

Every file and every line carries a checksum of its contents, which is verified when it
is read. Files that were written before there were checksums are read without.
"""

import hashlib
import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import jax
import numpy as np

from grsd_jax._files import (
    PathLike,
    as_path,
    packed,
    reason,
    sync_descriptor,
    unpacked,
)
from grsd_jax.experiments.common import files

#: What a JSON file says of itself, beside its contents. That there are two keys shows
#: that a checksum is missing, not that the file is older than checksums.
_FORMAT, _CHECKSUM = "file_format", "sha256"
_VERSION = 2

#: The same for one line; its number shows a line that was lost or doubled.
_LINE, _LINE_CHECKSUM = "line", "crc32"


def write_json(path: PathLike, value: Mapping[str, Any]) -> None:
    """Writes a JSON object, whole or not at all; what is not finite becomes null.

    Args:
        path: The file.
        value: Nested dicts, lists, tuples, and numpy or JAX numbers and arrays.

    Raises:
        UserError: If the file cannot be written.
        ValueError: If the value has a key that the file itself uses.
    """
    for key in (_FORMAT, _CHECKSUM):
        if key in value:
            raise ValueError(f"{key}: expected no such key, the file itself has one.")
    contents = plain(value) | {_FORMAT: _VERSION}
    contents |= {_CHECKSUM: _sha256(_canonical(contents))}
    text = json.dumps(contents, indent=2, sort_keys=True, allow_nan=False)
    with files.atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: PathLike) -> dict[str, Any]:
    """Reads a JSON object, and verifies its checksum.

    Args:
        path: The file.

    Returns:
        The object, without what the file says of itself.

    Raises:
        UserError: If the file is missing, is not a JSON object, or is damaged.
    """
    value = read_any_json(path)
    if not isinstance(value, dict):
        raise files.cannot_read(path, "a JSON object", f"a {type(value).__name__}")
    return value


def read_any_json(path: PathLike) -> Any:
    """Reads a JSON file of anyone's, and verifies the checksum if it is one of ours.

    Args:
        path: The file.

    Returns:
        Its value.

    Raises:
        UserError: If the file is missing, is not JSON, or is damaged.
    """
    try:
        value = _loads(as_path(path).read_bytes())
        if isinstance(value, dict) and (_FORMAT in value or _CHECKSUM in value):
            written = value.pop(_CHECKSUM, "no checksum")
            if written != _sha256(_canonical(value)):
                raise ValueError("contents that do not fit the checksum")
            del value[_FORMAT]
    except (OSError, ValueError) as error:
        raise files.cannot_read(path, "a JSON file", error) from error
    return value


def write_npz(path: PathLike, arrays: Mapping[str, Any]) -> None:
    """Writes named arrays as a compressed ``.npz``, whole or not at all.

    The checksum is the comment of the archive, so that any reader of ``.npz`` files can
    read it.

    Args:
        path: The file.
        arrays: Arrays of numbers by name.

    Raises:
        UserError: If the file cannot be written.
        ValueError: If an array could not be read back without pickle.
    """
    archive = packed(arrays)
    with files.atomic_path(path) as temporary:
        temporary.write_bytes(archive)


def read_npz(path: PathLike) -> dict[str, np.ndarray]:
    """Reads all arrays of an ``.npz`` file, without pickle; verifies the checksum.

    Args:
        path: The file.

    Returns:
        The arrays by name.

    Raises:
        UserError: If the file is missing, damaged, or needs pickle.
    """
    with files.reading(path, "an .npz file of arrays without pickle"):
        return unpacked(as_path(path).read_bytes())


def append_jsonl(path: PathLike, line: Mapping[str, Any]) -> None:
    """Appends one numbered line of JSON with its checksum, and syncs it to disk.

    A last line that an earlier write left without its end is completed if all of it is
    there, and dropped otherwise.

    Args:
        path: The file; its folder must exist.
        line: The record; see `write_json`.

    Raises:
        UserError: If the file cannot be written, or its last line is not one of ours.
    """
    try:
        with open(as_path(path), "a+b") as file:
            number = _mend(path, file) + 1
            file.write(_line(line, number))
            file.flush()
            sync_descriptor(file.fileno())
    except OSError as error:
        raise files.cannot_write(path, error) from error


def read_jsonl(path: PathLike) -> list[dict[str, Any]]:
    """Reads the records of a JSON-lines file, and verifies numbers and checksums.

    Args:
        path: The file; a missing one has no records.

    Returns:
        The records. A last line cut short, by a kill in mid-write, is left out, unless
        it lacks only its end.

    Raises:
        UserError: If a line is not a JSON object, is damaged, lost or doubled.
    """
    try:
        *lines, rest = as_path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise files.cannot_read(path, "a file of JSON lines", error) from error
    records: list[dict[str, Any]] = []
    numbered = True
    for place, text in enumerate(lines, start=1):
        number, record = _checked(path, text, place)
        if place == 1:
            numbered = number is not None
        if number != (place if numbered else None):
            raise files.cannot_read(
                path, "lines numbered one by one", f"{number} at line {place}"
            )
        records.append(record)
    last = _complete(rest, len(lines) + 1)
    return records if last is None else [*records, last]


def write_jsonl(path: PathLike, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes all records of a JSON-lines file, whole or not at all.

    Args:
        path: The file.
        records: Its records.

    Raises:
        UserError: If the file cannot be written.
    """
    lines = [_line(record, number) for number, record in enumerate(records, start=1)]
    with files.atomic_path(path) as temporary:
        temporary.write_bytes(b"".join(lines))


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
    if not as_path(path).exists():
        return []
    found = read_jsonl(path)
    with files.reading(path, "a step in every line"):
        kept = [record for record in found if record["step"] <= step]
    write_jsonl(path, kept)
    return kept


def _line(record: Mapping[str, Any], number: int) -> bytes:
    """Returns a record as a line of a file, with its number and checksum."""
    for key in (_LINE, _LINE_CHECKSUM):
        if key in record:
            raise ValueError(f"{key}: expected no such key, the file itself has one.")
    contents = plain(record) | {_LINE: number}
    contents |= {_LINE_CHECKSUM: _crc32(_canonical(contents))}
    return json.dumps(contents, allow_nan=False).encode() + b"\n"


def _unpack(text: bytes) -> tuple[int | None, dict[str, Any]]:
    """Returns a line's number and record; no number in a file before there were any.

    Raises:
        ValueError: If the line is not a JSON object, or does not fit its checksum.
    """
    record = _loads(text)
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}")
    if _LINE not in record and _LINE_CHECKSUM not in record:
        return None, record
    written = record.pop(_LINE_CHECKSUM, "no checksum")
    if _LINE not in record or written != _crc32(_canonical(record)):
        raise ValueError("contents that do not fit the checksum")
    return record.pop(_LINE), record


def _checked(
    path: PathLike, text: bytes, place: int | str
) -> tuple[int | None, dict[str, Any]]:
    try:
        return _unpack(text)
    except ValueError as error:
        got = f"line {place} ({reason(error)})"
        raise files.cannot_read(path, "a JSON object on every line", got) from error


def _complete(rest: bytes, number: int) -> dict[str, Any] | None:
    """Returns the record of a last line that lacks only its end, and None otherwise."""
    try:
        found, record = _unpack(rest)
    except ValueError:
        return None
    return record if found == number else None


def _mend(path: PathLike, file: BinaryIO) -> int:
    """Completes or drops a last line without its end; returns the last one's number."""
    size = file.seek(0, os.SEEK_END)
    *lines, rest = _tail(file, size).split(b"\n")
    number: int | None = 0
    if lines:
        number, _ = _checked(path, lines[-1], "last")
    if number is None:
        raise files.cannot_read(path, "numbered lines", "a last one without a number")
    if not rest:
        return number
    if _complete(rest, number + 1) is not None:
        file.write(b"\n")
        return number + 1
    file.truncate(size - len(rest))
    return number


def _tail(file: BinaryIO, size: int) -> bytes:
    """Returns the end of a file, at least from where its last whole line begins."""
    length = 2**14
    while True:
        start = max(0, size - length)
        file.seek(start)
        tail = file.read(size - start)
        if start == 0 or tail.count(b"\n") > 1:
            return tail
        length *= 4


def _loads(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, allow_nan=False).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _crc32(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"


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
