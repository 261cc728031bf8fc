from __future__ import annotations

import io
import sys

import pytest

from fedtune.report import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_log_gets_ten_plain_lines():
    log = io.StringIO()
    with Progress(1000, "rounds", stream=log) as progress:
        for _ in range(1000):
            progress.advance(1, loss=2.45123)
    lines = log.getvalue().splitlines()
    assert len(lines) == 10
    assert "\r" not in log.getvalue()
    assert "\x1b" not in log.getvalue()
    assert lines[0].startswith("rounds:  100/1000 (10 %)")
    assert lines[-1].startswith("rounds: 1000/1000 (100 %)")
    assert lines[-1].endswith("loss=2.451")


def test_slow_work_says_something_every_half_minute():
    log, clock = io.StringIO(), Clock()
    with Progress(1000, "steps", stream=log, clock=clock) as progress:
        for _ in range(50):
            clock.now += 10
            progress.advance()
        assert len(log.getvalue().splitlines()) == 16


def test_a_stop_in_the_middle_says_how_far_it_came():
    log = io.StringIO()
    with pytest.raises(RuntimeError), Progress(100, "steps", stream=log) as progress:  # noqa: PT012
        progress.advance(3)
        raise RuntimeError
    assert log.getvalue().startswith("steps:   3/100 (3 %)")


def test_nothing_to_do_prints_nothing():
    log = io.StringIO()
    with Progress(0, "rounds", stream=log):
        pass
    assert log.getvalue() == ""


def test_a_terminal_gets_a_bar_and_markup_is_text():
    terminal = Terminal()
    with Progress(4, "rounds [bold]", stream=terminal) as progress:
        progress.advance(4, site="[red]x")
    assert "4/4" in terminal.getvalue()
    assert "rounds [bold]" in terminal.getvalue()
    assert "site=[red]x" in terminal.getvalue()


def test_a_bar_inside_a_bar_works():
    terminal = Terminal()
    with Progress(2, "outer", stream=terminal) as outer:
        with Progress(3, "inner", stream=terminal) as inner:
            inner.advance(3)
        outer.advance(2)
    assert "2/2" in terminal.getvalue()
    assert "3/3" in terminal.getvalue()


def test_default_is_stderr(capsys: pytest.CaptureFixture[str]):
    with Progress(1, "rounds", stream=sys.stderr) as progress:
        progress.advance()
    with Progress(1, "rounds") as progress:
        progress.advance()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("rounds: 1/1 (100 %)") == 2
