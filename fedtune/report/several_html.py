"""The page of a run of several strategies: one table, one figure, and where each report lies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedtune.report import text
from fedtune.report.curves import compare_curves
from fedtune.report.formats import cells
from fedtune.report.html import both, concerns_list, page, write_page
from fedtune.report.markup import cell, section, table
from fedtune.report.side_by_side import run_rows
from fedtune.report.svg import Shape, esc
from fedtune.report.unlike import Note
from fedtune.results.summary import Ending, Summary

__all__ = ["write_comparison_page"]


def write_comparison_page(
    directory: Path, summaries: Sequence[Summary], notes: Sequence[Note], ending: Ending
) -> Path:
    """Write `directory/report.html` of a run of several strategies that ended so."""
    name = esc(directory.resolve().name)
    count = f"{len(summaries)} strateg{'y' if len(summaries) == 1 else 'ies'}"
    ended = [] if ending.reason is None else [ending.reason]
    body = (
        f'<header><p class="eyebrow"><b>fedtune</b> / {name}</p>'
        f"<h1>{count} on the same rows</h1>"
        f"{concerns_list([*ended, *(note.words for note in notes)])}</header>"
        f"{_figure(summaries)}{_table(summaries)}"
    )
    return write_page(directory, page(name, body))


def _figure(summaries: Sequence[Summary]) -> str:
    curves = compare_curves(summaries)
    chart = both(
        curves,
        wide=Shape(1070, 430, right=300),
        narrow=Shape(360, 300, right=12, left=40),
        x_title="samples seen, all clients together",
        y_text=text.loss,
        title="Held-out loss against samples seen",
    )
    keys = "".join(
        f'<li class="t-{curve.tone}"><span class="key"></span>{esc(curve.label)} '
        f"<b>{curve.end(text.loss)}</b></li>"
        for curve in curves
    )
    if not chart:
        return ""
    return (
        "<section><figure><h2>Held-out loss</h2><figcaption>Federated arm; bands span the seeds."
        f'</figcaption><ul class="legend">{keys}</ul>{chart}</figure></section>'
    )


def _table(summaries: Sequence[Summary]) -> str:
    if not summaries:
        return ""
    head, *lines = cells(run_rows(summaries))
    rows = [[cell(line[0], "name"), *(cell(value, "n") for value in line[1:])] for line in lines]
    note = (
        "Final loss with its standard deviation over seeds; the difference to the first is paired "
        "by seed, with its 95 % interval. Each strategy has a report of its own in "
        "strategies/NAME/report.html."
    )
    return section("Strategies", note, table([head[0], *(f"#{name}" for name in head[1:])], rows))
