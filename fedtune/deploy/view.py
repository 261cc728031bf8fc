"""What `fedtune status` shows, as text. Pure: everything comes in as values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap
from typing import Any

from fedtune.aligned import aligned
from fedtune.report import figures
from fedtune.results.round_record import RoundRecord
from fedtune.results.values import count, items, mapping

__all__ = ["ACTIVE", "RunState", "View", "render"]

ACTIVE = ("pending", "starting", "running")
SHOWN_RUNS, SHOWN_ROUNDS, SHOWN_NAMES = 8, 12, 12
BAR = 20
ROUND_COLUMNS = ("round", "train loss", "eval loss", "replies", "MB up", "MB down", "s")


@dataclass(frozen=True)
class RunState:
    """One run as the SuperLink knows it; `output_dir` is None when it was submitted elsewhere."""

    id: str
    status: str
    elapsed_s: float
    started: str
    details: str = ""
    output_dir: Path | None = None

    @property
    def is_active(self) -> bool:
        """Whether it has not ended."""
        return self.status in ACTIVE


@dataclass(frozen=True)
class View:
    """One look at a SuperLink.

    Attributes:
        nodes: number of nodes by state: online, offline, registered.
        runs: newest first.
        shown: the run that is told in full.
        federation: its federation.json, or empty.
        rounds: its finished rounds.
        clocks: a line for each site whose clock differs.
    """

    superlink: str
    nodes: Mapping[str, int]
    runs: Sequence[RunState]
    shown: RunState | None = None
    federation: Mapping[str, Any] = field(default_factory=dict)
    rounds: Sequence[RoundRecord] = ()
    clocks: Sequence[str] = ()


def render(view: View, *, width: int = 100) -> str:
    """The view, in lines of at most `width` characters: sentences wrapped, rows cut."""
    lines = [f"superlink {view.superlink}   {_nodes(view.nodes)}"]
    lines += [*_sentences(view.clocks[:SHOWN_NAMES], width), "", *_runs(view)]
    if view.shown is not None:
        lines += ["", *_run(view, view.shown, width)]
    return "\n".join(_cut(line, width) for line in lines)


def _nodes(nodes: Mapping[str, int]) -> str:
    known = [
        f"{nodes[name]} {name}" for name in ("online", "offline", "registered") if nodes.get(name)
    ]
    return f"sites: {', '.join(known) or 'none'}"


def _runs(view: View) -> list[str]:
    if not view.runs:
        return ["no runs yet"]
    rows = [("", "run", "state", "time", "submitted", "output")]
    for run in view.runs[:SHOWN_RUNS]:
        mark = ">" if view.shown is not None and run.id == view.shown.id else ""
        where = str(run.output_dir or figures.DASH)
        rows.append((mark, run.id, run.status, _duration(run.elapsed_s), run.started, where))
    skip = 0 if any(mark for mark, *_ in rows) else 1
    lines = aligned([row[skip:] for row in rows], right=(3 - skip,))
    hidden = len(view.runs) - SHOWN_RUNS
    return [*lines, f"  and {hidden} older"] if hidden > 0 else lines


def _run(view: View, run: RunState, width: int) -> list[str]:
    told = [f"run {run.id}: {run.status}{f' - {run.details}' if run.details else ''}"]
    if run.output_dir is None:
        told.append("its rounds can be seen by who submitted it, on the machine of the submit")
        return _sentences(told, width)
    if error := view.federation.get("error"):
        told.append(f"ended: {error}")
    elif run.is_active and (state := view.federation.get("state")):
        told.append(f"server: {state}")
    lines = [*_sentences(told, width), *_progress(view)]
    lines += _clients(view, width)
    lines += _rounds(view.rounds)
    return lines


def _progress(view: View) -> list[str]:
    total = count(view.federation.get("num_rounds"))
    done = max((record.round or 0 for record in view.rounds), default=0)
    now = count(view.federation.get("round"))
    if not total:
        return [] if view.rounds else ["no round has ended yet"]
    filled = BAR * min(done, total) // total
    line = f"[{'#' * filled}{'.' * (BAR - filled)}] {done}/{total} rounds done"
    if now and now > done and view.shown is not None and view.shown.is_active:
        line += f", in round {now}"
    seconds = [record.wall_s for record in view.rounds[-5:] if record.round]
    known = [value for value in seconds if value is not None]
    if known and view.shown is not None and view.shown.is_active and done < total:
        line += f", about {_duration(sum(known) / len(known) * (total - done))} to go"
    up = sum(record.traffic.up or 0 for record in view.rounds)
    down = sum(record.traffic.down or 0 for record in view.rounds)
    return [line, f"sent up {figures.megabytes(up)} MB, down {figures.megabytes(down)} MB"]


def _clients(view: View, width: int) -> list[str]:
    """Who is there, how far, and in which round the server last took an update."""
    clients = [row for row in map(mapping, items(view.federation.get("clients"))) if row]
    if not clients:
        return []
    taken = {
        reply.get("client"): record.round for record in view.rounds for reply in record.replies
    }
    rows, problems = [("client", "last update", "state")], []
    for row in clients[:SHOWN_NAMES]:
        name, number = str(row.get("client")), taken.get(row.get("client"))
        last = figures.DASH if number is None else f"round {number}"
        rows.append((name, last, str(row.get("state", figures.DASH))))
        if row.get("problem"):
            problems.append(f"{name}: {row['problem']}")
    lines = ["", *aligned(rows, right=())]
    if len(clients) > SHOWN_NAMES:
        lines.append(f"  and {len(clients) - SHOWN_NAMES} more")
    return [*lines, *_sentences(problems, width)]


def _rounds(rounds: Sequence[RoundRecord]) -> list[str]:
    if not rounds:
        return []
    scored = [(loss, row) for row in rounds if (loss := row.eval_loss) is not None]
    best = min(scored, key=lambda pair: pair[0])[1] if scored else None
    rows = [ROUND_COLUMNS]
    for row in rounds[-SHOWN_ROUNDS:]:
        refused = f" ({len(row.refused)} refused)" if row.refused else ""
        rows.append(
            (
                f"{'*' if row is best else ''}{figures.DASH if row.round is None else row.round}",
                figures.loss(row.train_loss),
                figures.loss(row.eval_loss),
                f"{len(row.replies)}{refused}" if row.round else figures.DASH,
                figures.megabytes(row.traffic.up),
                figures.megabytes(row.traffic.down),
                figures.seconds(row.wall_s),
            )
        )
    lines = ["", *aligned(rows, right=range(len(ROUND_COLUMNS)))]
    return [*lines, "* lowest eval loss"] if best is not None else lines


def _duration(seconds: float) -> str:
    """`42 s`, `3:07`, `2:03:07`."""
    whole = int(max(0.0, seconds))
    minutes, rest = divmod(whole, 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _sentences(lines: Sequence[str], width: int) -> list[str]:
    """Whole: a reason often stands at the end, and what to do after it."""
    return [
        part for line in lines for part in wrap(_printable(line), width, subsequent_indent="  ")
    ]


def _cut(line: str, width: int) -> str:
    line = _printable(line)
    return line if len(line) <= width else line[: width - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _printable(line: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in line)
