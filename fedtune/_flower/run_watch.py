"""A node asks now and then whether the runs that go on at its site still go on at the server.

The server says goodbye to the sites; one whose server was killed or stopped at once hears nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

__all__ = ["RunWatch", "watch_runs"]

ASK_S = 30.0


class RunWatch:
    """Asks in the node's own thread, over its connection.

    Args:
        open_runs: Flower's ids of the runs to ask about.
        over: gets the id of a run that is over, and why.
    """

    def __init__(
        self,
        open_runs: Callable[[], Iterable[str]],
        over: Callable[[str, str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open_runs, self._over, self._clock = open_runs, over, clock
        self._asked = clock()
        self.get_run: Callable[[int], Any] | None = None  # while connected

    def look(self) -> None:
        """Ask, if it is time. Call it often."""
        if self.get_run is None or self._clock() - self._asked < ASK_S:
            return
        for run in self._open_runs():
            if reason := self._reason(int(run)):
                self._over(run, reason)
        self._asked = self._clock()

    def _reason(self, run: int) -> str:
        """Why a run is over; nothing when it is not, or cannot be told now."""
        import httpx
        from flwr.supercore.error import ApiErrorCode, FlowerError
        from flwr.supercore.run import RunNotRunningException

        assert self.get_run is not None
        try:
            self.get_run(run)
        except RunNotRunningException:
            return "it has ended at the server"
        except httpx.HTTPStatusError as refusal:
            error = FlowerError.from_json(refusal.response.text)
            if error is not None and error.code == ApiErrorCode.FLEET_GET_RUN_FAILED:
                return "the server does not know it any more"
        except httpx.TransportError:
            pass
        return ""


def watch_runs(loop: ModuleType, watch: RunWatch) -> None:
    """Let `loop`, Flower's SuperNode, tell `watch` of its connection."""
    connect = vars(loop)["http_request_response"]

    @contextmanager
    def connected(*args: Any) -> Iterator[Any]:
        with connect(*args) as connection:
            watch.get_run = connection[3]
            try:
                yield connection
            finally:
                watch.get_run = None

    vars(loop)["http_request_response"] = connected
