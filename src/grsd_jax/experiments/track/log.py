"""The records of a probe in a file, written as they come, for any training loop.

One JSON line a record. With the probe's state in the training's checkpoint, a run that
was killed goes on with nothing lost and nothing doubled: `ProbeLog.rewind` drops what
was written after the checkpoint, and those records are made again.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from grsd_jax._checks import check_type
from grsd_jax.dynamics import ExactBalance, InstantRecord, ProbeRecord
from grsd_jax.experiments.common import files, records
from grsd_jax.results.tables import frame_of_lines

if TYPE_CHECKING:
    import pandas


class ProbeLog:
    """A file of JSON lines, one for each record.

    Every line has its number and a checksum, so that one that was changed, lost or
    doubled is noticed when the file is read.

    Args:
        path: The file; it and its folder are made by the first record.

    Attributes:
        path: The file.
    """

    def __init__(self, path: files.PathLike):
        self.path = files.as_path(path)

    def append(self, record: ProbeRecord, **more: Any) -> None:
        """Appends the line of a record, and syncs it to disk.

        A last line that was cut short is completed or dropped first.

        Args:
            record: The record.
            **more: What else the line shall say, under other names than the record's.

        Raises:
            UserError: If the file cannot be written.
            ValueError: If it is no record, or a name is one of the record's own.
        """
        check_type("record", record, ProbeRecord)
        line = record_line(record)
        if doubled := sorted(line.keys() & more.keys()):
            raise ValueError(
                f"more: expected other names than the record's, got {doubled[0]!r}."
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise files.cannot_write(self.path, error) from error
        records.append_jsonl(self.path, line | more)

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Drops the lines after a step, and a last one that was cut short.

        Args:
            step: The step at which the run goes on, such as ``state.last_step`` of the
                probe's state in the checkpoint.

        Returns:
            The lines that stay.

        Raises:
            UserError: If the file cannot be read or written.
        """
        return records.rewind_jsonl(self.path, step)

    def read(self) -> list[dict[str, Any]]:
        """Returns the lines, as dictionaries; what was not finite is None.

        Raises:
            UserError: If the file is missing or cannot be read, or a line was changed,
                lost or doubled.
        """
        if not self.path.exists():
            raise files.cannot_read(self.path, "the records of a probe", "no file")
        return records.read_jsonl(self.path)

    def to_pandas(self) -> "pandas.DataFrame":
        """Returns the lines as a data frame, one row a record, see `frame_of_lines`.

        Raises:
            ImportError: If pandas is not installed.
            UserError: As for `read`.
        """
        return frame_of_lines(self.read())


def read_tracks(workdir: Path) -> dict[str, list[dict[str, Any]]]:
    """Reads the records of every network of a tracked training.

    Args:
        workdir: The folder of its ``results.json``.

    Returns:
        The records, by the network's name.

    Raises:
        UserError: If a file cannot be read, or has not as many records as the results
            say.
    """
    about = workdir / "results.json"
    results = records.read_json(about)
    with files.reading(about, "the number of records of every network"):
        counts = {name: int(x["num_records"]) for name, x in results["tracks"].items()}
    tracks = {}
    for name, count in counts.items():
        log = ProbeLog(workdir / name / "records.jsonl")
        tracks[name] = log.read()
        if len(tracks[name]) != count:
            wanted = f"{count} records, as '{about}' says"
            raise files.cannot_read(log.path, wanted, len(tracks[name]))
    return tracks


def find_log(path: Path) -> Path | None:
    """Returns the file of records that a path means, None for a run's folder.

    Args:
        path: A file, or a folder with a ``records.jsonl`` and no ``results.json``.

    Returns:
        The file.
    """
    if path.is_file():
        return path
    log = path / "records.jsonl"
    return log if log.exists() and not (path / "results.json").exists() else None


def read_log(path: Path) -> list[dict[str, Any]]:
    """Reads the records of any loop.

    Args:
        path: The file.

    Returns:
        The records, at least one.

    Raises:
        UserError: If the file cannot be read, or does not hold a probe's records.
    """
    lines = ProbeLog(path).read()
    with files.reading(path, "the records of a probe"):
        if not lines:
            raise ValueError("no whole line")
        for number, line in enumerate(lines, start=1):
            if missing := [name for name in _EVERY if name not in line]:
                raise ValueError(f"line {number} without {missing[0]!r}")
            if line["step"] < lines[max(number - 2, 0)]["step"]:
                raise ValueError(
                    f"line {number} at an earlier step than the line before, as if two "
                    "runs had written the file"
                )
    return lines


#: The amounts and the errors of a balance, as a line has them.
_BALANCE = (
    "energies",
    "lost",
    "moved",
    "flux",
    "rotation",
    "drift",
    "density",
    "effective_edges",
    "elapsed",
    "velocity",
    "velocity_mask",
    "counting_velocity",
    "shift_velocity",
    "non_adjacent_share",
    "floor",
    "flux_error",
    "energy_error",
    "lost_error",
    "moved_error",
    "density_error",
    "velocity_error",
    "shift_velocity_error",
    "converged",
    "rounding",
)

#: What a line has of the record itself, before the balance and after it.
_FIRST = ("step", "start_step", "effective_time", "finite", "num_resolved")
_LAST = (
    "values",
    "num_columns",
    "seconds",
    "gradient_seconds",
    "cost",
    "cost_in_steps",
)

#: What else a line has of a balance; older files lack it.
_LATER = ("counting_velocity_error", "in_range")

#: What every line has, whatever its loop adds.
_EVERY = (*_FIRST, "edges", *_BALANCE, *_LAST)


def record_line(record: ProbeRecord) -> dict[str, Any]:
    """Returns a record as one line of JSON; what is not finite will be null.

    Args:
        record: The record.

    Returns:
        The names of `ExactBalance` and of the other parts of the record, with the
        shells' edges; all of the balance null where the record has none. The rates of
        an instantaneous record are under ``instantaneous``.
    """
    balance, measured = record.balance, record.measured_time
    line = {name: getattr(record, name) for name in _FIRST}
    line |= balance_line(balance)
    if measured is not None:
        line["measured_time"] = measured._asdict()
    line |= {name: getattr(record, name) for name in _LAST}
    if record.instantaneous is not None:
        line["instantaneous"] = _instant_line(record.instantaneous)
    return jax.device_get(line)


def balance_line(balance: ExactBalance | None) -> dict[str, Any]:
    """Returns the amounts and the errors of a balance, by the names of its fields.

    Args:
        balance: The balance; None for null everywhere.

    Returns:
        The names and values, and the shells' ``edges``.
    """
    if balance is None:
        return dict.fromkeys(("edges", *_BALANCE, *_LATER))
    fields = {name: getattr(balance, name) for name in (*_BALANCE, *_LATER)}
    return {"edges": balance.shells.edges} | fields


def _instant_line(record: InstantRecord) -> dict[str, Any]:
    """Returns the rates of an instantaneous record, without what single pairs have."""
    fit, closure, crossings = record.velocity_fit, record.closure, record.crossings
    return {
        "num_resolved": record.num_resolved,
        "complete": record.complete,
        "total_energy": record.total_energy,
        "edges": record.shells.edges,
        "counts": record.shells.counts,
        **record.dynamics._replace(finite=record.finite)._asdict(),
        "exponent": fit.fit.exponent,
        "exponent_interval": fit.fit.interval,
        "exponent_stderr": fit.fit.exponent_stderr,
        "prefactor": fit.fit.prefactor,
        "r_squared": fit.fit.r_squared,
        "sign": fit.sign,
        "sign_share": fit.sign_share,
        "curvature": fit.curvature,
        "p_value": fit.p_value,
        "measured_rate": closure.measured_rate,
        "closure_errors": closure.shell_errors,
        "closure_error": closure.total_error,
        "crossings_up": crossings.up,
        "crossings_down": crossings.down,
        "crossing_energy_up": crossings.energy_up,
        "crossing_energy_down": crossings.energy_down,
        "values": record.values,
        "drift": record.drift,
    }
