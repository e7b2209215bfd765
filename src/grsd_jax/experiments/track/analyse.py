"""What was tracked of each network in single numbers, and the table of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from grsd_jax.experiments.common.config import TITLES
from grsd_jax.experiments.common.tables import Legend, number, with_legend
from grsd_jax.experiments.track.quantities import (
    in_order,
    lost_share,
    moved_share,
    spreads_over_steps,
    usable_velocities,
    whole_intervals,
)


def summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarizes the records of one network.

    Args:
        lines: The records, in order.

    Returns:
        Counts of all records and of whole intervals, and medians over these: of the
        shares that were lost and moved, of the velocity and its null over the usable
        edges, and of the share between shells that are not neighbors. Also medians of
        how far the flux of a step varies with the number of steps, and of the cost over
        all records but the first two, which compile.
    """
    whole = whole_intervals(lines)
    velocities = [usable_velocities(line) for line in whole]
    found = {
        "lost_share_median": [lost_share(line) for line in whole],
        "moved_share_median": [moved_share(line) for line in whole],
        "velocity_median": [v for pair in velocities for v in pair[0]],
        "counting_velocity_median": [v for pair in velocities for v in pair[1]],
        "non_adjacent_share_median": [line["non_adjacent_share"] for line in whole],
        "spread_over_steps_median": spreads_over_steps(lines),
        "record_seconds_median": [line["seconds"] for line in lines[2:]],
        "train_step_seconds_median": [x.get("train_step_seconds") for x in lines[2:]],
        "cost_in_steps_median": [line["cost_in_steps"] for line in lines[2:]],
        "cost_in_gradients_median": [line["cost"] for line in lines[2:]],
    }
    return {
        "num_records": len(lines),
        "num_whole": len(whole),
        "finite": all(line["finite"] for line in lines),
        "num_edges": None if not whole else len(whole[-1]["edges"]),
        "num_resolved": None if not whole else whole[-1]["num_resolved"],
        **{name: _median(values) for name, values in found.items()},
    }


#: The rows of `track_rows`: a key of `summary`, what the table says, its format.
_ROWS = (
    ("test_accuracy", "test accuracy", ".4f"),
    ("num_records", "records", "d"),
    ("num_whole", "of them whole intervals, finite", "d"),
    ("num_resolved", "resolved edges, last of these", "d"),
    ("lost_share_median", "lost, share of the energy", ".3g"),
    ("moved_share_median", "moved, share of the energy", ".3g"),
    ("velocity_median", "velocity v", ".3g"),
    ("counting_velocity_median", "of it counting velocity, the null", ".3g"),
    ("non_adjacent_share_median", "non-adjacent share", ".2g"),
    ("spread_over_steps_median", "spread of the flux a step over h", ".2g"),
    ("record_seconds_median", "seconds a record", ".3g"),
    ("cost_in_steps_median", "cost of a record in training steps", ".1f"),
    ("cost_in_gradients_median", "cost of a record in gradients", ".1f"),
)

#: What the rows of the table mean.
LEGEND: Legend = (
    "Medians over the records of whole intervals, costs over all but the first two.",
    "Shares: of the energy before, |e|^2.",
    "Moved: half of sum |T_ab|. Velocities: over the edges where they are usable.",
    "A kernel that only grows moves energy at the counting velocity.",
    "Non-adjacent share: of what moved; only with --shells=sharp.",
    "Spread: (largest - smallest) / largest |F / h| over the lengths h of --over.",
)


def track_rows(tracks: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Lists what was tracked, a column for each network.

    Args:
        tracks: Entries of ``results.json`` by the network's name.

    Returns:
        Rows of cells, headings first; "n/a" where undefined.
    """
    tracks = {name: tracks[name] for name in in_order(tracks)}
    rows = [["quantity", *(TITLES.get(name, name) for name in tracks)]]
    for key, title, spec in _ROWS:
        cells = [_cell(track.get(key), spec) for track in tracks.values()]
        rows.append([title, *cells])
    return rows


def format_tracks(tracks: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns what was tracked as a table, a column for each network.

    Args:
        tracks: Entries of ``results.json`` by the network's name.

    Returns:
        The table, with its legend.
    """
    return with_legend([track_rows(tracks)], LEGEND)


def _cell(value: Any, spec: str) -> str:
    return number(value, spec if isinstance(value, int) else spec.replace("d", ".0f"))


def _median(values: Sequence[float | None]) -> float | None:
    found = [x for x in values if x is not None and np.isfinite(x)]
    return float(np.median(found)) if found else None
