"""Comma, semicolon and tab separated text: every cell is the text that stands in the file."""

from __future__ import annotations

import csv
import io
import sys
from collections import Counter
from collections.abc import Iterator

from fedtune.data.text import BadText, say_once
from fedtune.errors import private

__all__ = ["read_csv"]

NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
LOOKED_AT = 20  # records that tell the delimiter

Record = tuple[int, list[str]]  # the line on which it begins, and its cells


def read_csv(text: str, name: str, usual: str) -> tuple[dict[str, list[str]], list[int]]:
    """Columns of text and the line on which each record begins.

    The delimiter is the one that makes most columns, `usual` where several do; another one is
    said in one line. Blank lines are no records.

    Raises:
        BadText: a record with other than the header's number of cells, an open quote, a column
            name that is there twice.
    """
    delimiter = _delimiter(text, usual)
    if delimiter != usual:
        say_once(f"{name} is read as separated by {NAMES[delimiter]}.")
    try:
        columns, rows = _table(text, delimiter)
    except BadText:
        if delimiter != "\t":
            raise
        columns, rows = _table(text, delimiter, csv.QUOTE_NONE)
        say_once(f"{name}: a quote is a character like any other in it.")
    if _spaced(text, delimiter):
        say_once(f"{name}: spaces after its {NAMES[delimiter]} are taken off.")
    values = zip(*(cells for _, cells in rows), strict=True) if rows else ([] for _ in columns)
    return (
        {column: list(cells) for column, cells in zip(columns, values, strict=True)},
        [at for at, _ in rows],
    )


def _table(
    text: str, delimiter: str, quoting: int = csv.QUOTE_MINIMAL
) -> tuple[list[str], list[Record]]:
    """Names of the columns, and the records after them, all of as many cells."""
    records = _records(text, delimiter, quoting)
    line, header = next(records, (1, []))
    columns = _column_names(header, line)
    rows = list(records)
    ragged = [(at, len(cells)) for at, cells in rows if len(cells) != len(columns)]
    if ragged:
        at, count = ragged[0]
        others = len(ragged) - 1
        more = f" (and {others:,} more line{'s' if others > 1 else ''})" if others else ""
        raise BadText(
            f"line {at} has {_cells(count)}{more}, its header {_cells(len(columns))}, separated "
            f"by {NAMES[delimiter]}"
        )
    return columns, rows


def _records(text: str, delimiter: str, quoting: int = csv.QUOTE_MINIMAL) -> Iterator[Record]:
    limit = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.reader(
            io.StringIO(text, newline=""),
            delimiter=delimiter,
            quoting=quoting,  # type: ignore[arg-type]
            strict=True,
            skipinitialspace=_spaced(text, delimiter),
        )
        begin = 1
        for cells in reader:
            if cells:
                yield begin, cells
            begin = reader.line_num + 1
    except csv.Error as error:
        reason = "a quote is opened and never closed" if "end of data" in str(error) else error
        raise BadText(f"line {begin} cannot be read: {reason}") from None
    finally:
        csv.field_size_limit(limit)


def _spaced(text: str, delimiter: str) -> bool:
    """Whether the header has a space after its delimiters, so that all records may."""
    return delimiter != "\t" and f"{delimiter} " in text.split("\n", 1)[0]


def _delimiter(text: str, usual: str) -> str:
    """The delimiter with most columns among those whose first records have equally many."""
    counts: dict[str, int] = {}
    for delimiter in NAMES:
        widths = []
        try:
            for _, cells in _records(text, delimiter):
                widths.append(len(cells))
                if len(widths) > LOOKED_AT:
                    break
        except BadText:
            pass
        counts[delimiter] = widths[0] if widths else 0
        if len(set(widths)) > 1 and delimiter != usual:
            counts[delimiter] = 0
    return max(counts, key=lambda delimiter: (counts[delimiter], delimiter == usual))


def _column_names(header: list[str], line: int) -> list[str]:
    names = [name if name.strip() else f"unnamed_{i}" for i, name in enumerate(header)]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise BadText(f"its header (line {line}) names the column {private(repr(twice[0]))} twice")
    return names


def _cells(count: int) -> str:
    return f"{count} cell{'' if count == 1 else 's'}"
