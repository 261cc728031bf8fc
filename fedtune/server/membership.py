"""Who takes part: nodes that know the plan and hold the same adapter.

In a deployment they come and go, so the server looks again before every round.

A node is asked twice. `plan` tells it what the run will ask for and starts its trainer; it answers
with its name and its adapter's manifest. `setup` hands it the run's manifest and static tensors.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any

from flwr.app import Message, RecordDict

from fedtune.adapters import Manifest
from fedtune.adapters.fingerprint import Fingerprint
from fedtune.errors import ManifestError, RoundError, private
from fedtune.relay.frames import STARTING
from fedtune.server.bases import Bases
from fedtune.server.checkpoint import ServerState
from fedtune.server.goodbye import goodbyes
from fedtune.server.nodes import Node, Stage, objection, row
from fedtune.server.rounds.check_update import one_line, reason_of
from fedtune.strategies.agreement import check_ranks, rank_objection
from fedtune.strategies.lora.manifests import like, rank_total
from fedtune.transport.grid import EagerGrid
from fedtune.transport.messages import FINISH, PLAN, SETUP, Declared, Member, PlanTask, pack
from fedtune.transport.records import config_of

__all__ = ["ClientsHook", "Membership"]

log = logging.getLogger(__name__)

RETRY_S = 5.0  # a refused site may have been put right by then
FINISH_TIMEOUT_S = 20.0


ClientsHook = Callable[[list[dict[str, Any]]], None]


class Membership:
    """The nodes of a run.

    Args:
        plan: what every node is told.
        min_clients: nodes that must be ready before a round.
        join_timeout_s: how long to wait for them.
        patient: whether a node that refuses is asked again (a deployment), or ends the run (a
            simulation, whose clients cannot change).
        mixed_ranks: whether the nodes' LoRA ranks may differ.
        bases: the base weights that nodes must have.
        on_change: called with a row for every node when one of them has come further.
    """

    def __init__(
        self,
        grid: EagerGrid,
        plan: PlanTask,
        *,
        min_clients: int,
        join_timeout_s: float,
        patient: bool,
        mixed_ranks: bool = False,
        bases: Bases | None = None,
        on_change: ClientsHook = lambda clients: None,
    ) -> None:
        self._grid, self._plan, self._mixed_ranks = grid, plan, mixed_ranks
        self._min_clients, self._join_timeout_s = min_clients, join_timeout_s
        self._patient, self._on_change = patient, on_change
        self._bases = bases or Bases()
        self._shown: list[dict[str, Any]] = []
        self._nodes: dict[int, Node] = {}
        self._met: dict[int, Member] = {}  # knew the plan once, so that a trainer waits there
        self._told: set[int] = set()  # of the plan, so that a trainer may start there
        self._state: ServerState | None = None

    @property
    def problems(self) -> dict[str, str]:
        """Why nodes do not take part, by name or node id."""
        return {
            node.member.name if node.member else f"node {number}": node.problem
            for number, node in self._nodes.items()
            if node.stage == "refused"
        }

    def gather(self) -> Member:
        """Wait until enough nodes know the plan; returns the one that the run starts from.

        It is the first by name of those that hold the highest rank, on the base of most.
        """
        found = self._wait("planned")
        self._bases.choose({member.name: self._nodes[member.node].base for member in found})
        found = [m for m in found if not self._bases.objection(self._nodes[m.node].base)]

        def rank(member: Member) -> int:
            manifest = self._nodes[member.node].manifest
            return rank_total(manifest) if manifest else 0

        return min(found, key=lambda member: (-rank(member), member.name))

    @property
    def state(self) -> ServerState | None:
        """The state that nodes are set up with, once there is one."""
        return self._state

    def admit(self, state: ServerState) -> None:
        """From now on nodes with this state's adapter are set up."""
        self._state = state

    def ready(self) -> list[Member]:
        """Look who is there now; waits while there are fewer than needed.

        Raises:
            RoundError: too few within the join timeout, or a client of a simulation refused.
        """
        return self._wait("ready")

    def doubt(self, nodes: Iterable[int]) -> None:
        """These failed: their trainer may be a new one, so they are asked from the start."""
        if self._patient:
            for number in nodes:
                self._nodes.pop(number, None)

    def finish(self, reason: str, state: ServerState | None, personal: Collection[str]) -> None:
        """Tell all that were ever asked that the run is over, refused ones too; wait not long.

        Args:
            state: what they end with; without one they keep what they have.
            personal: parameters that a client keeps as they are once it has trained.
        """
        try:
            there = self._told & set(self._grid.get_node_ids())
            number = state.round if state else 0
            words: dict[str, str | int] = {
                "run": self._plan.run,
                "round": number,
                "reason": reason,
            }
            contents = goodbyes(sorted(there), self._met, words, state, personal)
            messages = [Message(content, node, FINISH) for node, content in contents.items()]
            for reply in self._grid.send_and_receive(messages, timeout=FINISH_TIMEOUT_S):
                if reply.has_error():
                    log.warning("finish: %s", reason_of(reply))
        except Exception as error:  # whatever ended the run must not be hidden by its goodbye
            log.warning("finish: sites were not told (%s: %s)", type(error).__name__, error)

    def _at(self, stage: Stage) -> list[Member]:
        found = [node.member for node in self._nodes.values() if node.stage == stage]
        return sorted((member for member in found if member), key=lambda member: member.name)

    def _wait(self, stage: Stage) -> list[Member]:
        deadline = time.monotonic() + self._join_timeout_s
        while True:
            idle = not self._look()
            found = self._at(stage)
            if idle and len(found) >= self._min_clients:
                return found
            if not self._patient and self.problems:
                problem = next(iter(self.problems.values()))
                raise RoundError(f"a client could not start: {private(problem)}")
            if time.monotonic() > deadline:
                raise RoundError(self._too_few(found))
            if idle:
                self._grid.pause()

    def _too_few(self, found: list[Member]) -> str:
        names = private(", ".join(member.name for member in found) or "none")
        refused = "".join(f"; {name}: {why}" for name, why in sorted(self.problems.items()))
        starting = sum(node.stage in ("asked", "setting up") for node in self._nodes.values())
        return (
            f"expected {self._min_clients} clients within {self._join_timeout_s:.0f} s, "
            f"{len(found)} are there ({names}), {starting} are starting{private(refused)}."
        )

    def _look(self) -> bool:
        """Forget who left, ask whom it is time to ask, take answers; whether there were any."""
        connected = set(self._grid.get_node_ids())
        for number in set(self._nodes) - connected:
            gone = self._nodes.pop(number)
            if gone.member:
                log.warning("%s has left", gone.member.name)
        for number in sorted(connected):
            self._ask(number, self._nodes.setdefault(number, Node()))
        pending = {node.pending: number for number, node in self._nodes.items() if node.pending}
        replies = list(self._grid.pull(pending)) if pending else []
        for reply in replies:
            number = pending[reply.metadata.reply_to_message_id]
            node = self._nodes[number]
            try:
                self._take(number, node, reply)
            except Exception as error:  # an answer from outside may be wrong in any way
                self._refuse(number, node, f"unusable answer: {_words(error)}")
        rows = [row(number, node) for number, node in sorted(self._nodes.items())]
        if rows != self._shown:
            self._shown = rows
            self._on_change(rows)
        return bool(replies)

    def _ask(self, number: int, node: Node) -> None:
        due = node.stage == "refused" and time.monotonic() > node.retry_at
        if node.stage == "new" or due:
            node.stage = "asked"
            self._told.add(number)
            self._push(number, node, Message(pack(config=self._plan.record()), number, PLAN))
        elif node.stage == "planned" and self._state is not None:
            # A site with another adapter is asked too: it then says so in its own log, and ends.
            node.stage = "setting up"
            self._push(number, node, Message(self._setup(node, self._state), number, SETUP))
        elif node.stage == "ready" and not node.pending and self._is_lonely(node):
            self._push(number, node, Message(pack(config=self._plan.record()), number, PLAN))

    def _is_lonely(self, node: Node) -> bool:
        """A site that is not sampled for long would give the run up for lost."""
        return self._patient and time.monotonic() - node.seen > self._plan.idle_timeout_s / 4

    def _push(self, number: int, node: Node, message: Message) -> None:
        sent = self._grid.push([message])
        node.pending = "".join(sent)
        if not sent:
            self._refuse(number, node, "it has left")

    def _take(self, number: int, node: Node, reply: Message) -> None:
        node.pending, node.seen = "", time.monotonic()
        if reply.has_error():
            self._refuse(number, node, self._ranks(node) or reason_of(reply))
        elif config_of(reply.content).get(STARTING):
            node.stage, node.name = "new", str(config_of(reply.content)["client"])
        elif node.stage == "asked":
            config = config_of(reply.content)
            name = str(config["client"])
            if any(other.member and other.member.name == name for other in self._others(number)):
                problem = f"another connected client is called {name}; give each site its --name"
                self._refuse(number, node, problem)
                return
            node.member = Member(number, name, bool(config["evaluates"]))
            try:
                node.member = replace(node.member, declared=Declared.of(config))
            except ManifestError as error:
                self._refuse(number, node, str(error).rstrip("."))
                return
            text = str(config["manifest"])
            node.manifest = Manifest.from_json(text) if text else None
            text = str(config.get("base", ""))
            node.base = Fingerprint.from_json(text) if text else None
            check_ranks(node.manifest)
            node.stage, node.problem = "planned", ""
            known = self._met.get(number)
            if known is None or known.name != name:
                self._met[number] = node.member
        elif self._state is not None:
            expected = self._expected(node, self._state.manifest)
            problem = self._ranks(node) or objection(expected, node.manifest)
            problem = problem or self._bases.objection(node.base)
            if problem:
                self._refuse(number, node, problem)
                return
            node.stage = "ready"
            self._bases.accept(node.member.name if node.member else f"node {number}", node.base)
            if node.member and self._mixed_ranks:
                node.member = self._met[number] = replace(node.member, manifest=expected)

    def _setup(self, node: Node, state: ServerState) -> RecordDict:
        manifest = self._expected(node, state.manifest)
        if not objection(manifest, node.manifest) and (why := self._bases.objection(node.base)):
            return pack(config={"run": self._plan.run, "refused": why})
        config = {"run": self._plan.run, "manifest": manifest.to_json()}
        return pack(arrays=state.static, config=config)

    def _expected(self, node: Node, run: Manifest) -> Manifest:
        """The run's adapter as this node should have built it: at its own ranks, where it may."""
        return like(run, node.manifest) if self._mixed_ranks and node.manifest else run

    def _ranks(self, node: Node) -> str:
        """What is wrong with a node's ranks alone; it cannot know what methods could take them."""
        if self._mixed_ranks or self._state is None or node.manifest is None:
            return ""
        return rank_objection(self._state.manifest, node.manifest)

    def _others(self, number: int) -> list[Node]:
        return [node for key, node in self._nodes.items() if key != number]

    def _refuse(self, number: int, node: Node, problem: str) -> None:
        node.stage, node.problem = "refused", problem
        node.retry_at = time.monotonic() + RETRY_S
        name = node.member.name if node.member else node.name or f"node {number}"
        log.warning("%s cannot take part: %s", name, problem)


def _words(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
