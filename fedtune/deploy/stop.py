"""`fedtune stop`: end a run after its round, or at once."""

from __future__ import annotations

import argparse

from fedtune.deploy.connection import Connection
from fedtune.deploy.superlink_runs import (
    add_run_arguments,
    choose_run,
    federation_of,
    list_runs,
    with_connection,
)
from fedtune.deploy.view import RunState
from fedtune.errors import ConfigError
from fedtune.server.submission import STOP

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `fedtune stop`."""
    add_run_arguments(parser, "the run to stop; default: the active one")
    parser.add_argument(
        "--now", action="store_true", help="do not wait for the end of the current round"
    )


def run(args: argparse.Namespace) -> int:
    """`fedtune stop`: end a run; the sites stay connected."""
    return with_connection(args, lambda link: _stop(link, args.run, now=args.now))


def _stop(link: Connection, run: str | None, *, now: bool) -> None:
    """Between rounds where the run looks for that, which ends the sites' training in order."""
    state = _to_stop(list_runs(link), run)
    if not now and federation_of(state.output_dir).get("state") == "running":
        assert state.output_dir is not None
        (state.output_dir / STOP).touch()
        print(f"run {state.id}: ends after the current round; --now ends it at once")
    else:
        link.flwr("stop", state.id)
        print(f"run {state.id}: stopped")


def _to_stop(runs: list[RunState], run: str | None) -> RunState:
    if run is not None:
        chosen = choose_run(runs, run)
        if not chosen.is_active:
            raise ConfigError(f"run {run}: expected an active run, received one {chosen.status}.")
        return chosen
    active = [state for state in runs if state.is_active]
    if len(active) != 1:
        ids = ", ".join(state.id for state in active)
        what = f"several are active: {ids}" if active else "none is active"
        raise ConfigError(f"fedtune stop: expected one active run, but {what}. Give its RUN_ID.")
    return active[0]
