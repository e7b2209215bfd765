"""Files on disk: written whole or not at all, synced, and told of in one sentence.

Everything that goes wrong with a file is a `UserError` with the file's name. What the
files hold is the business of `records`.
"""

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from grsd_jax import _files
from grsd_jax._files import PathLike, as_path, reason, sync, temporary_path
from grsd_jax.experiments.common.config import UserError

_TEMPORARY = re.compile(r"\..+\.(\d+)\.grsd\.tmp")


@contextlib.contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """Gives a temporary path that replaces ``path`` when the block ends well.

    Args:
        path: The file to write.

    Yields:
        The path to write to.

    Raises:
        UserError: If the folder cannot be written or is full.
    """
    try:
        with _files.atomic_path(path) as temporary:
            yield temporary
    except OSError as error:
        raise cannot_write(path, error) from error


def checksum(path: Path) -> str:
    """Returns the SHA-256 of a file.

    Args:
        path: The file.

    Returns:
        64 hexadecimal digits.

    Raises:
        OSError: If it cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_temporaries(folder: Path) -> None:
    """Removes what processes that are gone have left half-written in a folder.

    Folders inside that have a lock of their own are left to the runs that hold it.

    Args:
        folder: The folder, which this process may write; its subfolders too.

    Raises:
        UserError: If something cannot be removed.
    """
    try:
        for place, folders, names in os.walk(folder):
            for name in [*folders, *names]:
                found = _TEMPORARY.fullmatch(name)
                if found and not _is_alive(int(found[1])):
                    remove(Path(place, name))
            folders[:] = [x for x in folders if not Path(place, x, ".lock").exists()]
    except OSError as error:
        raise cannot_write(folder, error) from error


def _is_alive(pid: int) -> bool:
    """Returns whether another process has that id; this one has nothing half-written.

    In a container the process before a restart often had the same id as this one.
    """
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def remove(path: PathLike) -> None:
    """Removes a file or a folder, if it is there.

    A folder is renamed first, so that whoever reads sees all of it or nothing.

    Args:
        path: The path.

    Raises:
        UserError: If the folder cannot be written.
    """
    path = as_path(path)
    try:
        if path.is_dir() and not path.is_symlink():
            doomed = temporary_path(path)
            os.replace(path, doomed)
            shutil.rmtree(doomed)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def set_aside(folder: Path, names: Sequence[str]) -> list[Path]:
    """Renames files of a folder by the next free number, ``name-1.json``: all or none.

    Every file first gets its second name, and the first names go only when all have
    one, so that a full disk or a kill leaves the originals.

    Args:
        folder: The folder.
        names: The files; those that are missing are passed over.

    Returns:
        The paths of the files that are kept.

    Raises:
        UserError: If the folder cannot be written.
    """
    paths = [folder / name for name in names]
    number = 1
    while any(_numbered(path, number).exists() for path in paths):
        number += 1
    there = [path for path in paths if path.exists()]
    try:
        for path in there:
            _duplicate(path, _numbered(path, number))
    except OSError as error:
        for path in there:
            with contextlib.suppress(OSError):
                _numbered(path, number).unlink(missing_ok=True)
        raise cannot_write(folder, error) from error
    for path in there:
        remove(path)
    return [_numbered(path, number) for path in there]


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def _duplicate(path: Path, other: Path) -> None:
    """Gives a file a second name, or copies it where file systems have no links."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copy2(path, other)
        sync(other)


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


def cannot_read(path: PathLike, wanted: str, why: Any) -> UserError:
    """Returns the error of a file that does not hold what was expected.

    Args:
        path: The file.
        wanted: What was expected of it.
        why: What it is instead, or the error it caused.

    Returns:
        An error of one sentence.
    """
    if isinstance(why, OSError):
        why = why.strerror or why
    return UserError(f"'{os.fspath(path)}': expected {wanted}, got: {reason(why)}.")


@contextlib.contextmanager
def reading(path: PathLike, wanted: str) -> Iterator[None]:
    """Tells that a file does not hold what was expected, whatever that broke.

    For code that interprets what a file holds, which may be any file of that name:
    every number can be a list there, and every key missing.

    Args:
        path: The file.
        wanted: What is expected of it.

    Yields:
        Nothing.

    Raises:
        UserError: If the block raises any error; one that names the file passes.
    """
    try:
        yield
    except MemoryError:
        raise
    except UserError as error:
        if os.fspath(path) in str(error) or str(error).startswith("--"):
            raise  # it names the file or the flag
        raise cannot_read(path, wanted, error) from error
    except OSError as error:
        raise cannot_read(path, wanted, error) from error
    except Exception as error:
        why = f"{type(error).__name__}: {reason(error)[:160]}"
        raise cannot_read(path, wanted, why) from error
