"""An inline grid whose clients take simulated time: replies come in the order of a virtual clock.

Nothing really waits. A client that is asked to train at time t answers at t plus its delay; all
other requests are answered at once. With equal delays clients answer in the order they were asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flwr.app import Message
from flwr.clientapp import ClientApp

from fedtune.engines.inline import SERVER_NODE, InlineGrid
from fedtune.transport.messages import TRAIN

__all__ = ["DelayedGrid"]


class DelayedGrid(InlineGrid):
    """Clients of one process, each with its delay in seconds of the virtual clock.

    `now` is what the clock shows.
    """

    def __init__(self, client: ClientApp, delays: Sequence[float]) -> None:
        super().__init__(client, len(delays))
        self.now = 0.0
        self._delays = delays
        self._due: dict[str, float] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages and note when each will be answered."""
        outgoing = list(messages)
        ids = list(super().push_messages(outgoing))
        for message, message_id in zip(outgoing, ids, strict=True):
            index = message.metadata.dst_node_id - SERVER_NODE - 1
            trains = message.metadata.message_type == TRAIN
            self._due[message_id] = self.now + (self._delays[index] if trains else 0.0)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The reply that is due first."""
        wanted = [message_id for message_id in message_ids if message_id in self._due]
        if not wanted:
            return []
        order = list(self._due)
        first = min(wanted, key=lambda message_id: (self._due[message_id], order.index(message_id)))
        self.now = max(self.now, self._due.pop(first))
        return super().pull_messages([first])
