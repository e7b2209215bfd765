"""The Markdown of the documentation's page, from ``results.json`` alone."""

from typing import Any

from comparison.grid import PEERS, TASKS, parse_problem, task_kind
from comparison.targets import best, cost, matching, outcomes

Record = dict[str, Any]

_MODELS = {"resnet18": "ResNet-18", "mlp": "MLP"}
_TASKS = {
    "dense": "dense $M$",
    "block": "$M V$, b = {}",
    "derivative": r"$V^\top \dot{{M}} V$, b = {}",
    "eigenpairs": "20 eigenpairs",
    "measurement": "whole measurement",
}
_COLUMNS = (
    "prepare s",
    "call s (median)",
    "of ours",
    "compile s",
    "first result s (cached)",
    "peak MiB",
    "error",
    "columns",
    "GPU call s",
)
#: Columns that a table leaves out where none of its rows has them.
_OPTIONAL = ("first result s (cached)", "GPU call s")
NOT_MEASURED = "not measured"
_LEGEND = (
    "Times are in seconds.\n"
    "*prepare* comes once before the calls, *call* is the fastest call, and *compile* "
    "is how much longer the first one took.\n"
    "*of ours* is the time over that of the fastest variant of grsd_jax, for a dense "
    "$M$ with the preparation.\n"
    "*error* is relative, and *columns* counts those that an eigensolver asked for."
)


def task_title(task: str) -> str:
    """Returns what tables and plots call a task."""
    return _TASKS[task_kind(task)].format(task.rpartition("_")[2])


def problem_title(name: str) -> str:
    """Returns what tables and plots call a problem."""
    problem = parse_problem(name)
    return f"{_MODELS[problem.model]} w{problem.width}, N = {problem.num_examples}"


def render(results: Record) -> str:
    """Writes the targets, the environment and one table for each problem.

    Args:
        results: What ``results.json`` holds.

    Returns:
        Markdown, ending in a newline.
    """
    rows = results["rows"]
    names = list(dict.fromkeys(row["problem"] for row in rows))
    parts = [_targets(rows), _environment(results)]
    parts += [_problem(name, results) for name in names]
    return "\n\n".join(part for part in parts if part) + "\n"


def _targets(rows: list[Record]) -> str:
    lines = [
        "### Targets",
        "",
        "| problem | task | target | measured | met |",
        "| :--- | :--- | :--- | ---: | :--- |",
    ]
    words = {None: NOT_MEASURED, True: "yes", False: "**no**"}
    for outcome in outcomes(rows):
        cells = (
            problem_title(outcome.problem),
            task_title(outcome.task),
            outcome.goal,
            outcome.measured or NOT_MEASURED,
            words[outcome.met],
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _environment(results: Record) -> str:
    lines = []
    for device, machine in sorted(results["environment"].items()):
        lines.append(
            f"- {device.upper()}: {machine['cpu']}, {machine['cores']} cores, "
            f"{machine['memory_gib']:g} GiB, {machine['threads']} threads for PyTorch."
        )
    versions: dict[str, dict[str, str]] = {}
    for row in results["rows"]:
        if "versions" in row:
            versions[PEERS[row["peer"]].environment] = row["versions"]
    for name, packages in sorted(versions.items()):
        told = ", ".join(f"{package} {v}" for package, v in sorted(packages.items()))
        lines.append(f"- environment `{name}`: {told}.")
    return "\n".join(["### Environment", "", *lines]) if lines else ""


def _problem(name: str, results: Record) -> str:
    about = results["problems"][name]
    rows = [row for row in results["rows"] if row["problem"] == name]
    cells = []
    for task in TASKS:
        ours = best(rows, name, task, "grsd_jax")
        cells += [
            _cells(row, ours, rows)
            for row in rows
            if row["task"] == task and row["device"] == "cpu"
        ]
    kept = [
        i
        for i, column in enumerate(_COLUMNS, start=2)
        if column not in _OPTIONAL or {row[i] for row in cells} - {"", NOT_MEASURED}
    ]
    header, *body = (
        f"| {' | '.join(row[i] for i in (0, 1, *kept))} |"
        for row in [["task", "peer", *_COLUMNS], *cells]
    )
    lines = [
        f"### {problem_title(name)}",
        "",
        f"n = {about['dimension']}, P = {about['parameters']:,}.",
        "",
        header,
        f"| :--- | :--- |{' ---: |' * len(kept)}",
        *body,
        "",
        _LEGEND,
    ]
    return "\n".join(lines)


def _cells(row: Record, ours: Record | None, rows: list[Record]) -> list[str]:
    title = PEERS[row["peer"]].title
    if row["variant"]:
        title += f" ({row['variant']})"
    task = task_title(row["task"])
    if "seconds" not in row:
        return [task, title, "", f"{row['status']}: {row['reason']}", *[""] * 7]
    seconds, details = row["seconds"], row.get("details", {})
    call = f"{_number(seconds['minimum'])} ({_number(seconds['median'])})"
    if row["status"] != "ok":
        call = f"not counted: {row['status']}"
    gpu = _gpu_row(row, rows)
    error = "not finite" if row["error"] is None else f"{row['error']:.0e}"
    return [
        task,
        title,
        "" if row["prepare_seconds"] is None else _number(row["prepare_seconds"]),
        call,
        f"{cost(row) / cost(ours):.2f}" if ours and row["status"] == "ok" else "",
        _number(row["compile_seconds"]),
        _first_result(row),
        f"{row['peak_mib']:.0f}",
        error,
        str(details.get("columns", "")),
        NOT_MEASURED if gpu is None else _number(gpu["seconds"]["minimum"]),
    ]


def _first_result(row: Record) -> str:
    """Returns the time to the first result, and in brackets with a filled cache."""
    names = ("first_result_seconds", "first_result_seconds_cached")
    seconds, cached = (row.get(name) for name in names)
    if seconds is None or cached is None:
        return NOT_MEASURED
    return f"{seconds:.1f} ({cached:.1f})"


def _gpu_row(row: Record, rows: list[Record]) -> Record | None:
    names = ("problem", "task", "peer", "variant")
    same = {name: row[name] for name in names}
    return next(iter(matching(rows, device="gpu", status="ok", **same)), None)


def _number(seconds: float) -> str:
    return f"{seconds:.3f}" if seconds < 1 else f"{seconds:.2f}"
