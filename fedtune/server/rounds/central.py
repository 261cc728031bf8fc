"""The central workflow: the server samples clients, asks them, and aggregates what comes back."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fedtune.config import sampled_clients
from fedtune.errors import private
from fedtune.results.round_record import FailedAttempt, Refusal
from fedtune.server.checkpoint import ServerState
from fedtune.server.rounds.attempt import Attempt, StepFailedError
from fedtune.server.rounds.bounds import Judge
from fedtune.server.rounds.check_update import UpdateRefusedError, one_line
from fedtune.server.rounds.evaluation import Scores, scorers
from fedtune.server.rounds.exchange import Arrived, Global
from fedtune.server.rounds.round_result import RoundResult, needed_replies, sample_clients
from fedtune.server.rounds.workflow import AttemptFailedError, Played, Setting
from fedtune.strategies.aggregator import Aggregation, Aggregator
from fedtune.strategies.base import Round
from fedtune.strategies.lora.cumulative import Cumulative
from fedtune.strategies.lora.manifests import at_ranks, ranks_in, ranks_of
from fedtune.strategies.memory import ServerMemory
from fedtune.strategies.residuals import certifies
from fedtune.transport.messages import EvaluateTask, Member, RoundTask

__all__ = ["CentralRounds"]

log = logging.getLogger(__name__)

WINDOW = 50  # finished rounds among which bounds look for the last that moved


class CentralRounds:
    """The server samples clients, asks them, and aggregates what comes back."""

    def __init__(self, setting: Setting) -> None:
        self._set, self._exchange, self._method = setting, setting.exchange, setting.method
        self._risen: tuple[int, Mapping[str, float]] = (0, {})

    def play(
        self, number: int, attempt: int, members: Sequence[Member], state: ServerState
    ) -> Played:
        """One attempt at a round.

        Raises:
            AttemptFailedError: too few updates were good, or the server's step is not finite.
        """
        self._exchange.forget_leavers(members)
        current, before = self._global(state), self._exchange.traffic
        read_s, wait_s = self._exchange.read_s, self._exchange.wait_s
        names = self.sample(number, attempt, members)
        result = RoundResult(asked=sorted({*self._exchange.busy, *names}))
        judge = self._judge(number, state)
        aggregation = self._aggregation(number, members, state, len(result.asked))
        share = self._set.bounds.max_client_weight
        taking = Attempt(self._method, result, judge, aggregation, share=share)
        tasks = self._tasks(names, number, attempt, members, state)
        buffer = self._buffer(members)
        for read in self._exchange.train(number, tasks, members, current):
            if isinstance(read, Refusal):
                result.refused.append(read)
                continue
            self._take(taking, read, number, result)
            del read
            if taking.taken == buffer > 0:
                break
        started = time.perf_counter()
        taking.settle(state.history, {member.name: member.declared for member in members})
        try:
            changed, memory = self._step(taking, result, members, state, buffer)
        except AttemptFailedError:
            self._risen = number, judge.risen(len(result.asked), len(members))
            raise
        # As they would come out of a message: sums over strides would round differently.
        params = {n: value.contiguous() for n, value in {**state.params, **changed}.items()}
        result.aggregate_s += time.perf_counter() - started
        result.aggregate_s += self._exchange.read_s - read_s
        codec_s = self._exchange.traffic.codec_s - before.codec_s
        waited = self._exchange.wait_s - wait_s
        return Played(
            params,
            at_ranks(state.manifest, ranks_in(params)),
            memory,
            result.rounds,
            result.total("examples"),
            result.total("tokens"),
            result.train_loss,
            _figures(result, memory.base),
            result.refused,
            result.train_s,
            max(0.0, waited - result.train_s - codec_s),
            codec_s,
            result.aggregate_s,
        )

    def score(self, number: int, members: Sequence[Member], state: ServerState) -> Scores:
        """Scores of the clients that hold rows out; raises RoundError when all of them fail."""
        personal = self._personal(state)
        everybody = bool(personal) or self._set.plan.sites_evaluate
        tasks = {
            member.name: EvaluateTask(
                run=self._set.plan.run,
                round=number,
                manifest=(member.manifest or state.manifest).hash,
                resume_round=state.client_rounds.get(member.name, 0),
                personal=personal,
            )
            for member in scorers(members, self._exchange.busy, all_of_them=everybody)
        }
        return self._exchange.evaluate(number, tasks, members, self._global(state))

    def _global(self, state: ServerState) -> Global:
        return Global(state.params, state.manifest, _memory(state), self._method.extras)

    def _take(self, taking: Attempt, one: Arrived, number: int, result: RoundResult) -> None:
        started = time.perf_counter()
        try:
            taking.take(one)
        except UpdateRefusedError as error:
            result.refused.append(Refusal(one.node, one.client, one_line(str(error))))
            log.warning("round %d: refused %s: %s", number, one.client, error)
        result.aggregate_s += time.perf_counter() - started

    def sample(self, number: int, attempt: int, members: Sequence[Member]) -> list[str]:
        """Names of the clients asked in this attempt of a round, sorted; the busy ones are not."""
        busy = self._exchange.busy
        idle = {member.name for member in members} - set(busy)
        count = sampled_clients(self._set.fraction_train, len(members)) - len(busy)
        key = f"{self._set.plan.seed}/{number}/{attempt}"
        return sample_clients(idle, max(0, min(count, len(idle))), key)

    def _step(
        self,
        taking: Attempt,
        result: RoundResult,
        members: Sequence[Member],
        state: ServerState,
        buffer: int,
    ) -> tuple[dict[str, Tensor], ServerMemory]:
        """What the server makes of the updates; raises AttemptFailedError."""
        asked = needed_replies(self._set.min_replies, len(result.asked))
        needed = buffer or max(asked, self._method.rule.least_updates())
        if len(result.replies) < needed:
            raise _failure(result, needed)
        try:
            return taking.step(len(_known(members, state)))
        except StepFailedError as error:
            raise _failure(result, needed, str(error)) from None

    def _tasks(
        self,
        names: Sequence[str],
        number: int,
        attempt: int,
        members: Sequence[Member],
        state: ServerState,
    ) -> dict[str, RoundTask]:
        plan, correction = self._set.plan, self._method.correction
        properties = self._method.properties
        manifests = {member.name: member.manifest or state.manifest for member in members}
        frozen, personal = self._frozen(number, state), self._personal(state)
        settings = json.dumps(correction.settings if correction else {})
        return {
            name: RoundTask(
                run=plan.run,
                round=number,
                num_rounds=plan.num_rounds,
                attempt=attempt,
                manifest=manifests[name].hash,
                steps=plan.steps,
                epochs=plan.epochs,
                carry=plan.carry,
                seed=plan.seed,
                resume_round=state.client_rounds.get(name, 0),
                keep_rounds=state.keep_rounds(name),
                frozen=frozen,
                personal=personal,
                correction=correction.name if correction else "",
                correction_settings=settings,
                new_factors=number > 1 and properties.refactors,
                adds_to_base=properties.changes_base,
            )
            for name in names
        }

    def _frozen(self, number: int, state: ServerState) -> list[str]:
        """Trained tensors that stand still in a round."""
        trains = self._method.rule.trains
        return [name for name in sorted(state.manifest.entries) if not trains(name, number)]

    def _personal(self, state: ServerState) -> list[str]:
        """Trained tensors that stay with their client."""
        travels = self._method.rule.travels
        return [name for name in sorted(state.manifest.entries) if not travels(name)]

    def _buffer(self, members: Sequence[Member]) -> int:
        """Updates that end a round while others are under way; 0 to wait for all."""
        return self._method.rule.buffer(sampled_clients(self._set.fraction_train, len(members)))

    def _judge(self, number: int, state: ServerState) -> Judge:
        """Bounds by finished rounds in which the same tensors trained."""
        still = self._frozen(number, state)
        recent = state.history[-WINDOW:]
        alike = [one for one in recent if self._frozen(int(one["round"]), state) == still]
        memory = _memory(state)
        extras = {name: (what, memory.extra(name)) for name, what in self._method.extras.items()}
        risen = self._risen[1] if self._risen[0] == number else {}
        return self._set.bounds.judge(alike, state.params, extras, risen)

    def _aggregation(
        self, number: int, members: Sequence[Member], state: ServerState, updates: int
    ) -> Aggregation:
        """Of updates from clients whose ranks may differ from the global ones."""
        clients = [member.manifest or state.manifest for member in members]
        held = [ranks_of(one) for one in (*clients, state.manifest)]
        most = {name: max(ranks[name] for ranks in held) for name in held[-1]}
        return Aggregator(self._method, state.static).begin(
            Round(number, state.params, state.manifest.scaling, most),
            _memory(state),
            certifies=certifies(self._method, state.manifest, updates),
            same_ranks=all(ranks == held[-1] for ranks in held),
        )


def _failure(result: RoundResult, needed: int, problem: str = "") -> AttemptFailedError:
    few = f"{len(result.replies)} of {needed} needed updates"
    why = "; ".join(f"{item.client}: {item.reason}" for item in result.refused[:3])
    told = private(problem) if problem else f"{few} ({private(why)})"
    return AttemptFailedError(
        FailedAttempt(problem or f"{few} ({why})", tuple(result.refused)), told
    )


def _memory(state: ServerState) -> ServerMemory:
    return ServerMemory(state.method_state, state.base, state.control_clients)


def _known(members: Sequence[Member], state: ServerState) -> set[str]:
    """Clients that have ever taken part, or do now."""
    return state.client_rounds.keys() | {member.name for member in members}


def _figures(result: RoundResult, base: Cumulative) -> dict[str, Any]:
    added = {"base_rank": base.rank, "base_error": base.relative_error} if base.terms else {}
    return {
        "replies": result.replies,
        "update_norm": result.update_norm,
        "client_drift": result.client_drift,
        "server_rate": result.server_rate,
        "residual": result.residual,
        "residual_fedavg": result.residual_fedavg,
        **added,
    }
