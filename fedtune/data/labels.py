"""Names of the classes, and what speaks against a column of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from datasets import Dataset

from fedtune.config import DataArguments
from fedtune.data.columns import find_label_column, names_of, quoted, refuse_cells
from fedtune.data.origin import origin_of
from fedtune.data.text import say_once
from fedtune.errors import DataError, private

__all__ = ["check_held_out_labels", "find_label_names", "label_column", "labels_of"]

FEW = 20  # rows below which a label of its own in every row is no sign


def label_column(rows: Dataset, data: DataArguments) -> str:
    """The column of the labels.

    Raises:
        DataError: there is none.
    """
    column = find_label_column(rows.column_names, data)
    if column is None:
        raise DataError(
            f"columns: expected a label, received "
            f"{private(quoted(rows.column_names))}. "
            "Fix: name it with --label_column."
        )
    return column


def labels_of(rows: Dataset, data: DataArguments) -> list[str]:
    """Label of each row, as a name.

    Raises:
        DataError: no label column, or a cell that is null, blank, a fraction, a list or an object.
    """
    column = label_column(rows, data)

    def fault(cell: object) -> str | None:
        return "an empty cell" if isinstance(cell, str) and not cell.strip() else None

    refuse_cells(rows, column, "a label in every row", fault)
    return names_of(rows, column)


def find_label_names(rows: Dataset, data: DataArguments) -> list[str]:
    """Names of the classes: those of a ClassLabel, else the distinct labels, sorted.

    Warns of labels that differ by case or spaces alone, and of more labels than half the rows.

    Raises:
        DataError: no label column, an empty cell, a single label, fractions, or another label in
            every row: a head with one output would be trained as a regression.
    """
    column = label_column(rows, data)
    labels = labels_of(rows, data)
    found = set(labels)
    _check_count(column, labels)
    declared = getattr(rows.features[column], "names", None)
    if declared:
        return [str(name) for name in declared]
    _check_fractions(column, found)
    _warn_of_spelling(column, found)
    numeric = all(name.removeprefix("-").isdecimal() for name in found)
    return sorted(found, key=lambda name: (int(name) if numeric else 0, name))


def check_held_out_labels(evaluation: Dataset, data: DataArguments, names: Sequence[str]) -> None:
    """Warn where the held-out rows cannot tell a good model from a bad one.

    That is where all of them have one label, or a label that no training row has. `names` are the
    labels of the training file (`find_label_names`).
    """
    column = label_column(evaluation, data)
    labels = labels_of(evaluation, data)
    if len(set(labels)) == 1:
        say_once(
            f"column `{column}`: all {len(labels):,} held-out rows have one label, {labels[0]!r}: "
            "a model that knows nothing else scores 1.0 on them."
        )
    only = sorted(set(labels) - _trained(evaluation, data, names))
    if only:
        say_once(
            f"column `{column}`: {quoted(only)} {'is' if len(only) == 1 else 'are'} in held-out "
            "rows only: no client trains on such a row."
        )


def _trained(evaluation: Dataset, data: DataArguments, names: Sequence[str]) -> set[str]:
    """Labels of the rows that are not held out."""
    origin = origin_of(evaluation)
    whole = origin.whole()
    if len(whole) == len(evaluation):  # a file of its own
        return set(names)
    held_out = set(origin.positions)
    return {label for i, label in enumerate(labels_of(whole, data)) if i not in held_out}


def _check_count(column: str, labels: list[str]) -> None:
    found = set(labels)
    if len(found) == 1:
        raise DataError(
            f"column `{column}`: expected at least two labels, received "
            f"`{private(labels[0])}` in all {len(labels):,} rows. Fix: add rows of another "
            "label, or name another column with --label_column."
        )
    if len(labels) < FEW or 2 * len(found) <= len(labels):
        return
    what = f"{len(found):,} labels in {len(labels):,} rows"
    if len(found) == len(labels):
        raise DataError(
            f"column `{column}`: expected labels that rows share, received {what}, such as "
            f"{private(repr(labels[0]))}. Fix: name the column of the labels with --label_column."
        )
    say_once(f"column `{column}`: {what}; most labels are in one row alone. Is it the label?")


def _check_fractions(column: str, found: set[str]) -> None:
    """Text of numbers, as a csv file has them, that are points on a scale."""
    try:
        fractions = sorted(name for name in found if not float(name).is_integer())
    except (ValueError, OverflowError):
        return
    if fractions:
        raise DataError(
            f"column `{column}`: expected names or whole numbers, received the fraction "
            f"{private(fractions[0])}. Fix: name the classes, or name another column with "
            "--label_column."
        )


def _warn_of_spelling(column: str, found: set[str]) -> None:
    spelled = Counter(name.strip().casefold() for name in found)
    alike = sorted(name for name in found if spelled[name.strip().casefold()] > 1)
    if alike:
        say_once(
            f"column `{column}`: {quoted(alike)} differ by case or spaces alone; they are taken as "
            f"{len(alike)} labels."
        )
