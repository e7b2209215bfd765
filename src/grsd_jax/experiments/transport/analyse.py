"""The statistic of both networks with paired intervals over the seeds.

The unit is the seed: both networks of one seed share the order of the data and the
measured images, so that they are compared within the seed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from grsd_jax.experiments.common.config import TITLES, UserError
from grsd_jax.experiments.common.intervals import Interval, t_interval
from grsd_jax.experiments.common.tables import Legend, number, of_how_many, with_legend
from grsd_jax.experiments.transport.protocol import (
    ARMS,
    NUM_SEEDS,
    READINGS,
    Protocol,
    Reading,
)
from grsd_jax.experiments.transport.quantities import STATISTICS, statistics
from grsd_jax.results.text import counted

Runs = list[Mapping[str, Any]]

#: The quantities of the tables with their headings. Spreads are positive, so that
#: networks are compared by their ratio; the others by their difference.
HEADINGS = {
    "size": "size, mean of (v - v^N) tau",
    "edge_spread": "spread over edges",
    "interval_spread": "spread over intervals",
    "relative_edge_spread": "spread over edges over size",
    "relative_interval_spread": "spread over intervals over size",
    "exponent": "p of v - v^N, median of intervals",
    "curvature": "its curvature, median of intervals",
    "decay": "exponent of c over tau",
    "test_accuracy": "test accuracy",
}

#: What the rows of the tables mean.
LEGEND: Legend = (
    "Means over seeds with 95% intervals of Student's t; '(37 of 40)' if only so many "
    "intervals of time can be used.",
    "Spreads are standard deviations of (v - v^N) tau: over edges (median of the "
    "intervals), and of the intervals' means. Their ratio is above 1 where the first "
    "network is flatter or steadier. Common edges are those that are usable in both "
    "networks of a seed.",
    "Velocities of an interval are means over its usable edges, over the seeds that "
    "have at least three; '(7 of 8)' if only so many have.",
)

#: The statistic of the study, by which "flatter" and "steadier" are decided.
DECISIVE = {"edge_spread": "flatter over edges", "interval_spread": "steadier in time"}


def runs_by_network(results: Mapping[str, Any], arm: str) -> dict[str, Runs]:
    """Returns the finished runs of an arm, in the order of their seeds.

    Args:
        results: The contents of ``transport.json``.
        arm: One of `protocol.ARMS`.

    Returns:
        As many runs for each network, the residual one first; none if the arm has not
        begun.

    Raises:
        UserError: If a network has seeds that the other one does not have, or a seed
            twice.
    """
    found = {
        network: sorted(
            (
                run
                for run in results["runs"]
                if (run["arm"], run["network"]) == (arm, network)
            ),
            key=lambda run: run["seed"],
        )
        for network in results["networks"]
    }
    seeds = [[run["seed"] for run in runs] for runs in found.values()]
    if seeds[0] != seeds[1] or len({*seeds[0]}) < len(seeds[0]):
        raise UserError(
            f"transport.json: expected both networks of arm {arm!r} at the same seeds, "
            f"each once, got {seeds[0]} and {seeds[1]}."
        )
    return found


def arms_of(results: Mapping[str, Any]) -> list[str]:
    """Returns the arms that have a finished pair, in their own order.

    Raises:
        UserError: If there is none.
    """
    arms = [arm for arm in ARMS if any(run["arm"] == arm for run in results["runs"])]
    if not arms:
        raise UserError("transport.json: expected a finished pair of runs, got none.")
    return arms


def reading_of(run: Mapping[str, Any], reading: Reading = READINGS[0]) -> Any:
    """Returns what a run says under a reading, by default the one that decides."""
    wanted = reading._asdict()
    (found,) = (x for x in run["readings"] if {k: x[k] for k in wanted} == wanted)
    return found


def value_of(
    run: Mapping[str, Any], quantity: str, reading: Reading = READINGS[0]
) -> float:
    """Returns one number of a run.

    Args:
        run: An entry of ``transport.json``.
        quantity: A key of `HEADINGS`.
        reading: How the snapshots are read.

    Returns:
        The number, NaN where it is undefined.
    """
    found = reading_of(run, reading)
    if quantity == "test_accuracy":
        return _float(run[quantity])
    if quantity in ("exponent", "curvature"):
        values = np.array(found[f"{quantity}s"], np.float64)
        values = values[np.isfinite(values)]
        return float(np.median(values)) if len(values) else float("nan")
    return _float(found[quantity])


def compared(quantity: str, first: np.ndarray, second: np.ndarray) -> Interval:
    """Returns the paired comparison of two networks, with its 95% interval.

    Args:
        quantity: A key of `HEADINGS`.
        first: One number a seed of the residual network.
        second: The same of the plain one.

    Returns:
        For spreads the geometric mean of ``second / first``; otherwise the mean of
        ``second - first``.
    """
    if not quantity.endswith("spread"):
        return t_interval(second - first)
    positive = (first > 0) & (second > 0)
    logs = np.log(np.where(positive, second / np.where(positive, first, 1), np.nan))
    return Interval(*(float(x) for x in np.exp(t_interval(logs))))


def verdicts(results: Mapping[str, Any], arm: str) -> dict[str, str]:
    """Returns whether the residual network is flatter, and steadier, in an arm.

    Args:
        results: The contents of ``transport.json``.
        arm: The arm.

    Returns:
        For both spreads of `DECISIVE`: ``"yes"`` if the interval of their ratio lies
        above 1, ``"no, less so"`` below it, ``"undecided"`` otherwise; and ``"too few
        seeds"`` with less than `protocol.NUM_SEEDS`.
    """
    first, second = runs_by_network(results, arm).values()
    if len(first) < NUM_SEEDS:
        return dict.fromkeys(DECISIVE, "too few seeds")
    found = {}
    for quantity in DECISIVE:
        ratio = compared(quantity, *(_values(x, quantity) for x in (first, second)))
        found[quantity] = "undecided"
        if ratio.low > 1:
            found[quantity] = "yes"
        elif ratio.high < 1:
            found[quantity] = "no, less so"
    return found


def arm_rows(results: Mapping[str, Any], arm: str) -> list[list[str]]:
    """Lists the quantities of an arm under the reading that decides.

    Args:
        results: The contents of ``transport.json``.
        arm: The arm.

    Returns:
        Rows of cells, headings first: means over seeds with 95% intervals, the paired
        comparison, and the median standard error over images of each network.

    Raises:
        UserError: As for `runs_by_network`.
    """
    runs = runs_by_network(results, arm)
    titles = [TITLES[network] for network in runs]
    rows = [["arm", "quantity", *titles, "second to first, paired", "+- over images"]]
    for quantity, heading in HEADINGS.items():
        values = [_values(x, quantity) for x in runs.values()]
        each = [
            f"{t_interval(x)}{_standing(runs[name], quantity)}"
            for name, x in zip(runs, values, strict=True)
        ]
        kind = "ratio " if quantity.endswith("spread") else "difference "
        paired = f"{kind}{compared(quantity, *values)}"
        images = [_image_error(x, quantity) for x in runs.values()]
        rows.append([arm, heading, *each, paired, " and ".join(images)])
    return rows


def _standing(runs: Runs, quantity: str) -> str:
    """Returns how many intervals a quantity stands on, if not on all of them.

    The statistics need edges enough, and the fits are undefined without.
    """
    if quantity in STATISTICS:
        each = [np.array(reading_of(x)["products"], np.float64) for x in runs]
        enough = Protocol().min_edges
        known = [np.sum(np.isfinite(x), axis=1) >= enough for x in each]
    elif quantity in ("exponent", "curvature"):
        values = [reading_of(x)[f"{quantity}s"] for x in runs]
        known = [np.isfinite(np.array(x, np.float64)) for x in values]
    else:
        return ""
    have, whole = int(np.sum(known)), np.size(known)
    return of_how_many(have, whole)


def reading_rows(results: Mapping[str, Any], arm: str) -> list[list[str]]:
    """Lists what the statistic of an arm depends on, a row for each reading.

    Args:
        results: The contents of ``transport.json``.
        arm: The arm.

    Returns:
        Rows of cells, headings first.

    Raises:
        UserError: As for `runs_by_network`.
    """
    runs = runs_by_network(results, arm)
    titles = [f"size, {TITLES[network]}" for network in runs]
    titles += ["ratio over edges", "ratio over intervals", "over common edges"]
    rows = [["arm", "reading", *titles]]
    there = [Reading(x["form"], x["width"], x["grid"]) for x in _any(runs)["readings"]]
    for reading in sorted(there, key=READINGS.index):
        sizes = [str(t_interval(_values(x, "size", reading))) for x in runs.values()]
        ratios = [
            str(compared(q, *(_values(x, q, reading) for x in runs.values())))
            for q in DECISIVE
        ]
        common = str(ratio_over_common_edges(runs, reading))
        rows.append([arm, reading.name, *sizes, *ratios, common])
    return rows


def interval_rows(results: Mapping[str, Any], arm: str) -> list[list[str]]:
    """Lists the velocities of an arm under the reading that decides, by intervals.

    Args:
        results: The contents of ``transport.json``.
        arm: The arm.

    Returns:
        Rows of cells, headings first: means over the usable edges of the velocity, of
        that of the eigenvalues, and of their difference, times tau, and the exponent p;
        over the seeds where they are known, with 95% intervals.

    Raises:
        UserError: As for `runs_by_network`.
    """
    runs = runs_by_network(results, arm)
    rows = [["arm", "steps", "network", "v tau", "v^N tau", "(v - v^N) tau", "p"]]
    for index, (start, end) in enumerate(reading_of(_any(runs))["steps"]):
        for network, each in runs.items():
            columns = np.array([_velocities(run, index) for run in each]).T
            cells = [_mean_of_known(column) for column in columns]
            rows.append([arm, f"{start} to {end}", TITLES[network], *cells])
    return rows


def _velocities(run: Mapping[str, Any], interval: int) -> list[float]:
    """Returns the means over usable edges of one interval, and its exponent."""
    found = reading_of(run)
    products, counts = (
        np.array(found[name][interval], np.float64) for name in ("products", "counted")
    )
    usable = np.isfinite(products)
    exponent = _float(found["exponents"][interval])
    if np.sum(usable) < Protocol().min_edges:
        return [np.nan, np.nan, np.nan, exponent]
    excess, null = np.mean(products[usable]), np.mean(counts[usable])
    return [float(excess + null), float(null), float(excess), exponent]


def _mean_of_known(values: np.ndarray) -> str:
    known = values[np.isfinite(values)]
    if not len(known):
        return number(None)
    return f"{t_interval(known)}{of_how_many(len(known), len(values))}"


def ratio_over_common_edges(runs: Mapping[str, Runs], reading: Reading) -> Interval:
    """Returns the ratio of the spreads over the edges that both networks can use.

    Args:
        runs: As `runs_by_network` returns them.
        reading: How the snapshots are read.

    Returns:
        The geometric mean over seeds with its 95% interval; undefined if a seed has
        fewer than two intervals with `Protocol.min_edges` such edges.
    """
    spreads = []
    for pair in zip(*runs.values(), strict=True):
        # An unusable edge is null in the file, which becomes NaN.
        products = np.array(
            [reading_of(run, reading)["products"] for run in pair], np.float64
        )
        common = np.where(np.all(np.isfinite(products), axis=0), products, np.nan)
        found = [statistics(x, min_edges=Protocol().min_edges) for x in common]
        spreads.append([x["edge_spread"] for x in found])
    return compared("edge_spread", *np.array(spreads).T)


def transport_tables(results: Mapping[str, Any]) -> list[list[list[str]]]:
    """Returns the tables of every arm that has a finished pair.

    Args:
        results: The contents of ``transport.json``.

    Returns:
        The rows of `arm_rows`, `interval_rows` and `reading_rows`, arm by arm.

    Raises:
        UserError: If there is no finished pair, or the seeds of the networks differ.
    """
    return [
        rows(results, arm)
        for arm in arms_of(results)
        for rows in (arm_rows, interval_rows, reading_rows)
    ]


def format_transport(results: Mapping[str, Any]) -> str:
    """Writes what was found as tables, with the verdicts.

    Args:
        results: The contents of ``transport.json``.

    Returns:
        The text.

    Raises:
        UserError: If there is no finished pair, or the seeds of the networks differ.
    """
    parts = [with_legend(transport_tables(results), LEGEND)]
    parts += [verdict_sentence(results, arm) for arm in arms_of(results)]
    return "\n\n".join(parts)


def verdict_sentence(results: Mapping[str, Any], arm: str) -> str:
    """Returns what an arm decides, in words.

    Args:
        results: The contents of ``transport.json``.
        arm: One that has begun.

    Returns:
        The verdicts on `DECISIVE`, with the number of seeds.

    Raises:
        UserError: If the seeds of the networks differ.
    """
    first = results["networks"][0]
    number_of_seeds = len(runs_by_network(results, arm)[first])
    said = " ".join(
        f"{DECISIVE[quantity].capitalize()}? {verdict.capitalize()}."
        for quantity, verdict in verdicts(results, arm).items()
    )
    seeds = counted(number_of_seeds, "paired seed")
    return f"{arm}, {seeds}, {TITLES[first]}. {said}"


def _any(runs: Mapping[str, Runs]) -> Mapping[str, Any]:
    return next(iter(runs.values()))[0]


def _values(runs: Sequence[Any], quantity: str, reading: Reading = READINGS[0]) -> Any:
    return np.array([value_of(run, quantity, reading) for run in runs], np.float64)


def _image_error(runs: Sequence[Any], quantity: str) -> str:
    if quantity not in STATISTICS:
        return number(None)
    errors = [_float(reading_of(run)["image_stderr"][quantity]) for run in runs]
    return number(float(np.median(errors)))


def _float(value: Any) -> float:
    return float("nan") if value is None else float(value)
