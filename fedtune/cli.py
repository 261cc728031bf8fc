"""The `fedtune` command. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import argparse
import logging
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fedtune.errors import ConfigError, FedtuneError
from fedtune.processes.last_line import say_last, words_of
from fedtune.processes.signals import Stopped, ends_once, interrupted_by, status_of

if TYPE_CHECKING:
    from fedtune.results.summary import Summary

__all__ = ["main"]


# modules of fedtune.deploy, one a command
DEPLOYMENT = {
    "certs": "Make the certificates and keys of a server and its sites.",
    "up": "Start the server that sites connect to.",
    "join": "Take part as a site, with its own training script.",
    "submit": "Start a federated run and follow it.",
    "status": "Show runs, sites, rounds and losses.",
    "stop": "End a run.",
    "logs": "Show the log of a run.",
}
OF_RUNS = "--output_dir of a run; one of several strategies stands for all of them"
TABLES = ("table", "markdown", "csv", "latex", "json")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    The exit status is 0, 1 (doctor found a fault), 2 (a one-line error) or 128 + signal.
    """
    try:
        with ends_once():
            return _run(list(sys.argv[1:] if argv is None else argv))
    except (KeyboardInterrupt, Stopped) as stop:
        say_last(f"interrupted by {interrupted_by(stop)}", sys.stderr)
        return status_of(stop)


def _run(words: list[str]) -> int:
    try:
        args = _parser(words[0] if words else "").parse_args(words)
        command: Callable[[argparse.Namespace], int] = args.command
        return command(args)
    except FedtuneError as error:
        say_last(f"error: {error}", sys.stderr)
    except BrokenPipeError:  # `fedtune status | head`
        say_last("", sys.stdout)
        return 128 + signal.SIGPIPE
    except OSError as error:
        if interrupted_by(error):  # a terminal that is gone cannot be written to on the way out
            raise
        say_last(f"error: {words_of(error)}", sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    """Errors are one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See {self.prog} --help.")


def _parser(asked: str) -> argparse.ArgumentParser:
    """All commands; those of a deployment have flags only where they are `asked` for."""
    parser = _Parser(prog="fedtune", description="Federated fine-tuning of language models.")
    parser.add_argument("--version", action="version", version=f"fedtune {version('fedtune')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    plot = _add(commands, "plot", _plot, "Redraw the curves and report of runs; compare several.")
    plot.add_argument("directories", nargs="+", type=Path, metavar="DIR", help=OF_RUNS)
    plot.add_argument(
        "--output",
        type=Path,
        default=Path("compare.png"),
        help="of several runs, else compare.png",
    )

    compare = _add(commands, "compare", _compare, "Runs in one table, each against the first.")
    compare.add_argument("directories", nargs="+", type=Path, metavar="DIR", help=OF_RUNS)
    compare.add_argument(
        "--format",
        choices=TABLES,
        default="table",
        help="csv and json: every figure in full, under names that stay",
    )

    export = _add(commands, "export", _export, "Copy a run's adapter, or merge it into its base.")
    export.add_argument("directory", type=Path, metavar="DIR", help="a run, or one of its adapters")
    export.add_argument("--merge", action="store_true", help="write base model + adapter as one")
    export.add_argument("--best", action="store_true", help="the best round instead of the last")
    export.add_argument("--output_dir", type=Path, help="default: DIR-adapter or DIR-merged")
    export.add_argument(
        "--model_name_or_path",
        help="base model: of --merge, if it has moved; of a full model without its tokenizer",
    )

    _add(commands, "methods", _methods, "All methods and workflows that are found, as tables.")
    _add(commands, "doctor", _doctor, "Check this machine and its packages.")
    for name, help in DEPLOYMENT.items():
        command = _add(commands, name, _doctor, help)
        if name == asked:
            module = import_module(f"fedtune.deploy.{name}")
            command.set_defaults(command=module.run)
            module.add_arguments(command)
    return parser


def _add(
    commands: argparse._SubParsersAction[_Parser],
    name: str,
    command: Callable[[argparse.Namespace], int],
    help: str,
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help, description=help, allow_abbrev=False
    )
    parser.set_defaults(command=command)
    return parser


def _methods(args: argparse.Namespace) -> int:
    from fedtune.strategies.listing import listing

    print(listing())
    return 0


def _plot(args: argparse.Namespace) -> int:
    from fedtune.report.page import write_report
    from fedtune.report.plots import draw_compare, draw_loss, drawn
    from fedtune.report.render_runs import render_runs
    from fedtune.report.side_by_side import run_rows
    from fedtune.report.terminal import traffic_table
    from fedtune.report.unlike import notes

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    summaries = _summaries(args.directories)
    for summary in summaries:
        if picture := drawn(draw_loss, summary, summary.directory / "loss.png"):
            print(picture)
        print(write_report(summary.directory))
    if len(summaries) > 1:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        remarks = notes(summaries)
        draw = partial(draw_compare, notes=remarks)
        if picture := drawn(draw, summaries, args.output):
            print(picture)
        print(render_runs(run_rows(summaries), remarks, "table"))
        if table := traffic_table(summaries):
            print(table)
    return 0


def _compare(args: argparse.Namespace) -> int:
    from fedtune.report.render_runs import render_runs
    from fedtune.report.side_by_side import run_rows
    from fedtune.report.unlike import notes

    summaries = _summaries(args.directories)
    remarks = notes(summaries)
    print(render_runs(run_rows(summaries), remarks, args.format))
    if args.format == "csv":
        for note in remarks:
            print(f"warning: {note.words}", file=sys.stderr)
    return 0


def _summaries(given: Sequence[Path]) -> list[Summary]:
    """Of the runs in these directories; a killed one is told first."""
    from fedtune.compare.settle import settle
    from fedtune.report.run_directories import run_directories
    from fedtune.results.summary import load_summary

    for directory in given:
        settle(directory)
    directories = run_directories(given)
    for directory in directories:
        settle(directory)
    return [load_summary(directory) for directory in directories]


def _export(args: argparse.Namespace) -> int:
    from fedtune.compare.settle import settle

    with suppress(FedtuneError, OSError):  # one that still goes on, or is read-only, can be copied
        settle(args.directory)
    source = _adapter_of(args.directory, best=args.best)
    kind = "merged" if args.merge else "adapter"
    run = args.directory.resolve()
    target: Path = args.output_dir or run.with_name(f"{run.name}-{kind}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--output_dir: {target} is there already. Choose a new directory.")
    full = not (source / "adapter_config.json").is_file()
    if args.merge:
        from fedtune.adapters import merge

        merge(source, target, model_name_or_path=args.model_name_or_path)
    elif args.model_name_or_path and not full:
        raise ConfigError("--model_name_or_path needs --merge. Add it, or leave this out.")
    else:
        _check_weights(source)
        _copy(source, target, args.model_name_or_path)
    print(target)
    return 0


def _copy(source: Path, target: Path, base: str | None) -> None:
    """Copy a checkpoint; a full model gets tokenizer and generation settings of `base`."""
    from fedtune.files import replace_directory

    found = None
    if base is not None:
        from fedtune.adapters.beside import beside_of_base

        found = beside_of_base(base)
    with replace_directory(target) as fresh:
        shutil.copytree(source, fresh, dirs_exist_ok=True)
        if found is not None:
            from fedtune.adapters.beside import put_beside

            put_beside(fresh, found)


def _adapter_of(directory: Path, *, best: bool) -> Path:
    """The checkpoint in a run's directory, or the directory itself when it is one."""
    names = ("best",) if best else ("adapter", "model", ".")
    for name in names:
        found = directory / name
        if (found / "adapter_config.json").is_file() or (found / "config.json").is_file():
            return found
    expected = "best/" if best else "adapter/ or model/, and is no checkpoint itself"
    raise ConfigError(f"{directory}: has no {expected}. Give a finished run or an adapter.")


def _check_weights(directory: Path) -> None:
    """Every weight file opens; fedtune's own export also obeys its manifest."""
    from safetensors import SafetensorError, safe_open

    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{directory}: has no weights (*.safetensors).")
    for file in files:
        try:
            with safe_open(file, framework="numpy") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{file}: is damaged ({error}). Export another round.") from None
    if (directory / "fedtune_manifest.json").is_file():
        from fedtune.adapters import load_exported

        load_exported(directory)


def _doctor(args: argparse.Namespace) -> int:
    from fedtune.doctor import examine, render

    rows = examine()
    print(render(rows))
    return 1 if any(row.status == "FAIL" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
