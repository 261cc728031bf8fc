"""A whole run: every seed federated and compared; one that fails does not end the others."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from fedtune.client.worker import BuildModel, BuildTrainer
from fedtune.compare.arms import ArmInput, run_arm
from fedtune.compare.directory import OWN_ROWS, RESULT
from fedtune.compare.facts import Facts, settings_of
from fedtune.compare.own_rows_scorer import OwnRows
from fedtune.compare.settle import leaving
from fedtune.compare.shared import SharedArms
from fedtune.config import Arguments
from fedtune.data import format_table
from fedtune.data.silos import Silos
from fedtune.decisive import run_settings
from fedtune.errors import FedtuneError, RoundError
from fedtune.files import read_json, write_json
from fedtune.lock import hold
from fedtune.output_dir import MARKER, write_marker
from fedtune.processes.signals import interrupted_by
from fedtune.run.federate import federate, federate_control, own_scores
from fedtune.run.prepare import Prepared, prepare

__all__ = ["facts_of", "run_seeds", "surviving"]

log = logging.getLogger(__name__)


def facts_of(args: Arguments, silos: Silos, prepared: Prepared, files: dict[str, str]) -> Facts:
    """What `run.json` says of this run."""
    own = silos.own_evaluation
    return Facts(
        config=settings_of(args),
        seeds=args.seeds,
        arms=list(args.arms),
        clients=prepared.clients,
        full_bytes=prepared.full_bytes,
        base_loss=prepared.worker.base_loss(),
        own_rows=None if own is None else {name: len(own[name]) for name in own},
        files=files,
        identity=prepared.identity,
    )


def run_seeds(
    args: Arguments,
    directory: Path,
    silos: Silos,
    first: Prepared,
    build_model: BuildModel,
    build_trainer: BuildTrainer,
    *,
    shared: SharedArms | None = None,
) -> dict[str, Any]:
    """Run every seed into `directory` (several: `directory/seeds/<s>`); returns the summary.

    `first` is what the first seed starts from; wherever it was prepared, it works in `directory`,
    which holds the run's `run.json`. `shared` are arms that other runs may have run.
    However the run ends, its summary and report are there.

    Raises:
        RoundError: a seed or an arm failed; what did not is in the summary.
    """
    seeds = args.seeds
    print(f"output: {directory}", flush=True)
    print(format_table(first.clients), flush=True)
    with leaving(directory):
        if len(seeds) == 1:
            _run_seed(args, first, directory, silos.own_evaluation, shared)
        else:
            _run_each(args, directory, silos, first, build_model, build_trainer, shared)
    summary: dict[str, Any] = read_json(directory / "summary.json")
    return summary


def _run_each(
    args: Arguments,
    directory: Path,
    silos: Silos,
    first: Prepared,
    build_model: BuildModel,
    build_trainer: BuildTrainer,
    shared: SharedArms | None,
) -> None:
    seeds = args.seeds
    failed: list[str] = []
    run = read_json(directory / MARKER)
    whole, read = Facts(**run["facts"]), {"data": run["data"], "code": run["code"]}
    for seed in seeds:
        seed_dir, alone = directory / "seeds" / str(seed), _of_seed(args, seed)
        print(f"seed {seed}", flush=True)
        with surviving(f"seed {seed}", failed), hold(seed_dir):
            facts = replace(whole, seeds=[seed], config=settings_of(alone))
            write_marker(seed_dir, settings=run_settings(alone), facts=facts.to_json(), **read)
            with leaving(seed_dir):
                prepared = first
                if seed != seeds[0]:
                    work_dir = seed_dir / "clients"
                    prepared = prepare(args, seed, silos, work_dir, build_model, build_trainer)
                try:
                    arms = shared and shared.of_seed(seed)
                    _run_seed(alone, prepared, seed_dir, silos.own_evaluation, arms)
                finally:
                    prepared.worker.release()
    if failed:
        raise RoundError(f"{len(failed)} of {len(seeds)} seeds failed: {'; '.join(failed)}")


@contextmanager
def surviving(name: str, failed: list[str]) -> Iterator[None]:
    """An error of one part is noted in `failed` and said; the next part goes on."""
    try:
        yield
    except Exception as error:
        if interrupted_by(error):
            raise
        words = " ".join(str(error).split()) or type(error).__name__
        failed.append(f"{name}: {words}")
        trace = None if isinstance(error, FedtuneError) else error
        log.error("%s failed: %s", name, words, exc_info=trace)


def _of_seed(args: Arguments, seed: int) -> Arguments:
    """The settings with which this seed alone would have been run."""
    alone = copy.copy(args)
    alone.run = replace(args.run, seeds=str(seed))
    alone.training = copy.deepcopy(args.training)
    alone.training.seed = seed
    return alone


def _run_seed(
    args: Arguments,
    prepared: Prepared,
    directory: Path,
    own_rows: Mapping[str, Dataset] | None,
    shared: SharedArms | None,
) -> None:
    """The federated run, then its arms; one that fails takes nothing from the others."""
    worker = prepared.worker
    worker.work_dir = directory / "clients"
    first, last = federate(worker.args, worker, directory)
    failed: list[str] = []
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
            done = given.directory / name / RESULT
            if args.run.resume and done.is_file():
                continue
            with surviving(f"arm {name}", failed):
                result = shared.result(name, given) if shared else run_arm(name, given)
                done.parent.mkdir(parents=True, exist_ok=True)
                write_json(done, result)
        write_json(directory / OWN_ROWS, own_scores(worker.args, worker, last, own))
    if failed:
        raise RoundError("; ".join(failed))
