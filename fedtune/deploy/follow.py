"""Follow a run from the files that its ServerApp writes, on the SuperLink's host."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedtune.deploy.superlink_runs import federation_of
from fedtune.deploy.waiting import START_S, Waiting
from fedtune.errors import FedtuneError, RoundError
from fedtune.report.progress import Progress
from fedtune.results.round_record import ROUNDS, RoundRecord, read_rounds

__all__ = ["follow"]

STOPPED = "finished:stopped"  # what Flower says of a run that it was told to stop
POLL_S = 0.2
ALIVE_S = 10.0  # asking Flower costs a second of CPU
ALIVE_SHARE = 4.0  # on a busy host many: what is waited for should get most of the CPU
AGAIN_S = 0.5
DOUBTS = 3


def follow(
    directory: Path,
    num_rounds: int,
    problem: Callable[[], str | None],
    *,
    since: float,
    start_timeout_s: float = START_S,
    left: Callable[[], bool] = lambda: False,
) -> None:
    """Show waiting sites and finished rounds until the run is over.

    Args:
        problem: why the run cannot go on although its ServerApp says nothing, or None.
        since: what was written before this time (seconds since 1970) is of an earlier run.
        start_timeout_s: how long the ServerApp may take to its first word.
        left: whether a ServerApp that has said a word may be gone; quickly told.

    Raises:
        NotStarted: the ServerApp has not said a word for too long; it may still come.
        RoundError: the run failed, or its ServerApp is gone.
    """
    shown, base, asked, pause_s = "", "", time.monotonic(), ALIVE_S
    known: set[str] = set()
    doubts, cut = 0, False
    waiting = Waiting(start_timeout_s)
    with Progress(num_rounds, "rounds") as progress:
        if earlier := len(_rounds(directory)):  # of a run that is resumed
            progress.advance(earlier)
        while True:
            state = _read(directory, since)
            rounds = _rounds(directory) if state else []
            before, shown = shown, _show_sites(state, shown, known)
            base = _show_base(state, base)
            if shown != before or len(rounds) > progress.done:
                waiting.news()
            for record in rounds[progress.done :]:
                _show_trouble(record)
                cut = _show_cut(record, cut)
                progress.advance(1, **_facts(record))
            if state.get("state") == "done":
                return
            if state.get("state") in ("failed", "stopped"):
                raise RoundError(f"{state['error']}")
            waiting.look(state, len(rounds) + 1, num_rounds)
            due_s = ALIVE_S if state and left() else pause_s
            if time.monotonic() - asked > (AGAIN_S if doubts else due_s):
                began = time.monotonic()
                reason = problem()
                asked = time.monotonic()
                pause_s = max(ALIVE_S, ALIVE_SHARE * (asked - began))
                # a busy machine may fail to answer once; and what the server wrote last may have
                # come after the last look
                same = _read(directory, since) == state
                doubts = doubts + 1 if reason and same else 0
                if doubts == DOUBTS:
                    raise RoundError(_ended(str(reason), len(rounds) + 1 if state else 0))
            time.sleep(POLL_S)


def _ended(reason: str, number: int) -> str:
    """Why a run is over that says nothing itself; `number` of the round it was in, from 1."""
    where = f"in round {number}" if number else "before it had started"
    if reason.startswith(STOPPED):
        way = "continue with --resume" if number > 1 else "begin again with --overwrite"
        return f"stopped {where} by fedtune stop; {way}."
    return f"the server ended {where} without a word ({reason.rstrip('.')})."


def _read(directory: Path, since: float) -> dict[str, Any]:
    state = federation_of(directory)
    return state if state.get("time", 0.0) >= since else {}


def _rounds(directory: Path) -> list[RoundRecord]:
    try:
        return read_rounds(directory / ROUNDS)
    except FedtuneError as error:
        raise RoundError(f"{error} Look at the run with fedtune status and logs.") from None


def _show_sites(state: dict[str, Any], shown: str, known: set[str]) -> str:
    """Print who takes part when that has changed; returns what is on the screen.

    Args:
        known: sites that have taken part so far; added to.
    """
    words, nameless = [], 0
    absent = known - {site["client"] for site in state.get("clients", [])}
    for site in state.get("clients", []):
        if site.get("problem"):
            words.append(f"{site['client']} refused ({site['problem']})")
        elif site["client"].startswith("node "):  # it has not told its name yet
            nameless += 1
        else:
            known.add(site["client"])
            words.append(f"{site['client']} {'ready' if site['state'] == 'ready' else 'starting'}")
    if nameless:
        words.append(f"{nameless} more starting" if words else f"{nameless} starting")
    else:
        words += [f"{name} absent" for name in sorted(absent)]
    line = "sites: " + ", ".join(words)
    if words and line != shown:
        print(line, flush=True)
        return line
    return shown


def _show_base(state: dict[str, Any], shown: str) -> str:
    """Print once which base model the adapter is for: `export --merge` loads what it names."""
    if shown or not state.get("base_model"):
        return shown
    name = json.dumps(state["base_model"])[:200]  # from a site: nothing in it moves the cursor
    print(f"base model: {name}, as the site that the run starts from calls it", flush=True)
    return name


def _show_trouble(record: RoundRecord) -> None:
    """Print what went wrong in a round that came about all the same."""
    where = f"round {record.round}"
    for number, failure in enumerate(record.failed_attempts, start=1):
        print(f"{where}: attempt {number} failed: {failure.reason}", flush=True)
    for refusal in record.refused:
        print(f"{where}: refused {refusal.client} ({refusal.reason})", flush=True)


def _show_cut(record: RoundRecord, told: bool) -> bool:
    """Print, once in a run, whose weight was cut; returns whether that is told by now."""
    if told:
        return True
    for reply in record.replies:
        if "weight_cut_from" in reply:
            print(
                f"round {record.round}: the weight of {reply['client']} is cut from "
                f"{reply['weight_cut_from']:.0f} to {reply['weight']:.0f} (--max_client_weight); "
                "rounds.jsonl says of others",
                flush=True,
            )
            return True
    return False


def _facts(record: RoundRecord) -> dict[str, Any]:
    losses = {"eval_loss": record.eval_loss, "train_loss": record.train_loss}
    facts: dict[str, Any] = {name: loss for name, loss in losses.items() if loss is not None}
    facts["clients"] = len(record.replies)
    if record.refused:
        facts["refused"] = len(record.refused)
    return {**facts, "MB": (record.traffic.sent or 0) / 1e6}
