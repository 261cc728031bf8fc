"""How a run ended, and what it leaves then: summary, report and picture, from its directory alone.

A run that ends by itself, in whatever way, writes them on its way out; one that was killed could
not, and whoever looks at its directory next does (`settle`).
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedtune.compare.comparison import strategies_of, table_of, write_comparison
from fedtune.compare.compose import build_summary
from fedtune.compare.directory import history_of, refused_in, result_of
from fedtune.compare.facts import Facts
from fedtune.errors import FedtuneError
from fedtune.files import read_json, write_json
from fedtune.lock import holder
from fedtune.output_dir import forget_ending
from fedtune.processes.signals import held, interrupted_by
from fedtune.report import comparison_table, verdict_lines, write_report
from fedtune.report.findings import headline
from fedtune.report.plots import draw_loss, drawn
from fedtune.report.run_directories import run_directories
from fedtune.results.summary import SUMMARY, Ending, Summary, load_summary
from fedtune.server.submission import FEDERATION

__all__ = ["COMPLETED", "leaving", "settle", "way_on", "write_outcome"]

ON = "Continue with --resume, or begin again with --overwrite."
ADAPTERS = ("adapter", "model", "best")

log = logging.getLogger(__name__)


COMPLETED = Ending()


def ending_of(error: BaseException) -> Ending:
    """The ending of a run that leaves with this error."""
    name = interrupted_by(error)
    if name is not None:
        return Ending("interrupted", f"interrupted by {name}")
    words = " ".join(str(error).split())
    if isinstance(error, FedtuneError):
        return Ending("failed", words)
    return Ending("failed", f"{type(error).__name__}: {words}" if words else type(error).__name__)


@contextmanager
def leaving(directory: Path) -> Iterator[None]:
    """However the block ends, `directory` says so; what it said of an earlier try goes first."""
    forget_ending(directory)
    try:
        yield
    except BaseException as error:
        try:
            write_outcome(directory, ending_of(error))
        except Exception as lost:  # what ends the run is the news, not that it cannot be told
            log.warning("%s: no report could be written: %s", directory, lost)
        raise
    write_outcome(directory, COMPLETED)


def write_outcome(directory: Path, ending: Ending) -> None:
    """Write summary, report and picture of the run in `directory`, of all its seeds or its only.

    Only the picture may be interrupted, and the run does not depend on it.
    """
    facts = Facts.read(directory)
    if facts is None:
        raise FedtuneError(f"{directory}: expected a run.json that says what was run, found none.")
    if strategies_of(facts):
        with held():
            write_comparison(directory, facts, ending)
        return
    with held():
        write_json(directory / SUMMARY, _summary(directory, facts, ending).to_json())
        write_report(directory)
    drawn(draw_loss, load_summary(directory), directory / "loss.png")


def settle(directory: Path) -> None:
    """Write what a run left unwritten when it was killed, or when nobody followed it at its end.

    Directories that hold no run, or one that has told its end, stay as they are.

    Raises:
        FedtuneError: the run is still going on.
    """
    facts = Facts.read(directory)
    if facts is None or (directory / SUMMARY).is_file():
        return
    pid = holder(directory)
    if pid is not None:
        who = f"process {pid}" if pid else "another process"
        raise FedtuneError(f"{directory}: the run is still going on in {who}. Wait for its end.")
    for seed in facts.seeds:
        settle(directory / "seeds" / str(seed))
    if strategies_of(facts):
        for run in run_directories([directory]):
            settle(run)
    write_outcome(directory, _told(directory) or Ending("killed", "killed"))


def way_on(directory: Path) -> tuple[bool, list[str]]:
    """Whether the run completed, and its last lines on a terminal: what came out and is next."""
    report = f"report: {directory / 'report.html'}"
    facts = Facts.read(directory)
    if facts is not None and strategies_of(facts):
        well = read_json(directory / SUMMARY)["status"] == COMPLETED.status
        on = [] if well else [ON]
        return well, [table_of(directory), report, *on]
    summary = load_summary(directory)
    if summary.status == COMPLETED.status:
        return True, [comparison_table(summary), *verdict_lines(summary), report]
    done = summary.rounds
    kind = next((name for name in ADAPTERS[:2] if (directory / name).is_dir()), None)
    what = f"the global one after round {done}" if done else "the initial one, no round is done"
    lines = [headline(summary), report]
    lines += [f"adapter: {directory / kind} ({what})"] if kind else []
    return False, [*lines, ON]


def _told(directory: Path) -> Ending | None:
    """What the server of a deployment said last."""
    try:
        told = read_json(directory / FEDERATION)
    except (OSError, ValueError):
        return None
    if told.get("state") == "done":
        return COMPLETED
    status = {"failed": "failed", "stopped": "interrupted"}.get(told.get("state"))
    return Ending(status, str(told.get("error"))) if status else None


def _summary(directory: Path, facts: Facts, ending: Ending) -> Summary:
    if len(facts.seeds) > 1:
        endings = {seed: _of_seed(directory, seed) for seed in facts.seeds}
        results, over = _results(directory, facts, endings)
        _copy_adapters(directory, over)
        return build_summary(facts, results, ending=ending, endings=endings, over=over)
    if ending != COMPLETED:
        ending = _located(ending, directory, facts)
    result = result_of(directory, facts.arms)
    return build_summary(facts, [result] if "federated" in result else [], ending=ending)


def _of_seed(directory: Path, seed: int) -> Ending:
    """How one of several seeds ended."""
    path = directory / "seeds" / str(seed) / SUMMARY
    return Ending.from_json(read_json(path)) if path.is_file() else Ending("not run")


def _results(
    directory: Path, facts: Facts, endings: Mapping[int, Ending]
) -> tuple[list[dict[str, Any]], list[int]]:
    """Results of the completed seeds, and which those are.

    Without one, the federated series of all that began, as far as all of them came.
    """
    over = [seed for seed, ending in endings.items() if ending == COMPLETED]
    if over:
        return [result_of(directory / "seeds" / str(seed), facts.arms) for seed in over], over
    begun = {seed: result_of(directory / "seeds" / str(seed), ()) for seed in facts.seeds}
    begun = {seed: result for seed, result in begun.items() if result}
    common = min((len(result["federated"]["eval_loss"]) for result in begun.values()), default=0)
    cut = [{"federated": _cut(result["federated"], common)} for result in begun.values()]
    return cut, list(begun)


def _cut(arm: Mapping[str, Any], length: int) -> dict[str, Any]:
    return {name: values[:length] for name, values in arm.items() if isinstance(values, list)}


def _located(ending: Ending, directory: Path, facts: Facts) -> Ending:
    """With where in the run it was, and who was refused in a round that did not come about."""
    done, rounds = len(history_of(directory)) - 1, facts.federation.num_rounds
    if done < 0:
        return replace(ending, where="before round 1")
    if done < rounds:
        where, refused = f"in round {done + 1} of {rounds}", refused_in(directory, done + 1)
        return replace(ending, where=where, refused=refused)
    finished = result_of(directory, facts.arms)
    arm = next((arm for arm in facts.arms if arm not in finished), None)
    return replace(ending, where=f"in the arm {arm}" if arm else "after the last round")


def _copy_adapters(directory: Path, seeds: Sequence[int]) -> None:
    """The first of `seeds` that has one gives the adapter of all."""
    for seed in seeds:
        source = directory / "seeds" / str(seed)
        found = [name for name in ADAPTERS if (source / name).is_dir()]
        for name in found:
            shutil.rmtree(directory / name, ignore_errors=True)
            shutil.copytree(source / name, directory / name)
        if found:
            return
