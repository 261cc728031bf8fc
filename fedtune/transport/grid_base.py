"""What the grids of our own share: Flower's older message builder, and the wait for replies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedtune.errors import RoundError
from fedtune.transport.records import count_bytes

__all__ = ["POLL_INTERVAL_S", "GridBase", "push_through", "replies_to"]

POLL_INTERVAL_S = 0.05


class GridBase(Grid):
    """A grid; its children say who the nodes are, and how messages are pushed and pulled."""

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

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Push, then yield replies as they come, until all are there or time is up."""
        pending = {sent for sent in self.push_messages(messages) if sent is not None}
        yield from replies_to(pending, self.pull_messages, timeout=timeout)


def push_through(grid: Grid, messages: Sequence[Message]) -> list[str | None]:
    """The id of each message, None of one to a node that has left.

    Raises:
        RoundError: they were not taken.
    """
    ids: list[str | None] = list(grid.push_messages(messages))
    if len(ids) != len(messages):
        size = sum(count_bytes(message.content) for message in messages) / 1e6
        raise RoundError(
            f"server: expected the SuperLink to take {len(messages)} messages of {size:.1f} MB, it "
            f"took {len(ids)}. Train fewer parameters, or send fewer bytes of each: --codec int8."
        )
    return ids


def replies_to(
    pending: set[str],
    pull: Callable[[Iterable[str]], Iterable[Message]],
    *,
    timeout: float | None = None,
    pause: Callable[[], None] = lambda: time.sleep(POLL_INTERVAL_S),
) -> Iterator[Message]:
    """Yield what `pull` finds of the ids in `pending`, until none is left in it or time is up."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while pending:
        idle = True
        for reply in pull(pending):
            idle = False
            pending.discard(reply.metadata.reply_to_message_id)
            yield reply
            del reply
        if pending and deadline is not None and time.monotonic() > deadline:
            return
        if idle:
            pause()
