"""A decorator of Flower's `Grid`: messages travel packed, see packing.py."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedtune.errors import FrameError
from fedtune.transport.packing import MARK, convert, pack_arrays, unpack_arrays

__all__ = ["PackedGrid"]

POLL_INTERVAL_S = 0.05


class PackedGrid(Grid):
    """Packs what is pushed to `grid` and unpacks what is pulled; invisible to its user.

    The other side is a ClientApp with the mod `packed`.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    @property
    def run(self) -> Any:
        """The run of the grid below."""
        return self.grid.run

    def set_run(self, run: Any) -> None:
        """Hand on."""
        self.grid.set_run(run)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Flower's older way to build a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the connected nodes."""
        return self.grid.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:
        """The connected nodes."""
        return self.grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pack and send. A record that several messages share is packed, and travels, once."""
        known: dict[int, ArrayRecord] = {}

        def pack_once(record: ArrayRecord) -> ArrayRecord:
            if id(record) not in known:
                known[id(record)] = pack_arrays(record)
            return known[id(record)]

        outgoing = list(messages)
        sources = [message.content for message in outgoing]  # alive, so ids stay theirs
        for message, source in zip(outgoing, sources, strict=True):
            message.content = convert(source, pack_once)
            if not source.array_records:
                message.content[MARK] = ConfigRecord()
        return self.grid.push_messages(outgoing)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """The replies that are there, each unpacked when it is handed out."""
        replies = list(self.grid.pull_messages(message_ids))
        while replies:
            reply = replies.pop(0)
            if reply.has_content():
                # Broken bytes stay packed: they are no adapter, and refused as such.
                with contextlib.suppress(FrameError):
                    reply.content = convert(reply.content, unpack_arrays)
            yield reply
            del reply

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Push, then yield replies as they come, until all are there or time is up."""
        pending = set(self.push_messages(messages))
        deadline = None if timeout is None else time.monotonic() + timeout
        while pending and (deadline is None or time.monotonic() < deadline):
            for reply in self.pull_messages(pending):
                pending.discard(reply.metadata.reply_to_message_id)
                yield reply
            time.sleep(POLL_INTERVAL_S)
