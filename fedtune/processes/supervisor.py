"""Start named processes with their logs in files, watch them, and leave none behind."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

import psutil

from fedtune.errors import ConfigError, DeployError
from fedtune.failures import signal_name
from fedtune.processes import parent
from fedtune.processes.family import GIVE_UP_S, MARK, POLL_S, family, start_sweeper, subreaper
from fedtune.processes.signals import STOPPING, stoppable

__all__ = ["Part", "Supervisor", "free_port"]

SAY_S = 30.0
TAIL_LINES, TAIL_BYTES = 5, 65536
COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass(frozen=True)
class Part:
    """One started process.

    Attributes:
        log: what it and its descendants print.
        log_start: where in `log` this start begins, in bytes.
        mark: its entry in the environment of all its descendants.
    """

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int
    mark: str

    @property
    def pid(self) -> int:
        """Process id, group id and session id."""
        return self.process.pid

    @property
    def status(self) -> int | None:
        """Exit status (negative: the signal that ended it), or None while it runs."""
        return self.process.poll()

    def lines(self) -> list[str]:
        """The end of this start's log, without colours."""
        try:
            with self.log.open("rb") as handle:
                end = handle.seek(0, os.SEEK_END)
                handle.seek(max(self.log_start, end - TAIL_BYTES))
                return COLOURS.sub("", handle.read().decode("utf-8", "replace")).splitlines()
        except OSError:  # somebody cleaned up
            return []

    @property
    def how(self) -> str:
        """`name: killed by SIGKILL`, `name: ended, status 3`."""
        status = self.status or 0
        end = f"killed by {signal_name(-status)}" if status < 0 else f"ended, status {status}"
        return f"{self.name}: {end}"

    def tail(self) -> str:
        """The last lines of this start's log, on one line."""
        lines = [" ".join(line.split()) for line in self.lines() if line.strip(" \t^~")]
        return " | ".join(lines[-TAIL_LINES:])

    def ended(self) -> DeployError:
        """Why it is no longer there, with the end of its log."""
        return DeployError(f"{self.how}. {self.last_words()}")

    def last_words(self) -> str:
        """Where its log is and how it ends."""
        return f"End of {self.log}: {self.tail() or '(empty)'}"


class Supervisor:
    """Owns the processes of a deployment; on leaving the block none of them is left.

    with Supervisor(Path("logs")) as parts:
        server = parts.start("server", ["server", "--port", "8000"])
        parts.wait_ready(server, answers)
        parts.watch()

    SIGTERM and SIGHUP leave the block as `Stopped`, Ctrl-C as KeyboardInterrupt (in the main
    thread; a handler that is there already is kept).

    Args:
        directory: of the log files, `<part>.log`, appended to.
        env: environment of all parts; default: this process's own.
        grace_s: from SIGTERM to SIGKILL.
    """

    def __init__(
        self, directory: Path, *, env: Mapping[str, str] | None = None, grace_s: float = 5.0
    ) -> None:
        self.directory = directory
        self.env = dict(os.environ if env is None else env)
        self.grace_s = grace_s
        self.parts: list[Part] = []
        self._token = secrets.token_hex(8)
        self._signals = contextlib.ExitStack()
        self._was_subreaper = False
        self._sweeper: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{self.directory}: cannot be made: {error.strerror}. Choose another directory."
            ) from None
        self._was_subreaper = subreaper(True)
        self._sweeper = start_sweeper(self._token)
        self._signals.enter_context(stoppable())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with _deaf():
            self._end(self.parts)
            self.parts = []
            if self._sweeper is not None:
                self._sweeper.kill()
                self._sweeper.wait()
        subreaper(self._was_subreaper)
        self._signals.close()

    def start(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Part:
        """Start `command` in a session of its own, without input; `env` adds to the supervisor's.

        Raises:
            ConfigError: there is no such program.
        """
        words = [os.fspath(word) for word in command]
        environment = {**self.env, **(env or {})}
        program = shutil.which(words[0], path=environment.get("PATH"))
        if program is None:
            raise ConfigError(f"{name}: there is no program {words[0]}. Install it, or set PATH.")
        mark = f"{self._token}/{secrets.token_hex(4)}"
        outer = environment.get(MARK)
        environment[MARK] = f"{outer}:{mark}" if outer else mark
        log = self.directory / f"{name}.log"
        with log.open("ab") as output:
            launcher = [sys.executable, "-I", "-S", parent.__file__, str(os.getpid())]
            process = subprocess.Popen(
                [*launcher, program, *words[1:]],
                env=environment,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            part = Part(name, process, log, output.tell(), mark)
        self.parts.append(part)
        return part

    def wait_ready(self, part: Part, ready: Callable[[], bool], *, timeout_s: float = 60.0) -> None:
        """Wait until `ready()`; says so every `SAY_S` seconds.

        Raises:
            DeployError: a part has ended, or the time is over.
        """
        began = told = time.monotonic()
        while not ready():
            self.check()
            now = time.monotonic()
            if now - told >= SAY_S:
                waited = f"{now - began:.0f} s so far, at most {timeout_s:g} s"
                print(f"waiting: {part.name} is starting ({waited})", flush=True)
                told = now
            if now - began > timeout_s:
                raise DeployError(
                    f"{part.name}: not ready after {timeout_s:g} s. {part.last_words()}"
                )
            time.sleep(POLL_S)

    def check(self) -> None:
        """Raises DeployError when a part has ended."""
        for part in self.parts:
            if part.status is not None:
                raise part.ended()

    def watch(self, poll_s: float = 0.2) -> NoReturn:
        """Wait until a part ends, which raises DeployError."""
        while True:
            self.check()
            time.sleep(poll_s)

    def stop(self, part: Part) -> None:
        """End one part and all it started."""
        self._end([part])
        self.parts.remove(part)

    def processes(self) -> list[psutil.Process]:
        """All living processes of all parts."""
        return self._family(self.parts)

    def _end(self, parts: Sequence[Part]) -> None:
        """SIGTERM to all, SIGKILL to what is left after the grace, until nothing is."""
        started = time.monotonic()
        told: set[psutil.Process] = set()
        while living := self._family(parts):
            waited = time.monotonic() - started
            if waited > self.grace_s + GIVE_UP_S:
                raise DeployError(f"processes {[p.pid for p in living]}: SIGKILL did not end them.")
            for process in living:
                with contextlib.suppress(psutil.Error):
                    if waited > self.grace_s:
                        process.kill()
                    elif process not in told:
                        process.terminate()
            told.update(living)
            time.sleep(POLL_S)
        for part in parts:
            part.process.wait()
        for process in told:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)  # an orphan that this process adopted

    def _family(self, parts: Sequence[Part]) -> list[psutil.Process]:
        for part in parts:
            part.process.poll()
        return family({part.mark for part in parts}, {part.pid for part in parts})


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """A second Ctrl-C must not interrupt the reaping, which has limits of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers: Iterable[signal.Signals] = (signal.SIGINT, *STOPPING)
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # one that was not set from Python cannot be put back
                signal.signal(number, handler)
