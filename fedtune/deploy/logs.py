"""`fedtune logs`: what the server side of a run printed."""

from __future__ import annotations

import argparse

from fedtune.deploy.connection import Connection
from fedtune.deploy.superlink_runs import (
    add_run_arguments,
    choose_run,
    list_runs,
    with_connection,
)

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `fedtune logs`."""
    add_run_arguments(
        parser, "the run whose server log to print; default: the active one, else newest"
    )
    parser.add_argument("--follow", action="store_true", help="go on until the run ends")


def run(args: argparse.Namespace) -> int:
    """`fedtune logs`: what the server side of a run printed."""
    return with_connection(args, lambda link: _logs(link, args.run, follow=args.follow))


def _logs(link: Connection, run: str | None, *, follow: bool) -> None:
    chosen = choose_run(list_runs(link), run)
    link.show("log", chosen.id, "--stream" if follow else "--show")
