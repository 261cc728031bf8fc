"""One federation: a worker's clients, a method, an engine, and what is kept of every round."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedtune.checks import strategy_settings
from fedtune.client.app import client_app
from fedtune.client.worker import Worker
from fedtune.compare.summary import settings_of
from fedtune.config import Arguments, split_names
from fedtune.engines.inline import run_inline
from fedtune.errors import RoundError
from fedtune.report.progress import Progress
from fedtune.report.trackers import RoundTracker, open_trackers
from fedtune.server.app import ServerRun, server_app
from fedtune.server.checkpoint import ServerState
from fedtune.server.rounds import Plan, RoundHook
from fedtune.server.store import RunStore
from fedtune.strategies import FixedGlobal, Method, build_method

__all__ = ["federate", "federate_control", "plan_of"]

Engine = Callable[[ServerRun, Worker], None]


def federate(args: Arguments, worker: Worker, directory: Path) -> tuple[ServerState, ServerState]:
    """Run the federated arm in its engine, durably; returns its first and its last state.

    Raises RoundError when a round failed too often; `directory/adapter` is the last good one.
    """
    federation = args.federation
    store = RunStore(
        directory,
        num_rounds=federation.num_rounds,
        save_every_rounds=federation.save_every_rounds,
    )
    trackers = open_trackers(
        split_names(args.run.track), directory, directory.name, settings_of(args)
    )
    with Progress(federation.num_rounds, "rounds") as progress:
        run = _server_run(args, worker, build_strategy(args), _hook(store, progress, trackers))
        run.start = store.load() if args.run.resume else None
        if run.start is not None:
            progress.advance(run.start.round)
        try:
            _engine(args)(run, worker)
        finally:
            trackers.close()
    last = _result(run)
    return store.first(), last


def federate_control(
    args: Arguments, worker: Worker, method: str, start: ServerState, label: str
) -> ServerState:
    """A federation in this process from `start` that leaves nothing but its last state."""
    control = (
        FixedGlobal() if method == "fixed_global" else build_method(method, weight_by="tokens")
    )
    with Progress(args.federation.num_rounds, label) as progress:

        def on_round(state: ServerState, record: dict[str, Any]) -> None:
            if record["round"]:
                progress.advance(1, eval_loss=record["eval_loss"])

        run = _server_run(args, worker, control, on_round)
        run.start = start
        run.min_replies = None  # parity has one client, and nobody can be late in this process
        _run_inline(run, worker)
    return _result(run)


def build_strategy(args: Arguments) -> Method:
    """The method that `--strategy` and `--strategy_args` name."""
    federation = args.federation
    return build_method(
        federation.strategy,
        weight_by=federation.weight_by,
        settings=strategy_settings(federation.strategy_args),
    )


def plan_of(args: Arguments) -> Plan:
    """Rounds and budgets of a run."""
    federation = args.federation
    steps, epochs = federation.budget
    return Plan(
        run=str(args.training.seed),
        num_rounds=federation.num_rounds,
        steps=steps,
        epochs=epochs,
        carry=federation.client_state == "carry",
        seed=args.training.seed,
        round_timeout_s=federation.round_timeout_s,
        max_failed_rounds=federation.max_failed_rounds,
    )


def _server_run(args: Arguments, worker: Worker, method: Method, on_round: RoundHook) -> ServerRun:
    init_adapter = args.adapter.init_adapter
    return ServerRun(
        method=method,
        plan=plan_of(args),
        num_clients=len(worker.train),
        on_round=on_round,
        fraction_train=args.federation.fraction_train,
        min_replies=args.federation.min_replies,
        init_adapter=Path(init_adapter) if init_adapter else None,
    )


def _hook(store: RunStore, progress: Progress, trackers: RoundTracker) -> RoundHook:
    def on_round(state: ServerState, record: dict[str, Any]) -> None:
        store.on_round(state, record)
        trackers.log(record["round"], _scalars(record))
        if record["round"]:
            facts = {"eval_loss": record["eval_loss"], "train_loss": record["train_loss"]}
            if record["refused"]:
                facts["refused"] = len(record["refused"])
            progress.advance(1, **facts)

    return on_round


def _scalars(record: dict[str, Any]) -> dict[str, float]:
    timing = {f"time_{key}_s": value for key, value in record["time"].items()}
    flat = {**record, **record["eval_metrics"], **timing, "replies": len(record.get("replies", []))}
    return {
        key: float(value)
        for key, value in flat.items()
        if key != "round" and isinstance(value, int | float)
    }


def _engine(args: Arguments) -> Engine:
    if args.federation.engine == "inline":
        return _run_inline
    federation = args.federation

    def run_on_ray(run: ServerRun, worker: Worker) -> None:
        from fedtune.engines.ray import run_ray

        run_ray(
            server_app(run),
            worker,
            cpus_per_client=federation.cpus_per_client,
            gpus_per_client=federation.gpus_per_client,
        )

    return run_on_ray


def _run_inline(run: ServerRun, worker: Worker) -> None:
    # Clients run one after the other inside the pull: a limit would cut off the last ones.
    run.plan = replace(run.plan, round_timeout_s=math.inf)
    run_inline(server_app(run), client_app(lambda: worker), len(worker.train))


def _result(run: ServerRun) -> ServerState:
    if run.error is not None:
        raise run.error
    if run.result is None:
        raise RoundError("the engine ended without a result; its log says why.")
    return run.result
