"""The ServerApp of a deployment: reads a `Submission`, runs it, leaves what any run leaves.

Flower starts it in a process of its own beside the SuperLink. `federation.json` says what it is
doing; its last word is `done` or `failed` with the reason, unless the process was killed.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedtune.errors import ConfigError, RunStopped
from fedtune.files import write_json
from fedtune.lock import hold
from fedtune.output_dir import forget_ending
from fedtune.report.trackers import RoundTracker, open_trackers, round_scalars
from fedtune.server.app import ServerRun, serve
from fedtune.server.bases import Bases
from fedtune.server.checkpoint import ServerState
from fedtune.server.plan import Plan
from fedtune.server.run_rounds import RoundHook
from fedtune.server.store import RunStore
from fedtune.server.submission import FEDERATION, STOP, Submission
from fedtune.strategies import strategy_of
from fedtune.transport.packed_grid import PackedGrid

__all__ = ["app"]

BASES = Path("checkpoints", "bases.json")
HANDOVER_S = 60.0  # until the process that submitted the run lets go of its directory

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the submission that the run config names."""
    path = Path(str(context.run_config.get("settings", "")))
    if not path.is_file():
        raise ConfigError(
            f"run config settings: expected the file that fedtune submit wrote, received {path}."
        )
    submission = Submission.read(path)
    directory = Path(submission.directory)
    with hold(directory, wait_s=HANDOVER_S) if submission.alone else nullcontext():
        if submission.alone:
            forget_ending(directory)
        _journaled(grid, submission, Journal(submission, str(context.run_id)))


def _journaled(grid: Grid, submission: Submission, journal: Journal) -> None:
    try:
        _run(PackedGrid(grid), submission, journal)
    except RunStopped as stop:
        journal.write(state="stopped", error=str(stop))
        return
    except SystemExit:  # Flower ends the process: why is for those to say who look from outside
        raise
    except BaseException as error:
        journal.write(state="failed", error=" ".join(str(error).split()) or type(error).__name__)
        raise
    journal.write(state="done")


class Journal:
    """`federation.json`: who takes part and how the run stands."""

    def __init__(self, submission: Submission, flower_run: str) -> None:
        self._path = Path(submission.directory) / FEDERATION
        self._facts: dict[str, Any] = {
            "run": flower_run,
            "num_rounds": submission.federation.num_rounds,
            "min_clients": submission.min_clients,
            "state": "waiting for sites",
            "round": 0,
            "clients": [],
        }
        self.write()

    def write(self, **facts: Any) -> None:
        """Change some facts."""
        self._facts.update(facts)
        write_json(self._path, {**self._facts, "time": time.time()})


def _run(grid: Grid, submission: Submission, journal: Journal) -> ServerState:
    directory, federation = Path(submission.directory), submission.federation
    store = RunStore(
        directory,
        num_rounds=federation.num_rounds,
        save_every_rounds=federation.save_every_rounds,
    )
    with open_trackers(submission.track, directory, directory.name, {}) as trackers:
        run = ServerRun.of(
            federation,
            Plan.of(
                federation,
                run=submission.run,
                seed=submission.seed,
                sites_evaluate=submission.sites_evaluate,
            ),
            strategy_of(federation),
            on_round=_hook(store, trackers, journal, directory / STOP, federation.num_rounds),
            min_clients=submission.min_clients,
            init_adapter=submission.init_adapter,
            transport=submission.transport,
        )
        run.start = store.load() if submission.resume else None
        run.on_attempt = store.on_attempt
        run.join_timeout_s = submission.join_timeout_s
        run.on_clients = lambda clients: journal.write(clients=clients)
        run.deployed = True
        run.bases = Bases(directory / BASES, resume=submission.resume)
        (directory / STOP).unlink(missing_ok=True)  # one that came too late for an earlier run
        return serve(grid, run)


def _hook(
    store: RunStore, trackers: RoundTracker, journal: Journal, stop: Path, num_rounds: int
) -> RoundHook:
    def on_round(state: ServerState, record: dict[str, Any]) -> None:
        store.on_round(state, record)
        trackers.log(record["round"], round_scalars(record))
        print(_line(record), flush=True)  # for `fedtune logs`
        base = state.manifest.adapter_config.get("base_model_name_or_path")
        journal.write(state="running", round=state.round, base_model=base)
        if stop.exists():
            stop.unlink()
            if state.round == num_rounds:
                return
            store.save(state)
            raise RunStopped(f"stopped after round {state.round}; continue with --resume.")

    return on_round


def _line(record: dict[str, Any]) -> str:
    """A round in a line of the log."""
    words = [f"{len(record['replies'])} replies"] if record["round"] else ["before training"]
    losses = {name: record.get(name) for name in ("train_loss", "eval_loss")}
    words += [f"{name} {value:.4g}" for name, value in losses.items() if value is not None]
    words += [f"refused {row['client']} ({row['reason']})" for row in record.get("refused", [])]
    return f"round {record['round']}: {', '.join(words)}"
