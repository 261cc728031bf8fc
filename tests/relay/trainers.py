"""Trainers without a Trainer: a loop over one socket that counts what it really works on.

Run as a program it is a site's script: `python -m tests.relay.trainers --kill_at train/2`. It keeps
its replies on disk, as a session does, and appends a line to `work.log` in the run's folder for
each request that it does not know yet.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedtune.files import append_line
from fedtune.relay.folder import RunFolder
from fedtune.relay.frames import Frame, decode, encode, request_key

Answer = Callable[[Frame], bytes]
BROKEN = (OSError, EOFError, AuthenticationError)


def answer_politely(request: Frame) -> bytes:
    """Send back what was sent, with the client's name."""
    content = RecordDict({"config": ConfigRecord({"client": "fake"})})
    content["arrays"] = request.content.array_records.get("arrays", ArrayRecord())
    return encode(request.kind, content)


def worked(folder: RunFolder) -> list[str]:
    """What a trainer has worked on, as `kind/round`."""
    log = folder.path / "work.log"
    return log.read_text().split() if log.is_file() else []


def work(folder: RunFolder, frame: bytes, answer: Answer) -> bytes:
    """The reply on disk, or a new one."""
    request = decode(frame)
    cached = folder.replies / request_key(request.kind, request.content)
    if not cached.is_file():
        append_line(folder.path / "work.log", name_of(request))
        reply = answer(request)
        temporary = cached.with_suffix(".tmp")
        temporary.write_bytes(reply)
        temporary.replace(cached)
    return cached.read_bytes()


def name_of(request: Frame) -> str:
    """`train/2`."""
    config = request.content.config_records.get("config", ConfigRecord())
    return f"{request.kind}/{config.get('round', 0)}"


class Door:
    """The folder's socket, in place of a stale one. It stays there when its owner has gone."""

    def __init__(self, folder: RunFolder) -> None:
        self._key = folder.authkey
        folder.lock.touch()
        folder.socket.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(folder.socket))
        self._socket.listen(8)

    def accept(self) -> Connection:
        """The next peer that knows the key."""
        connection = Connection(self._socket.accept()[0].detach())
        deliver_challenge(connection, self._key)
        answer_challenge(connection, self._key)
        return connection

    def close(self) -> None:
        """End an `accept` in another thread, too."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class Trainer:
    """A trainer in a thread; `talk` may be replaced by something rude."""

    def __init__(
        self,
        folder: RunFolder,
        answer: Answer = answer_politely,
        talk: Callable[[Connection], None] | None = None,
    ) -> None:
        self.folder, self._answer = folder, answer
        self._talk = talk or self._talk_politely
        self._door = Door(folder)
        self._closed = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._closed:
            with contextlib.suppress(*BROKEN), self._door.accept() as connection:
                self._talk(connection)

    def _talk_politely(self, connection: Connection) -> None:
        connection.send_bytes(work(self.folder, connection.recv_bytes(), self._answer))

    def close(self) -> None:
        """Stop."""
        self._closed = True
        self._door.close()
        self._thread.join(5)


@contextlib.contextmanager
def trainer(
    folder: RunFolder,
    answer: Answer = answer_politely,
    talk: Callable[[Connection], None] | None = None,
) -> Iterator[Trainer]:
    """A `Trainer` for the time of a block."""
    made = Trainer(folder, answer, talk)
    try:
        yield made
    finally:
        made.close()


def main() -> int:
    """A site's script."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--start_s", type=float, default=0.0)
    parser.add_argument("--work_s", type=float, default=0.0)
    parser.add_argument("--kill_at", help="SIGKILL itself at this request, once")
    parser.add_argument("--always", action="store_true", help="--kill_at every time")
    parser.add_argument("--never_bind", action="store_true")
    parser.add_argument("--leave_at", help="end before answering this request")
    parser.add_argument("--child", type=Path, help="start a child and write its pid here")
    parser.add_argument("--linger_s", type=float, default=0.0)
    parser.add_argument("--status", type=int, default=0)
    args = parser.parse_args()
    print(f"script {os.getpid()} begins", flush=True)
    if args.child:
        pid = os.fork()
        if not pid:
            time.sleep(600)
        args.child.write_text(f"{os.getpid()} {pid}")
    time.sleep(args.start_s)
    if args.never_bind:
        return args.status
    folder = RunFolder.of_environment()
    assert folder is not None
    killed = folder.path / "killed"

    def answer(request: Frame) -> bytes:
        here = name_of(request)
        if here == args.leave_at:
            raise SystemExit(args.status)
        if here == args.kill_at and (args.always or not killed.exists()):
            killed.touch()
            print(f"killed at {here}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(args.work_s)
        print(f"worked on {here}", flush=True)
        return answer_politely(request)

    door, kind = Door(folder), ""
    while kind != "query.finish":
        with contextlib.suppress(*BROKEN), door.accept() as connection:
            frame = connection.recv_bytes()
            connection.send_bytes(work(folder, frame, answer))
            kind = decode(frame).kind
    door.close()
    time.sleep(args.linger_s)
    print("script ends", flush=True)
    return args.status


if __name__ == "__main__":
    sys.exit(main())
