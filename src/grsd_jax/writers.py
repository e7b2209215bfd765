"""Records of a probe as named numbers, for the dashboards of a training.

`scalars` turns a record into a flat dictionary. The writers are thin: each takes a step
and a record, and hands the numbers to TensorBoard, to a W&B run, or to a function.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from grsd_jax._files import PathLike
from grsd_jax.results.fields import description_of
from grsd_jax.results.flat import variables_of
from grsd_jax.results.tables import needed

__all__ = ["CallbackWriter", "Run", "TensorBoardWriter", "WandbWriter", "scalars"]

#: The axes whose entries are numbers of their own.
_SHORT = ("shell", "edge", "inner_edge")


class Run(Protocol):
    """What a `WandbWriter` needs of a run, which ``wandb.init()`` returns."""

    def log(self, data: dict[str, float], *, step: int) -> Any:
        """Takes numbers by name."""


def scalars(record: Any, prefix: str = "grsd") -> dict[str, float]:
    """Returns the numbers of a record, or of any result, by name.

    Single numbers, and the entries of short arrays over shells and edges: index 0 is
    the smallest lambda. What is undefined or masked is left out, since dashboards draw
    NaN as a gap or as zero.

    Args:
        record: A record of a probe, or any result.
        prefix: The beginning of every name.

    Returns:
        Names such as ``"grsd/total_energy"`` and ``"grsd/dynamics_energies/03"``, in
        the order of the fields. Truths are 0 or 1.

    Raises:
        ValueError: If it is no result, or is traced.
    """
    if description_of(record) is None:
        raise ValueError(f"record: expected a result, got a {type(record).__name__}.")
    found: dict[str, float] = {}
    for variable in variables_of(record):
        name = f"{prefix}/{variable.name}"
        if variable.values.ndim == 0:
            found[name] = float(variable.values)
        elif len(variable.axes) == 1 and variable.axes[0] in _SHORT:
            found |= {
                f"{name}/{k:02d}": float(value)
                for k, value in enumerate(variable.values)
            }
    return {name: value for name, value in found.items() if np.isfinite(value)}


class CallbackWriter:
    """Hands the numbers of every record to a function.

    Args:
        callback: Called with the step and the numbers by name.
        prefix: The beginning of every name.
    """

    def __init__(
        self, callback: Callable[[int, dict[str, float]], Any], prefix: str = "grsd"
    ):
        self._callback, self._prefix = callback, prefix

    def write(self, step: int, record: Any) -> None:
        """Hands over a record; None, where there was none to make, is passed over.

        Args:
            step: The step of the training.
            record: What `grsd_jax.dynamics.Probe.update` returned.
        """
        if record is not None:
            self._callback(step, scalars(record, self._prefix))


class WandbWriter(CallbackWriter):
    """Logs the numbers of every record to a W&B run, or to what has its ``log``.

    Args:
        run: What ``wandb.init()`` returns.
        prefix: The beginning of every name.
    """

    def __init__(self, run: Run, prefix: str = "grsd"):
        super().__init__(lambda step, numbers: run.log(numbers, step=step), prefix)


class TensorBoardWriter(CallbackWriter):
    """Writes the numbers of every record to an event file of TensorBoard.

    Args:
        logdir: The folder, made if need be.
        prefix: The beginning of every name.

    Raises:
        ImportError: If ``tensorboardX`` is not installed.
    """

    def __init__(self, logdir: PathLike, prefix: str = "grsd"):
        library = needed("tensorboardX", "TensorBoardWriter", "tensorboard")
        self._events = library.SummaryWriter(str(logdir))
        super().__init__(self._add, prefix)

    def _add(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._events.close()
