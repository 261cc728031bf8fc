"""Columns of an arm: one value per round of each figure, as `summary.json` holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from fedtune.results.round_record import RoundRecord
from fedtune.results.values import number

__all__ = ["Series", "Values", "final", "last"]

Values = tuple[float | None, ...]

BYTES = ("bytes_up", "bytes_down", "bytes_up_raw", "bytes_down_raw")
KEYS = ("eval_loss", "train_loss", "samples", "tokens", *BYTES, "wall_s")
NO_SERIES = {*KEYS, "runs", "clients", "time"}  # other lists of numbers are task metrics


def last(values: Values) -> float | None:
    """The last known value."""
    return next((value for value in reversed(values) if value is not None), None)


def final(values: Values) -> float | None:
    """The value after the last round; None without a round, or where a training diverged."""
    found = values[-1] if len(values) > 1 else None
    return None if found is None else float(found)


@dataclass(frozen=True)
class Series:
    """One value per round; index 0 is the initial adapter. Bytes and seconds are per round.

    A column that a file lacks is empty.
    """

    eval_loss: Values = ()
    train_loss: Values = ()
    samples: Values = ()
    tokens: Values = ()
    bytes_up: Values = ()
    bytes_down: Values = ()
    bytes_up_raw: Values = ()
    bytes_down_raw: Values = ()
    wall_s: Values = ()
    metrics: Mapping[str, Values] = field(default_factory=dict)  # accuracy, F1, ...

    def to_json(self) -> dict[str, list[float | None]]:
        """`{"eval_loss": [...], ...}`, the task metrics behind the others."""
        return {name: list(values) for name, values in self._columns().items()}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """The series in a JSON object that may hold more than them."""
        lists = {name: value for name, value in raw.items() if isinstance(value, list)}
        metrics = {
            name: tuple(map(number, values))
            for name, values in lists.items()
            if name not in NO_SERIES and all(_is_figure(value) for value in values)
        }
        columns = {name: tuple(map(number, lists[name])) for name in KEYS if name in lists}
        return cls(**columns, metrics=metrics)

    @classmethod
    def of_rounds(cls, records: Sequence[RoundRecord]) -> Self:
        """Column by column; bytes that nobody counted are 0."""
        plain = [record.to_json() for record in records]
        columns = {
            key: tuple(row[key] or 0 if key in BYTES else row[key] for row in plain) for key in KEYS
        }
        names = sorted({name for record in records for name in record.eval_metrics})
        metrics = {
            name: tuple(record.eval_metrics.get(name) for record in records) for name in names
        }
        return cls(**columns, metrics=metrics)

    @classmethod
    def of_history(cls, history: Sequence[Mapping[str, Any]]) -> Self:
        """`of_rounds` of records as JSON objects, which a server's state holds."""
        return cls.of_rounds([RoundRecord.from_json(record) for record in history])

    @classmethod
    def mean(cls, runs: Sequence[Self]) -> Self:
        """Element-wise mean; None where any run has none. ValueError: unequal lengths."""
        columns = [run._columns() for run in runs]
        means = {
            name: tuple(map(_mean, zip(*(column[name] for column in columns), strict=True)))
            for name in columns[0]
        }
        metrics = {name: means.pop(name) for name in runs[0].metrics}
        return cls(**means, metrics=metrics)

    def until(self, length: int) -> Self:
        """The first values of every column."""
        columns = {name: values[:length] for name, values in self._columns().items()}
        metrics = {name: columns.pop(name) for name in self.metrics}
        return type(self)(**columns, metrics=metrics)

    def _columns(self) -> dict[str, Values]:
        known = {name: getattr(self, name) for name in KEYS}
        return {name: values for name, values in known.items() if values} | dict(self.metrics)


def _is_figure(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    if all(value == known[0] for value in known):
        return known[0]
    return float(sum(known) / len(known))
