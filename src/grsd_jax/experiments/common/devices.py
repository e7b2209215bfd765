"""The devices of a run: joining the processes of a job, the mesh, and who writes.

All of it is `jax.distributed`; this module only gives it flags.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import flags
from jax.sharding import AxisType, Mesh

from grsd_jax.experiments.common import records
from grsd_jax.experiments.common.config import UserError

_ADDRESS = ("coordinator_address", "num_processes", "process_id")


def define_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines ``--distributed`` and what it may be told.

    Args:
        flag_values: Where to define them.
    """
    options = {"flag_values": flag_values, "module_name": __name__}
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


def join(flag_values: flags.FlagValues = flags.FLAGS) -> Mesh | None:
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
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                "--distributed: expected to find the other processes of the job, "
                f"got: {reason}."
            ) from error
    if jax.device_count() == 1:
        return None
    return jax.make_mesh(
        (jax.device_count(),), ("examples",), axis_types=(AxisType.Auto,)
    )


def writes() -> bool:
    """Returns whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


@contextlib.contextmanager
def workdir_lock(workdir: str | os.PathLike[str]) -> Iterator[Path]:
    """Locks a folder for the whole job, see `records.workdir_lock`.

    Args:
        workdir: The folder.

    Yields:
        The folder, which the process that writes has made and holds.

    Raises:
        UserError: If the folder cannot be written, or another run holds it.
    """
    if not writes():
        yield Path(workdir)
        return
    with records.workdir_lock(workdir) as folder:
        yield folder
