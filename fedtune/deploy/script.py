"""The site's own training script during one run: started, followed, started again when killed."""

from __future__ import annotations

import codecs
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from fedtune.errors import SiteError
from fedtune.failures import Failure, printed_failure
from fedtune.files import append_line
from fedtune.processes.supervisor import COLOURS, Part, Supervisor
from fedtune.relay.folder import ENVIRONMENT, Over, RunFolder, SitePlan

__all__ = ["LogLines", "Script", "without_bars"]

SETTLE_S = 1.0  # after the script's end: for the relay to note that the run is over
TRAINER = "trainer"  # its log is trainer.log
BAR = re.compile(r"^\s*([^|\[]{1,80}: +)?\d+%\|[^|]*\|[^|\[]*\[[^\]]*\]")  # of tqdm

Say = Callable[[str], None]


class Script:
    """One run at a site. Call `step` often, from the thread that made this.

    Attributes:
        run: Flower's id of the run.
        finished: whether the trainer has confirmed the end of the run.

    Args:
        command: the script and its arguments.
        max_restarts: how often it may be started again in this run.
        say: tells people what happens.
        show: gets each line that the script prints.
    """

    def __init__(
        self,
        parts: Supervisor,
        command: Sequence[str],
        folder: RunFolder,
        *,
        max_restarts: int,
        say: Say,
        show: Say,
    ) -> None:
        self._parts, self._command, self._folder = parts, command, folder
        self._max_restarts, self._say, self._show = max_restarts, say, show
        self._restarts = 0
        self._round, self.finished = 0, False
        self._ended_at: float | None = None
        self.run = folder.path.name
        plan = folder.plan
        if plan is None:
            raise SiteError(f"run {self.run}: has no plan. Send query.plan first.")
        self._num_rounds = plan.num_rounds
        say(f"run {self.run} begins: {_budget(plan)}; log: {parts.directory / TRAINER}.log")
        self._part, self._lines = self._start()

    def step(self) -> int | None:
        """Look after the script once; its exit status when it has ended for good.

        The status is negative after a signal, and 1 for a script that ended well without a patched
        Trainer.
        """
        self._tell()
        if (over := self._folder.over) is not None and over.at_once and not self.finished:
            return self._cut_off(over)
        status = self._part.status
        if status is None or not self._settled():
            return None
        self._parts.stop(self._part)  # what it left behind
        self._tell(rest=True)
        took_part = self._folder.lock.exists()
        refusal = "" if self.finished else self._folder.refusal
        may_restart = self._restarts < self._max_restarts and not refusal
        if status and not self.finished and may_restart:
            self._restarts += 1
            count = f"{self._restarts} of {self._max_restarts}"
            self._say(f"run {self.run}: trainer restarted ({count}). {self._how(self._failure())}")
            self._ended_at = None
            self._part, self._lines = self._start()
            return None
        if status and refusal:
            reason = f"this site cannot take part: {refusal}"
            self._say(f"error: run {self.run}: {reason} Log: {self._part.log}")
        elif status:
            failure = self._failure()
            reason = "it failed after the run" if self.finished else self._gave_up()
            self._say(f"error: run {self.run}: {reason}. {self._how(failure)}")
            reason += f": {failure.outside}" if failure else ""
        elif not took_part:
            status = 1
            reason = "no patched Trainer trained: call fedtune.patch(trainer) before train()"
            self._say(f"error: run {self.run}: {reason}. {self._part.last_words()}")
        elif not self.finished:
            reason = "it ended before the run was over"
            self._say(f"run {self.run}: the script ended before the run was over, status 0")
        else:
            reason = "the run is over"
            self._say(f"run {self.run}: the script ended, status 0")
        self._folder.write_exit_status(status, reason)
        return status

    def _cut_off(self, over: Over) -> int:
        """End a script that the server's goodbye did not reach; its status."""
        self._parts.stop(self._part)
        self._tell(rest=True)
        where = f"after round {self._round}" if self._round else "before its first round here"
        self._say(f"run {self.run} over {where} ({over.reason}); the script was ended")
        self._folder.write_exit_status(1, f"the run is over: {over.reason}")
        return 1

    def abandon(self, reason: str) -> None:
        """Say that this script will answer no more; its process is left to the supervisor."""
        if self._folder.exit_status is None:
            self._folder.write_exit_status(1, reason)

    def _start(self) -> tuple[Part, LogLines]:
        environment: Mapping[str, str] = {
            ENVIRONMENT: str(self._folder.path),
            "PYTHONUNBUFFERED": os.environ.get("PYTHONUNBUFFERED", "1"),
        }
        self._folder.note_start()
        self._folder.forget_failure()
        part = self._parts.start(TRAINER, self._command, env=environment)
        return part, LogLines(part.log, part.log_start)

    def _failure(self) -> Failure | None:
        """Why it failed: as fedtune has written it down, else as the script has printed it."""
        failure = self._folder.failure
        if failure is None:
            failure = printed_failure(self._part.lines())
            if failure is not None:
                with suppress(OSError):  # the disk may be full
                    append_line(self._part.log, f"fedtune: {failure.line}")
        return failure

    def _how(self, failure: Failure | None) -> str:
        if failure is None:
            return str(self._part.ended())
        return f"{self._part.how}: {failure.text} (id {failure.id}). Log: {self._part.log}"

    def _settled(self) -> bool:
        """Whether it is known if the script ended before or after the end of the run."""
        self._ended_at = self._ended_at or time.monotonic()
        waited = time.monotonic() - self._ended_at
        return self.finished or waited >= SETTLE_S or not self._folder.lock.exists()

    def _tell(self, *, rest: bool = False) -> None:
        for line in self._lines.read(rest=rest):
            if text := without_bars(line):
                self._show(text)
        progress = self._folder.progress
        if progress.round != self._round:
            self._round = progress.round
            self._say(f"run {self.run}: round {self._round} of {self._num_rounds}")
        if progress.finished and not self.finished:
            self.finished = True
            self._say(f"run {self.run} over after round {self._round} ({progress.reason})")

    def _gave_up(self) -> str:
        if not self._restarts:
            return "the script failed and may not be restarted (--max_restarts)"
        return f"the script failed after {self._restarts} restarts"


class LogLines:
    """What is appended to a log file, line by line.

    Of a progress bar, which overwrites its line, the last state is taken.
    """

    def __init__(self, path: Path, position: int = 0) -> None:
        self._path, self._position = path, position
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending = ""

    def read(self, *, rest: bool = False) -> list[str]:
        """New lines that have ended; with `rest`, the last one even if it has not."""
        try:
            with self._path.open("rb") as handle:
                handle.seek(self._position)
                data = handle.read()
        except FileNotFoundError:  # somebody cleaned up
            data = b""
        self._position += len(data)
        *lines, pending = (self._pending + self._decoder.decode(data)).split("\n")
        self._pending = _overwritten(pending)
        if rest and self._pending:
            lines.append(self._pending)
            self._pending = ""
        return [_overwritten(line).removesuffix("\r") for line in lines]


def without_bars(line: str) -> str:
    """A line of a log without progress bars and what moves a terminal's cursor; may be empty."""
    return BAR.sub("", COLOURS.sub("", line)).rstrip()


def _overwritten(line: str) -> str:
    """What a terminal shows of a line with carriage returns; one at the end changes nothing."""
    end = "\r" if line.endswith("\r") else ""
    return line.removesuffix("\r").rpartition("\r")[2] + end


def _budget(plan: SitePlan) -> str:
    if plan.steps:
        return f"{plan.num_rounds} rounds x {plan.steps} steps"
    return f"{plan.num_rounds} rounds x {plan.epochs:g} epochs"
