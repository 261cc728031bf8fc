"""What a run of several strategies leaves in its top level: the table, as JSON and as a page."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from fedtune.compare.facts import Facts
from fedtune.files import read_json, write_json
from fedtune.lists import split_names
from fedtune.report.comparison_page import write_comparison_page
from fedtune.report.plots import draw_compare, drawn
from fedtune.report.render_runs import records, render_runs
from fedtune.report.run_directories import STRATEGIES, folder_of, run_directories
from fedtune.report.side_by_side import run_rows
from fedtune.report.unlike import notes
from fedtune.results.summary import SUMMARY, Ending, Summary, load_summary

__all__ = ["strategies_of", "table_of", "write_comparison"]


def strategies_of(facts: Facts) -> list[str]:
    """The strategies of a run of several; empty for an ordinary run."""
    names = split_names(str(facts.config.get("federation", {}).get("strategy", "")))
    return names if len(names) > 1 else []


def write_comparison(directory: Path, facts: Facts, ending: Ending) -> None:
    """Write summary.json, report.html and loss.png over the strategies that began."""
    summaries, remarks = _begun(directory), []
    first = {}
    if summaries:
        remarks = notes(summaries)
        first = read_json(summaries[0].directory / SUMMARY)["arms"]
    by_name = {summary.directory.name: summary for summary in summaries}
    write_json(
        directory / SUMMARY,
        {
            **ending.to_json(),
            "strategies": [
                _ended(name, by_name.get(folder_of(name))) for name in strategies_of(facts)
            ],
            "seeds": facts.seeds,
            "base_loss": facts.base_loss,
            "arms": {name: arm for name, arm in first.items() if name != "federated"},
            "runs": records(run_rows(summaries)) if summaries else [],
            "notes": [note._asdict() for note in remarks],
            **facts.given,
        },
    )
    write_comparison_page(directory, summaries, remarks, ending)
    if summaries:
        drawn(partial(draw_compare, notes=remarks), summaries, directory / "loss.png")


def table_of(directory: Path) -> str:
    """The table of the strategies that began, with its notes."""
    summaries = _begun(directory)
    if not summaries:
        return "no strategy began"
    return render_runs(run_rows(summaries), notes(summaries), "table")


def _begun(directory: Path) -> list[Summary]:
    found = [run for run in run_directories([directory]) if (run / SUMMARY).is_file()]
    return [load_summary(run) for run in found if run != directory]


def _ended(name: str, summary: Summary | None) -> dict[str, Any]:
    if summary is None:
        return {"strategy": name, "status": "not run"}
    told = {"strategy": name, "directory": f"{STRATEGIES}/{folder_of(name)}"}
    reason = summary.ending.reason
    told |= {"status": summary.status}
    return told if reason is None else {**told, "reason": reason}
