"""How a run ended when it did not complete, in words: what stands above everything else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fedtune.report.records import Refusal, Summary
from fedtune.report.series import refusal_of

__all__ = ["ending", "last_refusals", "reason"]

AGAIN = re.compile(r"^round \d+ failed \d+ times: ")
LONGEST = 90  # characters of a reason in a headline


def ending(summary: Summary) -> str | None:
    """`Failed in round 1 of 2: 0 of 2 needed updates.`, or None for a run that completed."""
    if summary.status == "completed":
        return None
    runs = _runs(summary)
    if runs:
        counts = [run for run in runs if run.get("status") == "completed"]
        told = [_told(run) for run in runs if run.get("status") not in ("completed", "not run")]
        waiting = [str(run["seed"]) for run in runs if run.get("status") == "not run"]
        told += [f"not run: seed {', '.join(waiting)}"] if waiting else []
        return f"{len(counts)} of {len(runs)} seeds completed; {'; '.join(told)}."
    where = summary.extra.get("where")
    words = f"{summary.status.capitalize()}{f' {where}' if where else ''}"
    short = _short(reason(summary)) if summary.status == "failed" else ""
    return f"{words}: {short}." if short else f"{words}."


def reason(summary: Summary) -> str:
    """Why, in full; without what the headline says already."""
    return AGAIN.sub("", str(summary.extra.get("reason") or ""))


def last_refusals(summary: Summary) -> list[tuple[str, Refusal]]:
    """Who was refused in the round that never came about, by round (`2`, or `2 of seed 3`)."""
    rows = [(summary.extra, ""), *((run, f" of seed {run['seed']}") for run in _runs(summary))]
    return [
        (f"{item.get('round')}{seed}", refusal_of(item, int(item.get("attempt") or 1)))
        for told, seed in rows
        for item in told.get("refused") or ()
    ]


def _runs(summary: Summary) -> list[Mapping[str, Any]]:
    return list(summary.extra.get("runs") or ())


def _told(run: Mapping[str, Any]) -> str:
    """`seed 2 failed in round 1 of 2`."""
    return " ".join(
        str(word) for word in ("seed", run["seed"], run["status"], run.get("where", ""))
    )


def _short(words: str) -> str:
    """Up to the first parenthesis or sentence, and no longer than a headline may be."""
    first = re.split(r" \(|\. |; ", words, maxsplit=1)[0].rstrip(".")
    return first if len(first) <= LONGEST else f"{first[:LONGEST]}..."
