"""A node asks whether the runs at its site go on at the server."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import httpx
import pytest
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.run import RunNotRunningException

from fedtune._flower.run_watch import ASK_S, RunWatch, watch_runs


def refusal(status: int, code: int) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "http://superlink/v1/fleet/get-run")
    body = {"code": code, "detail": "no", "extra": None}
    return httpx.HTTPStatusError("", request=request, response=httpx.Response(status, json=body))


class Watched:
    """A watch whose server answers as `answers` says."""

    def __init__(self, answers: dict[int, BaseException | None]) -> None:
        self.now, self.asked = 0.0, []
        self.over: list[tuple[str, str]] = []
        self.watch = RunWatch(
            lambda: [str(run) for run in answers],
            lambda run, reason: self.over.append((run, reason)),
            clock=lambda: self.now,
        )

        def get_run(run: int) -> Any:
            self.asked.append(run)
            if (error := answers[run]) is not None:
                raise error

        self.get_run = get_run


def test_who_is_over_is_told_and_asked_for_now_and_then() -> None:
    gone = refusal(404, int(ApiErrorCode.FLEET_GET_RUN_FAILED))
    made = Watched({1: None, 2: RunNotRunningException(), 3: gone})
    made.watch.get_run = made.get_run
    for _ in range(100):
        made.watch.look()
        made.now += ASK_S / 10
    assert made.asked == [1, 2, 3] * (len(made.asked) // 3)
    assert 8 <= len(made.asked) // 3 <= 9
    assert made.over[:2] == [
        ("2", "it has ended at the server"),
        ("3", "the server does not know it any more"),
    ]


@pytest.mark.parametrize("error", [httpx.ReadTimeout("busy"), refusal(500, 1), refusal(400, 1)])
def test_no_answer_is_no_end(error: BaseException) -> None:
    made = Watched({1: error})
    made.watch.get_run = made.get_run
    made.now = ASK_S
    made.watch.look()
    assert made.asked == [1]
    assert made.over == []


def test_only_a_connected_node_asks() -> None:
    made = Watched({1: RunNotRunningException()})
    loop = ModuleType("loop")
    parts = (5, *[None] * 2, made.get_run, *[None] * 4)

    class Connection:
        def __init__(self, *_: Any) -> None:
            pass

        def __enter__(self) -> Any:
            return parts

        def __exit__(self, *_: Any) -> None:
            pass

    vars(loop)["http_request_response"] = Connection
    watch_runs(loop, made.watch)
    made.now = ASK_S
    made.watch.look()
    assert made.asked == []
    with vars(loop)["http_request_response"]("address", True) as connection:
        assert connection == parts
        made.watch.look()
    made.now *= 3
    made.watch.look()
    assert made.over == [("1", "it has ended at the server")]
