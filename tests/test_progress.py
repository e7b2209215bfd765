"""Progress where nobody looks: a line now and then, and none of short work."""

import io
import sys

import pytest

from grsd_jax.experiments.common import devices, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def told(monkeypatch, *, seconds, to=None, first=True):
    stream = io.StringIO() if to is None else to
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "LOG_SECONDS", seconds)
    monkeypatch.setattr(devices, "writes", lambda: first)
    with progress.progress_bar(total=3, desc="work", unit="step") as bar:
        for _ in range(3):
            bar.update()
    return stream.getvalue()


def test_a_log_gets_whole_lines(monkeypatch):
    lines = told(monkeypatch, seconds=0.0).splitlines()
    assert lines[-1].startswith("work: 100%")
    assert "3/3" in lines[-1]
    assert len(lines) >= 3


def test_a_bar_within_a_bar_moves_no_cursor(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    for _ in progress.progress_bar(range(2), desc="outer"):
        for _ in progress.progress_bar(range(2), desc="inner"):
            pass
    assert "inner: 100%" in stream.getvalue()
    assert chr(27) not in stream.getvalue()


def test_short_work_leaves_no_line(monkeypatch):
    assert told(monkeypatch, seconds=60.0) == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    assert "\r" in told(monkeypatch, seconds=60.0, to=Terminal())


def test_other_processes_are_silent(monkeypatch):
    assert told(monkeypatch, seconds=0.0, first=False) == ""


def test_an_iterable_passes_through():
    assert list(progress.progress_bar(range(4))) == [0, 1, 2, 3]


@pytest.mark.parametrize("text", ["\r", "   \r", ""])
def test_blank_redraws_leave_no_line(text, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    progress._Lines().write(text)
    assert stream.getvalue() == ""
