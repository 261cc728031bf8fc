"""A deployment whose processes can be found and killed one by one."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fedtune.processes.supervisor import free_port
from tests.conftest import REPOSITORY

MARK = "FEDTUNE_TEST_DEPLOYMENT"  # in the environment of all its processes


@dataclass(frozen=True)
class Step:
    """One line of a site's step log."""

    pid: int
    step: int
    rate: str
    digest: str


class Program:
    """A `fedtune` command in the background; what it prints is in a file."""

    def __init__(self, name: str, words: Sequence[Any], output: Path, env: dict[str, str]) -> None:
        self.name, self.output = name, output
        self.began = time.monotonic()
        with output.open("w") as handle:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fedtune.cli", *map(str, words)],
                cwd=REPOSITORY,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=handle,
                stderr=subprocess.STDOUT,
            )

    @property
    def printed(self) -> str:
        return self.output.read_text()

    def family(self) -> list[psutil.Process]:
        """Its descendants."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def sees(self, text: str, within_s: float = 90.0) -> float:
        """Wait until it has printed `text`; returns the seconds that took."""
        started = time.monotonic()
        while text not in self.printed:
            assert self.process.poll() is None, f"{self.name} has ended:\n{self.printed}"
            assert time.monotonic() - started < within_s, f"no {text!r}:\n{self.printed}"
            time.sleep(0.05)
        return time.monotonic() - started

    def wait(self, within_s: float = 180.0) -> int:
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} goes on:\n{self.printed}") from None

    def end(self, number: int = signal.SIGTERM) -> int:
        """Signal it and wait for its status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait(60)


class Deployment:
    """`fedtune up`, `join` and `submit` on loopback, under one directory.

    Args:
        temporary: for the sites' sockets, whose paths must be short.
    """

    def __init__(self, directory: Path, temporary: Path, *, tls: bool) -> None:
        self.directory, self.tls = directory, tls
        self.address = f"127.0.0.1:{free_port()}"
        self.token = secrets.token_hex(8)
        self.programs: list[Program] = []
        self.env = {
            **os.environ,
            MARK: self.token,
            "TMPDIR": str(temporary),
            "FLWR_HOME": str(directory / "flower-home"),
        }
        directory.mkdir(parents=True, exist_ok=True)
        if tls:
            certs = self.start("certs", "certs", directory / "certs", "--sites", "a,b")
            assert certs.wait(60) == 0, certs.printed

    def start(self, name: str, *words: Any) -> Program:
        number = sum(program.name == name for program in self.programs)
        output = self.directory / f"{name}-{number}.txt"
        program = Program(name, words, output, self.env)
        self.programs.append(program)
        return program

    def up(self) -> Program:
        """Start a SuperLink and wait until it listens."""
        flags = ["--port", self.address.rpartition(":")[2]]
        flags += ["--output_dir", self.directory / "superlink", *self._tls("server")]
        program = self.start("up", "up", *flags)
        program.sees("Ctrl-C stops it.")
        return program

    def join(self, name: str, *script: Any, flags: Sequence[Any] = ()) -> Program:
        """Start a site."""
        site = self.directory / name
        site.mkdir(exist_ok=True)
        words = ["--superlink", self.address, "--name", name, *self._tls(name)]
        words += ["--output_dir", site / "logs", *flags, "--"]
        words += [sys.executable, "-m", "tests.deployment.slow_script", site]
        words += ["--rows", 1 + ord(name) - ord("a"), *script]
        return self.start(name, "join", *words)

    def submit(self, output: str, *flags: Any, name: str = "submit") -> Program:
        """Start a run."""
        words = ["--superlink", self.address, *self._tls("submit")]
        words += ["--output_dir", self.directory / output, *flags]
        return self.start(name, "submit", *words)

    def steps(self, site: str) -> list[Step]:
        """What a site's script has written so far."""
        file = self.directory / site / "steps.log"
        rows = file.read_text().split("\n")[:-1] if file.exists() else []
        return [Step(int(a), int(b), c, d) for a, b, c, d in map(str.split, rows)]

    def reaches(self, site: str, step: int, within_s: float = 180.0) -> None:
        """Wait until the site is in `step` of the run."""
        self.until(lambda: any(row.step >= step for row in self.steps(site)), within_s)

    def until(self, true: Callable[[], Any], within_s: float = 180.0) -> float:
        """Wait; returns the seconds that took."""
        started = time.monotonic()
        while not true():
            if time.monotonic() - started > within_s:
                raise AssertionError("\n".join(f"== {p.name}\n{p.printed}" for p in self.programs))
            time.sleep(0.05)
        return time.monotonic() - started

    def processes(self) -> list[psutil.Process]:
        """All that live and carry the mark of this deployment."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                mine = process.environ().get(MARK) == self.token
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def close(self) -> list[psutil.Process]:
        """End everything; returns what was left by programs that were asked to end."""
        for program in reversed(self.programs):
            if program.process.poll() is None:
                program.process.terminate()
        for program in self.programs:
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.process.wait(40)
        deadline = time.monotonic() + 5
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        return left

    def _tls(self, role: str) -> list[Any]:
        return ["--tls", self.directory / "certs" / role] if self.tls else []


@contextlib.contextmanager
def placed(prefix: str, *, tls: bool) -> Iterator[Deployment]:
    """A deployment in temporary directories of its own; whoever asks for it closes it."""
    with (
        tempfile.TemporaryDirectory(prefix=prefix) as directory,
        tempfile.TemporaryDirectory(prefix="ft-") as temporary,
    ):
        yield Deployment(Path(directory), Path(temporary), tls=tls)


def kill(process: psutil.Process) -> float:
    """SIGKILL; returns when."""
    process.kill()
    return time.monotonic()


def one(processes: Sequence[psutil.Process], *words: str) -> psutil.Process:
    """The process whose command line has all `words`, its forks aside."""
    found = [process for process in processes if _says(process, words)]
    outer = [process for process in found if process.ppid() not in {p.pid for p in found}]
    assert len(outer) == 1, [(p.pid, p.cmdline()) for p in processes]
    return outer[0]


def trainer(site: Program) -> psutil.Process:
    """The site's script."""
    return one(site.family(), "tests.deployment.slow_script")


def supernode(site: Program) -> psutil.Process:
    """The site's node."""
    return one(site.family(), "fedtune.deploy.node")


def clientapp(site: Program) -> psutil.Process:
    """The process that handles the site's message: a fork of the node's fork."""
    (executor,) = supernode(site).children()
    (fork,) = executor.children()
    return fork


def superlink(up: Program) -> psutil.Process:
    """Flower's server."""
    return one(up.family(), "fedtune.deploy.gate")


def serverapp(up: Program) -> psutil.Process:
    """The process of the run at the server."""
    return one(up.family(), "flwr-serverapp")


def _says(process: psutil.Process, words: Sequence[str]) -> bool:
    try:
        line = " ".join(process.cmdline())
        return process.status() != psutil.STATUS_ZOMBIE and all(word in line for word in words)
    except psutil.Error:
        return False
