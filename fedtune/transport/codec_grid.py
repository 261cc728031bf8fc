"""A decorator of Flower's `Grid`: tensors travel coded, and the layers above do not notice.

Down, a client gets the difference to what it has, which is what it answered for last: the lost part
of one message is in the difference of the next one, so nothing adds up. Up, it answers with the
difference to what it was sent, which is added to what was meant for it.

A client that says that it lacks what a difference is to (`resend`) gets the message whole, one that
fails twice the next one. Whose model has the run's first parameters already needs no whole message.
Memory: what each group of equal clients has, and what was meant for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import ArrayRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedtune.errors import FedtuneError, RoundError
from fedtune.transport.codecs.base import refused
from fedtune.transport.coded_records import (
    RESEND,
    SECONDS,
    SEPARATOR,
    VERSION,
    bytes_in,
    facts_of,
    join,
    restore,
    wrap,
)
from fedtune.transport.coder import Coder
from fedtune.transport.differences import moved, undo
from fedtune.transport.grid_base import GridBase, push_through
from fedtune.transport.messages import ARRAYS, EVALUATE, SETUP, TRAIN
from fedtune.transport.records import count_bytes
from fedtune.transport.settings import CodecSettings
from fedtune.transport.traffic import Meter
from fedtune.transport.versions import Version

__all__ = ["CodecGrid"]

log = logging.getLogger(__name__)

UNUSABLE = 100  # code of an error of ours; Flower's are below
MOST_BYTES = 1 << 32  # of tensors that are kept for clients with different histories


@dataclass
class _Flight:
    """A message under way.

    Attributes:
        first: as it left first; replies are handed out as answers to it.
        content: as our caller gave it.
        version: what its receiver has once it has decoded it.
        whole: whether it was sent whole.
        id: of the message as it left last.
    """

    first: Message
    content: RecordDict
    version: Version
    whole: bool
    id: str = ""


class CodecGrid(GridBase):
    """Encodes what is pushed to `grid` and decodes what is pulled.

    Args:
        kinds: types of the messages that it encodes.
        refactors: whether every round's parameters are new factors: then there are no differences
            to send down.

    `wire` counts what is pushed and pulled below.
    """

    def __init__(
        self,
        grid: Grid,
        settings: CodecSettings,
        *,
        kinds: Collection[str] = (TRAIN, EVALUATE),
        refactors: bool = False,
    ) -> None:
        self.grid, self.wire = grid, Meter()
        self._settings, self._kinds, self._refactors = settings, kinds, refactors
        self._start: Version | None = None
        self._held: dict[int, Version] = {}  # by node, the one that answered last at the end
        self._failed: set[int] = set()  # nodes, in their last answer
        self._flights: dict[str, _Flight] = {}
        self._again: dict[str, str] = {}  # id of a message sent whole -> id that our caller knows

    def begin(self, params: Mapping[str, Tensor]) -> None:
        """From now on clients are asked, with their set-up, whether they have these parameters."""
        if self._settings.down == "none":
            return
        named = {f"{ARRAYS}{SEPARATOR}{name}": tensor for name, tensor in params.items()}
        self._start = Version.of(named, named)

    @property
    def run(self) -> Any:
        """The run of the grid below."""
        return self.grid.run

    def set_run(self, run: Any) -> None:
        """Hand on."""
        self.grid.set_run(run)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the connected nodes; what those that have left were asked stays unanswered."""
        nodes = list(self.grid.get_node_ids())
        self._keep_flights(lambda flight: flight.first.metadata.dst_node_id in nodes)
        return nodes

    def get_nodes(self) -> Iterable[Any]:
        """The connected nodes."""
        return self.grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Encode and send; what is the same for several nodes is encoded, and travels, once."""
        coder = Coder(self._settings, self._refactors)
        outgoing = list(messages)
        flights: dict[int, _Flight] = {}
        for index, message in enumerate(outgoing):
            if message.metadata.message_type in self._kinds:
                held = self._held.get(message.metadata.dst_node_id)
                flights[index] = self._coded(message, message.content, held, coder)
                outgoing[index] = flights[index].first
            elif message.metadata.message_type == SETUP and self._start is not None:
                asked = wrap(message.content, None, {VERSION: self._start.name})
                outgoing[index] = _addressed(asked, message)
        self.wire.codec_s += coder.seconds
        ids = self._push(outgoing)
        for index, flight in flights.items():
            self._forget_flights(flight.first)
            if (sent_id := ids[index]) is not None:
                self._flights[sent_id] = replace(flight, id=sent_id)
        return ids  # type: ignore[return-value]  # as Flower's: None of what has not left

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """The replies that are there, each decoded when it is handed out."""
        wanted = set(message_ids)
        below = [sent for sent, known in self._again.items() if known in wanted]
        below += wanted - set(self._again.values())
        replies = list(self.grid.pull_messages(below))
        while replies:
            reply = self._take(replies.pop(0))
            if reply is not None:
                yield reply
            del reply

    def _push(self, messages: list[Message]) -> list[str | None]:
        for message in messages:
            self.wire.down[message.metadata.dst_node_id] += count_bytes(message.content)
        return push_through(self.grid, messages)

    def _coded(
        self, message: Message, content: RecordDict, held: Version | None, coder: Coder
    ) -> _Flight:
        wrapped, version = coder.code(content, held)
        return _Flight(_addressed(wrapped, message), content, version, whole=held is None)

    def _forget_flights(self, newer: Message) -> None:
        """Who gets a message of a kind has answered the last one of it, or will not."""
        to = (newer.metadata.dst_node_id, newer.metadata.message_type)

        def is_other(flight: _Flight) -> bool:
            metadata = flight.first.metadata
            return (metadata.dst_node_id, metadata.message_type) != to

        self._keep_flights(is_other)

    def _keep_flights(self, wanted: Callable[[_Flight], bool]) -> None:
        self._flights = {i: flight for i, flight in self._flights.items() if wanted(flight)}
        self._again = {s: known for s, known in self._again.items() if known in self._flights}

    def _take(self, reply: Message) -> Message | None:
        """What our caller gets; None when the message had to be sent again."""
        if reply.has_content():
            self.wire.up[reply.metadata.src_node_id] += count_bytes(reply.content)
        sent_id = reply.metadata.reply_to_message_id
        known_id = self._again.pop(sent_id, sent_id)
        flight = self._flights.pop(known_id, None)
        if flight is None:
            self._note_first(reply)
            return reply
        if sent_id != flight.id:  # what it answers has been sent again since
            self._flights[known_id] = flight
            return None
        node = flight.first.metadata.dst_node_id
        if reply.has_error():
            self._fail(node)
            return reply if known_id == sent_id else Message(reply.error, reply_to=flight.first)
        started = time.perf_counter()
        try:
            if RESEND in reply.content and not flight.whole:
                log.warning("node %d lacks what it was sent a difference to; it gets all", node)
                self._held.pop(node, None)
                self._send_whole(known_id, flight)
                return None
            if RESEND in reply.content:
                raise refused("a reply to what was sent whole", "the wish for it once more")
            has = facts_of(reply.content).get(VERSION)
            if has != flight.version.name and self._settings.up == "none":
                raise refused("an update of what was sent", "one of something else")
            content = self._decoded(reply.content, flight)
        except FedtuneError as error:
            self._fail(node)
            return Message(Error(UNUSABLE, str(error)), reply_to=flight.first)
        self.wire.codec_s += time.perf_counter() - started + _seconds_in(reply.content)
        if has == flight.version.name:
            self._hold(node, flight.version)
        else:  # it had answered the same request before, which came to it in another way
            self._held.pop(node, None)
            self._failed.discard(node)
        return Message(content, reply_to=flight.first)

    def _fail(self, node: int) -> None:
        """It may be the network's fault once; then what the node has is no longer trusted."""
        if node in self._failed:
            self._held.pop(node, None)
        self._failed.add(node)

    def _note_first(self, reply: Message) -> None:
        """Who has the first parameters says so in the answer to its set-up."""
        if reply.has_content() and facts_of(reply.content):
            node, name = reply.metadata.src_node_id, facts_of(reply.content).get(VERSION)
            is_new = reply.metadata.message_type == SETUP and node not in self._held
            if self._start and name == self._start.name and is_new:
                self._hold(node, self._start)
            reply.content = restore(reply.content, None)

    def _decoded(self, content: RecordDict, flight: _Flight) -> RecordDict:
        data = bytes_in(content)
        meant, received = flight.version.meant, flight.version.received
        if data is not None:
            return restore(content, undo(data, meant))
        if self._settings.up != "none":
            return restore(content, None)
        plain = RecordDict({k: r for k, r in content.items() if not isinstance(r, ArrayRecord)})
        return restore(plain, moved(join(content), received, meant))

    def _send_whole(self, known_id: str, flight: _Flight) -> None:
        coder = Coder(self._settings, self._refactors)
        whole = self._coded(flight.first, flight.content, None, coder)
        self.wire.codec_s += coder.seconds
        (sent_id,) = self._push([whole.first])
        if sent_id is None:
            raise RoundError("expected the node to wait for what it had asked for, it has left.")
        self._again[sent_id] = known_id
        self._flights[known_id] = replace(whole, first=flight.first, id=sent_id)

    def _hold(self, node: int, version: Version) -> None:
        self._failed.discard(node)
        if not version.name:  # nothing is sent as a difference
            return
        self._held.pop(node, None)
        self._held[node] = self._shared(version)
        while len(self._held) > 1 and self._kept_bytes() > MOST_BYTES:
            del self._held[next(iter(self._held))]

    def _shared(self, version: Version) -> Version:
        """Nodes that were sent the same in messages of their own do not keep it twice."""
        for other in self._held.values():
            if other.name == version.name:
                return replace(version, received=other.received)
        return version

    def _kept_bytes(self) -> int:
        different = {version.name: version.nbytes for version in self._held.values()}
        return sum(different.values())


def _addressed(content: RecordDict, like: Message) -> Message:
    """To whom, and as what, `like` goes."""
    metadata = like.metadata
    return Message(
        content,
        metadata.dst_node_id,
        metadata.message_type,
        ttl=metadata.ttl,
        group_id=metadata.group_id,
    )


def _seconds_in(content: RecordDict) -> float:
    """What the client says that it needed for its side."""
    seconds = facts_of(content).get(SECONDS)
    return seconds if isinstance(seconds, float) and 0 <= seconds < 1e6 else 0.0
