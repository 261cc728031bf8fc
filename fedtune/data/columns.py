"""Columns found by name, and cells that must hold something."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

from datasets import ClassLabel, Dataset

from fedtune.config import DataArguments
from fedtune.data.origin import Faults, bad_rows
from fedtune.data.text import say_once
from fedtune.errors import DataError, private

__all__ = [
    "find_label_column",
    "names_of",
    "quoted",
    "read_column",
    "refuse_cells",
    "require_column",
    "require_text",
    "shown_names",
]

LABEL_COLUMNS = ("label", "labels", "sentiment", "category")
KINDS: dict[type, str] = {list: "a list", dict: "an object", bytes: "bytes"}

Fault = Callable[[Any], str | None]  # what is wrong with a cell, if anything


def quoted(columns: Sequence[str]) -> str:
    """Names as the user may have to write them, spaces seen: `'text', ' label'`."""
    return ", ".join(map(repr, columns))


def require_column(columns: Sequence[str], name: str, flag: str, or_else: str = "") -> str:
    """`name`, or a DataError with `flag`, what there is, the nearest name or other ways."""
    if name in columns:
        return name
    near = difflib.get_close_matches(name, columns, n=1)
    fix = (
        f"did you mean {flag} {private(near[0])}?"
        if near
        else f"set {flag} to one of these columns{or_else}."
    )
    raise DataError(
        f"{flag}: expected a column of the data ({private(quoted(columns))}), received {name!r}. "
        f"Fix: {fix}"
    )


def find_label_column(columns: Sequence[str], data: DataArguments) -> str | None:
    """`--label_column`, else the first of label, labels, sentiment, category; else None."""
    if data.label_column is not None:
        return require_column(columns, data.label_column, "--label_column")
    return next((name for name in LABEL_COLUMNS if name in columns), None)


def read_column(rows: Dataset, name: str) -> list[Any]:
    """All cells of a column.

    Raises:
        DataError: a cell is null.
    """
    refuse_cells(rows, name, "a value in every row", _null)
    return list(rows[name])


def require_text(
    rows: Dataset, name: str, *, blank_allowed: bool = False, null_allowed: bool = False
) -> list[str]:
    """All cells of a text column; with `null_allowed`, null is the empty string.

    A number, a date, true or false is taken as its text, which is counted and logged.

    Raises:
        DataError: a cell is null, a list or an object, or (unless allowed) blank.
    """

    def fault(cell: Any) -> str | None:
        if _null(cell):
            return None if null_allowed else "null"
        if type(cell) in KINDS:
            return KINDS[type(cell)]
        return None if blank_allowed or as_text(cell).strip() else "an empty cell"

    refuse_cells(rows, name, "text", fault)
    cells = list(rows[name])
    if any(_no_text(cell) for cell in cells):
        _say_what_is_no_text(rows, name)
    return [as_text(cell) for cell in cells]


def names_of(rows: Dataset, name: str) -> list[str]:
    """Cells of a label-like column as names; ClassLabel numbers become their class names.

    Raises:
        DataError: a cell is null, a fraction, or a list or object.
    """

    def fault(cell: Any) -> str | None:
        if isinstance(cell, float) and cell.is_integer():
            return None
        fraction = f"the fraction {private(cell)}" if isinstance(cell, float) else None
        return _null(cell) or fraction or KINDS.get(type(cell))

    refuse_cells(rows, name, "names or whole numbers", fault)
    return shown_names(rows, name)


def shown_names(rows: Dataset, name: str) -> list[str]:
    """Cells of any column as text for a table; ClassLabel numbers become their class names."""
    feature = rows.features[name]
    known = list(feature.names) if isinstance(feature, ClassLabel) and feature.names else []
    return [
        str(known[cell]) if known and cell is not None and cell >= 0 else _name(cell)
        for cell in rows[name]
    ]


def refuse_cells(rows: Dataset, name: str, expected: str, fault: Fault) -> None:
    """Raise a DataError that names the first row whose cell has a fault, and counts the others."""

    def check(some: Dataset) -> Faults:
        found = ((i, fault(cell)) for i, cell in enumerate(some[name]))
        return [(i, what) for i, what in found if what is not None]

    bad = bad_rows(rows, check)
    if bad is not None:
        raise DataError(
            f"column `{name}`: expected {expected}, received {bad.received} in {bad.where}. "
            "Fix: correct or remove what is named, or name another column."
        )


def as_text(cell: Any) -> str:
    """Text of a cell as JSON would write it; null is the empty string."""
    if isinstance(cell, str):
        return cell
    if _null(cell):
        return ""
    return str(cell).lower() if isinstance(cell, bool) else str(cell)


def _say_what_is_no_text(rows: Dataset, name: str) -> None:
    def check(some: Dataset) -> Faults:
        return [(i, as_text(cell)) for i, cell in enumerate(some[name]) if _no_text(cell)]

    found = bad_rows(rows, check)
    if found is not None:
        say_once(
            f"column `{name}`: {found.total:,} cell{'s' if found.total > 1 else ''} of numbers, "
            f"dates, true or false taken as text, the first as {found.received!r} in {found.first}."
        )


def _no_text(cell: Any) -> bool:
    return not isinstance(cell, str) and not _null(cell)


def _null(cell: Any) -> str | None:
    return "null" if cell is None or cell != cell else None  # NaN differs from itself


def _name(cell: Any) -> str:
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)
