"""Who owns a run's folder, and who may speak to its owner: one thread per peer that has the key."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import IO
from weakref import WeakSet

from fedtune.errors import ConfigError
from fedtune.relay.folder import RunFolder

__all__ = ["Door"]

log = logging.getLogger(__name__)

SILENCE_S = 60.0  # a peer that is there moves at least one byte in this time
TIMEVAL = struct.Struct("@ll")


class Door:
    """The folder's lock and socket. `open` lets peers in, `close` no more, `release` frees both.

    Args:
        converse: called with each connection whose peer has the key, in a thread of its own.

    Raises:
        ConfigError: another process or Trainer owns the folder, or its path is too long.
    """

    def __init__(self, folder: RunFolder, converse: Callable[[Connection], None]) -> None:
        folder.check_length()
        self._folder, self._converse = folder, converse
        self._authkey = folder.authkey
        self._connections: set[Connection] = set()
        self._warned = False
        self.closed = False
        self._lock = _own(folder)
        self._listener = _bind(folder)
        _doors.add(self)

    def open(self) -> None:
        """Answer knocks from now on."""
        threading.Thread(target=self._accept, name="fedtune-session", daemon=True).start()

    def close(self) -> None:
        """Whoever comes from now on waits for the next trainer."""
        self.closed = True
        self._folder.socket.unlink(missing_ok=True)
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the listening thread
        self._listener.close()

    def release(self) -> None:
        """Let another trainer own the folder."""
        self._lock.close()

    def _accept(self) -> None:
        while True:
            try:
                raw, _ = self._listener.accept()
            except OSError:
                if self.closed:
                    return
                time.sleep(0.1)  # out of file descriptors, say
                continue
            raw.setblocking(True)
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                raw.setsockopt(socket.SOL_SOCKET, option, TIMEVAL.pack(int(SILENCE_S), 0))
            connection = Connection(raw.detach())
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        self._connections.add(connection)
        try:
            with closing(connection), suppress(EOFError, OSError):  # the peer may leave at any time
                if self._admit(connection):
                    self._converse(connection)
        finally:
            self._connections.discard(connection)

    def _admit(self, connection: Connection) -> bool:
        """Whether the peer knows the key; it learns that we do."""
        try:
            deliver_challenge(connection, self._authkey)
            answer_challenge(connection, self._authkey)
        except (AuthenticationError, AssertionError, OSError, EOFError) as problem:
            if not self._warned:
                self._warned = True
                log.warning(
                    "%s: a peer without the key was refused (%s)", self._folder.socket, problem
                )
            return False
        return True

    def _let_go(self) -> None:
        """In a forked child: hold nothing that would keep the folder owned or a peer waiting."""
        self.closed = True
        self._lock.close()
        self._listener.close()
        for connection in self._connections:
            with suppress(OSError):
                connection.close()


_doors: WeakSet[Door] = WeakSet()


def _after_fork() -> None:
    for door in list(_doors):
        door._let_go()


os.register_at_fork(after_in_child=_after_fork)


def _own(folder: RunFolder) -> IO[bytes]:
    """The lock of the folder, held as long as the file is open."""
    handle = folder.lock.open("ab")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        raise ConfigError(
            f"run {folder.path.name}: expected one Trainer per run and site, received a second "
            f"one; the first one owns {folder.socket}. Call fedtune.unpatch on it first, or stop "
            "its process."
        ) from None
    return handle


def _bind(folder: RunFolder) -> socket.socket:
    """Bind the socket; one that a killed trainer left is replaced, which the lock makes safe."""
    folder.socket.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder.socket))
    listener.listen(16)
    return listener
