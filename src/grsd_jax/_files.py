"""Files that are written whole or not at all, and archives of arrays in them.

What the files hold, and what to tell whoever asked for them, is the caller's business.
"""

import contextlib
import errno
import hashlib
import io
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

PathLike = str | os.PathLike[str]

#: What a file system says that cannot sync; some do not let a folder be opened.
_NO_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EACCES}

#: The comment at the end of an archive: a tag and 64 digits.
_TAG = b"sha256:"
_COMMENT_SIZE = len(_TAG) + 64


def as_path(path: PathLike) -> Path:
    """Returns a path with ``~`` as the home folder.

    Raises:
        ValueError: If it holds a null byte, which no file system takes.
    """
    found = Path(os.path.expanduser(path))
    if "\0" in str(found):
        raise ValueError(f"path: expected no null byte, got {str(found)!r}.")
    return found


def temporary_path(path: Path) -> Path:
    """Returns where this process writes what becomes ``path`` by one rename."""
    return path.parent / f".{path.name}.{os.getpid()}.grsd.tmp"


@contextlib.contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """Gives a temporary path that replaces ``path`` when the block ends well.

    The temporary file lies in the same folder, so that the replacement is one rename;
    it is synced first, and removed if the block fails. Whoever reads ``path`` sees the
    old contents or the new ones, never a part.

    Raises:
        OSError: If the folder cannot be written or is full.
    """
    path = as_path(path)
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Has a file or the entries of a folder written to disk, where that can be done.

    Raises:
        OSError: If the disk is full or fails.
    """
    with _where_supported():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_descriptor(descriptor: int) -> None:
    """Has an open file written to disk, where the file system can.

    Raises:
        OSError: If the disk is full or fails.
    """
    with _where_supported():
        os.fsync(descriptor)


@contextlib.contextmanager
def _where_supported() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def packed(arrays: Mapping[str, Any]) -> bytes:
    """Returns named arrays as a compressed ``.npz`` archive, without pickle.

    The checksum is the comment of the archive, so that any reader of ``.npz`` files can
    read it.

    Raises:
        ValueError: If an array could not be read back without pickle.
    """
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise ValueError(f"{name}: expected an array of numbers, got dtype object.")
    archive = io.BytesIO()
    np.savez_compressed(archive, allow_pickle=False, **arrays)
    whole = archive.getvalue()
    # An archive ends with the length of its comment, which is 0 so far.
    digest = hashlib.sha256(whole).hexdigest().encode()
    return whole[:-2] + struct.pack("<H", _COMMENT_SIZE) + _TAG + digest


def unpacked(whole: bytes) -> dict[str, np.ndarray]:
    """Returns the arrays of an ``.npz`` archive, without pickle.

    The checksum is verified. An archive without a comment was not written here, or
    before there were checksums, and has none.

    Raises:
        Exception: Of any kind, if the bytes are no such archive, or a damaged one.
    """
    written = whole[-_COMMENT_SIZE:]
    if written.startswith(_TAG):
        before = whole[: -_COMMENT_SIZE - 2] + struct.pack("<H", 0)
        if written != _TAG + hashlib.sha256(before).hexdigest().encode():
            raise ValueError("contents that do not fit the checksum")
    elif not whole.endswith(struct.pack("<H", 0)):
        raise ValueError("an end without a checksum")
    loaded = np.load(io.BytesIO(whole), allow_pickle=False)
    if not isinstance(loaded, np.lib.npyio.NpzFile):
        raise ValueError("a single array")
    with loaded:
        return {name: loaded[name] for name in loaded.files}


def reason(error: Any) -> str:
    """Returns the text of an error on one line, without its full stop."""
    return " ".join(str(error).split()).rstrip(".")
