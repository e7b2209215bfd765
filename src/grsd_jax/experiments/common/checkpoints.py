"""Checkpoints of training: a thin layer over Orbax, with errors of one sentence.

A checkpoint holds the state's arrays by their tree paths, so that any model with the
same tree can load it, whatever wrote it. No pickle is involved.
"""

import contextlib
import os
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
from grsd_jax.experiments.common.config import UserError


class Checkpoints:
    """The checkpoints of one run, in one folder; a context manager.

    Each is written whole or not at all, and an older one is removed only after the
    newer one is complete.

    Args:
        directory: The folder, made if it is missing.
        max_to_keep: How many of the newest checkpoints stay.
        read_only: Whether nothing is made, cleaned up or written, so that the folder
            of a run in progress can be read.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        max_to_keep: int = 2,
        read_only: bool = False,
    ):
        self._directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=not read_only,
            create=not read_only,
        )
        try:
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=options,
                item_handlers=ocp.StandardCheckpointHandler(),
            )
        except Exception as error:
            raise self._unusable(_reason(error)) from error

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the manager."""
        self._manager.close()

    def latest_step(self) -> int | None:
        """Returns the step of the newest checkpoint, or None if there is none."""
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        """Returns the steps of all checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: PyTree) -> None:
        """Writes a checkpoint.

        Args:
            step: The step.
            state: A pytree of arrays.

        Raises:
            UserError: If it cannot be written, or one of that step exists already.
        """
        where = self._directory / str(step)
        try:
            with _uninterrupted():
                saved = self._manager.save(
                    step, args=ocp.args.StandardSave(_named(state))
                )
        except Exception as error:
            raise UserError(
                f"--workdir: expected to be able to write the checkpoint '{where}', "
                f"got: {_reason(error)}."
            ) from error
        if not saved:
            raise UserError(
                f"--workdir: expected no checkpoint newer than step {step - 1} in "
                f"'{self._directory}', got step {self.latest_step()}."
            )

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
        try:
            metadata = self._manager.item_metadata(step)
            stored = getattr(metadata, "tree", None) or {}
            _check_matches(where, template, stored)
            abstract = jax.tree.map(_abstract, stored)
            with _uninterrupted():
                loaded = self._manager.restore(
                    step, args=ocp.args.StandardRestore(abstract)
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

    def _unusable(self, got: str) -> UserError:
        return UserError(
            f"checkpoint: expected a folder of checkpoints in '{self._directory}', "
            f"got {got}."
        )


def restore_latest(directory: str | os.PathLike[str], template: PyTree) -> PyTree:
    """Reads the newest checkpoint of a folder, without making or changing anything.

    Args:
        directory: The folder of checkpoints.
        template: What to read; see `Checkpoints.restore`. With
            ``{"params": ..., "batch_stats": ...}`` the optimiser's state stays unread
            by the caller.

    Returns:
        A pytree like the template.

    Raises:
        UserError: If there is none, it is damaged, or it is of another tree.
    """
    if not Path(directory).is_dir():
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
