"""A decorator of Flower's `Grid`: messages travel packed, see packing.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedtune.errors import FrameError
from fedtune.transport.grid_base import GridBase
from fedtune.transport.packing import MARK, convert, pack_arrays, unpack_arrays

__all__ = ["PackedGrid"]


class PackedGrid(GridBase):
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
