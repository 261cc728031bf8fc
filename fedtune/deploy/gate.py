"""Flower's SuperLink with its control open to this machine only.

Flower's port serves sites (`/v1/fleet`) and, without asking who calls, also the commands that start
a run (`/v1/control`) and the processes of a run (`/v1/runtime`): whoever reaches the port may run a
program of their own on the server. Sites need the first alone; `fedtune submit` and the processes
of a run are on the server's machine. So other machines get the first alone.

    python -m fedtune.deploy.gate [flower-superlink's arguments]
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from importlib.metadata import entry_points
from ipaddress import ip_address
from typing import Any

__all__ = ["GATE", "Gate", "main"]

GATE = "/fedtune/gate"  # answers 200 where the gate is in place
FOR_SITES = ("/v1/fleet/", "/health")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Gate:
    """An ASGI application in front of another one."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what is allowed; answer 403 to the rest."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http" and scope["path"] == GATE:
            await _answer(send, 200)
        elif scope["type"] == "http" and (_for_sites(scope["path"]) or is_local(scope)):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await _answer(send, 403)
        else:
            await send({"type": "websocket.close", "code": 1008})


def is_local(scope: Scope) -> bool:
    """Whether the caller is on this machine: over loopback, or from the very address it called."""
    client, server = scope.get("client"), scope.get("server")
    if not client or not server:
        return False
    try:
        caller, called = _address(client[0]), _address(server[0])
    except ValueError:
        return False
    return bool(caller.is_loopback or caller == called)


def main() -> None:
    """Run `flower-superlink` behind the gate."""
    import uvicorn

    from fedtune.engines._compat import launch_runs_once

    launch_runs_once()
    serve: Callable[..., None] = uvicorn.run

    def serve_gated(*, app: App, **settings: Any) -> None:
        serve(app=Gate(app), **settings)

    vars(uvicorn)["run"] = serve_gated
    (program,) = entry_points(group="console_scripts", name="flower-superlink")
    program.load()()


def _for_sites(path: str) -> bool:
    return ".." not in path and path.startswith(FOR_SITES)


def _address(text: str) -> Any:
    address = ip_address(text)
    return getattr(address, "ipv4_mapped", None) or address


async def _answer(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b""})


if __name__ == "__main__":
    main()
