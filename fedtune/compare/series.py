"""One arm's numbers: a value per round, index 0 before training; the shape of `summary.json`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["KEYS", "SeriesDict", "mean_series", "of_history"]

SeriesDict = dict[str, list[Any]]

BYTES = ("bytes_up", "bytes_down", "bytes_up_raw", "bytes_down_raw")
KEYS = ("eval_loss", "train_loss", "samples", "tokens", *BYTES, "wall_s")


def of_history(history: Sequence[dict[str, Any]]) -> SeriesDict:
    """Column by column from one record per round; bytes default to 0, other keys to None."""
    series: SeriesDict = {
        key: [record.get(key, 0 if key in BYTES else None) for record in history] for key in KEYS
    }
    names = sorted({name for record in history for name in record.get("eval_metrics") or {}})
    for name in names:
        series[name] = [(record.get("eval_metrics") or {}).get(name) for record in history]
    return series


def mean_series(runs: Sequence[SeriesDict]) -> SeriesDict:
    """Element-wise mean of series of equal length; None where any run has none."""
    return {
        key: [_mean(values) for values in zip(*(run[key] for run in runs), strict=True)]
        for key in runs[0]
    }


def _mean(values: Sequence[Any]) -> float | int | None:
    if any(value is None for value in values):
        return None
    if all(value == values[0] for value in values):
        return values[0]  # type: ignore[no-any-return]
    return float(sum(values) / len(values))
