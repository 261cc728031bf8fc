"""One request to the site's trainer over its Unix socket, however often the trainer dies meanwhile.

The trainer recognises a repeated request and answers it without doing the work again, so whatever
breaks, the same bytes are sent again until there is an answer, the script has ended for good, or a
limit is reached.
"""

from __future__ import annotations

import socket
import struct
import time
from contextlib import closing
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

from fedtune.errors import FrameError, SiteError
from fedtune.relay.folder import RunFolder
from fedtune.relay.frames import MAX_FRAME_BYTES, Frame, decode, request_key

__all__ = ["StillStarting", "ask"]

RETRY_S = 0.1  # between attempts to connect
WATCH_S = 0.5  # while a reply is awaited: how often to see whether the script still lives
SILENCE_S = 60.0  # a peer that is there moves at least one byte in this time
TIMEVAL = struct.Struct("@ll")


class StillStarting(SiteError):
    """The trainer is not there yet, and may come."""


def ask(
    folder: RunFolder,
    frame: bytes,
    *,
    start_timeout_s: float,
    timeout_s: float,
    patience_s: float | None = None,
) -> Frame:
    """Send `frame` to the trainer of `folder` and return its reply; `Frame.error` is not raised.

    Args:
        start_timeout_s: how long the trainer may be absent at a stretch (it loads a model).
        timeout_s: how long the whole request may take.
        patience_s: how long to wait here for a trainer that starts; None: until it is there.

    Raises:
        StillStarting: it has not come in `patience_s`, and has time left.
        SiteError: the trainer stays away, the script has ended, the key is wrong, or time is up.
        FrameError: the request is too large, or the reply is no message.
        ConfigError: the socket's path is too long.
    """
    if len(frame) > MAX_FRAME_BYTES:
        raise FrameError(
            f"request: expected at most {MAX_FRAME_BYTES} bytes, received {len(frame)}. "
            "Send a smaller adapter."
        )
    started = absent_since = time.monotonic()
    deadline = started + timeout_s
    while True:
        problem: Exception
        try:
            with closing(_connect(folder, deadline)) as connection:
                try:
                    return decode(_exchange(connection, folder, frame, deadline))
                finally:
                    absent_since = time.monotonic()
        except (EOFError, OSError) as broken:  # which one it is depends on the instant of the kill
            problem = broken
        if folder.exit_status is not None:
            return _last_reply(folder, frame)
        now = time.monotonic()
        if now >= deadline:
            raise SiteError(
                f"trainer: expected a reply within {timeout_s:g} s, received none ({_say(problem)})"
                ". It may hang: look at the site's trainer.log, or give rounds more time."
            )
        absent_s = now - absent_since
        if patience_s is not None and absent_s >= patience_s:
            absent_s = folder.starting_s
            if absent_s < start_timeout_s:
                raise StillStarting("trainer: is starting. It is asked again.")
        if absent_s >= start_timeout_s:
            raise SiteError(
                f"trainer: expected a Trainer patched by fedtune within {start_timeout_s:g} s, "
                f"received none ({_say(problem)}). Look at the site's trainer.log; the script has "
                "to call fedtune.patch(trainer) and trainer.train(); --start_timeout_s gives more "
                "time."
            )
        time.sleep(max(0.0, min(RETRY_S, deadline - now)))


def _connect(folder: RunFolder, deadline: float) -> Connection:
    """A connection over which both sides have proved that they know the folder's key."""
    folder.check_length()
    try:
        key = folder.authkey
    except FileNotFoundError:
        raise SiteError(
            f"{folder.path}: expected a session's key, received none. The site was stopped or its "
            "folder deleted; run fedtune join again."
        ) from None
    with socket.socket(socket.AF_UNIX) as raw:
        _limit_silence(raw, deadline)
        raw.connect(str(folder.socket))
        connection = Connection(raw.detach())
    try:
        answer_challenge(connection, key)
        deliver_challenge(connection, key)
    except (AuthenticationError, AssertionError) as refusal:
        connection.close()
        raise SiteError(
            f"{folder.socket}: expected a trainer with this session's key, received a refusal "
            f"({refusal}). Another program owns the socket; run fedtune join again."
        ) from None
    except BaseException:
        connection.close()
        raise
    return connection


def _limit_silence(raw: socket.socket, deadline: float) -> None:
    """Let every read and write fail rather than wait for a stopped process for ever."""
    seconds = max(0.001, min(SILENCE_S, deadline - time.monotonic()))
    limit = TIMEVAL.pack(int(seconds), int(seconds % 1 * 1e6))
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def _exchange(connection: Connection, folder: RunFolder, frame: bytes, deadline: float) -> bytes:
    """One frame there, one back. Raises OSError when it is worth connecting again."""
    owner = _identity(folder)
    connection.send_bytes(frame)
    while not connection.poll(max(0.0, min(WATCH_S, deadline - time.monotonic()))):
        if time.monotonic() >= deadline:
            raise TimeoutError("connected, then silent")
        # A killed trainer's children may hold its connection open: then no end of file tells.
        gone = folder.exit_status is not None or _identity(folder) not in (owner, None)
        if gone and not connection.poll(0):
            raise ConnectionResetError("another process has taken over")
    try:
        return connection.recv_bytes(MAX_FRAME_BYTES)
    except OSError:
        if connection.readable:
            raise
        raise FrameError(
            f"reply: expected at most {MAX_FRAME_BYTES} bytes, received more. Train a smaller "
            "adapter."
        ) from None


def _identity(folder: RunFolder) -> tuple[int, int] | None:
    """Which socket is bound; a trainer that starts again makes a new one."""
    try:
        found = folder.socket.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_ctime_ns


def _last_reply(folder: RunFolder, frame: bytes) -> Frame:
    """What the trainer wrote down before its script ended; otherwise the end is the answer."""
    request = decode(frame)
    try:
        return decode((folder.replies / request_key(request.kind, request.content)).read_bytes())
    except (FileNotFoundError, FrameError):
        pass
    raise SiteError(f"expected a reply, but {folder.end}. Look at the site's trainer.log.")


def _say(problem: Exception) -> str:
    if isinstance(problem, BlockingIOError):  # what a socket's time limit raises
        return "it is connected, but silent"
    return f"{type(problem).__name__}: {problem}" if str(problem) else type(problem).__name__
