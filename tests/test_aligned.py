"""Columns of plain text."""

from __future__ import annotations

from fedtune.aligned import aligned, padded

ROWS = [("run", "loss", "note"), ("a-long-name", "2.5", ""), ("b", "10.25", "late")]


def test_figures_stand_at_the_right_and_no_line_ends_in_blanks() -> None:
    assert aligned(ROWS, right=(1,)) == [
        "run           loss  note",
        "a-long-name    2.5",
        "b            10.25  late",
    ]


def test_the_rule_is_as_wide_as_the_widest_line() -> None:
    head, rule, *body = aligned(ROWS, right=(), rule=True)
    assert rule == "-" * max(map(len, (head, *body)))


def test_all_cells_of_a_column_are_equally_long() -> None:
    columns = zip(*padded(ROWS, right=(1,)), strict=True)
    assert [{len(cell) for cell in column} for column in columns] == [{11}, {5}, {4}]
