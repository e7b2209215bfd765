"""A run: its folder, its processes, its progress, and what was computed already."""

import contextlib
import errno
import fcntl
import importlib.metadata
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from absl import flags
from jax.sharding import AxisType, Mesh

from grsd_jax._files import sync_descriptor
from grsd_jax.experiments.common import files, records
from grsd_jax.experiments.common.config import UserError

if TYPE_CHECKING:
    from tqdm import tqdm

#: Scalars for a JSON file, and named arrays for an ``.npz`` file beside it.
Result = tuple[dict[str, Any], dict[str, np.ndarray]]

#: Seconds between the lines of a log; work that takes less leaves none.
LOG_SECONDS = 30.0

_ADDRESS = ("coordinator_address", "num_processes", "process_id")


def cached(
    path: files.PathLike, made_by: Mapping[str, Any], compute: Callable[[], Result]
) -> Result:
    """Returns what ``compute`` returns, from files made under the same ``made_by``.

    The entry lies in ``path.json`` together with ``made_by``; the arrays, if there are
    any, in ``path.npz``. The arrays are written first and each file whole or not at
    all, so that a kill at any moment leaves a result or none. A file that is missing,
    damaged or made by something else is computed again.

    Args:
        path: The files' common name, without a suffix.
        made_by: All that the result depends on, in values that JSON can hold.
        compute: Returns the entry and the arrays.

    Returns:
        The entry and the arrays, always as the files hold them: a number that is not
        finite is None in the entry, and a tuple is a list.

    Raises:
        UserError: If the files cannot be written.
    """
    path = files.as_path(path)
    note, file = (path.with_name(path.name + suffix) for suffix in (".json", ".npz"))
    found = _read(note, file, made_by)
    if found is not None:
        return found
    entry, arrays = compute()
    files.remove(note)  # never beside the arrays of another result
    if arrays:
        records.write_npz(file, arrays)
    else:
        files.remove(file)
    contents = {"made_by": made_by, "entry": entry, "arrays": sorted(arrays)}
    records.write_json(note, contents)
    return records.plain(entry), {name: np.asarray(x) for name, x in arrays.items()}


def _read(note: Path, file: Path, made_by: Mapping[str, Any]) -> Result | None:
    """Returns the result in the two files, None unless both are whole and match."""
    try:
        contents = records.read_json(note)
        if contents.get("made_by") != records.plain(made_by):
            return None
        arrays = records.read_npz(file) if contents["arrays"] else {}
        if sorted(arrays) == contents["arrays"]:
            return contents["entry"], arrays
    except (UserError, KeyError):  # missing or damaged
        pass
    return None


def check_same_run(folder: Path, settings: Mapping[str, Any]) -> None:
    """Checks that the training in a folder was made with the given settings.

    Args:
        folder: The folder of a training, with its ``config.json``.
        settings: The settings that matter, by the names of their flags.

    Raises:
        UserError: If one differs, or the file cannot be read or lacks one.
    """
    path = folder / "config.json"
    written = records.read_json(path)
    for name, value in settings.items():
        if name not in written:
            raise files.cannot_read(path, f"the setting '{name}'", "none")
        if (there := written[name]) != value:
            raise UserError(
                f"--{name}: expected {there!r} as in the run that is in '{folder}', "
                f"got {value!r}; choose another --workdir for other settings."
            )


def environment(*, precision: str) -> dict[str, Any]:
    """Describes what a result was computed with.

    Args:
        precision: The value of ``--precision``.

    Returns:
        Versions, the kind and number of devices, and the precision.
    """
    packages = ("grsd-jax", "jax", "jaxlib", "flax", "optax", "numpy")
    versions = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name.replace("-", "_")] = importlib.metadata.version(name)
    devices = jax.devices()
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "precision": precision,
    }


@contextlib.contextmanager
def workdir_lock(workdir: files.PathLike) -> Iterator[Path]:
    """Makes the folder, checks that it can be written, and keeps other runs out.

    What a killed run left half-written there is removed. A folder that was made here
    and is still empty when the run fails is removed too. The first process of a job
    holds the lock for all of it. The lock is the system's: it ends with the process,
    however that ends.

    Args:
        workdir: The folder.

    Yields:
        The folder.

    Raises:
        UserError: If the folder cannot be written, or another run holds it.
    """
    workdir = files.as_path(workdir)
    if not writes():
        yield workdir
        return
    made = not workdir.exists()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / ".lock", "a+", encoding="utf-8", errors="replace")  # noqa: SIM115
    except OSError as error:
        raise files.cannot_write(workdir, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise files.cannot_write(workdir, error) from error
            lock.seek(0)
            pid = lock.read().strip() or "unknown"
            raise UserError(
                f"--workdir: expected no other run in '{workdir}', "
                f"got one with pid {pid}."
            ) from None
        _check_writable(workdir)
        files.remove_temporaries(workdir)
        try:
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n")
            lock.flush()
        except OSError as error:
            raise files.cannot_write(workdir, error) from error
        try:
            yield workdir
        except BaseException:
            if made:
                _remove_if_unused(workdir)
            raise


def _remove_if_unused(workdir: Path) -> None:
    """Removes a folder with nothing but its lock; one that is not left as it is."""
    with contextlib.suppress(OSError):
        if [path.name for path in workdir.iterdir()] == [".lock"]:
            (workdir / ".lock").unlink()
            workdir.rmdir()


def _check_writable(workdir: Path) -> None:
    """Writes and removes a small file, so that a full folder is seen at the start."""
    try:
        with tempfile.TemporaryFile(dir=workdir) as file:
            file.write(bytes(2**16))
            file.flush()
            sync_descriptor(file.fileno())
    except OSError as error:
        raise files.cannot_write(workdir, error) from error


def define_process_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines ``--distributed`` and the flags that say where the processes are.

    Args:
        flag_values: Where to define them.
    """
    options = {"flag_values": flag_values, "module_name": sys.argv[0]}
    flags.DEFINE_boolean(
        "distributed",
        False,
        "Join the other processes of the job. Under SLURM and Open MPI and on TPU "
        "pods they are found; elsewhere give the three flags below.",
        **options,
    )
    flags.DEFINE_string(
        "coordinator_address", None, "HOST:PORT of process 0.", **options
    )
    flags.DEFINE_integer("num_processes", None, "Processes of the job.", **options)
    flags.DEFINE_integer("process_id", None, "This one, from 0.", **options)


def join_processes(flag_values: flags.FlagValues = flags.FLAGS) -> Mesh | None:
    """Joins the job if the flags ask for it, and returns the mesh of all devices.

    To be called before anything is computed.

    Args:
        flag_values: Parsed flags.

    Returns:
        A mesh with one axis, ``"examples"``; None if there is one device only.

    Raises:
        UserError: If the flags do not fit, or the other processes are not found.
    """
    given = {name: flag_values[name].value for name in _ADDRESS}
    told = [name for name, value in given.items() if value is not None]
    if told and (len(told) < len(given) or not flag_values["distributed"].value):
        missing = [n for n in ("distributed", *_ADDRESS) if not flag_values[n].present]
        raise UserError(
            f"--{told[0]}: expected --distributed, --coordinator_address, "
            "--num_processes and --process_id together, got none of "
            f"{', '.join(f'--{name}' for name in missing)}."
        )
    if flag_values["distributed"].value:
        # CPU devices of several processes need it; other backends do not look at it.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        try:
            jax.distributed.initialize(
                given["coordinator_address"],
                given["num_processes"],
                given["process_id"],
            )
        except (ValueError, RuntimeError) as error:
            raise UserError(
                "--distributed: expected to find the other processes of the job, "
                f"got: {files.reason(error)}."
            ) from error
    if jax.device_count() == 1:
        return None
    return jax.make_mesh(
        (jax.device_count(),), ("examples",), axis_types=(AxisType.Auto,)
    )


def writes() -> bool:
    """Returns whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


class _Lines:
    """A text file for tqdm that ends every redrawn bar with a newline."""

    def write(self, text: str) -> None:
        told = text.strip()
        if told:
            sys.stderr.write(told + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> "tqdm":
    """Makes a bar of progress, which the first process alone shows.

    A run under nohup or a scheduler writes to a file, where a bar that redraws itself
    is of no use and silence for an hour is worse.

    Args:
        iterable: What the work goes through; None to count by ``update``.
        **options: Of `tqdm`.

    Returns:
        The bar; where standard error is no terminal it writes a line each
        `LOG_SECONDS`, and a last one at its end if it wrote any.
    """
    from tqdm import tqdm  # only what shows a bar needs the package

    class Log(tqdm):
        """A bar of lines, the last of which says how far the work came."""

        shown: int | None = None

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            if msg is None:
                self.shown = self.n
            super().display(msg, pos)

        def close(self) -> None:
            if self.shown not in (None, self.n):
                self.refresh()
            super().close()

    if not writes():
        return tqdm(iterable, disable=True, **options)
    if not sys.stderr.isatty():
        options |= {
            "file": _Lines(),
            "delay": LOG_SECONDS,
            "mininterval": LOG_SECONDS,
            "maxinterval": LOG_SECONDS,
            "ncols": 88,
            "leave": False,
            "position": 0,  # a nested bar would move the cursor
        }
        return Log(iterable, **options)
    return tqdm(iterable, **options)
