"""A web server's connections, each with its peer, none of them kept for a caller who asks nothing.

uvicorn ends a connection that rests after a request, not one whose first request never comes, or
comes byte by byte.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

__all__ = ["protocol"]

REQUEST_S = 30.0  # to ask something, from the start or from the end of what was asked before
HEADERS = 64 << 10  # bytes of a request before its body, at least

Address = tuple[str, int]
StateOf = Callable[[Address, Address], dict[str, Any]]


def protocol(state_of: StateOf) -> type[asyncio.Protocol]:
    """The protocol that uvicorn would choose, watched.

    Args:
        state_of: what the state of each request holds of its connection, by the addresses of the
            caller and of the server.
    """
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    return cast(
        type[asyncio.Protocol],
        type("Watched", (_Watch, AutoHTTPProtocol), {"state_of": staticmethod(state_of)}),
    )


class _Watch(asyncio.Protocol):
    """Before one of uvicorn's protocols; its `cycle` is the request in hand, or the last one."""

    state_of: StateOf
    app_state: dict[str, Any]
    cycle: Any
    _transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note who is there."""
        super().connection_made(transport)
        self._transport = cast(asyncio.Transport, transport)
        self._loop = asyncio.get_running_loop()
        self._idle_bytes = 0
        self._seen: Any = None
        ends = [transport.get_extra_info(name) for name in ("peername", "sockname")]
        if all(isinstance(end, tuple) for end in ends):
            self.app_state = {**self.app_state, **self.state_of(*(end[:2] for end in ends))}
        self._timer = self._loop.call_later(REQUEST_S, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop watching."""
        self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Pass it on, unless the head of the request has no end."""
        before = self.cycle
        if self._rests:
            self._idle_bytes += len(data)
            if self._idle_bytes - len(data) > HEADERS:
                self._transport.abort()
                return
        super().data_received(data)
        if self.cycle is not before:
            self._idle_bytes = 0

    @property
    def _rests(self) -> bool:
        return self.cycle is None or bool(self.cycle.response_complete)

    def _look(self) -> None:
        if self._rests and self.cycle is self._seen:
            self._transport.abort()
            return
        self._seen = self.cycle
        self._timer = self._loop.call_later(REQUEST_S, self._look)
