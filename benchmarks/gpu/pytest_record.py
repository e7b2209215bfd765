"""A pytest plugin that writes down each test as it ends, and stops one that takes long.

Set ``GRSD_RECORD`` to a file of JSON lines and ``GRSD_SECONDS`` to a test's seconds.
"""

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

_LINES = 12


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    """Raises in a test that has taken its time."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"stopped after {seconds} seconds")

    seconds = int(os.environ["GRSD_SECONDS"])
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Appends a line for a test, in the process that collects the reports."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    if report.when != "call" and report.outcome == "passed":
        return
    record = {
        "test": report.nodeid,
        "outcome": report.outcome,
        "seconds": round(report.duration, 2),
        "measured": dict(report.user_properties),
    }
    if report.failed:
        lines = report.longreprtext.strip().splitlines()[-_LINES:]
        record["lines"] = [line[:400] for line in lines]
    with open(os.environ["GRSD_RECORD"], "a") as file:
        file.write(json.dumps(record, default=str) + "\n")
