"""The trainer's end of the socket: who may speak, what is answered once and never done twice."""

from __future__ import annotations

import os
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, RecordDict

from fedtune.client.codec_link import CodecLink
from fedtune.client.session import KEPT_REPLIES, Session
from fedtune.errors import ConfigError, RoundError
from fedtune.relay.folder import RunFolder
from fedtune.relay.frames import MAX_FRAME_BYTES, Frame, decode, encode
from tests.client.driver import connect, send


def owned(folder: RunFolder) -> Session:
    return Session(folder, CodecLink(folder.path / "transport", dict))


@pytest.fixture
def session(folder: RunFolder) -> Iterator[Session]:
    session = owned(folder)
    yield session
    session.close()


def question(number: int, kind: str = "train") -> bytes:
    return encode(kind, RecordDict({"config": ConfigRecord({"run": "run", "round": number})}))


def answer(number: int) -> RecordDict:
    return RecordDict({"config": ConfigRecord({"answer": number})})


def said(frame: Frame) -> object:
    return frame.content.config_records["config"]["answer"]


class Asking(threading.Thread):
    """A peer that waits for its reply."""

    def __init__(self, folder: RunFolder, frame: bytes) -> None:
        super().__init__(daemon=True)
        self._folder, self._frame = folder, frame
        self.reply: Frame | None = None
        self.start()

    def run(self) -> None:
        self.reply = send(self._folder, self._frame)

    def result(self) -> Frame:
        self.join(10.0)
        assert self.reply is not None
        return self.reply


def test_a_request_reaches_the_main_thread_and_its_reply_the_peer(session: Session) -> None:
    asking = Asking(session.folder, question(1))
    request = session.next(10.0)
    assert (request.kind, request.content.config_records["config"]["round"]) == ("train", 1)
    request.reply(answer(7))
    assert said(asking.result()) == 7


def test_the_same_request_in_flight_is_one_request(session: Session) -> None:
    both = [Asking(session.folder, question(1)) for _ in range(2)]
    request = session.next(10.0)
    with pytest.raises(RoundError):
        session.next(0.3)
    request.reply(answer(1))
    assert [said(asking.result()) for asking in both] == [1, 1]


def test_a_peer_that_left_finds_the_reply_later(session: Session) -> None:
    with connect(session.folder) as connection:
        connection.send_bytes(question(1))
        request = session.next(10.0)
    request.reply(answer(5))
    assert said(send(session.folder, question(1))) == 5
    with pytest.raises(RoundError):
        session.next(0.1)


def test_the_reply_outlives_the_process(folder: RunFolder) -> None:
    session = owned(folder)
    asking = Asking(folder, question(1))
    session.next(10.0).reply(answer(3))
    asking.result()
    session.close()
    session = owned(folder)
    assert said(send(folder, question(1))) == 3
    session.close()


def test_a_refusal_is_not_kept(session: Session) -> None:
    asking = Asking(session.folder, question(1))
    session.next(10.0).fail("no\nrows")
    assert asking.result().error == "no rows"
    asking = Asking(session.folder, question(1))
    session.next(10.0).reply(answer(1))
    assert asking.result().error is None


def test_only_the_last_replies_are_kept(session: Session) -> None:
    for number in range(KEPT_REPLIES + 3):
        asking = Asking(session.folder, question(number))
        session.next(10.0).reply(answer(number))
        asking.result()
    assert len(list(session.folder.replies.iterdir())) == KEPT_REPLIES
    assert said(send(session.folder, question(KEPT_REPLIES + 2))) == KEPT_REPLIES + 2


def test_a_ping_is_answered_while_the_trainer_is_busy(session: Session) -> None:
    asking = Asking(session.folder, question(1))
    request = session.next(10.0)
    session.say("training", round=1)
    reply = send(session.folder, encode("ping"))
    assert dict(reply.content.config_records["config"])["state"] == "training"
    assert session.folder.status["round"] == 1
    request.reply(answer(1))
    asking.result()


def test_a_wrong_key_is_refused_once_loudly(
    session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        with pytest.raises(AuthenticationError):
            connect(session.folder, b"guess")
    assert send(session.folder, encode("ping")).error is None
    assert caplog.text.count("without the key") == 1


def test_a_peer_that_says_nothing_does_not_disturb(session: Session) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(session.folder.socket))
        assert send(session.folder, encode("ping")).error is None


@pytest.mark.parametrize("data", [b"", b"\0\0\0\4null", b"\xff" * 40, encode("ping")[:-1]])
def test_a_malformed_frame_is_answered_with_an_error(session: Session, data: bytes) -> None:
    assert "expected a fedtune message" in str(send(session.folder, data).error)
    assert send(session.folder, encode("ping")).error is None


def test_a_frame_that_is_too_large_is_not_read(session: Session) -> None:
    with connect(session.folder) as connection:
        assert isinstance(connection, Connection)
        # multiprocessing's own header for more than 2 GB
        os.write(connection.fileno(), struct.pack("!iQ", -1, MAX_FRAME_BYTES + 1))
        assert "at most" in str(decode(connection.recv_bytes()).error)
    assert send(session.folder, encode("ping")).error is None


def test_half_a_frame_does_not_disturb(session: Session) -> None:
    with connect(session.folder) as connection:
        os.write(connection.fileno(), struct.pack("!i", 100) + b"half")
    assert send(session.folder, encode("ping")).error is None


def test_a_folder_has_one_owner(session: Session) -> None:
    with pytest.raises(ConfigError, match="one Trainer per run"):
        owned(session.folder)
    assert send(session.folder, encode("ping")).error is None


def test_a_stale_socket_is_replaced(folder: RunFolder) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(folder.socket))
    stale.close()
    session = owned(folder)
    assert send(folder, encode("ping")).error is None
    session.close()
    assert not folder.socket.exists()


def test_closing_answers_who_waits(folder: RunFolder) -> None:
    session = owned(folder)
    asking = Asking(folder, question(1))
    session.next(10.0)
    session.close("out of memory")
    assert asking.result().error == "out of memory"


def test_after_the_end_only_old_answers_are_given(session: Session) -> None:
    asking = Asking(session.folder, question(1))
    session.next(10.0).reply(answer(1))
    asking.result()
    session.end("the run is over")
    assert said(send(session.folder, question(1))) == 1
    assert send(session.folder, question(2)).error == "the run is over"


def test_two_runs_in_one_process(session: Session) -> None:
    with tempfile.TemporaryDirectory(prefix="ft-") as directory:
        other = owned(RunFolder.create(Path(directory) / "other"))
        asking = [Asking(one.folder, question(1)) for one in (session, other)]
        other.next(10.0).reply(answer(2))
        session.next(10.0).reply(answer(1))
        assert [said(one.result()) for one in asking] == [1, 2]
        other.close()


def test_silence_has_a_limit_and_a_beat(session: Session) -> None:
    started = time.monotonic()
    with pytest.raises(RoundError, match=r"within 0\.2 s"):
        session.next(0.2)
    assert time.monotonic() - started < 5.0


def test_a_forked_child_does_not_keep_the_folder(folder: RunFolder) -> None:
    """A killed trainer's data loader workers may live on for seconds."""
    session = owned(folder)
    forked, child_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(child_end, b"!")
        time.sleep(30)
        os._exit(0)
    try:
        os.read(forked, 1)
        session._door.release()  # as the kernel does when the parent is killed
        again = owned(folder)
        again.close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        session.close()
        os.close(forked)
        os.close(child_end)
