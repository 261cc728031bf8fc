"""The eager grid: a decorator of Flower's `Grid` that hands out each reply as it arrives.

Flower's own `send_and_receive` keeps every reply in a list and sleeps seconds between polls. Here a
reply is yielded, folded by the caller and dropped, so server memory does not grow with clients.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from flwr.app import Message
from flwr.serverapp import Grid

from fedtune.transport.grid_base import POLL_INTERVAL_S, push_through, replies_to
from fedtune.transport.records import count_bytes
from fedtune.transport.traffic import Meter, Traffic

__all__ = ["EagerGrid"]


class EagerGrid:
    """Sends messages through `grid` and yields replies one by one.

    A reply is kept until somebody asks for it: what a round leaves over is there for the next one.

    Args:
        wire: counts what a decorator below makes of the messages; None: they leave as they are.
    """

    def __init__(
        self, grid: Grid, poll_interval_s: float = POLL_INTERVAL_S, wire: Meter | None = None
    ) -> None:
        self.grid = grid
        self.poll_interval_s = poll_interval_s
        self._raw = Meter()
        self._wire = wire or self._raw
        self.wait_s = 0.0
        self._asked: dict[str, int] = {}  # id of a message -> node that it went to
        self._inbox: list[Message] = []

    def get_node_ids(self) -> list[int]:
        """Ids of the connected nodes, sorted."""
        return sorted(self.grid.get_node_ids())

    def push(self, messages: Iterable[Message]) -> list[str]:
        """Send messages without waiting for a reply; returns the ids of those that have left.

        Raises:
            RoundError: they were not taken.
        """
        outgoing = list(messages)
        nodes = [message.metadata.dst_node_id for message in outgoing]
        for node, message in zip(nodes, outgoing, strict=True):
            self._raw.down[node] += count_bytes(message.content)
        ids = push_through(self.grid, outgoing)
        asked = {sent: node for sent, node in zip(ids, nodes, strict=True) if sent is not None}
        self._asked |= asked
        return list(asked)

    @property
    def traffic(self) -> Traffic:
        """All bytes so far."""
        return Traffic.now(self._wire, self._raw)

    def node_of(self, reply: Message) -> int:
        """The node that was asked: the reply for one that is lost comes from the server itself."""
        metadata = reply.metadata
        return self._asked.get(metadata.reply_to_message_id, metadata.src_node_id)

    def pull(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """The replies that are there by now; each is let go of before the next is handed out."""
        wanted = set(message_ids)
        missing = wanted - {message.metadata.reply_to_message_id for message in self._inbox}
        arriving = iter(self.grid.pull_messages(missing) if missing else ())
        try:
            while (reply := self._next(wanted, arriving)) is not None:
                if reply.has_content():
                    self._raw.up[self.node_of(reply)] += count_bytes(reply.content)
                message_id = reply.metadata.reply_to_message_id
                yield reply
                del reply
                self._asked.pop(message_id, None)
        finally:
            self._inbox.extend(arriving)  # who stops early finds them the next time

    def _next(self, wanted: set[str], arriving: Iterator[Message]) -> Message | None:
        """The first reply that is wanted, or that answers no open message: nobody will ask."""
        for index, kept in enumerate(self._inbox):
            if self._is_due(kept, wanted):
                return self._inbox.pop(index)
        started = time.monotonic()
        try:
            for reply in arriving:
                if self._is_due(reply, wanted):
                    return reply
                self._inbox.append(reply)
        finally:
            self.wait_s += time.monotonic() - started
        return None

    def _is_due(self, reply: Message, wanted: set[str]) -> bool:
        message_id = reply.metadata.reply_to_message_id
        return message_id in wanted or message_id not in self._asked

    def pause(self) -> None:
        """Wait until the next look."""
        time.sleep(self.poll_interval_s)
        self.wait_s += self.poll_interval_s

    def send_and_receive(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,
        pending: set[str] | None = None,
    ) -> Iterator[Message]:
        """Push all messages, then yield replies as they arrive.

        Ends when every message is answered or after `timeout` seconds; who has not answered by
        then is for the caller to work out from the node ids of the replies. `pending` are ids of
        earlier messages whose replies are waited for too; those without one are left in it.
        """
        waiting = set() if pending is None else pending
        waiting |= set(self.push(messages))
        yield from replies_to(waiting, self.pull, timeout=timeout, pause=self.pause)
