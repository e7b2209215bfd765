"""The claims of the paper as checks on numbers with intervals, and their verdicts.

Everything is computed from ``study.json`` and ``study.npz`` alone.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grsd_jax.experiments.claims.plan import (
    BINNINGS,
    NETWORKS,
    VARIATIONS,
    cell_name,
)
from grsd_jax.experiments.common import records
from grsd_jax.experiments.common.config import UserError

RESNET, PLAIN = NETWORKS
_NUM_DRAWS = 4000
_COVERAGE = (2.5, 97.5)

#: The choices in the order of the tables; the literal coupling is a choice of reading.
CHOICES = {v.name: v.text for v in (*VARIATIONS, *BINNINGS)}
CHOICES |= {"literal": "literal coupling in the Toeplitz residual"}


class Study(NamedTuple):
    """A study as its files hold it.

    Attributes:
        info: The contents of ``study.json``.
        arrays: The contents of ``study.npz``.
        seeds: The seeds.
    """

    info: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]
    seeds: tuple[int, ...]


class Interval(NamedTuple):
    """A number with its 95% interval.

    Attributes:
        estimate: The mean over seeds.
        low: Lower end.
        high: Upper end.
    """

    estimate: float
    low: float
    high: float


#: From a quantity's name and a network to draws of its mean over seeds; the first draw
#: is the estimate itself.
Draws = Callable[[str, str], np.ndarray]


class Check(NamedTuple):
    """One inequality that a claim comes to.

    Attributes:
        text: What is compared, in a table's words.
        number: The number, from draws of the quantities.
        at_most: Whether the threshold bounds it from above, or from below.
        threshold: The threshold.
    """

    text: str
    number: Callable[[Draws], np.ndarray]
    at_most: bool
    threshold: float


class Claim(NamedTuple):
    """A claim of the paper.

    Attributes:
        name: A short name.
        text: The claim.
        source: Where the paper makes it.
        checks: What it comes to; all must hold.
    """

    name: str
    text: str
    source: str
    checks: tuple[Check, ...]


def _distance(q: Draws, network: str) -> np.ndarray:
    return np.abs(q("slope", network) - 1)


def _fall(q: Draws, network: str) -> np.ndarray:
    """The share of the edges' residual that is gone at the centre."""
    edge = q("edge", network)
    return (edge - q("centre", network)) / edge


CLAIMS = (
    Claim(
        "diagonal",
        "ResNet-18: the diagonal scales with an exponent near 1 and a high R^2",
        "7.4",
        (
            Check("ResNet |slope - 1|", lambda q: _distance(q, RESNET), True, 0.1),
            Check("ResNet R^2", lambda q: q("r_squared", RESNET), False, 0.9),
        ),
    ),
    Claim(
        "contrast",
        "PlainNet-18: its exponent is further off, its R^2 lower",
        "7.4",
        (
            Check(
                "|slope - 1|, plain less ResNet",
                lambda q: _distance(q, PLAIN) - _distance(q, RESNET),
                False,
                0.0,
            ),
            Check(
                "R^2, ResNet less plain",
                lambda q: q("r_squared", RESNET) - q("r_squared", PLAIN),
                False,
                0.0,
            ),
        ),
    ),
    Claim(
        "toeplitz",
        "ResNet-18: the Toeplitz residual falls from the edges to the centre",
        "7.5",
        (Check("ResNet, share that is gone", lambda q: _fall(q, RESNET), False, 0.2),),
    ),
    Claim(
        "insensitive",
        "PlainNet-18: the residual hardly changes, and less than the ResNet's",
        "7.5",
        (
            Check(
                "plain, |share that is gone|",
                lambda q: np.abs(_fall(q, PLAIN)),
                True,
                0.2,
            ),
            Check(
                "share that is gone, ResNet less plain",
                lambda q: _fall(q, RESNET) - _fall(q, PLAIN),
                False,
                0.0,
            ),
        ),
    ),
    Claim(
        "edges",
        "Both networks: the residual is worse at the edges",
        "7.5",
        tuple(
            Check(
                f"{title}, edge less centre",
                lambda q, n=network: q("edge", n) - q("centre", n),
                False,
                0.0,
            )
            for network, title in ((RESNET, "ResNet"), (PLAIN, "plain"))
        ),
    ),
    Claim(
        "mixing",
        "Coupling between shells is weak against mixing inside them",
        "7, claims 1 and 2",
        tuple(
            Check(
                f"{title}, neighbours over inside",
                lambda q, n=network: q("inter_over_intra", n),
                True,
                0.5,
            )
            for network, title in ((RESNET, "ResNet"), (PLAIN, "plain"))
        ),
    ),
)


class Verdict(NamedTuple):
    """What came out for one claim under one choice.

    Attributes:
        word: ``"reproduced"`` if the whole interval of every check is on the right
            side, ``"not reproduced"`` if one is wholly on the wrong side, and
            ``"undecided"`` otherwise.
        numbers: The interval of each check.
    """

    word: str
    numbers: tuple[Interval, ...]


def read_study(folder: records.PathLike) -> Study:
    """Reads a study.

    Args:
        folder: The folder of ``study.json`` and ``study.npz``.

    Returns:
        The study.

    Raises:
        UserError: If a file cannot be read or is not of a study.
    """
    info = records.read_json(Path(folder) / "study.json")
    if not isinstance(info, dict) or not info.get("cells"):
        raise UserError("study.json: expected the cells of a study, got none.")
    seeds = sorted(
        {int(name.split("-")[0].removeprefix("seed")) for name in info["cells"]}
    )
    return Study(info, records.read_npz(Path(folder) / "study.npz"), tuple(seeds))


def draws_of(study: Study, choice: str, *, seed: int = 0) -> Draws:
    """Returns draws of the quantities' means over seeds under one choice.

    Seeds are drawn with replacement, and for each of them the deviation of a random
    half of its pairs from the mean of the halves. All quantities of a draw, of both
    networks, come from the same seeds.

    Args:
        study: The study.
        choice: A key of `CHOICES`, or the name of a control.
        seed: Seed of the draws.

    Returns:
        ``draws(quantity, network)``, ``[1 + 4000]``, the estimate first; ``"edge"`` and
        ``"centre"`` are those of the choice's coupling.
    """
    rng = np.random.default_rng(seed)
    count = len(study.seeds)
    picked = rng.integers(0, count, (_NUM_DRAWS, count))
    halves = rng.integers(0, study.info["num_replicates"], (_NUM_DRAWS, count))
    coupling = "literal" if choice == "literal" else "renormalized"
    names = list(study.info["quantities"])

    def draws(quantity: str, network: str) -> np.ndarray:
        if quantity in ("edge", "centre"):
            quantity = f"{coupling}_{quantity}"
        which = names.index(quantity)
        cells = [cell_arrays(study, s, network, choice) for s in study.seeds]
        estimates = np.array([cell["quantities"][which] for cell in cells])
        spread = np.array([cell["replicates"][:, which] for cell in cells])
        spread = spread - np.nanmean(spread, axis=1, keepdims=True)
        # Undefined for one seed is undefined; a half may have too few pairs.
        drawn = np.mean(estimates[picked] + spread[picked, halves], axis=1)
        return np.concatenate([[np.mean(estimates)], drawn])

    return draws


def cell_arrays(
    study: Study, seed: int, network: str, choice: str
) -> Mapping[str, np.ndarray]:
    """Returns the arrays of a cell.

    Args:
        study: The study.
        seed: Seed.
        network: The network.
        choice: A key of `CHOICES`, or the name of a control.

    Returns:
        The arrays by name; those of the base if the choice does not concern the
        network.
    """
    concerned = {v.name: v.networks for v in VARIATIONS} | {"literal": ()}
    elsewhere = network not in concerned.get(choice, NETWORKS)
    name = cell_name(seed, network, "base" if elsewhere else choice)
    return {
        key: study.arrays[f"{name}/{key}"]
        for key in ("quantities", "replicates", "windows", "values", "diagonal", "used")
    }


def interval_of(drawn: np.ndarray) -> Interval:
    """Returns the estimate and the percentiles of draws, as `draws_of` makes them."""
    if np.isnan(drawn[1:]).all():
        return Interval(float(drawn[0]), float("nan"), float("nan"))
    low, high = np.nanpercentile(drawn[1:], _COVERAGE)
    return Interval(float(drawn[0]), float(low), float(high))


def judge(claim: Claim, draws: Draws) -> Verdict:
    """Holds one claim against the numbers of one choice.

    Args:
        claim: The claim.
        draws: The draws under the choice.

    Returns:
        The verdict.
    """
    numbers = tuple(interval_of(check.number(draws)) for check in claim.checks)
    sides = [
        _side(number, check)
        for number, check in zip(numbers, claim.checks, strict=True)
    ]
    if "wrong" in sides:
        return Verdict("not reproduced", numbers)
    word = "reproduced" if all(side == "right" for side in sides) else "undecided"
    return Verdict(word, numbers)


def _side(number: Interval, check: Check) -> str:
    """Says on which side of the threshold a whole interval lies, ``""`` if on both."""
    if not np.isfinite(number).all() or number.low == number.high == check.threshold:
        return ""
    if check.at_most:
        low, high = number.low, number.high
    else:
        low, high = -number.high, -number.low
    threshold = check.threshold if check.at_most else -check.threshold
    if high <= threshold:
        return "right"
    return "wrong" if low > threshold else ""


def verdicts(study: Study) -> dict[str, dict[str, Verdict]]:
    """Judges every claim under every choice.

    Args:
        study: The study.

    Returns:
        The verdicts by choice and claim.
    """
    return {
        choice: {claim.name: judge(claim, draws) for claim in CLAIMS}
        for choice in CHOICES
        for draws in [draws_of(study, choice)]
    }


def depends_on(
    found: Mapping[str, Mapping[str, Verdict]], claim: str
) -> dict[str, list[str]]:
    """Lists the choices that decide a claim otherwise than the base does.

    Args:
        found: The verdicts by choice and claim.
        claim: Name of the claim.

    Returns:
        The choices by their verdict. It is the opposite of the base's, or, where the
        base leaves the claim undecided, either.
    """
    base = found["base"][claim].word
    turned: dict[str, list[str]] = {}
    for choice, by_claim in found.items():
        word = by_claim[claim].word
        if word not in (base, "undecided"):
            turned.setdefault(word, []).append(choice)
    return turned
