"""What a run waits for, said while nothing else is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from fedtune.errors import RoundError

__all__ = ["SAY_S", "START_S", "NotStarted", "Waiting"]

SAY_S = 30.0  # without news
SITES = "waiting for sites"  # what a run's server says of itself before its first round
START_S = 600.0  # a cold disk, a busy host: imports alone may take minutes


class NotStarted(RoundError):
    """The run's server has not said a word for too long."""


class Waiting:
    """Looks at a run now and then, and prints a line when there was no news for `SAY_S` seconds.

    Args:
        start_timeout_s: how long the run's server may take to say its first word.
    """

    def __init__(
        self,
        start_timeout_s: float = START_S,
        *,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit, self._say, self._clock = start_timeout_s, say, clock
        self._stage, self._since, self._told = _stage({}, 0, 0), clock(), clock()

    def news(self) -> None:
        """Something else was printed."""
        self._told = self._clock()

    def look(self, state: Mapping[str, Any], round_: int, num_rounds: int) -> None:
        """Say what is waited for, if it is time.

        Args:
            state: what the run's server says of itself; empty before its first word.
            round_: the round that is under way, where one is.

        Raises:
            NotStarted: its first word is overdue.
        """
        now = self._clock()
        stage = _stage(state, round_, num_rounds)
        if stage != self._stage:
            self._stage, self._since = stage, now
        waited = now - self._since
        if not state and waited >= self._limit:
            raise NotStarted(
                f"the run's server did not start within {self._limit:g} s. Look at its "
                "superlink.log (fedtune up), end what keeps the host busy, or give more time with "
                "--start_timeout_s."
            )
        if now - self._told >= SAY_S:
            most = "" if state else f", at most {self._limit:g} s"
            self._say(f"waiting: {_what(state) or stage} ({waited:.0f} s so far{most})")
            self._told = now


def _stage(state: Mapping[str, Any], round_: int, num_rounds: int) -> str:
    if not state:
        return "the run's server is starting"
    return SITES if state.get("state") == SITES else f"round {round_} of {num_rounds}"


def _what(state: Mapping[str, Any]) -> str:
    """Which sites, where it is for sites."""
    if state.get("state") != SITES:
        return ""
    stages = [site["state"] for site in state["clients"]]
    ready, refused = stages.count("ready"), stages.count("refused")
    starting, counts = len(stages) - ready - refused, [f"{ready} ready"]
    counts += [f"{starting} starting"] * (starting > 0) + [f"{refused} refused"] * (refused > 0)
    return f"sites: {', '.join(counts)}, {state['min_clients']} needed"
