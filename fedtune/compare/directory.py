"""What a run has measured so far, from the files that it writes as it goes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedtune.compare.series import of_history
from fedtune.files import read_json, read_object

__all__ = ["OWN_ROWS", "RESULT", "attempts_of", "history_of", "result_of"]

OWN_ROWS = "own_rows.json"  # losses of the last global on each client's own held-out rows
RESULT = "result.json"  # an arm that is done, in arms/<arm>/


def history_of(directory: Path) -> list[dict[str, Any]]:
    """One record per scored round, index 0 included; empty before that one is."""
    starts = sorted(directory.glob("checkpoints/start/round-*/state.json"))
    if not starts:
        return []
    return [*read_json(starts[-1])["history"][:1], *_lines(directory / "rounds.jsonl")]


def attempts_of(directory: Path) -> list[dict[str, Any]]:
    """Attempts at a round that failed, in order."""
    return _lines(directory / "attempts.jsonl")


def result_of(directory: Path, arms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Arms that have something to show: the federated one as far as it came, others when done."""
    result: dict[str, dict[str, Any]] = {}
    if history := history_of(directory):
        times = [record["time"] for record in history]
        result["federated"] = {**of_history(history), "time": times}
        if (directory / OWN_ROWS).is_file():
            result["federated"]["own"] = read_json(directory / OWN_ROWS)
    for arm in arms:
        done = directory / "arms" / arm / RESULT
        if done.is_file():
            result[arm] = read_object(done, "Delete it to run that arm again.")
    return result


def _lines(path: Path) -> list[dict[str, Any]]:
    """A killed process may have left half of the last line."""
    if not path.is_file():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines() if line]
