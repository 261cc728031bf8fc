"""Where rows come from: an error names a row that one can find in the file.

Rows that are read carry their source and their positions in it through `select` and `derive`;
no column is added, so trainers see nothing of it. Rows that other code made are counted from 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from datasets import Dataset

__all__ = [
    "UNKNOWN",
    "BadRows",
    "Faults",
    "bad_rows",
    "derive",
    "first_rows",
    "mark",
    "origin_of",
    "row_name",
    "select",
]

ATTRIBUTE = "fedtune_origin"  # `datasets` keeps it where a row stays where it is, as in renaming

Faults = Sequence[tuple[int, str]]  # position of a bad row, and what was received


@dataclass(frozen=True)
class Source:
    """A file or data set by name, and the line on which each row begins, where it has lines."""

    name: str | None = None
    lines: Sequence[int] | None = None

    def row(self, position: int) -> str:
        """A row by its number from 1: `row 38 (line 39 of rows.csv)`."""
        if self.lines is not None:
            return f"row {position + 1} (line {self.lines[position]} of {self.name})"
        of = "(rows count from 1)" if self.name is None else f"of {self.name}"
        return f"row {position + 1} {of}"


UNKNOWN = Source()  # rows that other code made


class BadRows(NamedTuple):
    """What the first bad row holds, its name, and how many bad rows the whole source has."""

    received: str
    first: str
    total: int

    @property
    def where(self) -> str:
        """`row 38 (line 38 of rows.jsonl) and 2 more rows`."""
        more = self.total - 1
        return self.first + (f" and {more:,} more row{'s' if more > 1 else ''}" if more else "")


@dataclass(frozen=True)
class Origin:
    """Source of some rows, their positions in it, and all its rows in the same form."""

    source: Source
    positions: Sequence[int]
    whole: Callable[[], Dataset]

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        return self  # nothing in it changes


def mark(rows: Dataset, name: str, lines: Sequence[int] | None = None) -> Dataset:
    """`rows` as all rows of a source; `lines` has the line of each."""
    return _attach(rows, Source(name, lines), range(len(rows)), None)


def first_rows(rows: Dataset, count: int) -> Dataset:
    """The first rows of a source, as if it had no others."""
    origin = origin_of(rows)
    numbers = range(min(count, len(rows)))
    return _attach(rows.select(numbers, keep_in_memory=True), origin.source, numbers, None)


def origin_of(rows: Dataset) -> Origin:
    """Origin of `rows`; their own numbers where nothing is known of it."""
    found = getattr(rows, ATTRIBUTE, None)
    if found is None or len(found[1]) != len(rows):
        found = (UNKNOWN, range(len(rows)), None)
    source, positions, whole = found
    return Origin(source, positions, whole or partial(_same, rows))


def select(rows: Dataset, positions: Sequence[int]) -> Dataset:
    """These rows of `rows`, in this order, with their origin."""
    origin = origin_of(rows)
    numbers = [int(i) for i in positions]
    chosen = rows.select(numbers, keep_in_memory=True)
    return _attach(chosen, origin.source, [origin.positions[i] for i in numbers], origin.whole)


def derive(rows: Dataset, derived: Dataset, convert: Callable[[Dataset], Dataset]) -> Dataset:
    """`derived`, which `convert` made of `rows` row by row, with the origin of `rows`."""
    origin = origin_of(rows)
    return _attach(
        derived, origin.source, origin.positions, partial(_converted, convert, origin.whole)
    )


def row_name(rows: Dataset, position: int) -> str:
    """Name of one of `rows` in its source: `row 38 (line 38 of rows.jsonl)`."""
    origin = origin_of(rows)
    return origin.source.row(origin.positions[position])


def bad_rows(rows: Dataset, check: Callable[[Dataset], Faults]) -> BadRows | None:
    """Bad rows of the whole source, whoever got them, if any of `rows` is bad; else None.

    `check` is given `rows` first, then (only if something is wrong) all rows of their source in
    the same form.
    """
    faults = check(rows)
    if not faults:
        return None
    origin = origin_of(rows)
    everywhere = check(origin.whole()) or [(origin.positions[i], what) for i, what in faults]
    position, received = everywhere[0]
    return BadRows(received, origin.source.row(position), len(everywhere))


def _attach(
    rows: Dataset,
    source: Source,
    positions: Sequence[int],
    whole: Callable[[], Dataset] | None,
) -> Dataset:
    setattr(rows, ATTRIBUTE, (source, positions, whole))
    return rows


def _same(rows: Dataset) -> Dataset:
    return rows


def _converted(convert: Callable[[Dataset], Dataset], whole: Callable[[], Dataset]) -> Dataset:
    return convert(whole())
