"""The inline engine: Flower's apps driven in this process, one client after the other.

Deterministic, starts at once, holds one reply at a time: a client runs when its reply is pulled.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from flwr.app import Context, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedtune._flower.task_message import client_failed, set_message_id, task_identity
from fedtune.transport.grid_base import GridBase

__all__ = ["InlineGrid", "run_inline"]

log = logging.getLogger(__name__)

RUN_ID = 1
SERVER_NODE = 1


class InlineGrid(GridBase):
    """A grid of `num_clients` nodes that live in this process."""

    def __init__(self, client: ClientApp, num_clients: int) -> None:
        self._client = client
        self._contexts = {SERVER_NODE + 1 + i: _context(i, num_clients) for i in range(num_clients)}
        self._queue: dict[str, Message] = {}
        self._pushed = 0

    @property
    def run(self) -> None:  # type: ignore[override]
        """An inline grid serves one run, which needs no description."""

    def set_run(self, run: object) -> None:
        """Nothing to set."""

    def get_node_ids(self) -> Iterable[int]:
        """Ids of all nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; nothing runs yet."""
        ids = []
        for message in messages:
            self._pushed += 1
            set_message_id(message, f"m{self._pushed}")
            self._queue[message.metadata.message_id] = message
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the first queued message among `message_ids` and return its reply."""
        wanted = set(message_ids)
        for message_id in self._queue:
            if message_id in wanted:
                return [self._run(self._queue.pop(message_id))]
        return []

    def _run(self, message: Message) -> Message:
        context = self._contexts[message.metadata.dst_node_id]
        try:
            return self._client(message, context)
        except Exception as error:  # as Flower does: the server decides what a failure means
            log.debug("client failed", exc_info=True)
            return client_failed(message, error)


def run_inline(
    server: ServerApp, client: ClientApp, num_clients: int, grid: InlineGrid | None = None
) -> None:
    """Run a ServerApp against `num_clients` clients in this process, on a grid of one's own."""
    with task_identity(RUN_ID, SERVER_NODE):
        server(grid or InlineGrid(client, num_clients), _context(0, num_clients))


def _context(partition_id: int, num_partitions: int) -> Context:
    node_config: UserConfig = {"partition-id": partition_id, "num-partitions": num_partitions}
    return Context(RUN_ID, partition_id, node_config, RecordDict(), {})
