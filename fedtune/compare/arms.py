"""Each arm of the comparison, from the same initial parameters and on the same held-out rows."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from torch import Tensor

from fedtune.adapters import export_adapter
from fedtune.client.loader import check_loader
from fedtune.client.local import steps_of
from fedtune.client.worker import Worker
from fedtune.compare.gaps import first_difference
from fedtune.compare.own_rows_scorer import OwnRows
from fedtune.compare.plain import PlainRun, run_plain
from fedtune.compare.schedule import steps_to_see
from fedtune.config import Arguments, sampled_clients
from fedtune.report.progress import Progress
from fedtune.results.series import Series
from fedtune.server.checkpoint import ServerState

__all__ = ["ArmInput", "FederatedRun", "run_arm"]

WORK = "work"  # scratch of an arm, removed when it is done

# Runs a federation over a worker's clients: (worker, method name, start, label) -> last state.
FederatedRun = Callable[[Worker, str, ServerState, str], ServerState]


@dataclass(frozen=True)
class ArmInput:
    """What every arm starts from.

    Attributes:
        worker: the live model, the clients' rows and the held-out rows.
        start: the initial global state.
        history: the federated arm, one record per round.
        directory: `arms/` of the run.
        federate: runs a federation inline.
        own: scores what an arm ends with on each client's own held-out rows.
    """

    args: Arguments
    worker: Worker
    start: ServerState
    history: Sequence[dict[str, Any]]
    directory: Path
    federate: FederatedRun
    own: OwnRows | None = None

    @property
    def built(self) -> ServerState:
        """The start with all that the recipe's model trains; the method may have frozen some."""
        return self.start.as_built(self.worker.manifest)


def run_arm(name: str, given: ArmInput) -> dict[str, Any]:
    """Run one arm; returns its part of `summary.json` and leaves `arms/<name>/adapter`."""
    try:
        return _ARMS[name](given)
    finally:
        shutil.rmtree(given.directory / name / WORK, ignore_errors=True)


def _centralized(given: ArmInput) -> dict[str, Any]:
    return _pooled(given, "centralized", batch_factor=1)


def _centralized_large_batch(given: ArmInput) -> dict[str, Any]:
    return _pooled(given, "centralized_large_batch", batch_factor=_asked(given))


def _asked(given: ArmInput) -> int:
    return sampled_clients(given.args.federation.fraction_train, len(given.worker.train))


def _pooled(given: ArmInput, name: str, *, batch_factor: int) -> dict[str, Any]:
    worker = _quiet_worker(given, name)
    worker.args.training.per_device_train_batch_size *= batch_factor
    rows = concatenate_datasets(list(worker.train.values()))
    trainer = worker.new_trainer(rows, worker.evaluation, name)
    check_loader(trainer, name)
    marks = [int(record["samples"]) for record in given.history[1:]]
    steps = steps_to_see(trainer, marks[-1])
    start = given.built.params
    run = _train(given, name, trainer, start, max_steps=steps, marks=marks, mark_by="samples")
    _export(given, name, run.params)
    seen = int(run.history[-1].samples or 0)
    apart = abs(seen - marks[-1])
    return {
        **Series.of_rounds(run.history).to_json(),
        "equal_samples": apart == 0 or apart < run.last_rows,
        "own": given.own.scores(run.params) if given.own else {},
    }


def _local(given: ArmInput) -> dict[str, Any]:
    worker = _quiet_worker(given, "local")
    rounds = len(given.history) - 1
    clients: list[dict[str, Any]] = []
    series: list[Series] = []
    own: dict[str, float | None] = {}
    best: tuple[float, PlainRun] | None = None
    for client, rows in worker.train.items():
        trainer = worker.new_trainer(rows, worker.evaluation, f"local-{client}")
        steps = steps_of(trainer, *given.args.federation.budget)
        marks = [number * steps for number in range(1, rounds + 1)]
        start = worker.at_rank_of(client, given.built.params)
        label, last = f"local {client}", marks[-1]
        run = _train(given, label, trainer, start, max_steps=last, marks=marks, mark_by="steps")
        series.append(Series.of_rounds(run.history))
        clients.append({"client": client, **series[-1].to_json()})
        if given.own is not None:
            own[client] = given.own.score(client, run.params)
        loss = run.history[-1].eval_loss  # None when this client diverged
        final = math.inf if loss is None else loss
        if best is None or final < best[0]:
            best = (final, run)
    if best is not None:
        _export(given, "local", best[1].params)
    return {**Series.mean(series).to_json(), "clients": clients, "own": own}


def _fixed_global(given: ArmInput) -> dict[str, Any]:
    worker = _quiet_worker(given, "fixed_global")
    state = given.federate(worker, "fixed_global", given.built, "fixed global")
    _export(given, "fixed_global", state.params)
    return Series.of_history(state.history).to_json()


def _parity(given: ArmInput) -> dict[str, Any]:
    """One federated client against the plain Trainer, step by step."""
    worker = _quiet_worker(given, "parity")
    client, rows = worker.evaluator, worker.train[worker.evaluator]
    worker.args.training.logging_steps = 1
    worker.args.training.logging_strategy = "steps"
    alone = worker.fork(train={client: rows}, work_dir=worker.work_dir)
    rounds = len(given.history) - 1
    state = given.federate(alone, "fedavg", given.built, "parity, federated")
    federated = alone.trainer(client)
    trainer = alone.new_trainer(rows, None, "plain")
    steps = int(federated.state.global_step)
    start = given.built.params
    run = _train(given, "parity, plain", trainer, start, max_steps=steps, marks=[], mark_by="steps")
    step = first_difference(federated.state.log_history, run.log_history)
    equal = all(torch.equal(state.params[name], value) for name, value in run.params.items())
    if step is None and not equal:
        step = steps
    _export(given, "parity", state.params)
    series = Series.of_history(state.history).to_json()
    return {**series, "identical": step is None, "first_diff_step": step, "rounds": rounds}


_ARMS: dict[str, Callable[[ArmInput], dict[str, Any]]] = {
    "centralized": _centralized,
    "centralized_large_batch": _centralized_large_batch,
    "local": _local,
    "fixed_global": _fixed_global,
    "parity": _parity,
}


def _quiet_worker(given: ArmInput, name: str) -> Worker:
    """The same model and rows, with its own work directory and no reporting of its Trainers."""
    worker = given.worker.fork(work_dir=given.directory / name / WORK)
    worker.args.training.report_to = []
    return worker


def _train(
    given: ArmInput, label: str, trainer: Any, params: dict[str, Tensor], **settings: Any
) -> PlainRun:
    with Progress(settings["max_steps"], label) as progress:
        done = 0

        def on_step(step: int) -> None:
            nonlocal done
            progress.advance(step - done)
            done = step

        return run_plain(trainer, params, given.built.manifest, on_step=on_step, **settings)


def _export(given: ArmInput, name: str, params: dict[str, Tensor]) -> None:
    if all(math.isfinite(float(value.float().sum())) for value in params.values()):
        start = given.built
        export_adapter(
            given.directory / name / "adapter",
            params,
            start.static,
            start.manifest,
            beside=given.worker.beside,
        )
