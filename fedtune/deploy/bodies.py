"""How much of a request from a site is read: next to nothing of one that nobody knows."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fedtune.deploy.admission import Scope, header

__all__ = ["Body", "Receive", "Send", "answer", "limit_of", "refuse"]

STRANGER = 64 << 10  # bytes; to register or to ask for work takes a few hundred
KNOWN = 32 << 20  # parts of a message have 5 MiB
PIECE_S = 60.0  # from one piece of a body to the next

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def limit_of(scope: Scope, knows: Callable[[Scope], bool]) -> tuple[int, bool]:
    """How many bytes this request may have, and whether it has said that it has more.

    Args:
        knows: whether a site's signature is on the request; asked about large requests only, since
            it takes longer than a small one.
    """
    chunked = bool(header(scope, b"transfer-encoding"))
    lengths = [int(value) for value in header(scope, b"content-length") if value.isdigit()]
    length = max(lengths, default=0)
    if not chunked and length <= STRANGER:
        return STRANGER, False
    limit = KNOWN if knows(scope) else STRANGER
    return limit, length > limit or (chunked and limit == STRANGER)


class Body:
    """A request whose body is counted, and answered with 413 when it is too long.

    Attributes:
        refused: whether it was too long or came too slowly; what the application answers then is
            dropped.
    """

    def __init__(self, receive: Receive, send: Send, limit: int) -> None:
        self._receive, self._send, self._limit = receive, send, limit
        self._size, self._whole = 0, False
        self.refused = False

    async def receive(self) -> MutableMapping[str, Any]:
        """As ASGI's."""
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout(PIECE_S):
                message = await self._receive()
        except TimeoutError:
            return await self._refuse(408, f"nothing of the body came for {PIECE_S:.0f} s")
        self._size += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._size > self._limit:
            return await self._refuse(413, f"expected at most {self._limit} bytes")
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """As ASGI's."""
        if not self.refused:
            await self._send(message)

    async def _refuse(self, status: int, detail: str) -> MutableMapping[str, Any]:
        self.refused = True
        await refuse(self._send, status, detail)
        return {"type": "http.disconnect"}


async def refuse(send: Send, status: int, reason: str) -> None:
    """Answer with one line, as Flower's own errors are, and close."""
    await answer(send, status, {"detail": f"fedtune: {reason}."})


async def answer(send: Send, status: int, content: dict[str, Any]) -> None:
    """Answer with `content` as JSON, and close."""
    body = json.dumps(content).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
