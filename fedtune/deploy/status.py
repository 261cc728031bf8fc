"""`fedtune status`: the runs of a SuperLink, and one of them in full."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

from fedtune.deploy.connection import Connection
from fedtune.deploy.superlink_runs import (
    add_run_arguments,
    choose_run,
    federation_of,
    list_runs,
    with_connection,
)
from fedtune.deploy.view import View, render
from fedtune.errors import ConfigError, FedtuneError
from fedtune.results.round_record import ROUNDS, RoundRecord, read_rounds

__all__ = ["add_arguments", "look", "run"]

REFRESH_S = 5.0
CLEAR = "\x1b[H\x1b[2J\x1b[3J"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `fedtune status`."""
    add_run_arguments(parser, "the run to show in full; default: the active one, else the newest")
    parser.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=REFRESH_S,
        metavar="SECONDS",
        help=f"show it again every SECONDS ({REFRESH_S:g}) until Ctrl-C",
    )


def run(args: argparse.Namespace) -> int:
    """`fedtune status`."""
    if args.watch is not None and not 0 < args.watch < 3600:
        raise ConfigError(
            f"--watch: expected seconds above 0, below 3600, received {args.watch:g}."
        )
    return with_connection(args, lambda link: _status(link, args.run, args.watch))


def look(link: Connection, run: str | None = None) -> View:
    """One look at the SuperLink; raises ConfigError when it has no run `run`."""
    runs = list_runs(link)
    nodes = Counter(str(row["status"]) for row in link.flwr("supernode", "list")["nodes"])
    shown = choose_run(runs, run) if runs or run else None
    directory = shown.output_dir if shown else None
    return View(
        superlink=str(link.address),
        nodes=nodes,
        runs=runs,
        shown=shown,
        federation=federation_of(directory),
        rounds=_rounds(directory),
        clocks=link.probe(),
    )


def _status(link: Connection, run: str | None, every_s: float | None) -> None:
    if every_s is None:
        print(_shown(link, run))
        return
    with contextlib.suppress(KeyboardInterrupt):  # how a watch ends
        while True:
            text = _shown(link, run)
            print(f"{CLEAR if sys.stdout.isatty() else ''}{text}", flush=True)
            time.sleep(every_s)


def _shown(link: Connection, run: str | None) -> str:
    return render(look(link, run), width=shutil.get_terminal_size((100, 24)).columns)


def _rounds(directory: Path | None) -> list[RoundRecord]:
    """Finished rounds as far as they can be read, which another user may not."""
    try:
        return [] if directory is None else read_rounds(directory / ROUNDS)
    except (OSError, FedtuneError):
        return []
