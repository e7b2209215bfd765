"""What this package is to reach against its peers, and what came out."""

from typing import Any, NamedTuple

from comparison.grid import PEERS

Record = dict[str, Any]

#: Times faster than a peer: problem, task, peer, ratio.
_FASTER = (
    ("resnet18_w16_n32", "dense", "torch_func", 2.0),
    ("resnet18_w64_n16", "dense", "torch_func", 4.0),
    ("resnet18_w16_n32", "dense", "neural_tangents", 20.0),
    ("resnet18_w16_n32", "block_8", "torch_func", 1.25),
    ("resnet18_w16_n32", "block_32", "torch_func", 1.4),
    ("resnet18_w64_n16", "block_8", "torch_func", 1.8),
    ("resnet18_w64_n32", "block_8", "torch_func", 1.8),
)
_DERIVATIVES = ("derivative_8", "derivative_32", "derivative_160")
_DERIVATIVE_PROBLEM = "resnet18_w16_n32"
_DERIVATIVE_PATHS = {"grsd_jax": "", "grsd_jax_plain": ", by the plain path"}
_MOST_BLOCK_PRODUCTS = 1.0
#: Share of the forward pass's rate of operations that the plain path is to keep.
_RATE = 0.8
_RATES = (
    ("mlp_w256_n32", "block_8"),
    ("resnet18_w16_n32", "block_8"),
    ("resnet18_w16_n32", "block_32"),
    ("resnet18_w64_n16", "block_8"),
)
_PAIR_GOALS = {
    "columns": "fewer operator columns than SciPy eigsh",
    "seconds": "less time than SciPy eigsh, at the width of fewest columns",
    "best seconds": "less time than SciPy eigsh, at the fastest width",
}
_PAIR_PROBLEMS = ("mlp_w256_n32", "resnet18_w16_n32", "resnet18_w64_n32")


class Outcome(NamedTuple):
    """A target and what was measured.

    Attributes:
        problem: The problem.
        task: The task.
        goal: The target in words.
        measured: What came out, None if it was not measured.
        met: Whether it was reached, None if it was not measured.
    """

    problem: str
    task: str
    goal: str
    measured: str | None
    met: bool | None


def matching(rows: list[Record], **wanted: str) -> list[Record]:
    """Returns the rows that have all the values wanted."""
    return [row for row in rows if all(row[key] == wanted[key] for key in wanted)]


def agreeing(rows: list[Record], problem: str, task: str, peer: str) -> list[Record]:
    """Returns the variants of a peer on a CPU whose results agree."""
    named = {"problem": problem, "task": task, "peer": peer}
    return matching(rows, device="cpu", status="ok", **named)


def best(rows: list[Record], problem: str, task: str, peer: str) -> Record | None:
    """Returns the fastest of the variants that agree, or None."""
    return min(agreeing(rows, problem, task, peer), key=cost, default=None)


def cost(row: Record) -> float:
    """Returns the seconds that count: of a dense matrix with the preparation."""
    extra = row["prepare_seconds"] or 0.0 if row["task"] == "dense" else 0.0
    return row["seconds"]["minimum"] + extra


def outcomes(rows: list[Record]) -> list[Outcome]:
    """Compares the rows with every target.

    Args:
        rows: Those of ``results.json``.

    Returns:
        One outcome for each target, measured or not.
    """
    return [
        *(_faster(rows, *target) for target in _FASTER),
        *(_derivative(rows, task, "grsd_jax") for task in _DERIVATIVES),
        *(_derivative(rows, task, "grsd_jax_plain") for task in _DERIVATIVES[:2]),
        *(_rate(rows, *where) for where in _RATES),
        *(
            _pairs(rows, problem, quantity)
            for problem in _PAIR_PROBLEMS
            for quantity in _PAIR_GOALS
        ),
    ]


def _faster(
    rows: list[Record], problem: str, task: str, peer: str, ratio: float
) -> Outcome:
    goal = f"at least {ratio:g} times as fast as {PEERS[peer].title}"
    ours = best(rows, problem, task, "grsd_jax")
    theirs = best(rows, problem, task, peer)
    if ours is None or theirs is None:
        return Outcome(problem, task, goal, None, None)
    reached = cost(theirs) / cost(ours)
    return Outcome(problem, task, goal, f"{reached:.2f} times", reached >= ratio)


def _derivative(rows: list[Record], task: str, peer: str) -> Outcome:
    goal = f"at most {_MOST_BLOCK_PRODUCTS:.1f} plain block products"
    goal += _DERIVATIVE_PATHS[peer]
    row = best(rows, _DERIVATIVE_PROBLEM, task, peer)
    if row is None:
        return Outcome(_DERIVATIVE_PROBLEM, task, goal, None, None)
    share = row["seconds"]["minimum"] / row["beside_seconds"]["minimum"]
    met = share <= _MOST_BLOCK_PRODUCTS
    return Outcome(_DERIVATIVE_PROBLEM, task, goal, f"{share:.2f}", met)


def _rate(rows: list[Record], problem: str, task: str) -> Outcome:
    goal = f"plain path: at least {_RATE:g} of the forward pass's FLOP rate"
    row = best(rows, problem, task, "grsd_jax_plain")
    if row is None:
        return Outcome(problem, task, goal, None, None)
    details = row["details"]
    rate = details["flops"] / row["seconds"]["minimum"]
    forward = details["beside_flops"] / row["beside_seconds"]["minimum"]
    return Outcome(
        problem, task, goal, f"{rate / forward:.2f}", rate >= _RATE * forward
    )


def _pairs(rows: list[Record], problem: str, quantity: str) -> Outcome:
    """Compares with SciPy's best setting.

    Columns and seconds are those of the block width that needs the fewest columns, so
    that one setting shows both; the best seconds are those of the fastest width.
    """
    goal = _PAIR_GOALS[quantity]
    widths = agreeing(rows, problem, "eigenpairs", "grsd_jax")
    theirs = best(rows, problem, "eigenpairs", "scipy_eigsh")
    if not widths or theirs is None:
        return Outcome(problem, "eigenpairs", goal, None, None)
    ours = min(widths, key=cost if quantity == "best seconds" else _columns)
    if quantity == "columns":
        left, right = _columns(ours), _columns(theirs)
        measured = f"{left} against {right} ({ours['variant']})"
    else:
        left, right = cost(ours), cost(theirs)
        measured = f"{left:.3f} s against {right:.3f} s ({ours['variant']})"
    return Outcome(problem, "eigenpairs", goal, measured, left < right)


def _columns(row: Record) -> int:
    return row["details"]["columns"]
