"""Columns found by name, and cells that must hold something."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from datasets import ClassLabel, Dataset

from fedtune.config import DataArguments
from fedtune.errors import DataError

__all__ = [
    "find_label_column",
    "names_of",
    "read_column",
    "require_column",
    "require_text",
    "shown_names",
]

LABEL_COLUMNS = ("label", "labels", "sentiment", "category")


def require_column(columns: Sequence[str], name: str, flag: str, or_else: str = "") -> str:
    """`name`, or a DataError with `flag`, what there is, the nearest name or other ways."""
    if name in columns:
        return name
    near = difflib.get_close_matches(name, columns, n=1)
    fix = (
        f"did you mean {flag} {near[0]}?"
        if near
        else f"set {flag} to one of these columns{or_else}."
    )
    raise DataError(
        f"{flag}: expected a column of the data ({', '.join(columns)}), received {name!r}. "
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
    cells = list(rows[name])
    if None in cells:
        raise _bad_cell(name, "a value in every row", "none", cells.index(None))
    return cells


def require_text(
    rows: Dataset, name: str, *, blank_allowed: bool = False, null_allowed: bool = False
) -> list[str]:
    """All cells of a text column; with `null_allowed`, null is the empty string.

    Raises:
        DataError: a cell is null, no text, or (unless allowed) blank.
    """
    cells = [cell or "" for cell in rows[name]] if null_allowed else read_column(rows, name)
    for i, cell in enumerate(cells):
        if not isinstance(cell, str):
            raise _bad_cell(name, "text", type(cell).__name__, i)
        if not (blank_allowed or cell.strip()):
            raise _bad_cell(name, "text", "an empty cell", i)
    return cells


def names_of(rows: Dataset, name: str) -> list[str]:
    """Cells of a label-like column as names; ClassLabel numbers become their class names.

    Raises:
        DataError: a cell is null, a fraction, or a list or object.
    """
    for i, cell in enumerate(read_column(rows, name)):
        if isinstance(cell, (list, dict, float)):
            raise _bad_cell(name, "names or whole numbers", type(cell).__name__, i)
    return shown_names(rows, name)


def shown_names(rows: Dataset, name: str) -> list[str]:
    """Cells of any column as text for a table; ClassLabel numbers become their class names."""
    feature = rows.features[name]
    known = list(feature.names) if isinstance(feature, ClassLabel) and feature.names else []
    return [
        str(known[cell]) if known and cell is not None and cell >= 0 else str(cell)
        for cell in rows[name]
    ]


def _bad_cell(name: str, expected: str, received: str, row: int) -> DataError:
    return DataError(
        f"column `{name}`: expected {expected}, received {received} in row {row} (rows count "
        "from 0). Fix: correct or remove that row, or name another column."
    )
