"""The runs of a SuperLink, and the flags by which a command names one of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedtune.deploy.address import Address
from fedtune.deploy.connection import Connection
from fedtune.deploy.submitted_runs import known_runs
from fedtune.deploy.view import RunState
from fedtune.errors import ConfigError
from fedtune.files import read_json
from fedtune.server.submission import FEDERATION

__all__ = ["add_run_arguments", "choose_run", "federation_of", "list_runs", "with_connection"]


def add_run_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """Flags of a command about one run; `what` is the help of RUN_ID."""
    parser.add_argument("run", nargs="?", metavar="RUN_ID", help=what)
    parser.add_argument(
        "--superlink", required=True, metavar="HOST:PORT", help="where fedtune up is"
    )
    parser.add_argument("--tls", type=Path, metavar="DIR", help="folder that fedtune certs made")


def with_connection(args: argparse.Namespace, command: Callable[[Connection], None]) -> int:
    """Run `command` at the SuperLink that the flags name; returns the exit status."""
    with Connection(Address.parse(args.superlink), tls=args.tls) as link:
        try:
            command(link)
        except KeyboardInterrupt:
            return 130
    return 0


def list_runs(link: Connection) -> list[RunState]:
    """All runs of the SuperLink, the newest first."""
    known = known_runs()
    runs = [_run_state(row, known) for row in link.flwr("list")["runs"]]
    return sorted(runs, key=lambda run: run.started, reverse=True)


def choose_run(runs: list[RunState], run: str | None) -> RunState:
    """The run with this id; without one the newest active run, else the newest."""
    if run is not None:
        found = [state for state in runs if state.id == _checked(run)]
        if not found:
            known = ", ".join(state.id for state in runs[:5]) or "none"
            raise ConfigError(f"run {run}: the SuperLink does not know it. Known: {known}.")
        return found[0]
    if not runs:
        raise ConfigError("the SuperLink has no runs yet. Start one with fedtune submit.")
    return next((state for state in runs if state.is_active), runs[0])


def federation_of(directory: Path | None) -> dict[str, Any]:
    """Content of federation.json in the output directory of a run; empty where it has none."""
    if directory is None:
        return {}
    try:
        value = read_json(directory / FEDERATION)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _checked(run: str) -> str:
    if not (run.isascii() and run.isdigit()):
        raise ConfigError(f"RUN_ID: expected a whole number, received {run!r}.")
    return run


def _run_state(row: dict[str, Any], known: dict[str, Path]) -> RunState:
    details = str(row.get("status-details") or "")
    return RunState(
        id=str(row["run-id"]),
        status=str(row["status"]),
        elapsed_s=float(row.get("elapsed") or 0.0),
        started=str(row.get("pending-at") or ""),
        details="" if details == "N/A" else details,
        output_dir=known.get(str(row["run-id"])),
    )
