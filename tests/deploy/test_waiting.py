"""What `submit` says while it waits, by a clock of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fedtune.deploy.waiting import SAY_S, NotStarted, Waiting

SITES = {
    "state": "waiting for sites",
    "min_clients": 2,
    "clients": [{"client": "a", "state": "ready"}, {"client": "b", "state": "asked"}],
}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def seconds(self, number: int) -> Iterator[int]:
        for second in range(number):
            self.now += 1
            yield second


def test_a_line_at_least_every_30_s_whatever_is_waited_for() -> None:
    clock, said = Clock(), []
    waiting = Waiting(600, say=lambda line: said.append((clock.now, line)), clock=clock)
    for stage in ({}, SITES, {"state": "running"}):
        for _ in clock.seconds(100):
            waiting.look(stage, 3, 10)
    times = [1000.0, *(when for when, _ in said)]
    assert max(b - a for a, b in zip(times, times[1:], strict=False)) <= SAY_S
    assert len(said) == 300 // SAY_S
    lines = [line for _, line in said]
    assert lines[0] == "waiting: the run's server is starting (30 s so far, at most 600 s)"
    assert lines[3] == "waiting: sites: 1 ready, 1 starting, 2 needed (19 s so far)"
    assert lines[-1] == "waiting: round 3 of 10 (99 s so far)"


def test_news_stand_for_a_line() -> None:
    clock, said = Clock(), []
    waiting = Waiting(600, say=said.append, clock=clock)
    for second in clock.seconds(200):
        if second % 20 == 0:
            waiting.news()
        waiting.look(SITES, 1, 10)
    assert said == []


def test_a_server_that_does_not_start_is_given_up_and_one_that_has_started_is_not() -> None:
    clock = Clock()
    waiting = Waiting(60, say=lambda line: None, clock=clock)
    for _ in clock.seconds(59):
        waiting.look({}, 1, 10)
    clock.now += 1
    with pytest.raises(NotStarted, match=r"did not start within 60 s\. .*--start_timeout_s"):
        waiting.look({}, 1, 10)
    waiting = Waiting(60, say=lambda line: None, clock=clock)
    for _ in clock.seconds(300):
        waiting.look(SITES, 1, 10)
