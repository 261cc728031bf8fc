"""Flower's SuperLink with its control open to its own user, and to root, alone.

Flower's port serves sites (`/v1/fleet`) and, without asking who calls, also the commands that start
a run (`/v1/control`) and the processes of a run (`/v1/runtime`): whoever reaches the port may run a
program of their own on the server. Sites need the first alone, and get that alone, in bounds
(`bodies.py`). `fedtune submit` and the processes of a run are on the server's machine and of its
user; what that takes is in `admission.py`.

    python -P -m fedtune.deploy.gate [flower-superlink's arguments]
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fedtune.deploy.admission import Rules, Scope, is_for_sites, peer_state
from fedtune.deploy.bodies import Body, Receive, Send, answer, limit_of, refuse
from fedtune.deploy.clocks import Clocks
from fedtune.deploy.probe import HEALTH

__all__ = ["GATE", "Gate", "main"]

GATE = "/fedtune/gate"  # answers 200 to who may ask for more than sites may

App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Gate:
    """An ASGI application in front of another one.

    Args:
        rules: of what is not for sites.
        knows: whether a site that the application knows has signed a request.
    """

    def __init__(self, app: App, rules: Rules, knows: Callable[[Scope], bool]) -> None:
        self.app, self._rules, self._knows = app, rules, knows
        self._clocks = Clocks()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what is allowed; answer 403 to the rest, and 413 to what is too long."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["path"] == HEALTH:
            self._clocks.note(scope)
            await self._bounded(scope, receive, self._clocks.telling(send))
        elif is_for_sites(scope["path"]):
            await self._bounded(scope, receive, send)
        elif (refusal := await self._refusal(scope)) is not None:
            await refuse(send, 403, refusal)
        elif scope["path"] == GATE:
            await answer(send, 200, {"clocks": self._clocks.lately()})
        else:
            await self.app(scope, receive, send)

    async def _refusal(self, scope: Scope) -> str | None:
        if self._rules.takes_long(scope):  # meanwhile others are served
            return await asyncio.to_thread(self._rules.refusal, scope)
        return self._rules.refusal(scope)

    async def _bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit, exceeds = limit_of(scope, self._knows)
        if exceeds:
            await refuse(send, 413, f"expected at most {limit} bytes")
            return
        body = Body(receive, send, limit)
        try:
            await self.app(scope, body.receive, body.send)
        except Exception:
            if not body.refused:  # else it could not go on without the rest
                raise


def main() -> None:
    """Run `flower-superlink` behind the gate."""
    from fedtune._flower.fleet import known_nodes
    from fedtune._flower.listening import protocol
    from fedtune._flower.superlink import run_superlink
    from fedtune.deploy.opening import Opening

    def gated(app: Any, host: str, certificate: str | None) -> Gate:
        nodes = known_nodes(app)
        rules = Rules.here(host, _names(certificate))
        return Gate(Opening(app), rules, lambda scope: nodes(scope["headers"]))

    run_superlink(gated, protocol(peer_state))


def _names(certificate: str | None) -> list[str]:
    from fedtune.deploy.keys import hosts_of, load_certificate

    return [] if certificate is None else hosts_of(load_certificate(Path(certificate)))


if __name__ == "__main__":
    main()
