"""Progress of long work: a bar on a terminal, a few plain lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

__all__ = ["Progress"]

LINE_SHARE = 0.1  # a log gets a line after this share of the work
LINE_SECONDS = 30.0  # or after this long, when the work is slow


class Progress:
    """Counts `total` units of work on stderr.

    with Progress(10, "rounds") as progress:
        progress.advance(1, loss=2.451)
    """

    def __init__(
        self,
        total: int,
        label: str,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total = max(0, total)
        self.label = label
        self.done = 0
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._started = clock()
        self._line_done, self._line_time = 0, self._started
        self._facts = ""
        self._bar: tuple[Bar, TaskID] | None = None

    def __enter__(self) -> Self:
        self._started = self._line_time = self._clock()
        if self._stream.isatty():
            self._bar = _open_bar(self._stream, self.label, self.total)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None
        elif self._line_done != self.done:
            self._line()

    def advance(self, n: int = 1, **facts: object) -> None:
        """Count `n` more units; `facts` are shown until the next ones."""
        self.done += n
        if facts:
            self._facts = "  ".join(f"{key}={_short(value)}" for key, value in facts.items())
        if self._bar is not None:
            self._bar[0].update(self._bar[1], advance=n, facts=self._facts)
        elif self._due():
            self._line()

    def _due(self) -> bool:
        enough = self.done - self._line_done >= LINE_SHARE * self.total
        late = self._clock() - self._line_time >= LINE_SECONDS
        return enough or late or self.done >= self.total > self._line_done

    def _line(self) -> None:
        now = self._clock()
        share = 100 * self.done // self.total if self.total else 100
        width = len(str(self.total))
        words = [
            f"{self.label}: {self.done:>{width}}/{self.total} ({share} %)",
            f"{now - self._started:.1f} s",
            self._facts,
        ]
        print("  ".join(word for word in words if word), file=self._stream, flush=True)
        self._line_done, self._line_time = self.done, now


def _open_bar(stream: TextIO, label: str, total: int) -> tuple[Bar, TaskID] | None:
    """A running bar; None when another one holds the terminal, which then gets plain lines."""
    from rich.console import Console
    from rich.errors import LiveError
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[facts]}", style="dim", markup=False),
        console=Console(file=stream),
    )
    task = bar.add_task(label, total=total, facts="")
    try:
        bar.start()
    except LiveError:
        return None
    return bar, task


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
