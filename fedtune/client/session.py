"""The trainer's end of the site's socket: takes requests, remembers replies, survives its peers.

    relay --- Unix socket (`door.py`) --- threads --- queue --- main thread (the Trainer)

Threads only move bytes. The main thread takes one request at a time and may be busy for a whole
round; its reply is on disk before anyone sees it, so that a peer that left, or a trainer that was
killed and started again, finds it there: nothing is done twice.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection

from flwr.app import ConfigRecord, RecordDict

from fedtune.client.codec_link import CodecLink, Seal
from fedtune.client.door import Door
from fedtune.client.failing import note_failure, told
from fedtune.errors import FedtuneError, FrameError, RoundError
from fedtune.files import write_bytes
from fedtune.relay.folder import RunFolder
from fedtune.relay.frames import MAX_FRAME_BYTES, Frame, decode, encode, request_key
from fedtune.transport.coded_records import resend
from fedtune.transport.messages import DONE

__all__ = ["PING", "Request", "Session"]

log = logging.getLogger(__name__)

PING, TRAIN = "ping", "train"
KEPT_REPLIES = 6  # plan, setup and two rounds
BEAT_S = 20.0  # how often a wait gives a sign of life
GOODBYE_S = 5.0  # what a peer has to read the last reply


class Request:
    """What the server asks; answered once, with `reply` or with `fail`."""

    def __init__(
        self, frame: Frame, key: str, settle: Callable[[Request, bytes, bool], None]
    ) -> None:
        self.kind, self.content, self.key = frame.kind, frame.content, key
        self._settle = settle
        self._seal: Seal = lambda reply: reply
        self._done = threading.Event()
        self._answer = b""
        self.taken = False

    @property
    def answered(self) -> bool:
        """Whether there is an answer."""
        return self._done.is_set()

    def open(self, link: CodecLink) -> bool:
        """Decode the content; whether it can be worked on: it is answered when not."""
        try:
            opened = link.open(self.content)
        except (FedtuneError, OSError) as error:
            self._refuse(error)
            return False
        if opened is None:
            self._finish(encode(self.kind, resend()), keep=False)
            return False
        self.content, self._seal = opened
        return True

    def reply(self, content: RecordDict) -> None:
        """Answer; the same request gets the same answer from now on, in later processes too."""
        try:
            sealed = self._seal(content)
        except (FedtuneError, OSError) as error:
            self._refuse(error)
            return
        self._finish(encode(self.kind, sealed), keep=True)

    def fail(self, reason: str) -> None:
        """Refuse; the same request may be tried again."""
        self._finish(encode(self.kind, error=" ".join(reason.split())), keep=False)

    def _refuse(self, error: Exception) -> None:
        log.error("%s: %s", self.kind, error)
        self.fail(told(error))

    def wait(self) -> bytes:
        """The encoded answer, once there is one."""
        self._done.wait()
        return self._answer

    def _finish(self, answer: bytes, *, keep: bool) -> None:
        if not self.answered:
            self._settle(self, answer, keep)
            self._answer = answer
            self._done.set()


class Session:
    """Owns the socket of a run's folder until `close`.

    Args:
        folder: as `fedtune join` made it.
        link: decodes requests and encodes replies.

    Raises:
        ConfigError: another process or Trainer owns the folder, or its path is too long.
    """

    def __init__(self, folder: RunFolder, link: CodecLink) -> None:
        self._door = Door(folder, self._converse)
        self.folder, self._link = folder, link
        self._queue: queue.Queue[Request] = queue.Queue()
        self._requests: dict[str, Request] = {}
        self._changed = threading.Condition()
        self._busy = 0  # connections that wait for an answer or are being sent one
        self._heard = time.monotonic()
        self._over = ""
        self._status: dict[str, str | int | float] = {}
        folder.replies.mkdir(mode=0o700, exist_ok=True)
        atexit.register(self._close_at_exit)
        self.say("starting")
        self._door.open()

    def next(self, timeout_s: float, beat: Callable[[], None] | None = None) -> Request:
        """The next request; `beat` is called now and then while there is none.

        Raises:
            RoundError: no word from the server for `timeout_s` seconds.
        """
        started = time.monotonic()
        while True:
            left = max(started, self._heard) + timeout_s - time.monotonic()
            if left <= 0:
                raise RoundError(
                    f"run {self.folder.path.name}: expected a word from the server within "
                    f"{timeout_s:g} s, received none. See fedtune status whether the run goes on "
                    "and the site is connected; then start fedtune join again."
                )
            try:
                request = self._queue.get(timeout=min(left, BEAT_S))
            except queue.Empty:
                if beat is not None:
                    beat()
                continue
            with self._changed:
                request.taken = not request.answered
            if request.taken and request.open(self._link):
                return request

    def say(self, state: str, **more: str | int | float) -> None:
        """Tell people and pings what the trainer is doing."""
        self._status = {"state": state, **more, "pid": os.getpid(), "since": round(time.time(), 3)}
        with suppress(OSError):  # the folder may be gone once the site has stopped
            self.folder.write_status(**self._status)

    def end(self, reason: str) -> None:
        """Take no new requests; those answered before are answered again."""
        with self._changed:
            self._over = reason
            unanswered = [request for request in self._requests.values() if not request.answered]
        for request in unanswered:
            request.fail(reason)

    def finish(self, reason: str) -> None:
        """The run is over at this site; one that was not done may be resumed."""
        if reason == DONE:
            self._link.forget()
        self.end(f"the run is over at this site ({reason})")

    def close(self, reason: str = "the site's trainer has ended") -> None:
        """Refuse what is unanswered with `reason`, let peers read it, and free the folder."""
        if self._door.closed:
            return
        self._door.close()
        atexit.unregister(self._close_at_exit)
        self.end(self._over or reason)
        with self._changed:
            self._changed.wait_for(lambda: not self._busy, GOODBYE_S)
        self._door.release()

    def _close_at_exit(self) -> None:
        """What ended the interpreter is why."""
        error = getattr(sys, "last_value", None)
        if error is None:
            self.close()
        else:
            self.close(f"the script failed: {note_failure(error)}")

    def _converse(self, connection: Connection) -> None:
        try:
            data = connection.recv_bytes(MAX_FRAME_BYTES)
        except OSError:
            if connection.readable:
                raise
            connection.send_bytes(
                encode("error", error=f"request: expected at most {MAX_FRAME_BYTES} bytes.")
            )
            return
        with self._changed:
            self._busy += 1
        try:
            connection.send_bytes(self._answer(data))
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    def _answer(self, data: bytes) -> bytes:
        try:
            frame = decode(data)
        except FrameError as error:
            return encode("error", error=str(error))
        if frame.kind == PING:
            return encode(PING, RecordDict({"config": ConfigRecord(dict(self._status))}))
        key = request_key(frame.kind, frame.content)
        with self._changed:
            self._heard = time.monotonic()
            with suppress(FileNotFoundError):
                return (self.folder.replies / key).read_bytes()
            request = self._requests.get(key)
            if request is not None and not request.taken:
                request.content = frame.content  # which may have come in a better way
            if request is None:
                if self._over:
                    return encode(frame.kind, error=self._over)
                if frame.kind == TRAIN:  # those before it have expired, or it would not be asked
                    self._supersede()
                request = self._requests[key] = Request(frame, key, self._settle)
                self._queue.put(request)
        return request.wait()

    def _supersede(self) -> None:
        for older in list(self._requests.values()):
            if older.kind == TRAIN and not older.taken:
                older.fail("a later round was asked for")

    def _settle(self, request: Request, answer: bytes, keep: bool) -> None:
        with self._changed:
            if keep:
                try:
                    write_bytes(self.folder.replies / request.key, answer)
                    _prune(self.folder)
                except OSError as error:
                    log.warning("%s: reply not kept (%s)", self.folder.replies, error)
            self._requests.pop(request.key, None)


def _prune(folder: RunFolder) -> None:
    files = [path for path in folder.replies.iterdir() if not path.name.startswith(".")]
    for path in sorted(files, key=lambda path: path.stat().st_mtime_ns)[:-KEPT_REPLIES]:
        path.unlink(missing_ok=True)
