"""What the lines of ``records.jsonl`` say of the balance, in single numbers."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from grsd_jax.experiments.common.config import TITLES

Line = Mapping[str, Any]
Lines = Sequence[Line]


def column(lines: Lines, name: str) -> np.ndarray:
    """Returns one field of all records, ``[records, ...]``, NaN for null."""
    return np.array([line[name] for line in lines], np.float64)


def in_order(names: Iterable[str]) -> list[str]:
    """Returns networks in one order, those of anyone's own after ours."""
    names = list(names)
    return sorted(names, key=[*TITLES, *names].index)


def balanced(lines: Lines) -> list[Line]:
    """Returns the finite records with a balance, which the first of a loop lacks."""
    return [x for x in lines if x["finite"] and x["flux"] is not None]


def num_steps(line: Line) -> int:
    """Returns the training steps between both ends of a balance."""
    return line["step"] - line["start_step"]


def whole_intervals(lines: Lines) -> list[Line]:
    """Returns the records that reach from one to the next, without those of --over.

    Where one of them ends another begins, also in a loop that left a record out; the
    last is known by its length.
    """
    lines = balanced(lines)
    starts = {line["start_step"] for line in lines}
    longest = max(map(num_steps, lines), default=0)
    return [x for x in lines if x["step"] in starts or num_steps(x) == longest]


def total_energy(line: Line) -> float:
    """Returns ``|e|^2`` at the beginning."""
    return float(np.sum(line["energies"][0]))


def lost_share(line: Line) -> float:
    """Returns what was lost, as a share of the energy at the beginning."""
    return _share(np.sum(line["lost"]), line)


def moved_share(line: Line) -> float:
    """Returns what moved between shells, as a share of the energy at the beginning."""
    return _share(np.sum(np.abs(line["moved"])) / 2, line)


def _share(amount: float, line: Line) -> float:
    """Returns an amount over the energy at the beginning, NaN if there is none."""
    energy = total_energy(line)
    return float(amount) / energy if energy else float("nan")


def usable_velocities(line: Line) -> tuple[np.ndarray, np.ndarray]:
    """Returns the velocity and the counting velocity at the usable edges.

    The second is NaN where nothing was counted.
    """
    used = np.array(line["velocity_mask"], bool)
    velocity = np.array(line["velocity"], np.float64)
    counted = line["counting_velocity"] or np.full(len(used), np.nan)
    return velocity[used], np.array(counted, np.float64)[used]


def by_steps(lines: Lines) -> dict[int, list[Line]]:
    """Returns the finite records by the training steps between their ends."""
    groups = defaultdict(list)
    for line in balanced(lines):
        groups[num_steps(line)].append(line)
    return dict(sorted(groups.items()))


def spreads_over_steps(lines: Lines) -> list[float]:
    """Returns how far the flux of one step depends on the steps h it is taken over.

    For every record of --over beside others of the same beginning, at every edge where
    all exceed their errors: ``(max - min) / max`` of ``F / h``, the last in size.
    """
    groups = defaultdict(list)
    for line in balanced(lines):
        groups[line["start_step"]].append(line)
    spreads = []
    for group in groups.values():
        if len(group) < 2:
            continue
        steps = np.array([num_steps(line) for line in group])[:, None]
        flux = column(group, "flux")
        known = np.all(np.abs(flux) > column(group, "flux_error"), axis=0)
        rates = (flux / steps)[:, known]
        sizes = np.max(np.abs(rates), axis=0)
        spreads += list((np.max(rates, axis=0) - np.min(rates, axis=0)) / sizes)
    return spreads
