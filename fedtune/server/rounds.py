"""The round loop: ask, fold, evaluate, make durable; retry what failed, give up when it stays."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord

from fedtune.config import FederationArguments
from fedtune.errors import RoundError, private
from fedtune.results.round_record import FailedAttempt, RoundRecord, WireBytes
from fedtune.server.checkpoint import ServerState
from fedtune.server.membership import Membership
from fedtune.strategies.advance import ServerMemory
from fedtune.strategies.lora.cumulative import Cumulative
from fedtune.strategies.outcome import Outcome
from fedtune.strategies.shell import FedStrategy
from fedtune.strategies.updates import finite_or_none
from fedtune.transport.grid import EagerGrid
from fedtune.transport.messages import Member, RoundTask
from fedtune.transport.records import params_of, to_arrays
from fedtune.transport.traffic import Traffic

__all__ = ["AttemptHook", "Plan", "RoundHook", "run_rounds"]

log = logging.getLogger(__name__)

WIDE_BASE_MB = 100.0

RoundHook = Callable[[ServerState, dict[str, Any]], None]
AttemptHook = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Plan:
    """What a run is to do.

    Attributes:
        run: id of the run.
        steps: optimizer steps of a client per round, or 0 when `epochs` counts.
        epochs: passes of a client over its rows per round, or 0.
        carry: whether clients keep optimizer, scheduler, RNG and data position.
        max_failed_rounds: failures of one round that are retried; one more ends the run.
        sites_evaluate: whether each client scores the global parameters on rows of its own, so that
            they travel for it; in a simulation the pooled rows are the coordinator's.
    """

    run: str
    num_rounds: int
    steps: int
    epochs: float
    carry: bool
    seed: int
    round_timeout_s: float = 3600.0
    max_failed_rounds: int = 2
    sites_evaluate: bool = False

    @classmethod
    def of(cls, federation: FederationArguments, **others: Any) -> Plan:
        """The plan that the flags of a federation ask for."""
        steps, epochs = federation.budget
        return cls(
            num_rounds=federation.num_rounds,
            steps=steps,
            epochs=epochs,
            carry=federation.client_state == "carry",
            round_timeout_s=federation.round_timeout_s,
            max_failed_rounds=federation.max_failed_rounds,
            **others,
        )


def run_rounds(
    grid: EagerGrid,
    strategy: FedStrategy,
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
    strategy.memory = ServerMemory(
        state.manifest, state.method_state, state.base, state.control_clients
    )
    strategy.client_rounds, strategy.node_of = state.client_rounds, grid.node_of
    strategy.history = state.history
    before = grid.traffic
    strategy.members = members.ready()
    arrays = to_arrays(state.params)
    if not state.history:
        first = _first_record(grid, strategy, arrays, plan, before)
        _keep_best(state, first)
        state.history.append(first)
        on_round(state, first)
    for number in range(state.round + 1, plan.num_rounds + 1):
        arrays, record = _run_round(
            grid, strategy, plan, state, number, arrays, members, on_attempt
        )
        state.round = number
        state.params = params_of(arrays)
        memory = strategy.memory
        _warn_of_size(state.base, memory.base)
        state.manifest, state.method_state = memory.manifest, memory.method_state
        state.base, state.control_clients = memory.base, memory.control_clients
        _keep_best(state, record)
        state.history.append(record)
        on_round(state, record)
    return state


def _keep_best(state: ServerState, record: dict[str, Any]) -> None:
    """Of equal losses the earlier: a round is best only when it beat all before it."""
    loss = record["eval_loss"]
    if loss is not None and (not state.best or loss < state.best["eval_loss"]):
        state.best = {"round": record["round"], "eval_loss": loss}


def _first_record(
    grid: EagerGrid, strategy: FedStrategy, arrays: ArrayRecord, plan: Plan, before: Traffic
) -> dict[str, Any]:
    started = time.perf_counter()
    metrics, evaluate_s, uncounted = _evaluate(grid, strategy, plan, 0, arrays)
    record = RoundRecord(
        round=0,
        **_evaluation(metrics, strategy),
        samples=0,
        tokens=0,
        traffic=WireBytes.from_json((grid.traffic - before - uncounted).total),
        wall_s=round(time.perf_counter() - started, 4),
        time={"train": 0.0, "wait": 0.0, "codec": 0.0, "aggregate": 0.0, "evaluate": evaluate_s},
    )
    return record.to_json()


def _run_round(
    grid: EagerGrid,
    strategy: FedStrategy,
    plan: Plan,
    state: ServerState,
    number: int,
    arrays: ArrayRecord,
    members: Membership,
    on_attempt: AttemptHook,
) -> tuple[ArrayRecord, dict[str, Any]]:
    started, before = time.perf_counter(), grid.traffic
    pending = strategy.pending
    failures: list[FailedAttempt] = []
    while True:
        attempt = len(failures) + 1
        grid.wait_s, coded_s = 0.0, grid.traffic.codec_s
        strategy.members = _ready(members, failures)
        strategy.tasks = _tasks(strategy, plan, state, number, attempt)
        replies = grid.send_and_receive(
            strategy.configure_train(number, arrays, ConfigRecord(), grid.grid),
            timeout=plan.round_timeout_s,
            pending=pending,
        )
        new, _ = strategy.aggregate_train(number, replies)
        outcome = strategy.outcome
        members.doubt(one.node for one in outcome.refused if one.node is not None)
        if new is not None:
            break
        failures.append(_failure(strategy, outcome))
        on_attempt({"round": number, "attempt": attempt, **failures[-1].to_json()})
        log.warning("round %d, attempt %d failed: %s", number, attempt, failures[-1].reason)
        if len(failures) > plan.max_failed_rounds:
            few = f"{_few(strategy, outcome)} ({private(_reasons(outcome))})"
            why = private(outcome.problem) if outcome.problem else few
            raise RoundError(
                f"round {number} failed {len(failures)} times: {why}. Fix the clients, or allow "
                "fewer with --min_replies."
            )
    state.client_rounds.update(outcome.rounds)
    coded_s = grid.traffic.codec_s - coded_s  # in the attempt that was good, as is the wait
    wait_s = max(0.0, grid.wait_s - outcome.train_s - coded_s)
    names = strategy.clients
    metrics, evaluate_s, uncounted = _evaluate(grid, strategy, plan, number, new)
    traffic = grid.traffic - before - uncounted
    last = state.history[-1]
    by_client = {names[node]: traffic.of(node) for node in traffic.nodes if node in names}
    record = RoundRecord(
        round=number,
        attempt=attempt,
        **_evaluation(metrics, strategy),
        train_loss=outcome.train_loss,
        samples=last["samples"] + outcome.total("examples"),
        tokens=last["tokens"] + outcome.total("tokens"),
        traffic=WireBytes.from_json(traffic.total),
        clients={name: WireBytes.from_json(one) for name, one in by_client.items()},
        wall_s=round(time.perf_counter() - started, 4),
        replies=outcome.replies,
        refused=outcome.refused,
        failed_attempts=failures,
        update_norm=outcome.update_norm,
        client_drift=outcome.client_drift,
        server_rate=outcome.server_rate,
        residual=outcome.residual,
        residual_fedavg=outcome.residual_fedavg,
        **_base(strategy.memory.base),
        time={
            "train": round(outcome.train_s, 4),
            "wait": round(wait_s, 4),
            "codec": round(coded_s, 4),
            "aggregate": round(outcome.aggregate_s, 4),
            "evaluate": evaluate_s,
        },
    )
    return new, record.to_json()


def _tasks(
    strategy: FedStrategy, plan: Plan, state: ServerState, number: int, attempt: int
) -> dict[str, RoundTask]:
    members = {member.name: member for member in strategy.members}
    correction = strategy.method.correction()
    return {
        name: RoundTask(
            run=plan.run,
            round=number,
            num_rounds=plan.num_rounds,
            attempt=attempt,
            manifest=(members[name].manifest or strategy.manifest).hash,
            steps=plan.steps,
            epochs=plan.epochs,
            carry=plan.carry,
            seed=plan.seed,
            resume_round=state.client_rounds.get(name, 0),
            keep_rounds=state.keep_rounds(name),
            frozen=strategy.frozen(number),
            personal=strategy.personal,
            correction=correction.name if correction else "",
            correction_settings=json.dumps(dict(correction.settings) if correction else {}),
            new_factors=number > 1 and strategy.method.properties.refactors,
            adds_to_base=strategy.method.properties.changes_base,
        )
        for name in strategy.sample(number, attempt)
    }


def _evaluate(
    grid: EagerGrid, strategy: FedStrategy, plan: Plan, number: int, arrays: ArrayRecord
) -> tuple[dict[str, float], float, Traffic]:
    """Metrics of the global parameters, none when nobody can score them; seconds; and traffic.

    The traffic is that which does not count: held-out rows in one place are the server's own.
    """
    before, wait_s, started = grid.traffic, grid.wait_s, time.perf_counter()
    messages = strategy.configure_evaluate(number, arrays, ConfigRecord(), grid.grid)
    replies = grid.send_and_receive(messages, timeout=plan.round_timeout_s)
    try:
        metrics = strategy.aggregate_evaluate(number, replies)
    except RoundError as error:
        if not plan.sites_evaluate:
            raise
        log.warning("%s; the round counts without a score", error)
        metrics = MetricRecord()
    grid.wait_s = wait_s
    uncounted = Traffic() if plan.sites_evaluate else grid.traffic - before
    plain = {key: float(value) for key, value in metrics.items()}  # type: ignore[arg-type]
    return plain, round(time.perf_counter() - started, 4), uncounted


def _evaluation(metrics: dict[str, float], strategy: FedStrategy) -> dict[str, Any]:
    others = {key: finite_or_none(value) for key, value in metrics.items() if key != "eval_loss"}
    record = {"eval_loss": metrics.get("eval_loss"), "eval_metrics": others}
    scores = strategy.scores
    return {**record, "eval_clients": scores} if len(scores) > 1 else record


def _base(base: Cumulative) -> dict[str, Any]:
    """Of what was added to the base: the largest rank, and what its recompression may have lost."""
    return {"base_rank": base.rank, "base_error": base.relative_error} if base.terms else {}


def _warn_of_size(before: Cumulative, now: Cumulative) -> None:
    if before.megabytes <= WIDE_BASE_MB < now.megabytes:
        log.warning(
            "what the method has added to the base takes %.0f MB a message by now (rank %d) and "
            "may grow; --strategy_args max_rank=N bounds it, base_error then says what that costs",
            now.megabytes,
            now.rank,
        )


def _ready(members: Membership, failures: list[FailedAttempt]) -> list[Member]:
    """Who is there; where too few come back, why they failed before is the reason."""
    try:
        return members.ready()
    except RoundError as error:
        if not failures:
            raise
        before = private(failures[-1].reason)
        raise RoundError(f"{before}; after that {error.marked}") from None


def _failure(strategy: FedStrategy, outcome: Outcome) -> FailedAttempt:
    few = f"{_few(strategy, outcome)} ({_reasons(outcome)})"
    return FailedAttempt(outcome.problem or few, tuple(outcome.refused))


def _few(strategy: FedStrategy, outcome: Outcome) -> str:
    return f"{len(outcome.replies)} of {strategy.needed} needed updates"


def _reasons(outcome: Outcome) -> str:
    return "; ".join(f"{item.client}: {item.reason}" for item in outcome.refused[:3])
