"""From a recipe's two functions to a finished run: flags, data, engine, arms, report."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedtune.checks import check_arguments
from fedtune.client.worker import BuildModel, BuildTrainer
from fedtune.config import Arguments
from fedtune.decisive import run_settings
from fedtune.errors import FedtuneError, RoundError
from fedtune.lock import check_free, hold
from fedtune.output_dir import check_output_dir, prepare_output_dir
from fedtune.processes.signals import Stopped, interrupted_by, stoppable
from fedtune.relay.folder import RunFolder
from fedtune.settings import parse_arguments

__all__ = ["launch", "quiet_libraries"]

log = logging.getLogger(__name__)

USAGE_ERROR, RUN_ERROR = 2, 1


def launch(
    build_model: BuildModel,
    build_trainer: BuildTrainer,
    *,
    training_class: type | None = None,
    argv: Sequence[str] | None = None,
) -> None:
    """Run a recipe: parse flags and the YAML beside it, federate, compare, report.

    Args:
        build_model: `args -> (model, tokenizer)`, called once per process.
        build_trainer: `args, model, tokenizer, train, evaluation -> Trainer`, called once per
            client; `evaluation` is None for clients that do not score the global model.
        training_class: `TrainingArguments` or a subclass; trl's `SFTConfig` by default.
        argv: flags, by default those of the command line.

    Ends the process: status 2 for a wrong setting or unusable data, 1 for a run that failed.
    """
    quiet_libraries()
    try:
        args = parse_arguments(
            training_class or _sft_config(), argv, recipe_file=_file_of(build_model)
        )
        check_arguments(args)
        flags = sys.argv[1:] if argv is None else argv
        args.command = (sys.executable, _file_of(build_model), *flags)
        folder = RunFolder.of_environment()
        if folder is None:
            with stoppable():
                run(args, build_model, build_trainer)
        else:
            _take_part(args, folder, build_model, build_trainer)
    except RoundError as error:
        _fail(error, RUN_ERROR)
    except FedtuneError as error:
        _fail(error, USAGE_ERROR)
    except (KeyboardInterrupt, Stopped) as stop:
        with suppress(OSError):
            print(f"interrupted by {interrupted_by(stop)}", file=sys.stderr)
        sys.exit(stop.code if isinstance(stop, Stopped) else 130)


def run(args: Arguments, build_model: BuildModel, build_trainer: BuildTrainer) -> dict[str, Any]:
    """`launch` without parsing: returns the summary, raises FedtuneError.

    Nothing is written or deleted in the output directory before model, data and Trainers stand;
    from then on summary and report are there however the run ends.
    """
    from fedtune.compare.facts import versions
    from fedtune.run.dry_run import describe_run
    from fedtune.run.prepare import load_silos, prepare
    from fedtune.run.seeds import facts_of, run_seeds
    from fedtune.run.sources import sources_of

    if len(args.strategies) > 1:
        return _run_several(args, build_model, build_trainer)
    output: dict[str, Any] = {
        "directory": args.training.output_dir,
        "resume": args.run.resume,
        "overwrite": args.run.overwrite,
        "settings": run_settings(args),
    }
    directory = Path(args.training.output_dir)
    if not args.run.dry_run:
        check_free(directory)
        sources = sources_of(args)
        output |= {"data": sources.data, "code": {**sources.code, **versions()}}
        check_output_dir(**output)
    silos = load_silos(args)
    with TemporaryDirectory() as scratch:
        first = prepare(args, args.seeds[0], silos, Path(scratch), build_model, build_trainer)
        for hint in args.hints:
            log.warning(hint)
        first.warn()
        if args.run.dry_run:
            print(describe_run(args, first))
            return {}
    with hold(directory):
        facts = facts_of(args, silos, first, sources.all)
        prepare_output_dir(**output, facts=facts.to_json())
        try:
            return run_seeds(args, directory, silos, first, build_model, build_trainer)
        finally:
            _say_end(directory)


def _run_several(
    args: Arguments, build_model: BuildModel, build_trainer: BuildTrainer
) -> dict[str, Any]:
    from fedtune.run.sweep import run_strategies

    try:
        return run_strategies(args, build_model, build_trainer)
    finally:
        if not args.run.dry_run:
            _say_end(Path(args.training.output_dir))


def _say_end(directory: Path) -> None:
    """The last lines of a run; what did not complete and what to do about it go to stderr."""
    from fedtune.compare.settle import way_on

    with suppress(OSError, FedtuneError):  # a terminal that is gone, a disk that is full
        well, lines = way_on(directory)
        print("\n".join(lines), file=sys.stdout if well else sys.stderr, flush=True)


def _take_part(
    args: Arguments, folder: RunFolder, build_model: BuildModel, build_trainer: BuildTrainer
) -> None:
    from fedtune.run.as_site import take_part

    take_part(args, folder, build_model, build_trainer)


def quiet_libraries() -> None:
    """One bar for the rounds instead of one per loaded weight and tokenized data set."""
    import datasets
    import transformers

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.captureWarnings(True)
    for chatty in ("py.warnings", "bitsandbytes", "transformers", "trl"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()


def _sft_config() -> type:
    from trl.trainer.sft_config import SFTConfig

    return SFTConfig


def _file_of(function: Callable[..., Any]) -> str:
    return function.__code__.co_filename


def _fail(error: Exception, status: int) -> None:
    if RunFolder.of_environment() is not None:
        from fedtune.client.failing import note_failure

        note_failure(error)
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(status)
