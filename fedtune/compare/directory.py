"""What a run has measured so far, from the files that it writes as it goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedtune.files import read_json, read_object
from fedtune.results.round_record import ROUNDS, RoundRecord, read_lines, read_rounds
from fedtune.results.series import Series
from fedtune.results.summary import LastRefusal

__all__ = ["OWN_ROWS", "RESULT", "history_of", "refused_in", "result_of"]

OWN_ROWS = "own_rows.json"  # losses of the last global on each client's own held-out rows
ATTEMPTS = "attempts.jsonl"  # those at a round that failed
RESULT = "result.json"  # an arm that is done, in arms/<arm>/


def history_of(directory: Path) -> list[RoundRecord]:
    """One record per scored round, index 0 included; empty before that one is."""
    starts = sorted(directory.glob("checkpoints/start/round-*/state.json"))
    if not starts:
        return []
    first = read_json(starts[-1])["history"][:1]
    return [*map(RoundRecord.from_json, first), *read_rounds(directory / ROUNDS)]


def refused_in(directory: Path, number: int) -> tuple[LastRefusal, ...]:
    """Whose updates were refused in the attempts at a round that all failed, in order."""
    return tuple(
        LastRefusal.from_json({**attempt, **refusal})
        for attempt in read_lines(directory / ATTEMPTS)
        if attempt["round"] == number
        for refusal in attempt["refused"]
    )


def result_of(directory: Path, arms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Arms that have something to show: the federated one as far as it came, others when done."""
    result: dict[str, dict[str, Any]] = {}
    if history := history_of(directory):
        times = [dict(record.time) for record in history]
        result["federated"] = {**Series.of_rounds(history).to_json(), "time": times}
        if (directory / OWN_ROWS).is_file():
            result["federated"]["own"] = read_json(directory / OWN_ROWS)
    for arm in arms:
        done = directory / "arms" / arm / RESULT
        if done.is_file():
            result[arm] = read_object(done, "Delete it to run that arm again.")
    return result
