"""A whole run: every seed federated and compared, then the summary and the report."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset

from fedtune.client.worker import BuildModel, BuildTrainer
from fedtune.compare.arms import ArmInput, run_arm
from fedtune.compare.own_rows import OwnRows
from fedtune.compare.series import of_history
from fedtune.compare.summary import build_summary, settings_of
from fedtune.config import Arguments
from fedtune.data import format_table
from fedtune.data.silos import Silos
from fedtune.federate import federate, federate_control, own_scores
from fedtune.files import read_object, write_json
from fedtune.prepare import Prepared, prepare
from fedtune.report import comparison_table, load_summary, verdict_lines, write_report
from fedtune.report.plots import draw_loss

__all__ = ["run_seeds"]


def run_seeds(
    args: Arguments,
    directory: Path,
    silos: Silos,
    first: Prepared,
    build_model: BuildModel,
    build_trainer: BuildTrainer,
) -> dict[str, Any]:
    """Run every seed into `directory` (several: `directory/seeds/<s>`); returns the summary.

    `first` is what the first seed starts from; wherever it was prepared, it works in `directory`.
    """
    seeds, results = args.seeds, []
    print(f"output: {directory}", flush=True)
    base_loss, own = first.worker.base_loss(), silos.own_evaluation
    facts = Facts(base_loss, None if own is None else {name: len(own[name]) for name in own})
    for seed in seeds:
        seed_dir = directory if len(seeds) == 1 else directory / "seeds" / str(seed)
        seed_dir.mkdir(parents=True, exist_ok=True)
        work_dir = seed_dir / "clients"
        if seed == seeds[0]:
            prepared = first
            prepared.worker.work_dir = work_dir
            print(format_table(prepared.clients), flush=True)
        else:
            prepared = prepare(args, seed, silos, work_dir, build_model, build_trainer)
        if len(seeds) > 1:
            print(f"seed {seed}", flush=True)
        results.append(_run_seed(args, prepared, seed_dir, own))
        if len(seeds) > 1:
            _write(_of_seed(args, seed), results[-1:], prepared, seed_dir, facts)
        if seed != seeds[-1]:
            prepared.worker.release()
    summary = _write(args, results, prepared, directory, facts)
    if len(seeds) > 1:
        _copy_adapters(directory / "seeds" / str(seeds[0]), directory)
    loaded = load_summary(directory)
    print(comparison_table(loaded))
    print("\n".join(verdict_lines(loaded)))
    print(f"report: {directory / 'report.html'}")
    return summary


def _of_seed(args: Arguments, seed: int) -> Arguments:
    """The settings with which this seed alone would have been run."""
    alone = copy.copy(args)
    alone.run = replace(args.run, seeds=str(seed))
    alone.training = copy.deepcopy(args.training)
    alone.training.seed = seed
    return alone


class Facts(NamedTuple):
    """What all seeds share: the base model's held-out loss, and how many rows are whose own."""

    base_loss: float | None
    own_rows: dict[str, int] | None


def _run_seed(
    args: Arguments, prepared: Prepared, directory: Path, own_rows: Mapping[str, Dataset] | None
) -> dict[str, Any]:
    worker = prepared.worker
    first, last = federate(worker.args, worker, directory)
    result: dict[str, Any] = {"federated": _federated(last.history)}
    with OwnRows.of(worker, own_rows if "local" in args.arms else None) as own:
        given = ArmInput(
            args=worker.args,
            worker=worker,
            start=first,
            history=last.history,
            directory=directory / "arms",
            federate=partial(federate_control, worker.args),
            own=own,
        )
        for name in args.arms:
            done = given.directory / name / "result.json"
            if not (args.run.resume and done.is_file()):
                result_of_arm = run_arm(name, given)
                done.parent.mkdir(parents=True, exist_ok=True)
                write_json(done, result_of_arm)
            result[name] = read_object(done, "Delete it to run that arm again.")
        result["federated"]["own"] = own_scores(worker.args, worker, last, own)
    return result


def _federated(history: list[dict[str, Any]]) -> dict[str, Any]:
    return {**of_history(history), "time": [record["time"] for record in history]}


def _write(
    args: Arguments,
    results: list[dict[str, Any]],
    prepared: Prepared,
    directory: Path,
    facts: Facts,
) -> dict[str, Any]:
    """Summary, picture and report of one seed or of all."""
    summary = build_summary(
        args.federation,
        args.transport,
        results,
        seeds=args.seeds,
        clients=prepared.clients,
        full_bytes=prepared.full_bytes,
        config=settings_of(args),
        base_loss=facts.base_loss,
        own_rows=facts.own_rows,
    )
    write_json(directory / "summary.json", summary)
    draw_loss(load_summary(directory), directory / "loss.png")
    write_report(directory)
    return summary


def _copy_adapters(source: Path, target: Path) -> None:
    for name in ("adapter", "model", "best"):
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, dirs_exist_ok=True)
