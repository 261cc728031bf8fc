"""Before a site's node starts: whether it can join now, and if not, what people should know."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from fedtune.deploy.address import Address
from fedtune.deploy.clock import AHEAD_S, BEHIND_S, CLOCK, SITE, Offset
from fedtune.deploy.probe import NotYet, probe
from fedtune.deploy.proxy import Proxy

__all__ = ["Lookout", "Say"]

Say = Callable[[str], None]


class Lookout:
    """Asks the SuperLink itself, on the way that the node will take.

    Args:
        ca: who must have signed its certificate, or None for no TLS.
        name: of the site; the server hears it with the site's time.
        say: tells people what happens, each thing once.
    """

    def __init__(
        self, superlink: Address, ca: Path | None, proxy: Proxy | None, *, name: str, say: Say
    ) -> None:
        self._superlink, self._ca, self._proxy = superlink, ca, proxy
        self._name, self._say = name, say
        self._told, self._has_warned = "", False

    def is_clear(self) -> bool:
        """Whether a node can join now; raises DeployError where waiting would not help."""
        try:
            offset = probe(
                self._superlink,
                self._ca,
                proxy=self._proxy,
                headers={SITE: self._name, CLOCK: f"{time.time():.3f}"},
            ).offset
        except NotYet as problem:
            reason = problem.reason
            self._tell(reason, f"waiting for a SuperLink at {self._superlink} ({reason})")
            return False
        if offset is not None and offset.is_refused:
            self._tell("clock", f"not let in: {_of_clocks(offset)}; trying again")
            return False
        if offset is not None and offset.is_notable and not self._has_warned:
            self._has_warned = True
            self._say(f"warning: {_of_clocks(offset)}")
        self._told = ""
        return True

    def _tell(self, kind: str, text: str) -> None:
        if kind != self._told:
            self._say(text)
        self._told = kind


def _of_clocks(offset: Offset) -> str:
    return (
        f"this host's clock is {offset} (Flower takes {AHEAD_S:.0f} s ahead to {BEHIND_S:.0f} s "
        "behind). Set it, best by NTP"
    )
