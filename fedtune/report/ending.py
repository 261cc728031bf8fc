"""How a run ended when it did not complete, in words: what stands above everything else."""

from __future__ import annotations

import re

from fedtune.results.summary import LastRefusal, Summary

__all__ = ["ending", "last_refusals", "reason"]

AGAIN = re.compile(r"^round \d+ failed \d+ times: ")
LONGEST = 90  # characters of a reason in a headline


def ending(summary: Summary) -> str | None:
    """`Failed in round 1 of 2: 0 of 2 needed updates.`, or None for a run that completed."""
    if summary.status == "completed":
        return None
    if summary.endings:
        seeds = summary.endings.items()
        counts = sum(one.status == "completed" for _, one in seeds)
        told = [
            " ".join(filter(None, ("seed", str(seed), one.status, one.where)))
            for seed, one in seeds
            if one.status not in ("completed", "not run")
        ]
        waiting = [str(seed) for seed, one in seeds if one.status == "not run"]
        told += [f"not run: seed {', '.join(waiting)}"] if waiting else []
        return f"{counts} of {len(seeds)} seeds completed; {'; '.join(told)}."
    where = summary.ending.where
    words = f"{summary.status.capitalize()}{f' {where}' if where else ''}"
    short = _short(reason(summary)) if summary.status == "failed" else ""
    return f"{words}: {short}." if short else f"{words}."


def reason(summary: Summary) -> str:
    """Why, in full; without what the headline says already."""
    return AGAIN.sub("", summary.ending.reason or "")


def last_refusals(summary: Summary) -> list[tuple[str, LastRefusal]]:
    """Who was refused in the round that never came about, by round (`2`, or `2 of seed 3`)."""
    endings = [("", summary.ending)]
    endings += [(f" of seed {seed}", one) for seed, one in summary.endings.items()]
    return [(f"{one.round}{seed}", one) for seed, told in endings for one in told.refused or ()]


def _short(words: str) -> str:
    """Up to the first parenthesis or sentence, and no longer than a headline may be."""
    first = re.split(r" \(|\. |; ", words, maxsplit=1)[0].rstrip(".")
    return first if len(first) <= LONGEST else f"{first[:LONGEST]}..."
