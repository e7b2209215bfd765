"""What each kind of results says: one sentence, tables, and how to read them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grsd_jax.experiments.benchmark import analyse as benchmark
from grsd_jax.experiments.claims import analyse as claims
from grsd_jax.experiments.common.config import TITLES
from grsd_jax.experiments.common.intervals import t_interval
from grsd_jax.experiments.common.tables import number
from grsd_jax.experiments.conditions import analyse as conditions
from grsd_jax.experiments.reproduce import analyse as reproduce
from grsd_jax.experiments.sweep import analyse as sweep
from grsd_jax.experiments.track import analyse as track
from grsd_jax.experiments.transport import analyse as transport
from grsd_jax.results import percent
from grsd_jax.results.text import counted
from grsd_jax.shells.diagnostics import mostly_unresolved


class Contents(NamedTuple):
    """What stands above the figures.

    Attributes:
        summary: One sentence; empty for results of another kind.
        tables: Rows of cells, headings first.
        notes: Sentences that belong below the tables.
    """

    summary: str = ""
    tables: Sequence[list[list[str]]] = ()
    notes: Sequence[str] = ()


def contents_of(path: Path, results: Mapping[str, Any]) -> Contents:
    """Returns what a results file says.

    Args:
        path: The file.
        results: What it holds.

    Returns:
        The contents, empty for a kind that has no tables of its own.

    Raises:
        UserError: If the results are not complete.
    """
    by_name = {
        "claims.json": _claims,
        "transport.json": _transport,
        "benchmark.json": _benchmark,
    }
    if path.name in by_name:
        return by_name[path.name](results)
    if path.name == "sweep.json":
        return _sweep(path.with_name("sweep.csv"))
    if "condition1" in results:
        return _conditions(results)
    if "tracks" in results:
        return tracked(results["tracks"])
    if "model" in results or "models" in results:
        return _measured(results)
    return Contents()


def tracked(tracks: Mapping[str, Mapping[str, Any]]) -> Contents:
    """Returns what the records of trainings say.

    Args:
        tracks: Summaries of the records, by the network's name.

    Returns:
        The contents.
    """
    counts = "; ".join(
        f"{TITLES.get(name, name)}, {counted(found['num_records'], 'record')}"
        + ("" if found["finite"] else ", not all finite")
        for name, found in tracks.items()
    )
    rows = track.track_rows(tracks)
    return Contents(f"What the probe saw: {counts}.", [rows], track.LEGEND)


def _measured(results: Mapping[str, Any]) -> Contents:
    slopes = "; ".join(_slope(entry) for entry in reproduce.list_entries(results))
    return Contents(
        f"Slope of the diagonal, which the theory predicts to be 1: {slopes}.",
        reproduce.result_tables(results),
        [*reproduce.LEGEND, *reproduce.result_caveats(results)],
    )


def _slope(entry: reproduce.Entry) -> str:
    """Returns a row's slope, with the energy behind it if that is less than half."""
    share = entry.number("unresolved_share") or 0.0
    held = (
        f" (of {percent(1 - share)} of the energy)" if mostly_unresolved(share) else ""
    )
    return f"{entry.label}, {number(entry.number('diagonal_fit', 'exponent'))}{held}"


def _conditions(found: Mapping[str, Any]) -> Contents:
    outcomes = "; ".join(
        f"{title}, {found[name]['verdict']['outcome']}"
        for name, title in conditions.TITLES.items()
    )
    notes = list(conditions.LEGEND)
    if found.get("propagation"):
        notes.append(conditions.format_propagation(found["propagation"]))
    rows = conditions.condition_rows(found)
    return Contents(f"The four conditions: {outcomes}.", [rows], notes)


def _claims(results: Mapping[str, Any]) -> Contents:
    slopes = claims.values_by_seed(results, "mean", "slope")
    less = t_interval(slopes[claims.RESNET] - slopes[claims.PLAIN])
    summary = (
        f"Over {counted(len(slopes[claims.RESNET]), 'paired seed')}, the slope of "
        f"ResNet-18 less that of its plain twin, of the mean kernel, is {less}."
    )
    return Contents(summary, [claims.claim_rows(results)], claims.LEGEND)


def _transport(results: Mapping[str, Any]) -> Contents:
    arms = transport.arms_of(results)
    summary = " ".join(transport.verdict_sentence(results, arm) for arm in arms)
    return Contents(summary, transport.transport_tables(results), transport.LEGEND)


def _sweep(path: Path) -> Contents:
    rows = sweep.read_rows(path)
    networks = counted(len({row["model"] for row in rows}), "network")
    depths = sorted({row["depth"] for row in rows})
    summary = (
        f"{counted(len(rows), 'training')} of {networks} at "
        f"depth{'s' if len(depths) > 1 else ''} {', '.join(map(str, depths))}"
    )
    diverged = sum(row["status"] == "diverged" for row in rows)
    summary += f", of which {diverged} diverged." if diverged else "."
    return Contents(summary, sweep.sweep_tables(rows), sweep.LEGEND)


def _benchmark(results: Mapping[str, Any]) -> Contents:
    times = {row["case"]: row for row in results["rows"]}
    slowest = max(times, key=lambda case: times[case]["seconds"])
    summary = (
        f"Of {len(times)} operations the slowest is {slowest}, with "
        f"{number(times[slowest]['gradients'], '.1f')} gradients of the same batches."
    )
    rows = benchmark.benchmark_rows(results["rows"])
    return Contents(summary, [rows], benchmark.LEGEND)
