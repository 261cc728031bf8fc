"""The page of a run of several strategies: one table, one figure, and where each report lies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedtune.files import write_text
from fedtune.report import figures
from fedtune.report.blocks import Cell, Figure, Section, Table, cells
from fedtune.report.curves import compare_curves
from fedtune.report.page import both, render
from fedtune.report.render_runs import rows_of_words
from fedtune.report.side_by_side import run_rows
from fedtune.report.svg import Shape
from fedtune.report.unlike import Note
from fedtune.results.summary import Ending, Summary

__all__ = ["write_comparison_page"]

NOTE = (
    "Final loss with its standard deviation over seeds; the difference to the first is paired by "
    "seed, with its 95 % interval. Each strategy has a report of its own in "
    "strategies/NAME/report.html."
)


def write_comparison_page(
    directory: Path, summaries: Sequence[Summary], notes: Sequence[Note], ending: Ending
) -> None:
    """Write `directory/report.html` of a run of several strategies that ended so."""
    page = render(
        "comparison.html",
        directory,
        count=len(summaries),
        concerns=[*filter(None, [ending.reason]), *(note.words for note in notes)],
        figure=_figure(summaries),
        section=_section(summaries) if summaries else None,
    )
    write_text(directory / "report.html", page)


def _figure(summaries: Sequence[Summary]) -> Figure | None:
    curves = compare_curves(summaries)
    chart = both(
        curves,
        wide=Shape(1070, 430, right=300),
        narrow=Shape(360, 300, right=12, left=40),
        x_title="samples seen, all clients together",
        y_text=figures.loss,
        title="Held-out loss against samples seen",
    )
    caption = "Federated arm; bands span the seeds."
    return Figure("Held-out loss", caption, chart, curves) if chart else None


def _section(summaries: Sequence[Summary]) -> Section:
    (first, *heads), *lines = rows_of_words(run_rows(summaries))
    rows = [[Cell(line[0], "name"), *cells(line[1:])] for line in lines]
    return Section("Strategies", NOTE, [Table([first, *(f"#{head}" for head in heads)], rows)])
