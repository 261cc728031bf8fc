"""One request to a trainer that may be absent, killed, silent, rude or finished."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, Listener
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedtune.errors import ConfigError, FedtuneError, FrameError, SiteError
from fedtune.relay import link
from fedtune.relay.folder import ENVIRONMENT, RunFolder
from fedtune.relay.frames import Frame, encode, request_key
from tests.conftest import REPOSITORY
from tests.relay.trainers import Door, Trainer, answer_politely, trainer, worked

BIG = 3_000_000  # more than any socket's buffer holds


def content(round_: int = 1, size: int = 4) -> RecordDict:
    arrays = ArrayRecord({"w": Array(np.full(size, round_, dtype=np.uint8))})
    return RecordDict(
        {"arrays": arrays, "config": ConfigRecord({"run": "r", "round": round_, "manifest": "m"})}
    )


def ask(
    folder: RunFolder,
    round_: int = 1,
    *,
    kind: str = "train",
    size: int = 4,
    start_timeout_s: float = 10.0,
    timeout_s: float = 20.0,
) -> Frame:
    frame = encode(kind, content(round_, size))
    return link.ask(folder, frame, start_timeout_s=start_timeout_s, timeout_s=timeout_s)


@pytest.fixture
def in_background() -> Iterator[Callable[..., Future[Frame]]]:
    with ThreadPoolExecutor() as pool:
        yield lambda *args, **kwargs: pool.submit(ask, *args, **kwargs)


Scripts = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(folder: RunFolder) -> Iterator[Scripts]:
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.relay.trainers", *arguments]
        environment = {**os.environ, ENVIRONMENT: str(folder.path)}
        process = subprocess.Popen(command, env=environment, cwd=REPOSITORY)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("size", [0, 4, BIG])
def test_request_and_reply(folder: RunFolder, size: int) -> None:
    with trainer(folder):
        reply = ask(folder, 7, size=size)
    assert reply.kind == "train"
    sent = np.full(size, 7, dtype=np.uint8)
    np.testing.assert_array_equal(reply.content.array_records["arrays"]["w"].numpy(), sent)
    assert worked(folder) == ["train/7"]


def test_a_refusal_is_returned(folder: RunFolder) -> None:
    with trainer(folder, lambda request: encode(request.kind, error="round 3 is over")):
        assert ask(folder).error == "round 3 is over"


def test_a_trainer_that_comes_late(folder: RunFolder, in_background: Callable[..., Future[Frame]]):
    reply = in_background(folder)
    time.sleep(0.3)
    assert not reply.done()
    with trainer(folder):
        assert reply.result(5).kind == "train"


def test_no_trainer(folder: RunFolder) -> None:
    started = time.monotonic()
    with pytest.raises(SiteError, match=r"patched by fedtune within 0.3 s.*FileNotFoundError.*log"):
        ask(folder, start_timeout_s=0.3)
    assert 0.3 <= time.monotonic() - started < 2


def test_a_socket_that_nobody_owns(folder: RunFolder) -> None:
    Door(folder).close()  # it stays, as after SIGKILL
    with pytest.raises(SiteError, match="ConnectionRefusedError"):
        ask(folder, start_timeout_s=0.2)


def test_a_wrong_key_is_an_error_at_once(folder: RunFolder) -> None:
    with trainer(folder):
        folder.authkey_file.write_bytes(b"another key")
        started = time.monotonic()
        with pytest.raises(SiteError, match="this session's key"):
            ask(folder)
        assert time.monotonic() - started < 2


def test_a_trainer_that_cannot_prove_its_key(folder: RunFolder) -> None:
    """The other direction: a program that accepts any key learns nothing and is not believed."""
    seen: list[bytes] = []

    def impostor() -> None:
        connection = Connection(raw.accept()[0].detach())
        connection.send_bytes(b"#CHALLENGE#" + b"x" * 20)
        connection.recv_bytes(256)
        connection.send_bytes(b"#WELCOME#")
        connection.recv_bytes(256)
        connection.send_bytes(b"a digest")
        seen.append(connection.recv_bytes(256))
        with pytest.raises(EOFError):
            connection.recv_bytes()

    with socket.socket(socket.AF_UNIX) as raw:
        raw.bind(str(folder.socket))
        raw.listen()
        thread = threading.Thread(target=impostor)
        thread.start()
        with pytest.raises(SiteError, match="this session's key"):
            ask(folder)
        thread.join()
    assert seen == [b"#FAILURE#"]


def test_a_program_with_another_protocol(folder: RunFolder) -> None:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.bind(str(folder.socket))
        raw.listen()
        thread = threading.Thread(
            target=lambda: Connection(raw.accept()[0].detach()).send_bytes(b"hello")
        )
        thread.start()
        with pytest.raises(SiteError, match="this session's key"):
            ask(folder)
        thread.join()


def test_a_folder_without_a_key(folder: RunFolder) -> None:
    folder.authkey_file.unlink()
    with pytest.raises(SiteError, match="received none.*fedtune join"):
        ask(folder)


def test_a_socket_path_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Set TMPDIR"):
        ask(RunFolder(tmp_path / ("x" * 100)))


def test_too_large_a_request(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "MAX_FRAME_BYTES", 10)
    with pytest.raises(FrameError, match="request: expected at most 10 bytes"):
        ask(folder)


def test_too_large_a_reply(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = encode("train", content())
    monkeypatch.setattr(link, "MAX_FRAME_BYTES", len(frame))
    with (
        trainer(folder, lambda request: b"x" * (len(frame) + 1)),
        pytest.raises(FrameError, match="reply: expected at most"),
    ):
        ask(folder)


@pytest.mark.parametrize("rude", [b"", b"\0" * 50, encode("train", content())[:-1]], ids=len)
def test_a_reply_that_is_no_message(folder: RunFolder, rude: bytes) -> None:
    with trainer(folder, lambda request: rude), pytest.raises(FrameError):
        ask(folder)
    assert worked(folder) == ["train/1"]


def hang_up_first(times: int, do: Callable[[Connection], None]) -> Callable[[Connection], None]:
    """`do` for some connections, which then break; afterwards a good reply."""
    seen = 0

    def talk(connection: Connection) -> None:
        nonlocal seen
        seen += 1
        if seen <= times:
            do(connection)
        else:
            connection.recv_bytes()
            connection.send_bytes(encode("train", content()))

    return talk


def send_half(connection: Connection) -> None:
    connection.recv_bytes()
    os.write(connection.fileno(), struct.pack("!i", 1000) + b"x" * 10)


def receive_half(connection: Connection) -> None:
    os.read(connection.fileno(), 10)


BREAKS = {
    "at once": lambda connection: None,
    "half a request": receive_half,
    "before the reply": lambda connection: connection.recv_bytes(),
    "half a reply": send_half,
}


@pytest.mark.parametrize("how", BREAKS)
def test_broken_connections_are_made_again(folder: RunFolder, how: str) -> None:
    with trainer(folder, talk=hang_up_first(3, BREAKS[how])):
        assert ask(folder, size=BIG).kind == "train"


def test_a_silent_trainer(folder: RunFolder) -> None:
    over = threading.Event()

    def silent(connection: Connection) -> None:
        connection.recv_bytes()
        over.wait(10)

    started = time.monotonic()
    with trainer(folder, talk=silent):
        with pytest.raises(SiteError, match="a reply within 0.4 s.*silent.*hang"):
            ask(folder, timeout_s=0.4)
        assert time.monotonic() - started < 2
        over.set()


@pytest.mark.parametrize("backlog", [1, 0])
def test_a_listener_that_never_accepts(folder: RunFolder, backlog: int) -> None:
    """The kernel connects on its behalf until its queue is full, then `connect` itself waits."""
    started = time.monotonic()
    with socket.socket(socket.AF_UNIX) as raw:
        raw.bind(str(folder.socket))
        raw.listen(backlog)
        for _ in range(3):
            with pytest.raises(SiteError, match="a reply within 0.2 s.*silent"):
                ask(folder, timeout_s=0.2)
    assert time.monotonic() - started < 3


def test_a_stopped_trainer(folder: RunFolder, start: Scripts) -> None:
    process = start()
    ask(folder)
    process.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(SiteError, match="a reply within 0.5 s"):
        ask(folder, 2, timeout_s=0.5, size=BIG)
    assert time.monotonic() - started < 2
    process.send_signal(signal.SIGCONT)
    assert ask(folder, 2, size=BIG).kind == "train"


def test_the_limit_of_absence_starts_when_the_trainer_was_last_seen(
    folder: RunFolder, in_background: Callable[..., Future[Frame]]
) -> None:
    def work(request: Frame) -> bytes:
        time.sleep(0.8)
        return answer_politely(request)

    with trainer(folder, work):
        assert ask(folder, start_timeout_s=0.3).kind == "train"


def test_a_trainer_that_is_killed_in_a_round(folder: RunFolder, start: Scripts) -> None:
    first = start("--kill_at", "train/1")
    with ThreadPoolExecutor() as pool:
        reply = pool.submit(ask, folder)
        assert first.wait(10) == -signal.SIGKILL
        start()
        assert reply.result(10).kind == "train"
    assert worked(folder) == ["train/1", "train/1"]


def test_a_trainer_that_is_killed_ten_times(folder: RunFolder, start: Scripts) -> None:
    """At any instant: before it binds, while it reads, works or writes."""
    with ThreadPoolExecutor() as pool:
        reply = pool.submit(ask, folder, size=BIG, timeout_s=60)
        for attempt in range(10):
            process = start("--work_s", "0.1")
            time.sleep(0.05 + 0.07 * attempt)
            if attempt < 9:
                process.kill()
                process.wait()
        assert reply.result(20).kind == "train"


def test_a_killed_trainer_whose_child_holds_the_connection(
    folder: RunFolder,
) -> None:
    """A DataLoader's workers outlive their parent for seconds; no end of file tells of its end."""
    hold = threading.Event()

    def silent(connection: Connection) -> None:
        connection.recv_bytes()
        hold.wait(20)

    with ThreadPoolExecutor() as pool, trainer(folder, talk=silent):
        reply = pool.submit(ask, folder)
        time.sleep(0.3)
        second = Trainer(folder)  # the same folder, as after a restart
        assert reply.result(10).kind == "train"
        second.close()
        hold.set()


def test_the_same_request_is_worked_on_once(folder: RunFolder, start: Scripts) -> None:
    start("--work_s", "0.3")
    with pytest.raises(SiteError, match="a reply within"):
        ask(folder, timeout_s=0.2)
    first = ask(folder)
    assert ask(folder) == first
    assert worked(folder) == ["train/1"]
    ask(folder, 2)
    assert worked(folder) == ["train/1", "train/2"]


def test_a_script_that_has_ended_for_good(folder: RunFolder) -> None:
    folder.write_exit_status(3, "restarted 3 times")
    started = time.monotonic()
    with pytest.raises(SiteError, match=r"status 3 \(restarted 3 times\).*trainer.log"):
        ask(folder)
    assert time.monotonic() - started < 1


def test_a_script_that_ends_for_good_while_a_reply_is_awaited(folder: RunFolder) -> None:
    def end(connection: Connection) -> None:
        connection.recv_bytes()
        folder.write_exit_status(1, "it crashed")
        over.wait(5)  # somebody still holds the connection

    over = threading.Event()
    with trainer(folder, talk=end):
        with pytest.raises(SiteError, match=r"status 1 \(it crashed\)"):
            ask(folder)
        over.set()


def test_the_last_reply_of_a_script_that_has_ended(folder: RunFolder) -> None:
    """It was written before the script ended, and only its way to the relay was cut."""
    key = request_key("query.finish", content(3))
    (folder.replies / key).write_bytes(encode("query.finish", content(3)))
    folder.write_exit_status(0)
    assert ask(folder, 3, kind="query.finish").kind == "query.finish"
    with pytest.raises(SiteError, match="status 0"):
        ask(folder, 4, kind="query.finish")


def test_a_script_that_ends_right_after_its_reply(folder: RunFolder) -> None:
    def answer(connection: Connection) -> None:
        connection.recv_bytes()
        connection.send_bytes(encode("query.finish", content(3)))
        folder.socket.unlink()
        folder.write_exit_status(0)

    with trainer(folder, talk=answer):
        assert ask(folder, kind="query.finish").kind == "query.finish"


def test_many_relays_at_once(folder: RunFolder) -> None:
    with trainer(folder), ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda number: ask(folder, number), range(24)))
    assert all(reply.kind == "train" for reply in replies)
    assert sorted(worked(folder)) == sorted(f"train/{number}" for number in range(24))


def test_every_error_is_one_line(folder: RunFolder) -> None:
    with pytest.raises(FedtuneError) as error:
        ask(folder, start_timeout_s=0.1)
    assert "\n" not in str(error.value)


def test_a_listener_of_the_standard_library_is_understood(folder: RunFolder) -> None:
    def serve() -> None:
        with listener.accept() as connection:
            connection.send_bytes(connection.recv_bytes())

    with Listener(str(folder.socket), "AF_UNIX", authkey=folder.authkey) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        assert ask(folder).kind == "train"
        thread.join()
