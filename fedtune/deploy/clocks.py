"""At the server: tell sites the time, and note whose clock differs from it."""

from __future__ import annotations

import sys
import time

from fedtune.deploy.admission import Scope, header
from fedtune.deploy.bodies import Send
from fedtune.deploy.clock import CLOCK, SITE, TIME, Offset
from fedtune.deploy.roles import SITE_NAME

__all__ = ["Clocks"]

MOST_SITES = 256  # anybody may ask, under any name
AGAIN_S = 600.0  # between lines about one site


class Clocks:
    """What sites have said of their clocks when they asked whether the server is there."""

    def __init__(self) -> None:
        self._next: dict[str, float] = {}  # when a site may be spoken of again

    def note(self, scope: Scope) -> None:
        """Print a line, into the SuperLink's log, where a site's clock differs."""
        try:
            (name,), (clock,) = (header(scope, key.encode()) for key in (SITE, CLOCK))
            site, ahead = name.decode("ascii"), float(clock) - time.time()
        except ValueError:
            return
        offset = Offset(ahead, ahead)
        if not offset.is_notable or not SITE_NAME.fullmatch(site):
            return
        now = time.monotonic()
        if now < self._next.get(site, now):
            return
        if len(self._next) >= MOST_SITES:
            self._next.clear()
        self._next[site] = now + AGAIN_S
        outcome = "not let in until it is set" if offset.is_refused else "let in"
        where = scope["client"][0] if scope.get("client") else "unknown"
        print(f"site {site} at {where}: its clock is {offset}; {outcome}", file=sys.stderr)

    @staticmethod
    def telling(send: Send) -> Send:
        """`send` with the time in the head of the answer, which nobody in between may keep."""

        async def tell(message: Scope) -> None:
            if message["type"] == "http.response.start":
                stamp = [(TIME.encode(), f"{time.time():.3f}".encode())]
                fresh = [(b"cache-control", b"no-store")]
                message = {**message, "headers": [*message.get("headers", ()), *stamp, *fresh]}
            await send(message)

        return tell
