"""At the server: tell sites the time, and note whose clock differs from it."""

from __future__ import annotations

import math
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
        self._noted: dict[str, tuple[float, str]] = {}  # when printed, and the line

    def note(self, scope: Scope) -> None:
        """Print a line, into the SuperLink's log, where a site's clock differs."""
        try:
            (name,), (clock,) = (header(scope, key.encode()) for key in (SITE, CLOCK))
            site, ahead = name.decode("ascii"), float(clock) - time.time()
        except ValueError:
            return
        offset = Offset(ahead, ahead)
        if not offset.is_notable or not SITE_NAME.fullmatch(site):
            self._noted.pop(site, None)
            return
        now = time.monotonic()
        printed, _ = self._noted.get(site, (-math.inf, ""))
        outcome = "not let in until it is set" if offset.is_refused else "let in"
        where = scope["client"][0] if scope.get("client") else "unknown"
        line = f"site {site} at {where}: its clock is {offset}; {outcome}"
        if now - printed >= AGAIN_S:
            printed = now
            print(line, file=sys.stderr, flush=True)
        if len(self._noted) >= MOST_SITES:
            self._noted.clear()
        self._noted[site] = printed, line

    def lately(self) -> list[str]:
        """The lines of the sites whose clocks differed when they last asked."""
        return [line for _, line in self._noted.values()]

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
