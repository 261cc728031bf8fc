"""In place of `flower-superexec`: one process that has imported everything and forks per message.

It sleeps until the SuperNode rings, so an idle site costs nothing. A fork that is killed before
it has replied is started again with the same task; after `ATTEMPTS` the server gets an error reply.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import select
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from socket import socket
from typing import Any, NoReturn

from flwr.clientapp import ClientApp

from fedtune._flower.clientapp import Task, run_task
from fedtune._flower.journal import Journal
from fedtune.errors import SiteError

__all__ = ["ATTEMPTS", "Executor"]

ATTEMPTS = 3  # processes that may die over one message
RING = b"r"
STUCK = 3  # exit status: the SuperNode has to start anew

log = logging.getLogger(__name__)


@dataclass
class _Fork:
    """A running process and its task."""

    token: str
    journal: Journal
    attempt: int
    task: int
    pid: int = 0
    end: int = -1  # readable when the process is gone


@dataclass
class Executor:
    """Acquires tasks from the SuperNode and does each in a fork.

    Attributes:
        address: of the SuperNode's Runtime API.
        secret: shared with the SuperNode; nobody else on the machine can acquire a task.
        bell: connected to the SuperNode; readable when there may be a task.
        folder: private directory for the journals.
        check: see `Task`.
        load: see `Task`.
        bind: called in every fork with this process's id, to end it with this process.
    """

    address: str
    secret: bytes
    bell: socket
    folder: Path
    check: Callable[[bytes], None]
    load: Callable[[], ClientApp]
    bind: Callable[[int], None]
    _forks: list[_Fork] = field(default_factory=list)
    _numbers: Any = field(default_factory=itertools.count)

    def serve(self) -> None:
        """Work until the SuperNode is gone. Raises SystemExit when a task can only be lost."""
        self.bell.setblocking(False)
        client = self._client()
        while True:
            readable, _, _ = select.select(
                [self.bell.fileno(), *(f.end for f in self._forks)], [], []
            )
            ended = [fork for fork in self._forks if fork.end in readable]
            for fork in ended:
                self._ended(fork)
            rung = self.bell.fileno() in readable
            if rung and not self.bell.recv(4096):
                return
            if rung or ended:
                self._acquire(client)

    def _acquire(self, client: Any) -> None:
        from flwr.proto.runtime_pb2 import AcquireTaskRequest
        from flwr.supercore.constant import TaskType

        request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        found = client.AcquireTask(request)
        if found.HasField("task") and found.token:
            task = int(found.task.task_id)
            for fork in [fork for fork in self._forks if fork.task == task]:
                self._drop(fork)  # it starts so slowly that the SuperNode has given it up
            journal = Journal(self.folder / f"task-{next(self._numbers)}")
            self._start(_Fork(found.token, journal, attempt=1, task=task))

    def _drop(self, fork: _Fork) -> None:
        """End a fork that may no longer talk, so that none runs beside its successor."""
        os.kill(fork.pid, signal.SIGKILL)
        os.close(fork.end)
        os.waitpid(fork.pid, 0)
        self._forks.remove(fork)
        fork.journal.delete()

    def _start(self, fork: _Fork) -> None:
        end, held = os.pipe()
        executor = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.close(end)
            self._run(fork, executor)
        os.close(held)
        fork.pid, fork.end = pid, end
        self._forks.append(fork)

    def _run(self, fork: _Fork, executor: int) -> NoReturn:
        """The life of a fork. `held` stays open in it; the parent sees it close."""
        status = 1
        try:
            self.bind(executor)
            run_task(
                Task(
                    address=self.address,
                    token=fork.token,
                    journal=fork.journal,
                    check=self.check,
                    load=self.load if fork.attempt <= ATTEMPTS else _give_up,
                    replied=self._ring,
                    executor=executor,
                )
            )
        except SystemExit as exit:
            status = exit.code if isinstance(exit.code, int) else 1
        except BaseException:
            log.exception("ClientApp process failed")
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _ended(self, fork: _Fork) -> None:
        os.close(fork.end)
        _, status = os.waitpid(fork.pid, 0)
        self._forks.remove(fork)
        journal = fork.journal
        if journal.has(journal.DONE) or self._answered(fork):
            journal.delete()
            return
        how = _say(status)
        if journal.has(journal.REPLYING) or fork.attempt > ATTEMPTS:
            log.error(
                "ClientApp process %d: %s; its reply is lost, the node restarts", fork.pid, how
            )
            sys.exit(STUCK)
        log.warning("ClientApp process %d: %s; another one takes over", fork.pid, how)
        self._start(_Fork(fork.token, journal, fork.attempt + 1, fork.task))

    def _answered(self, fork: _Fork) -> bool:
        """Whether the SuperNode has given the task up and told the server so."""
        import httpx
        from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest

        if not fork.journal.has(fork.journal.MESSAGE):
            return False
        client = self._client(fork.token)
        try:
            return not client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success
        except httpx.HTTPStatusError as refusal:
            return refusal.response.status_code == httpx.codes.UNAUTHORIZED
        finally:
            client.close()

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # full: it rings already; closed: nobody hears it
            self.bell.send(RING)

    def _client(self, token: str | None = None) -> Any:
        from flwr.supercore.interceptors import (
            RuntimeTokenHttpInterceptor,
            RuntimeVersionHttpInterceptor,
            SuperExecAuthHttpInterceptor,
        )
        from flwr.supercore.runtime import RuntimeHttpClient

        entitled: Any = (
            RuntimeTokenHttpInterceptor(token)
            if token
            else SuperExecAuthHttpInterceptor(
                master_secret=self.secret,
                protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"}),
            )
        )
        version = RuntimeVersionHttpInterceptor(component_name="SuperExec")
        return RuntimeHttpClient.from_server_address(
            self.address, True, None, interceptors=[version, entitled]
        )


def _give_up() -> NoReturn:
    raise SiteError(
        f"site: expected a reply, but {ATTEMPTS} processes were killed over this message. Look at "
        "the site's log, and for the kernel's out-of-memory killer (dmesg)."
    )


def _say(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"ended with status {os.WEXITSTATUS(status)} before it had replied"
