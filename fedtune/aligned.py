"""Columns of a table in plain text."""

from __future__ import annotations

from collections.abc import Collection, Sequence

__all__ = ["aligned", "padded"]

GAP = "  "


def aligned(
    rows: Sequence[Sequence[str]], right: Collection[int], *, rule: bool = False
) -> list[str]:
    """One line per row, each column as wide as its longest cell, without blanks at its end.

    Args:
        rows: head first, all of equal length.
        right: columns whose cells are at the right edge.
        rule: put a rule as wide as the table under the head.
    """
    lines = [GAP.join(row).rstrip() for row in padded(rows, right)]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]] if rule else lines


def padded(rows: Sequence[Sequence[str]], right: Collection[int]) -> list[list[str]]:
    """The cells, each as long as the longest in its column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        [
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
