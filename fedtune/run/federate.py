"""One federation: a worker's clients, a method, an engine, and what is kept of every round."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fedtune.client.app import client_app
from fedtune.client.worker import Worker
from fedtune.compare.facts import settings_of
from fedtune.compare.own_rows_scorer import OwnRows
from fedtune.config import Arguments, TransportArguments
from fedtune.engines.delayed import DelayedGrid
from fedtune.engines.inline import run_inline
from fedtune.errors import RoundError
from fedtune.lists import split_names
from fedtune.report.progress import Progress
from fedtune.report.trackers import RoundTracker, open_trackers, round_scalars
from fedtune.server.app import ServerRun, server_app
from fedtune.server.checkpoint import ServerState
from fedtune.server.plan import Plan
from fedtune.server.run_rounds import RoundHook
from fedtune.server.store import RunStore
from fedtune.server.submission import Submission
from fedtune.strategies import Method, build_method, fixed_global, strategy_of

__all__ = ["federate", "federate_control", "own_scores"]

Engine = Callable[[ServerRun, Worker], None]


def federate(args: Arguments, worker: Worker, directory: Path) -> tuple[ServerState, ServerState]:
    """Run the federated arm in its engine, durably; returns its first and its last state.

    Raises RoundError when a round failed too often; `directory/adapter` is the last good one.
    """
    store = RunStore(
        directory,
        num_rounds=args.federation.num_rounds,
        save_every_rounds=args.federation.save_every_rounds,
        personal=partial(_personal, strategy_of(args.federation), worker),
        beside=worker.beside,
    )
    if args.federation.engine == "flower":
        last = _in_processes(args, worker, directory, store)
    else:
        last = _in_this_process(args, worker, directory, store)
    return store.first(), last


def own_scores(
    args: Arguments, worker: Worker, last: ServerState, own: OwnRows
) -> dict[str, float | None]:
    """Loss of the last global on each client's own rows, with what the client keeps for itself.

    Empty where that is in the client's process only.
    """
    method = strategy_of(args.federation)
    if args.federation.engine == "flower" and not all(map(method.rule.travels, last.params)):
        return {}
    personal = _personal(method, worker, last)
    return own.final(last, personal, f"{args.training.seed}/{last.round + 1}")


def _personal(method: Method, worker: Worker, state: ServerState) -> dict[str, dict[str, Tensor]]:
    """What each client keeps for itself, where the method has it keep something."""
    if all(method.rule.travels(name) for name in state.params):
        return {}
    return {client: worker.personal(client, r) for client, r in state.client_rounds.items()}


def _in_this_process(
    args: Arguments, worker: Worker, directory: Path, store: RunStore
) -> ServerState:
    federation, names = args.federation, split_names(args.run.track)
    with (
        open_trackers(names, directory, directory.name, settings_of(args)) as trackers,
        Progress(federation.num_rounds, "rounds") as progress,
    ):
        on_round = _hook(store, progress, trackers)
        run = _server_run(args, worker, strategy_of(federation), on_round, args.transport)
        run.start = store.load() if args.run.resume else None
        run.on_attempt = store.on_attempt
        if run.start is not None:
            progress.advance(run.start.round)
        _engine(args)(run, worker)
    return _result(run)


def _in_processes(args: Arguments, worker: Worker, directory: Path, store: RunStore) -> ServerState:
    """One server process, and for each client a node and a trainer: Flower as it is deployed."""
    from fedtune.engines.flower import run_flower

    submission = Submission(
        run=secrets.token_hex(6),
        directory=str(directory.absolute()),
        federation=args.federation,
        transport=args.transport,
        seed=args.training.seed,
        min_clients=len(worker.train),
        join_timeout_s=args.federation.round_timeout_s,
        init_adapter=args.adapter.init_adapter and str(Path(args.adapter.init_adapter).absolute()),
        track=tuple(split_names(args.run.track)),
        sites_evaluate=False,
        alone=False,
    )
    logs = directory / "deployment"
    run_flower(submission, clients=worker.names, command=args.command, logs=logs)
    store.complete()
    last = store.load()
    if last is None:
        raise RoundError(f"the server left no state; its log is in {logs}.")
    return last


def federate_control(
    args: Arguments, worker: Worker, method: str, start: ServerState, label: str
) -> ServerState:
    """A federation in this process from `start`, without a codec; only its last state is left."""
    control = (
        fixed_global() if method == "fixed_global" else build_method(method, weight_by="tokens")
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


def _server_run(
    args: Arguments,
    worker: Worker,
    method: Method,
    on_round: RoundHook,
    transport: TransportArguments | None = None,
) -> ServerRun:
    seed = args.training.seed
    return ServerRun.of(
        args.federation,
        Plan.of(args.federation, run=str(seed), seed=seed),
        method,
        on_round=on_round,
        min_clients=len(worker.train),
        init_adapter=args.adapter.init_adapter,
        transport=transport,
    )


def _hook(store: RunStore, progress: Progress, trackers: RoundTracker) -> RoundHook:
    def on_round(state: ServerState, record: dict[str, Any]) -> None:
        store.on_round(state, record)
        trackers.log(record["round"], round_scalars(record))
        if record["round"]:
            facts = {"eval_loss": record["eval_loss"], "train_loss": record["train_loss"]}
            if record["refused"]:
                facts["refused"] = len(record["refused"])
            progress.advance(1, **facts)

    return on_round


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
    client = client_app(lambda: worker)
    delays = worker.args.federation.delays
    grid = DelayedGrid(client, delays) if delays and len(delays) == len(worker.train) else None
    run_inline(server_app(run), client, len(worker.train), grid)


def _result(run: ServerRun) -> ServerState:
    if run.error is not None:
        raise run.error
    if run.result is None:
        raise RoundError("the engine ended without a result; its log says why.")
    return run.result
