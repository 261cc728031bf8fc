"""The table of several runs as text, markdown, csv, LaTeX or JSON."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from fedtune.aligned import aligned, padded
from fedtune.report import figures
from fedtune.report.intervals import Interval
from fedtune.report.side_by_side import RunRow
from fedtune.report.unlike import Note
from fedtune.results.round_record import WireBytes

__all__ = ["FORMATS", "records", "render_runs", "rows_of_words"]

MOST_SETTINGS = 4  # columns of a table that is read; csv and json have all
LONGEST = 24  # characters of a setting in it
PLUS_MINUS = "\N{PLUS-MINUS SIGN}"


def render_runs(rows: Sequence[RunRow], notes: Sequence[Note], style: str) -> str:
    """The rows in one of `FORMATS`; csv has no place for notes."""
    return FORMATS[style](rows, notes)


def _plain(rows: Sequence[RunRow], notes: Sequence[Note]) -> str:
    table = rows_of_words(rows)
    lines = aligned(table, range(1, len(table[0])), rule=True)
    return "\n".join([*lines, *_under(notes)])


def _markdown(rows: Sequence[RunRow], notes: Sequence[Note]) -> str:
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows_of_words(rows)]
    rule = ["---", *["--:"] * (len(head) - 1)]
    lines = padded([head, rule, *body], range(1, len(head)))
    lines[1] = [cell.replace(" ", "-") for cell in lines[1]]
    table = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([*table, *(["", *_under(notes, "- ")] if notes else [])])


def _latex(rows: Sequence[RunRow], notes: Sequence[Note]) -> str:
    head, *body = [[_escaped(cell) for cell in row] for row in rows_of_words(rows)]
    lines = [
        *(f"% {_one_line(note.words)}" for note in notes),
        f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        "\\hline",
        f"{' & '.join(head)} \\\\",
        "\\hline",
        *(f"{' & '.join(row)} \\\\" for row in body),
        "\\hline",
        "\\end{tabular}",
    ]
    return "\n".join(lines)


def _csv(rows: Sequence[RunRow], notes: Sequence[Note]) -> str:
    out = io.StringIO()
    found = records(rows)
    settings = list(dict.fromkeys(name for row in rows for name in row.settings))
    columns = [*(key for key in found[0] if key not in ("settings", "final_losses"))]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*columns, *(f"setting_{name}" for name in settings)])
    for row, record in zip(rows, found, strict=True):
        values = [" ".join(v) if isinstance(v := record[key], list) else v for key in columns]
        writer.writerow([*values, *(row.settings.get(name, "") for name in settings)])
    return out.getvalue().rstrip("\n")


def _json(rows: Sequence[RunRow], notes: Sequence[Note]) -> str:
    told = [note._asdict() for note in notes]
    return json.dumps({"runs": records(rows), "notes": told}, indent=1)


FORMATS: dict[str, Callable[[Sequence[RunRow], Sequence[Note]], str]] = {
    "table": _plain,
    "markdown": _markdown,
    "csv": _csv,
    "latex": _latex,
    "json": _json,
}


def records(rows: Sequence[RunRow]) -> list[dict[str, Any]]:
    """The rows as JSON values, every figure in full; these names stay."""
    return [_record(row) for row in rows]


def _record(row: RunRow) -> dict[str, Any]:
    return {
        "run": row.run,
        "directory": str(row.directory),
        "strategy": row.strategy,
        "status": row.status,
        "reason": row.reason,
        "seeds": list(row.seeds),
        "rounds": row.rounds,
        "samples": row.samples,
        "base_loss": row.base_loss,
        "initial_loss": row.first_loss,
        "final_loss": row.final_loss,
        "final_loss_std": _std(row.final_losses),
        "final_losses": list(row.final_losses),
        "best_loss": row.best_loss,
        "best_round": row.best_round,
        **_interval("difference", row.difference),
        **_interval("difference_pct", row.difference_pct),
        "difference_seeds": row.difference.seeds if row.difference else None,
        "mb_up": _mb(row.bytes_up),
        "mb_down": _mb(row.bytes_down),
        "seconds": row.seconds,
        "settings": dict(row.settings),
    }


def _interval(name: str, found: Interval | None) -> dict[str, float | None]:
    mean, low, high = found[:3] if found else (None, None, None)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def _mb(value: float | None) -> float | None:
    return None if value is None else value / 1e6


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def rows_of_words(rows: Sequence[RunRow]) -> list[list[str]]:
    """Head and rows as people read them; columns that say nothing are left out."""
    names = list(dict.fromkeys(name for row in rows for name in row.settings))[:MOST_SETTINGS]
    head = ["run", "strategy", *names, "rounds", "status", "final loss", "best (round)"]
    lines = [
        [
            row.run,
            row.strategy or figures.DASH,
            *(_short(row.settings.get(name, "")) for name in names),
            str(row.rounds),
            row.status,
            _loss(row),
            _best(row),
            *([_difference(row)] if len(rows) > 1 else []),
            figures.megabytes(WireBytes(row.bytes_up, row.bytes_down).sent),
            figures.seconds(row.seconds),
        ]
        for row in rows
    ]
    head += [f"vs {rows[0].run} %"] if len(rows) > 1 else []
    head += ["MB", "s"]
    alike = {"rounds": len({row.rounds for row in rows}) < 2}
    alike["status"] = {row.status for row in rows} == {"completed"}
    kept = [index for index, name in enumerate(head) if not alike.get(name)]
    return [[line[index] for index in kept] for line in (head, *lines)]


def _loss(row: RunRow) -> str:
    """`2.451`, over several seeds `2.451 ± 0.012`."""
    std = _std(row.final_losses)
    return figures.loss(row.final_loss) + (f" {PLUS_MINUS} {std:.3f}" if std is not None else "")


def _best(row: RunRow) -> str:
    return (
        figures.DASH
        if row.best_loss is None
        else f"{figures.loss(row.best_loss)} ({row.best_round})"
    )


def _difference(row: RunRow) -> str:
    """`+1.30 [-0.20, +2.80]` percent, `+1.30 (1 seed)`; a dash for the run itself."""
    found = row.difference_pct
    if found is None:
        return figures.DASH
    if found.low is None or found.high is None:
        return f"{found.mean:+.2f} (1 seed)"
    return f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def _short(value: str) -> str:
    one = _one_line(value) or figures.DASH
    return one if len(one) <= LONGEST else f"{one[: LONGEST - 3]}..."


def _one_line(words: str) -> str:
    return " ".join(words.split())


def _under(notes: Sequence[Note], bullet: str = "") -> list[str]:
    return [f"{bullet}{'warning: ' if note.serious else ''}{note.words}" for note in notes]


SPECIAL = {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    PLUS_MINUS: "$\\pm$",
    figures.DASH: "--",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    **{char: f"\\{char}" for char in "&%$#_{}"},
}


def _escaped(words: str) -> str:
    return "".join(SPECIAL.get(char, char) for char in words)
