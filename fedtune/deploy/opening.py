"""A SuperLink that lets sites in once it knows their keys.

`fedtune up` registers the keys at a SuperLink that listens already. A site that came in between
would be refused as unknown; told that the server is not ready (503), its node tries again.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

__all__ = ["OPENED", "Opening"]

OPENED = "FEDTUNE_OPENED"  # environment: a file that is there once the keys are registered
FOR_SITES = "/v1/fleet/"

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Opening:
    """An ASGI application in front of another one; without a file it is open from the start."""

    def __init__(self, app: App, file: str | None = None) -> None:
        self.app = app
        named = os.environ.get(OPENED) if file is None else file
        self._file = Path(named) if named else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 503 to a site."""
        if self._file is not None and self._file.exists():
            self._file = None
        if self._file is None or not str(scope.get("path", "")).startswith(FOR_SITES):
            await self.app(scope, receive, send)
        else:
            await send({"type": "http.response.start", "status": 503, "headers": []})
            await send({"type": "http.response.body", "body": b""})
