"""The Flower `Strategy` around every method: sampling, messages, checked fold, outcome of a round.

The shell keeps no reply: each is decoded, checked, folded and dropped as the grid yields it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedtune.adapters import Manifest
from fedtune.config import sampled_clients
from fedtune.results.round_record import Refusal
from fedtune.strategies.advance import ServerMemory
from fedtune.strategies.attempt import Arrived, Attempt, StepFailedError
from fedtune.strategies.base import Method, Round
from fedtune.strategies.bounds import DEFAULT, Bounds, Judge
from fedtune.strategies.gathering import Gathering
from fedtune.strategies.outcome import Outcome, needed_replies, sample_clients
from fedtune.strategies.scoring import Row, mean_scores, scorers
from fedtune.strategies.updates import (
    Expected,
    UpdateRefusedError,
    one_line,
    read_update,
    reason_of,
)
from fedtune.strategies.views import Flight, Views
from fedtune.transport.messages import EVALUATE, TRAIN, EvaluateTask, Member, RoundTask, pack
from fedtune.transport.records import params_of, to_arrays

__all__ = ["FedStrategy"]

log = logging.getLogger(__name__)

WINDOW = 50  # finished rounds among which bounds look for the last that moved


class FedStrategy(Strategy):
    """Drives one `Method` over named clients.

    Args:
        method: what to compute.
        manifest: of the global parameters.
        static: frozen tensors that every client has.
        fraction_train: share of the clients asked in a round.
        min_replies: good updates needed: a number, a fraction of those asked, or None for all.
        seed: of the sampling.
        run_id: id of the run, which clients know it by.
        ttl_s: how long a message may wait for its client; infinite when there is no limit.
        pooled: whether one client's held-out rows are those of all.
        bounds: of what one client's reply may do.

    Set `members` to who takes part before each use, and `node_of` to what knows whose reply a
    message is, where that is not its sender's. `memory` is what the server keeps, `client_rounds`
    the last round of each client whose update was taken, `history` the records of finished rounds.
    """

    def __init__(
        self,
        method: Method,
        manifest: Manifest,
        *,
        static: Mapping[str, Tensor] | None = None,
        fraction_train: float = 1.0,
        min_replies: str | None = None,
        seed: int = 42,
        run_id: str = "",
        ttl_s: float = math.inf,
        pooled: bool = True,
        bounds: Bounds = DEFAULT,
    ) -> None:
        self.method = method
        self.memory = ServerMemory(manifest)
        self.static = static or {}
        self.fraction_train = fraction_train
        self.min_replies = min_replies
        self.seed = seed
        self.run_id = run_id
        self.ttl_s = ttl_s
        self.pooled = pooled
        self.bounds = bounds
        self.members: list[Member] = []
        self.node_of: Callable[[Message], int] = lambda reply: reply.metadata.src_node_id
        self.scores: list[Row] = []
        self.client_rounds: Mapping[str, int] = {}
        self.history: Sequence[Mapping[str, Any]] = ()
        self.tasks: dict[str, RoundTask] = {}
        self.outcome = Outcome(asked=[])
        self.pending: set[str] = set()  # ids of messages under way
        self._flights: dict[str, Flight] = {}
        self._risen: tuple[int, Mapping[str, float]] = (0, {})
        self._global: dict[str, Tensor] = {}
        self._views = Views({}, ArrayRecord(), "")

    @property
    def clients(self) -> dict[int, str]:
        """Node id -> client name."""
        return {member.node: member.name for member in self.members}

    def summary(self) -> None:
        """Log the method and its settings."""
        log.info("%s over %d clients", self.method, len(self.members))

    @property
    def manifest(self) -> Manifest:
        """Of the global parameters."""
        return self.memory.manifest

    @property
    def needed(self) -> int:
        """Good updates that the round needs, by `min_replies` and by the method."""
        asked = needed_replies(self.min_replies, len(self.outcome.asked))
        return self.buffer or max(asked, self.method.least_updates())

    @property
    def buffer(self) -> int:
        """Updates that end a round while others are under way; 0 to wait for all."""
        return self.method.buffer(sampled_clients(self.fraction_train, len(self.members)))

    def sample(self, server_round: int, attempt: int) -> list[str]:
        """Names of the clients asked in this attempt of a round, sorted; the busy ones are not."""
        self._forget_leavers()
        count = sampled_clients(self.fraction_train, len(self.clients)) - len(self._flights)
        idle = set(self.clients.values()) - self._flights.keys()
        key = f"{self.seed}/{server_round}/{attempt}"
        return sample_clients(idle, max(0, min(count, len(idle))), key)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message per client in `tasks`; equal parameter records are shared."""
        self._take(arrays, server_round)
        members = {member.name: member for member in self.members}
        control = to_arrays(self.memory.control) if self.method.has_control else None
        base = self._base()
        for name, task in self.tasks.items():
            self._flights[name] = Flight(task, self._views, members[name].node)
        self.outcome = Outcome(asked=sorted(self._flights))
        return [
            Message(
                pack(
                    arrays=self._view(members[name], task.resume_round),
                    control=control,
                    base=base,
                    config=task.record(),
                ),
                members[name].node,
                TRAIN,
                ttl=self.ttl_s if math.isfinite(self.ttl_s) else None,
                group_id=str(server_round),
            )
            for name, task in sorted(self.tasks.items())
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold good replies, refuse the others; (None, None) when too few are good.

        `outcome` then says what happened. Nothing of the strategy's own state changes unless the
        round is good.
        """
        outcome, attempt, judge = self.outcome, *self._begin(server_round)
        members = {member.node: member for member in self.members}
        for message in replies:
            node = self.node_of(message)
            member = members.get(node)
            name = member.name if member else str(node)
            flight = self._flights.pop(name, None)
            if member is None or flight is None:
                outcome.refused.append(Refusal(node, name, "not asked, or answered twice"))
                continue
            if message.has_error() and message.metadata.src_node_id != node:  # it is lost
                outcome.refused.append(Refusal(node, name, reason_of(message)))
                continue
            started = time.perf_counter()
            try:
                manifest = member.manifest or self.manifest
                control = self.method.has_control
                expected = Expected.of(flight.task, manifest, control, member.declared)
                update = read_update(message, expected)
                start, number = flight.views.params(member.manifest), flight.task.round
                attempt.take(Arrived(name, node, update, start, number, server_round - number))
            except UpdateRefusedError as error:
                outcome.refused.append(Refusal(node, name, one_line(str(error))))
                log.warning("round %d: refused %s: %s", server_round, name, error)
                continue
            finally:
                del message
                outcome.aggregate_s += time.perf_counter() - started
            del update, flight, start
            if attempt.taken == self.buffer:
                break
        else:
            self._give_up()
        started = time.perf_counter()
        attempt.settle(self.history, {one.name: one.declared for one in self.members})
        new = self._step(attempt) if len(outcome.replies) >= self.needed else None
        arrays = to_arrays(new) if new is not None else None
        outcome.aggregate_s += time.perf_counter() - started
        if arrays is None:
            self._risen = server_round, judge.risen(len(outcome.asked), len(self.members))
            return None, None
        return arrays, MetricRecord({"num-examples": outcome.total("examples")})

    def _begin(self, server_round: int) -> tuple[Attempt, Judge]:
        """An attempt at a round, bounded by finished rounds in which the same tensors trained."""
        still = self.frozen(server_round)
        judge = self.bounds.judge(
            [one for one in self.history[-WINDOW:] if self.frozen(int(one["round"])) == still],
            self._global,
            self.memory.control,
            self._risen[1] if self._risen[0] == server_round else {},
        )
        gathering = Gathering.of(
            self.method,
            Round(server_round, self._global, self.manifest.scaling),
            self.manifest,
            [member.manifest or self.manifest for member in self.members],
            self.static,
            updates=len(self._flights),
        )
        share = self.bounds.max_client_weight
        return Attempt(self.method, self.outcome, judge, gathering, share=share), judge

    def _give_up(self) -> None:
        """Wait no more for those under way."""
        why = "no reply within the round's time limit"
        for name, flight in sorted(self._flights.items()):
            self.outcome.refused.append(Refusal(flight.node, name, why))
        self._flights.clear()
        self.pending.clear()

    def _forget_leavers(self) -> None:
        """Whoever has left since he was asked may come back as somebody new."""
        for name in [name for name, f in self._flights.items() if f.node not in self.clients]:
            del self._flights[name]
            log.warning("%s has left with a round under way; its update will not be used", name)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The global parameters for the clients that score them (`scoring.scorers`)."""
        self._take(arrays, server_round + 1)
        base, personal = self._base(), self.personal
        messages = []
        for member in scorers(
            self.members, self._flights, all_of_them=bool(personal) or not self.pooled
        ):
            task = EvaluateTask(
                run=self.run_id,
                round=server_round,
                manifest=(member.manifest or self.manifest).hash,
                resume_round=self.client_rounds.get(member.name, 0),
                personal=personal,
            )
            content = pack(
                arrays=self._view(member, task.resume_round), base=base, config=task.record()
            )
            messages.append(Message(content, member.node, EVALUATE, group_id=str(server_round)))
        return messages

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord:
        """Mean of each metric, weighted by the tokens (else the examples) it was measured on.

        `scores` then holds each client's own. Clients that fail are left out; raises RoundError
        when all do.
        """
        scored = any(member.evaluates for member in self.members)
        mean, self.scores = mean_scores(server_round, replies, self.clients, needed=scored)
        return mean

    # What the method asks for.

    def frozen(self, server_round: int) -> list[str]:
        """Trained tensors that stand still in a round."""
        names = sorted(self.manifest.entries)
        return [name for name in names if not self.method.trains(name, server_round)]

    @property
    def personal(self) -> list[str]:
        """Trained tensors that stay with their client."""
        return [name for name in sorted(self.manifest.entries) if not self.method.travels(name)]

    def _take(self, arrays: ArrayRecord, server_round: int) -> None:
        self._global = params_of(arrays)
        self._views = Views(self._global, arrays, f"{self.seed}/{server_round}")

    def _view(self, member: Member, resume_round: int) -> ArrayRecord:
        """What a member gets: personal tensors only until it has its own."""
        return self._views.record(member.manifest, self.personal if resume_round else ())

    def _base(self) -> ArrayRecord | None:
        base = self.memory.base
        return to_arrays(base.sent(self._global)) if base.terms else None

    def _step(self, attempt: Attempt) -> dict[str, Tensor] | None:
        """What the server makes of good updates; None when that cannot be used."""
        known = len(self.client_rounds.keys() | set(self.clients.values()))
        try:
            new, self.memory = attempt.step(self._global, self.static, self.memory, known)
        except StepFailedError as error:
            self.outcome.problem = str(error)
            return None
        return new
