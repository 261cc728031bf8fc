"""Flower's own SuperNode in this process, without its fixed waits; its ClientApps run in forks."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import select
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NoReturn

from flwr.clientapp import ClientApp

from fedtune._flower.executor import RING, Executor
from fedtune._flower.objects import hasten_objects
from fedtune._flower.predecessor import report_predecessor
from fedtune._flower.run_watch import RunWatch, watch_runs

__all__ = ["NodeOptions", "Patience", "run_supernode", "run_untested_supernode"]

LOOPBACK = "127.0.0.1"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NodeOptions:
    """How to reach the SuperLink, and what runs here.

    Attributes:
        superlink: `host:port`.
        root_certificates: the CA of the SuperLink, or None for no TLS.
        private_key: this node's key, or None when the SuperLink asks for none.
        folder: private directory of the site.
        port: of the Runtime API on loopback; 0 for any free one.
    """

    superlink: str
    root_certificates: Path | None
    private_key: Path | None
    folder: Path
    port: int = 0

    def arguments(self, port: int) -> list[str]:
        """As flags of `flower-supernode`."""
        flags = ["--superlink", self.superlink, "--host", LOOPBACK, "--port", str(port)]
        if self.root_certificates is None:
            flags.append("--insecure")
        else:
            flags += ["--root-certificates", str(self.root_certificates)]
        if self.private_key is not None:
            flags += ["--auth-supernode-private-key", str(self.private_key)]
        return flags


class Patience:
    """Pauses that grow with the time waited so far: late by a twentieth at most, and cheap."""

    SHARE = 0.05

    def __init__(self, shortest: float, longest: float) -> None:
        self.shortest, self.longest = shortest, longest
        self._began = time.monotonic()

    def begin(self) -> None:
        """Wait for something new."""
        self._began = time.monotonic()

    def pause(self) -> float:
        """Seconds until the next look."""
        waited = time.monotonic() - self._began
        return min(self.longest, max(self.shortest, self.SHARE * waited))


class Clock:
    """Stands in for the module `time` in Flower's SuperNode loop, which sleeps in two places.

    Without a message it sleeps 3 s: here 0.05 to 1 s. While a ClientApp works it sleeps 0.5 s
    between looks for the reply: here until the executor's bell rings. The bell rings the other way
    too, since the executor does not poll.
    """

    FLOWERS_IDLE_S = 3.0

    def __init__(self, bell: socket.socket, watch: RunWatch) -> None:
        self.executor_gone = False
        self._bell, self._watch = bell, watch
        self._idle = Patience(0.05, 1.0)
        self._reply = Patience(0.05, 1.0)
        self._was_idle = True

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        """Wait for a message, or for a reply; raises SystemExit when the executor is gone."""
        idle = seconds >= self.FLOWERS_IDLE_S
        patience = self._idle if idle else self._reply
        if idle != self._was_idle:
            patience.begin()
        self._was_idle = idle
        if not idle:
            with contextlib.suppress(OSError):  # full: it rings already; closed: see below
                self._bell.send(RING)
        self._watch.look()
        readable, _, _ = select.select([self._bell], [], [], patience.pause())
        if readable and not self._heard():
            self.executor_gone = True
            sys.exit(1)
        if readable:
            self._reply.begin()

    def _heard(self) -> bool:
        try:
            return bool(self._bell.recv(4096))
        except ConnectionError:
            return False


def run_supernode(
    options: NodeOptions,
    *,
    check: Callable[[bytes], None],
    load: Callable[[], ClientApp],
    bind: Callable[[int], None],
    watch: RunWatch,
) -> NoReturn:
    """Run until SIGTERM, SIGINT or a failure; ends the process, its executor and their forks.

    Args:
        check: raises when the bundle it is given is not the site's app.
        load: returns the site's ClientApp; called in the executor.
        bind: makes the calling process end with its parent, whose id it is given.
        watch: asks whether runs go on.
    """
    # Shared by the executor and its forks; must start no thread.
    import flwr.supernode.runtime.run_clientapp  # noqa: F401

    scratch = Path(mkdtemp(prefix="node-", dir=options.folder))
    secret = secrets.token_bytes(32)
    port = options.port or _free_port()
    here, there = socket.socketpair()
    supernode = os.getpid()
    executor = os.fork()
    if executor == 0:
        here.close()
        address = f"{LOOPBACK}:{port}"
        _execute(Executor(address, secret, there, scratch, check, load, bind), supernode)
    there.close()
    here.setblocking(False)
    status = 1
    try:
        status = _supernode(options, port, _write_secret(scratch, secret), here, executor, watch)
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else 1
    finally:
        _stop(executor)
        shutil.rmtree(scratch, ignore_errors=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # Flower's web server may still hold a thread


def run_untested_supernode(options: NodeOptions) -> NoReturn:
    """Become Flower's own `flower-supernode`, which installs and runs the app the server sends."""
    beside = Path(sys.executable).parent
    os.environ["PATH"] = f"{beside}{os.pathsep}{os.environ.get('PATH', '')}"  # for flower-superexec
    command = shutil.which("flower-supernode") or str(beside / "flower-supernode")
    port = options.port or _free_port()
    os.execv(command, [command, *options.arguments(port)])


def _execute(executor: Executor, supernode: int) -> NoReturn:
    status = 1
    try:
        os.setpgid(0, 0)  # Ctrl-C is for the SuperNode; it stops us, whole group at once
        executor.bind(supernode)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        with contextlib.suppress(Exception):  # told to the server when there is a task
            executor.load()
        executor.serve()
        status = 0
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else 1
    except BaseException:
        log.exception("executor failed")
    finally:
        sys.stderr.flush()
        os._exit(status)


def _supernode(
    options: NodeOptions,
    port: int,
    secret: Path,
    bell: socket.socket,
    executor: int,
    watch: RunWatch,
) -> int:
    """Flower's `flower-supernode --isolation process`; returns an exit status or raises it."""
    from flwr.supercore.exit import add_exit_handler
    from flwr.supercore.exit.exit_handler import trigger_exit_handlers
    from flwr.supernode import start_client_internal as loop
    from flwr.supernode.cli.flower_supernode import flower_supernode

    clock = Clock(bell, watch)
    if vars(loop)["time"] is not time:  # not the Flower this was written for
        raise AttributeError("flwr.supernode.start_client_internal.time")
    vars(loop)["time"] = clock
    hasten_objects(loop)
    report_predecessor(loop, options.folder)
    watch_runs(loop, watch)
    add_exit_handler(lambda: _stop(executor), run_before_force_exit=True)
    sys.argv = [
        "flower-supernode",
        *options.arguments(port),
        *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
    ]
    try:
        flower_supernode()
    finally:
        if clock.executor_gone:
            log.error("executor: expected it to run, it is gone. The node stops; start it again.")
            trigger_exit_handlers(run_before_force_exit=False)
    return 1


def _write_secret(folder: Path, secret: bytes) -> Path:
    file = folder / "secret"
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as handle:
        handle.write(secret)
    return file


@cache  # once: afterwards the id may be another process's
def _stop(executor: int) -> None:
    """Kill the executor and its forks; they have nothing to save."""
    for kill in (os.killpg, os.kill):  # the group may not exist yet
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(executor, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(executor, 0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
