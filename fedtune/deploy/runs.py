"""`fedtune status`, `stop` and `logs`: over Flower's own list, stop and log."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedtune.deploy.address import Address
from fedtune.deploy.connection import Connection
from fedtune.deploy.register import known_runs
from fedtune.deploy.view import RunState, View, render
from fedtune.errors import ConfigError, FedtuneError
from fedtune.files import read_json
from fedtune.results.round_record import ROUNDS, RoundRecord, read_rounds
from fedtune.server.submission import FEDERATION, STOP

__all__ = [
    "add_logs_arguments",
    "add_status_arguments",
    "add_stop_arguments",
    "list_runs",
    "look",
    "run_logs",
    "run_status",
    "run_stop",
]

REFRESH_S = 5.0
CLEAR = "\x1b[H\x1b[2J\x1b[3J"


def add_status_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `fedtune status`."""
    _add_common(parser, "the run to show in full; default: the active one, else the newest")
    parser.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=REFRESH_S,
        metavar="SECONDS",
        help=f"show it again every SECONDS ({REFRESH_S:g}) until Ctrl-C",
    )


def add_stop_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `fedtune stop`."""
    _add_common(parser, "the run to stop; default: the active one")
    parser.add_argument(
        "--now", action="store_true", help="do not wait for the end of the current round"
    )


def add_logs_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `fedtune logs`."""
    _add_common(parser, "the run whose server log to print; default: the active one, else newest")
    parser.add_argument("--follow", action="store_true", help="go on until the run ends")


def run_status(args: argparse.Namespace) -> int:
    """`fedtune status`."""
    if args.watch is not None and not 0 < args.watch < 3600:
        raise ConfigError(
            f"--watch: expected seconds above 0, below 3600, received {args.watch:g}."
        )
    return _with_connection(args, lambda link: _status(link, args.run, args.watch))


def run_stop(args: argparse.Namespace) -> int:
    """`fedtune stop`: end a run; the sites stay connected."""
    return _with_connection(args, lambda link: _stop(link, args.run, now=args.now))


def run_logs(args: argparse.Namespace) -> int:
    """`fedtune logs`: what the server side of a run printed."""
    return _with_connection(args, lambda link: _logs(link, args.run, follow=args.follow))


def list_runs(link: Connection) -> list[RunState]:
    """All runs of the SuperLink, the newest first."""
    known = known_runs()
    runs = [_run_state(row, known) for row in link.flwr("list")["runs"]]
    return sorted(runs, key=lambda run: run.started, reverse=True)


def look(link: Connection, run: str | None = None) -> View:
    """One look at the SuperLink; raises ConfigError when it has no run `run`."""
    runs = list_runs(link)
    nodes = Counter(str(row["status"]) for row in link.flwr("supernode", "list")["nodes"])
    shown = _choose(runs, run) if runs or run else None
    directory = shown.output_dir if shown else None
    return View(
        superlink=str(link.address),
        nodes=nodes,
        runs=runs,
        shown=shown,
        federation=_federation(directory),
        rounds=_rounds(directory),
        clocks=link.probe(),
    )


def _add_common(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("run", nargs="?", metavar="RUN_ID", help=what)
    parser.add_argument(
        "--superlink", required=True, metavar="HOST:PORT", help="where fedtune up is"
    )
    parser.add_argument("--tls", type=Path, metavar="DIR", help="folder that fedtune certs made")


def _with_connection(args: argparse.Namespace, command: Callable[[Connection], None]) -> int:
    with Connection(Address.parse(args.superlink), tls=args.tls) as link:
        try:
            command(link)
        except KeyboardInterrupt:
            return 130
    return 0


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


def _stop(link: Connection, run: str | None, *, now: bool) -> None:
    """Between rounds where the run looks for that, which ends the sites' training in order."""
    state = _to_stop(list_runs(link), run)
    if not now and _federation(state.output_dir).get("state") == "running":
        assert state.output_dir is not None
        (state.output_dir / STOP).touch()
        print(f"run {state.id}: ends after the current round; --now ends it at once")
    else:
        link.flwr("stop", state.id)
        print(f"run {state.id}: stopped")


def _to_stop(runs: list[RunState], run: str | None) -> RunState:
    if run is not None:
        chosen = _choose(runs, run)
        if not chosen.is_active:
            raise ConfigError(f"run {run}: expected an active run, received one {chosen.status}.")
        return chosen
    active = [state for state in runs if state.is_active]
    if len(active) != 1:
        ids = ", ".join(state.id for state in active)
        what = f"several are active: {ids}" if active else "none is active"
        raise ConfigError(f"fedtune stop: expected one active run, but {what}. Give its RUN_ID.")
    return active[0]


def _logs(link: Connection, run: str | None, *, follow: bool) -> None:
    chosen = _choose(list_runs(link), run)
    link.show("log", chosen.id, "--stream" if follow else "--show")


def _choose(runs: list[RunState], run: str | None) -> RunState:
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


def _federation(directory: Path | None) -> dict[str, Any]:
    if directory is None:
        return {}
    try:
        value = read_json(directory / FEDERATION)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _rounds(directory: Path | None) -> list[RoundRecord]:
    """Finished rounds as far as they can be read, which another user may not."""
    try:
        return [] if directory is None else read_rounds(directory / ROUNDS)
    except (OSError, FedtuneError):
        return []
