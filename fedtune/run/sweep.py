"""`--strategy a,b,c`: one whole run each, side by side, over the same rows and shared arms."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedtune.checks import each_strategy
from fedtune.client.worker import BuildModel, BuildTrainer
from fedtune.compare.facts import settings_of
from fedtune.compare.settle import leaving
from fedtune.compare.shared import SharedArms
from fedtune.config import Arguments
from fedtune.decisive import run_settings
from fedtune.errors import RoundError
from fedtune.files import read_json
from fedtune.lock import check_free, hold
from fedtune.output_dir import MARKER, check_output_dir, prepare_output_dir
from fedtune.report.run_directories import STRATEGIES, folder_of
from fedtune.run.dry_run import describe_run
from fedtune.run.prepare import load_silos, prepare
from fedtune.run.seeds import facts_of, run_seeds, surviving
from fedtune.run.sources import sources_of

__all__ = ["run_strategies"]

log = logging.getLogger(__name__)


def run_strategies(
    args: Arguments, build_model: BuildModel, build_trainer: BuildTrainer
) -> dict[str, Any]:
    """Run every strategy into `strategies/<name>/` of the output directory; returns the summary.

    Nothing is written before model, data and Trainers stand. A strategy that fails does not end the
    others. With `--resume`, those that are done are only read.

    Raises:
        RoundError: a strategy failed; what did not is in the table.
    """
    top, runs = Path(args.training.output_dir), each_strategy(args)
    output: dict[str, Any] = {"resume": args.run.resume, "overwrite": args.run.overwrite}
    if not args.run.dry_run:
        check_free(top)
        sources = sources_of(args)
        read: dict[str, Any] = {"data": sources.data, "code": sources.code}
        check_output_dir(top, **output, settings=run_settings(args), **read)
    silos = load_silos(args)
    with TemporaryDirectory() as scratch:
        first = prepare(args, args.seeds[0], silos, Path(scratch), build_model, build_trainer)
        if args.run.dry_run:
            for one in runs:
                print(f"strategy {one.federation.strategy}\n{describe_run(one, first)}\n")
            return {}
    facts = facts_of(args, silos, first, sources.all)
    first.worker.release()
    with hold(top):
        prepare_output_dir(
            top, **output, settings=run_settings(args), facts=facts.to_json(), **read
        )
        failed: list[str] = []
        with leaving(top):
            for number, one in enumerate(runs, start=1):
                name = one.federation.strategy
                print(f"strategy {name} ({number} of {len(runs)})", flush=True)
                inside = top / STRATEGIES / folder_of(name)
                with surviving(name, failed), hold(inside):
                    resume = args.run.resume and (inside / MARKER).is_file()
                    prepare_output_dir(
                        inside,
                        resume=resume,
                        overwrite=args.run.overwrite,
                        settings=run_settings(one),
                        facts=replace(facts, config=settings_of(one)).to_json(),
                        **read,
                    )
                    one = _inside(one, inside, resume)
                    shared = SharedArms(top / "arms")
                    with TemporaryDirectory() as scratch:
                        where, seed = Path(scratch), one.seeds[0]
                        prepared = prepare(one, seed, silos, where, build_model, build_trainer)
                    try:
                        run_seeds(
                            one, inside, silos, prepared, build_model, build_trainer, shared=shared
                        )
                    finally:
                        prepared.worker.release()
            if failed:
                raise RoundError(
                    f"{len(failed)} of {len(runs)} strategies failed: {'; '.join(failed)}"
                )
    summary: dict[str, Any] = read_json(top / "summary.json")
    return summary


def _inside(args: Arguments, directory: Path, resume: bool) -> Arguments:
    """The settings with which this strategy alone would have been run there."""
    alone = copy.copy(args)
    alone.run = copy.copy(args.run)
    alone.run.resume = resume
    alone.training = copy.deepcopy(args.training)
    alone.training.output_dir = str(directory)
    return alone
