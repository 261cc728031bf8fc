"""How a round's updates and scores come in: one train message a client, each reply checked.

    exchange.train(...)      an update or a refusal, one by one as they arrive
    exchange.evaluate(...)   scores

No reply is kept: each is decoded, checked, handed out and dropped. Flower's messages are made and
read here and in `check_update.py`, `client_views.py`, `evaluation.py`, and nowhere else in a round.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from flwr.app import ArrayRecord, Message
from torch import Tensor

from fedtune.adapters import Manifest
from fedtune.results.round_record import Refusal
from fedtune.server.rounds.check_update import (
    Expected,
    Update,
    UpdateRefusedError,
    one_line,
    read_update,
    reason_of,
)
from fedtune.server.rounds.client_views import ClientViews, PendingRound
from fedtune.server.rounds.evaluation import Scores, mean_scores
from fedtune.strategies.memory import ServerMemory
from fedtune.transport.grid import EagerGrid
from fedtune.transport.messages import EVALUATE, TRAIN, EvaluateTask, Member, RoundTask, pack
from fedtune.transport.records import to_arrays
from fedtune.transport.traffic import Traffic

__all__ = ["Arrived", "DirectExchange", "Exchange", "Global"]

log = logging.getLogger(__name__)

NO_REPLY = "no reply within the round's time limit"


@dataclass(frozen=True)
class Global:
    """What clients start from.

    Attributes:
        params: the global parameters.
        manifest: what they obey.
        memory: the method's, of which extras and what is added to the base travel.
        extras: what travels beside the parameters: record names, and what they are called.
    """

    params: Mapping[str, Tensor]
    manifest: Manifest
    memory: ServerMemory = field(default_factory=ServerMemory)
    extras: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Arrived:
    """A checked update.

    Attributes:
        start: what its client was sent.
        round: which it was trained in; `age` rounds have ended since.
    """

    client: str
    node: int
    update: Update
    start: Mapping[str, Tensor]
    round: int
    age: int


Tasks = Mapping[str, RoundTask]


class Exchange(Protocol):
    """A way for contributions to come in. One lives as long as a run.

    Attributes:
        read_s: seconds spent on reading and checking replies, in all.
    """

    read_s: float

    @property
    def busy(self) -> Collection[str]:
        """Names of clients with a round under way."""

    @property
    def wait_s(self) -> float:
        """Seconds spent on waiting for replies, in all."""

    @property
    def traffic(self) -> Traffic:
        """All bytes so far."""

    def forget_leavers(self, members: Sequence[Member]) -> None:
        """Wait no more for clients that are not among these."""

    def train(
        self, number: int, tasks: Tasks, members: Sequence[Member], current: Global
    ) -> Iterator[Arrived | Refusal]:
        """Ask clients for updates; yields what came of those, and of earlier ones under way.

        Args:
            number: of the round.
            tasks: client -> what it is asked.
            members: who takes part in the run now.
            current: what the clients start from.
        """

    def evaluate(
        self, number: int, tasks: Mapping[str, EvaluateTask], members: Sequence[Member], now: Global
    ) -> Scores:
        """Ask clients for scores of `now`; raises RoundError where none is of use."""

    def drain(self) -> None:
        """Wait for all that is under way, and drop it."""


class DirectExchange:
    """One train message a client.

    Args:
        grid: sends and receives.
        timeout_s: how long a message may take; infinite when there is no limit.
        seed: of what ranks beyond the global ones start from.
    """

    def __init__(self, grid: EagerGrid, *, timeout_s: float = math.inf, seed: int = 42) -> None:
        self._grid, self._timeout_s, self._seed = grid, timeout_s, seed
        self._pending: set[str] = set()  # ids of messages under way
        self._rounds: dict[str, PendingRound] = {}
        self._views = ClientViews({}, "")
        self.read_s = 0.0

    @property
    def busy(self) -> Collection[str]:
        """Names of clients with a round under way."""
        return self._rounds.keys()

    @property
    def wait_s(self) -> float:
        """Seconds spent on waiting for replies, in all."""
        return self._grid.wait_s

    @property
    def traffic(self) -> Traffic:
        """All bytes so far."""
        return self._grid.traffic

    def forget_leavers(self, members: Sequence[Member]) -> None:
        """Wait no more for clients that are not among these, nor for a node of one before."""
        there = {member.node for member in members}
        for name in [name for name, one in self._rounds.items() if one.node not in there]:
            del self._rounds[name]
            log.warning("%s has left with a round under way; its update will not be used", name)

    def train(
        self, number: int, tasks: Tasks, members: Sequence[Member], current: Global
    ) -> Iterator[Arrived | Refusal]:
        """Ask clients for updates; yields what came of those, and of earlier ones under way.

        Who stops early finds the others at the next call. Who reads to the end waits no more for
        clients that have not answered in time.
        """
        there = {member.node: member for member in members}
        views = self._views_of(current, number)
        extras = {name: to_arrays(current.memory.extra(name)) for name in current.extras}
        messages = self._messages(TRAIN, number, tasks, members, views, extras)
        for member in members:
            if member.name in tasks:
                self._rounds[member.name] = PendingRound(tasks[member.name], views, member.node)
        replies = self._grid.send_and_receive(
            messages, timeout=self._timeout_s, pending=self._pending
        )
        for message in replies:
            read = self._read(message, number, there, current)
            del message
            yield read
            del read
        for name, one in sorted(self._rounds.items()):
            yield Refusal(one.node, name, NO_REPLY)
        self._rounds.clear()
        self._pending.clear()

    def evaluate(
        self, number: int, tasks: Mapping[str, EvaluateTask], members: Sequence[Member], now: Global
    ) -> Scores:
        """Ask clients for scores of `now`; raises RoundError where none is of use."""
        messages = self._messages(EVALUATE, number, tasks, members, self._views_of(now, number + 1))
        replies = self._grid.send_and_receive(messages, timeout=self._timeout_s)
        names = {member.node: member.name for member in members}
        needed = any(member.evaluates for member in members)
        return mean_scores(number, replies, names, needed=needed)

    def drain(self) -> None:
        """Wait for all that is under way, and drop it."""
        for _ in self._grid.send_and_receive([], timeout=self._timeout_s, pending=self._pending):
            pass

    def _messages(
        self,
        kind: str,
        number: int,
        tasks: Mapping[str, RoundTask] | Mapping[str, EvaluateTask],
        members: Sequence[Member],
        views: ClientViews,
        extras: Mapping[str, ArrayRecord] | None = None,
    ) -> list[Message]:
        """One for each client that is asked; clients that get the same share one record."""
        ttl = self._timeout_s if kind == TRAIN and math.isfinite(self._timeout_s) else None
        messages = []
        for member in sorted(members, key=lambda member: member.name):
            if (task := tasks.get(member.name)) is not None:
                arrays = views.record(member.manifest, task.personal if task.resume_round else ())
                content = pack(arrays=arrays, extras=extras, base=views.base, config=task.record())
                messages.append(Message(content, member.node, kind, ttl=ttl, group_id=str(number)))
        return messages

    def _read(
        self, message: Message, number: int, members: Mapping[int, Member], current: Global
    ) -> Arrived | Refusal:
        node = self._grid.node_of(message)
        member = members.get(node)
        name = member.name if member else str(node)
        pending = self._rounds.pop(name, None)
        if member is None or pending is None:
            return Refusal(node, name, "not asked, or answered twice")
        if message.has_error() and message.metadata.src_node_id != node:  # it is lost
            return Refusal(node, name, reason_of(message))
        started = time.perf_counter()
        try:
            manifest = member.manifest or current.manifest
            expected = Expected.of(pending.task, manifest, current.extras, member.declared)
            update = read_update(message, expected)
            start, trained_in = pending.views.params(member.manifest), pending.task.round
            return Arrived(name, node, update, start, trained_in, number - trained_in)
        except UpdateRefusedError as error:
            log.warning("round %d: refused %s: %s", number, name, error)
            return Refusal(node, name, one_line(str(error)))
        finally:
            self.read_s += time.perf_counter() - started

    def _views_of(self, current: Global, number: int) -> ClientViews:
        """Encoded once, though they are scored before they are trained from."""
        key = f"{self._seed}/{number}"
        if not self._views.shows(current.params, key):
            self._views = ClientViews(current.params, key, current.memory.base)
        return self._views
