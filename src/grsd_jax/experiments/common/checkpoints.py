"""Checkpoints of training: a thin layer over Orbax, with errors of one sentence.

A checkpoint holds the state's arrays by their tree paths, so that any model with the
same tree can load it, whatever wrote it. No pickle is involved.
"""

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from grsd_jax._typing import PyTree
from grsd_jax.experiments.common import files, records
from grsd_jax.experiments.common.config import UserError


class Checkpoints:
    """The checkpoints of one run, in one folder; a context manager.

    Each is a folder by the name of its step, with the arrays as Orbax writes them and
    the checksum of every file in ``files.json``. It gets its name by one rename, when
    it is complete, and loses it by one before anything is deleted; an older one is
    removed only after the newer one is complete. A folder in which a file is missing is
    not a checkpoint.

    Args:
        directory: The folder, made if it is missing.
        max_to_keep: How many of the newest checkpoints stay.
        read_only: Whether nothing is made, cleaned up or written, so that the folder
            of a run in progress can be read.
    """

    def __init__(
        self,
        directory: files.PathLike,
        *,
        max_to_keep: int = 2,
        read_only: bool = False,
    ):
        self._directory = files.as_path(directory).absolute()
        self._max_to_keep = max_to_keep
        if not read_only:
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise self._unusable(files.reason(error)) from error
            files.remove_temporaries(self._directory)
        self._orbax = ocp.Checkpointer(ocp.StandardCheckpointHandler())

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes Orbax."""
        self._orbax.close()

    def latest_step(self) -> int | None:
        """Returns the step of the newest checkpoint, or None if there is none.

        Raises:
            UserError: If there are folders of checkpoints, and none is complete: a
                training must not begin again over them by itself.
        """
        steps = self.all_steps()
        if not steps and (parts := self._folders()):
            raise self._unusable(
                "only ones that are incomplete or older than checksums, of the steps "
                f"{sorted(parts)}; remove them to start from the beginning"
            )
        return steps[-1] if steps else None

    def all_steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, ascending."""
        folders = self._folders().items()
        return sorted(step for step, folder in folders if _is_complete(folder))

    def save(self, step: int, state: PyTree) -> None:
        """Writes a checkpoint.

        Args:
            step: The step.
            state: A pytree of arrays.

        Raises:
            UserError: If it cannot be written, or a newer one exists, or one of that
                step.
        """
        steps = self.all_steps()
        if steps and steps[-1] >= step:
            raise UserError(
                f"--workdir: expected no checkpoint newer than step {step - 1} in "
                f"'{self._directory}', got step {steps[-1]}."
            )
        where = self._directory / str(step)
        try:
            with _uninterrupted():
                self._write(where, _named(state))
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"--workdir: expected to be able to write the checkpoint '{where}', "
                f"got: {_reason(error)}."
            ) from error
        for old in [*steps, step][: -self._max_to_keep]:
            files.remove(self._directory / str(old))

    def _write(self, where: Path, state: PyTree) -> None:
        """Writes a checkpoint beside its place, and gives it its name at the end."""
        temporary = files.temporary_path(where)
        files.remove(where)  # what is there is incomplete
        try:
            arrays = ocp.args.StandardSave(state)
            self._orbax.save(temporary / _ARRAYS, args=arrays)
            records.write_json(temporary / _MANIFEST, _manifest(temporary))
            os.replace(temporary, where)
            files.sync(self._directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def restore(self, template: PyTree, *, step: int | None = None) -> PyTree:
        """Reads a checkpoint, or the part of it that the template asks for.

        Args:
            template: A pytree of arrays or `jax.ShapeDtypeStruct`; paths and shapes
                must be those of the checkpoint, which may hold more.
            step: The step; the newest by default.

        Returns:
            A pytree like the template.

        Raises:
            UserError: If there is no checkpoint, it is damaged, or it is of another
                tree.
        """
        step = self.latest_step() if step is None else step
        if step is None:
            raise self._unusable("none")
        where = f"step {step} of '{self._directory}'"
        folder = self._directory / str(step)
        try:
            _verify(folder)
            metadata = self._orbax.metadata(folder / _ARRAYS).item_metadata
            stored = getattr(metadata, "tree", None) or {}
            _check_matches(where, template, stored)
            abstract = jax.tree.map(_abstract, stored)
            with _uninterrupted():
                loaded = self._orbax.restore(
                    folder / _ARRAYS, args=ocp.args.StandardRestore(abstract)
                )
        except UserError:
            raise
        except Exception as error:  # Orbax and its storage raise many kinds
            raise UserError(
                f"checkpoint: expected a complete checkpoint in {where}, got: "
                f"{_reason(error)}; remove that step's folder to use the one before."
            ) from error
        arrays = _by_path(loaded)
        leaves, treedef = jax.tree_util.tree_flatten_with_path(template)
        return treedef.unflatten([arrays[_name(path)] for path, _ in leaves])

    def _folders(self) -> dict[int, Path]:
        """Returns what lies in the folder under the name of a step."""
        if not self._directory.is_dir():
            return {}
        found = self._directory.iterdir()
        return {int(path.name): path for path in found if path.name.isdecimal()}

    def _unusable(self, got: str) -> UserError:
        return UserError(
            f"checkpoint: expected a folder of checkpoints in '{self._directory}', "
            f"got {got}."
        )


#: The files of a checkpoint: the arrays, and the checksum of each of their files.
_ARRAYS, _MANIFEST = "arrays", "files.json"


def _manifest(folder: Path) -> dict[str, str]:
    """Returns the checksum of every file of a checkpoint, by its name in the folder."""
    paths = sorted(path for path in (folder / _ARRAYS).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): files.checksum(path) for path in paths}


def _is_complete(folder: Path) -> bool:
    """Returns whether all files are there; a damaged one is noticed on loading."""
    try:
        names = records.read_json(folder / _MANIFEST)
    except UserError:
        return (folder / _MANIFEST).exists()
    return all((folder / name).exists() for name in names)


def _verify(folder: Path) -> None:
    """Raises ValueError or OSError unless every file is as it was written."""
    try:
        checksums = records.read_json(folder / _MANIFEST)
    except UserError as error:
        raise ValueError(str(error)) from error
    for name, checksum in checksums.items():
        if files.checksum(folder / name) != checksum:
            raise ValueError(f"contents of '{name}' that do not fit the checksum")


def restore_latest(directory: files.PathLike, template: PyTree) -> PyTree:
    """Reads the newest checkpoint of a folder, without making or changing anything.

    Args:
        directory: The folder of checkpoints.
        template: What to read; see `Checkpoints.restore`. With
            ``{"params": ..., "batch_stats": ...}`` the optimizer's state stays unread
            by the caller.

    Returns:
        A pytree like the template.

    Raises:
        UserError: If there is none, it is damaged, or it is of another tree.
    """
    if not files.as_path(directory).is_dir():
        raise UserError(
            f"checkpoint: expected a folder of checkpoints in '{directory}', got none."
        )
    with Checkpoints(directory, read_only=True) as checkpoints:
        return checkpoints.restore(template)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Puts off Ctrl-C until the block ends.

    Orbax runs an event loop, under which Python's own handler can lose the signal, and
    threads, which complain if they are cut off.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = threading.Event()
    usual = signal.signal(signal.SIGINT, lambda *_: came.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if came.is_set():
        signal.raise_signal(signal.SIGINT)


def _named(tree: PyTree) -> PyTree:
    """Returns named tuples as dicts, so that every leaf has a name in storage."""
    if hasattr(tree, "_asdict"):
        return {name: _named(item) for name, item in tree._asdict().items()}
    if isinstance(tree, Mapping):
        return {name: _named(item) for name, item in tree.items()}
    if isinstance(tree, list | tuple):
        return [_named(item) for item in tree]
    return tree


def _check_matches(where: str, template: PyTree, stored: PyTree) -> None:
    """Raises UserError unless ``stored`` has every path and shape of the template."""
    got = _by_path(stored)
    if not got:
        raise ValueError("no arrays in it")
    for name, leaf in _by_path(template).items():
        if name not in got:
            raise UserError(
                f"checkpoint: expected the array '{name}' in {where}, got none by that "
                f"name; the checkpoint is of another model or other settings."
            )
        if tuple(got[name].shape) != np.shape(leaf):
            raise UserError(
                f"checkpoint: expected '{name}' of shape {list(np.shape(leaf))} in "
                f"{where}, got {list(got[name].shape)}."
            )
        if got[name].dtype != leaf.dtype:
            raise UserError(
                f"checkpoint: expected '{name}' of dtype {leaf.dtype} in {where}, "
                f"got {got[name].dtype}."
            )


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding: jax.sharding.Sharding
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if jax.process_count() > 1:  # each process needs its own copy
        everywhere = jax.sharding.Mesh(np.asarray(jax.devices()), ("devices",))
        sharding = NamedSharding(everywhere, PartitionSpec())
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _by_path(tree: PyTree) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_name(path): leaf for path, leaf in leaves}


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text[:160]}"
