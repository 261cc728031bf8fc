"""The rounds of a run: play, score, make durable; retry what failed, give up when it stays.

History, best, retries and durable state stand here, once for all workflows.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from fedtune.errors import RoundError, private
from fedtune.results.round_record import FailedAttempt, Refusal, RoundRecord, WireBytes
from fedtune.server.checkpoint import ServerState
from fedtune.server.membership import Membership
from fedtune.server.plan import Plan
from fedtune.server.rounds.check_update import finite_or_none
from fedtune.server.rounds.evaluation import Scores
from fedtune.server.rounds.exchange import Exchange
from fedtune.server.rounds.workflow import AttemptFailedError, Played, Workflow
from fedtune.strategies.lora.cumulative import Cumulative
from fedtune.transport.messages import Member
from fedtune.transport.traffic import Traffic

__all__ = ["AttemptHook", "RoundHook", "run_rounds"]

log = logging.getLogger(__name__)

WIDE_BASE_MB = 100.0

Failures = list[FailedAttempt]
RoundHook = Callable[[ServerState, dict[str, Any]], None]
AttemptHook = Callable[[dict[str, Any]], None]


def run_rounds(
    workflow: Workflow,
    exchange: Exchange,
    plan: Plan,
    state: ServerState,
    on_round: RoundHook,
    members: Membership,
    on_attempt: AttemptHook = lambda failure: None,
) -> ServerState:
    """Run the rounds after `state.round` up to `plan.num_rounds`.

    `on_round(state, record)` is called after the evaluation of every round, index 0 included when
    `state` has no history yet, and `on_attempt(failure)` after every attempt at a round that
    failed. Raises RoundError when one round fails too often; the last good state has then been
    handed to `on_round` already.
    """
    run = _Rounds(workflow, exchange, plan, members, on_attempt)
    before = exchange.traffic
    there = members.ready()
    if not state.history:
        first = run.first(state, there, before)
        _keep_best(state, first)
        state.history.append(first)
        on_round(state, first)
    for number in range(state.round + 1, plan.num_rounds + 1):
        played, record = run.play(number, state)
        _warn_of_size(state.base, played.memory.base)
        _take(state, number, played)
        _keep_best(state, record)
        state.history.append(record)
        on_round(state, record)
    return state


class _Rounds:
    """What all rounds of a run share."""

    def __init__(
        self,
        workflow: Workflow,
        exchange: Exchange,
        plan: Plan,
        members: Membership,
        on_attempt: AttemptHook,
    ) -> None:
        self._workflow, self._exchange, self._plan = workflow, exchange, plan
        self._members, self._on_attempt = members, on_attempt

    def first(
        self, state: ServerState, members: Sequence[Member], before: Traffic
    ) -> dict[str, Any]:
        """The record of index 0: the parameters before any training."""
        started = time.perf_counter()
        scores, evaluate_s, uncounted = self._score(0, members, state)
        none = {"train": 0.0, "wait": 0.0, "codec": 0.0, "aggregate": 0.0}
        record = RoundRecord(
            round=0,
            **_evaluation(scores),
            samples=0,
            tokens=0,
            traffic=WireBytes.from_json((self._exchange.traffic - before - uncounted).total),
            wall_s=round(time.perf_counter() - started, 4),
            time={**none, "evaluate": evaluate_s},
        )
        return record.to_json()

    def play(self, number: int, state: ServerState) -> tuple[Played, dict[str, Any]]:
        """A round and its record; raises RoundError when it fails too often."""
        started, before = time.perf_counter(), self._exchange.traffic
        failures: Failures = []
        while True:
            attempt = len(failures) + 1
            members = self._ready(failures)
            try:
                played = self._workflow.play(number, attempt, members, state)
            except AttemptFailedError as error:
                failures.append(error.failure)
                self._doubt(error.failure.refused)
                self._give_up(number, failures, error.told)
                continue
            self._doubt(played.refused)
            break
        state.client_rounds.update(played.rounds)
        after = copy.copy(state)  # the state itself stays that of the last finished round
        _take(after, number, played)
        scores, evaluate_s, uncounted = self._score(number, members, after)
        traffic = self._exchange.traffic - before - uncounted
        names = {member.node: member.name for member in members}
        by_client = {names[node]: traffic.of(node) for node in traffic.nodes if node in names}
        last = state.history[-1]
        record = RoundRecord(
            round=number,
            attempt=attempt,
            **_evaluation(scores),
            train_loss=played.train_loss,
            samples=last["samples"] + played.samples,
            tokens=last["tokens"] + played.tokens,
            traffic=WireBytes.from_json(traffic.total),
            clients={name: WireBytes.from_json(one) for name, one in by_client.items()},
            wall_s=round(time.perf_counter() - started, 4),
            refused=played.refused,
            failed_attempts=failures,
            **played.figures,
            time={
                "train": round(played.train_s, 4),
                "wait": round(played.wait_s, 4),
                "codec": round(played.codec_s, 4),
                "aggregate": round(played.aggregate_s, 4),
                "evaluate": evaluate_s,
            },
        )
        return played, record.to_json()

    def _doubt(self, refused: Sequence[Refusal]) -> None:
        """Ask them from the start: their trainers may be new ones."""
        self._members.doubt(one.node for one in refused if one.node is not None)

    def _give_up(self, number: int, failures: Failures, told: str) -> None:
        """Note a failure; raises RoundError when it is one too many."""
        self._on_attempt({"round": number, "attempt": len(failures), **asdict(failures[-1])})
        log.warning("round %d, attempt %d failed: %s", number, len(failures), failures[-1].reason)
        if len(failures) > self._plan.max_failed_rounds:
            raise RoundError(
                f"round {number} failed {len(failures)} times: {told}. Fix the clients, or allow "
                "fewer with --min_replies."
            )

    def _ready(self, failures: Failures) -> list[Member]:
        """Who is there; where too few come back, why they failed before is the reason."""
        try:
            return self._members.ready()
        except RoundError as error:
            if not failures:
                raise
            before = private(failures[-1].reason)
            raise RoundError(f"{before}; after that {error.marked}") from None

    def _score(
        self, number: int, members: Sequence[Member], state: ServerState
    ) -> tuple[Scores, float, Traffic]:
        """Scores, none when nobody can score them; seconds; and traffic that does not count.

        Held-out rows in one place are the server's own: nothing would have to travel.
        """
        before, started = self._exchange.traffic, time.perf_counter()
        try:
            scores = self._workflow.score(number, members, state)
        except RoundError as error:
            if not self._plan.sites_evaluate:
                raise
            log.warning("%s; the round counts without a score", error)
            scores = Scores({}, [])
        uncounted = Traffic() if self._plan.sites_evaluate else self._exchange.traffic - before
        return scores, round(time.perf_counter() - started, 4), uncounted


def _take(state: ServerState, number: int, played: Played) -> None:
    """Go on to what a round has come to."""
    state.round, state.params, state.manifest = number, played.params, played.manifest
    state.method_state, state.base = played.memory.method_state, played.memory.base
    state.control_clients = played.memory.extras_clients


def _keep_best(state: ServerState, record: dict[str, Any]) -> None:
    """Of equal losses the earlier: a round is best only when it beat all before it."""
    loss = record["eval_loss"]
    if loss is not None and (not state.best or loss < state.best["eval_loss"]):
        state.best = {"round": record["round"], "eval_loss": loss}


def _evaluation(scores: Scores) -> dict[str, Any]:
    metrics = scores.mean
    others = {key: finite_or_none(value) for key, value in metrics.items() if key != "eval_loss"}
    record = {"eval_loss": metrics.get("eval_loss"), "eval_metrics": others}
    return {**record, "eval_clients": scores.clients} if len(scores.clients) > 1 else record


def _warn_of_size(before: Cumulative, now: Cumulative) -> None:
    if before.megabytes <= WIDE_BASE_MB < now.megabytes:
        log.warning(
            "what the method has added to the base takes %.0f MB a message by now (rank %d) and "
            "may grow; --strategy_args max_rank=N bounds it, base_error then says what that costs",
            now.megabytes,
            now.rank,
        )
