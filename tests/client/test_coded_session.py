"""A session under a codec: the server's coded grid at the other end of its socket."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import uuid4

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from safetensors.torch import load_file, save_file

from fedtune.client.codec_link import CodecLink
from fedtune.client.session import Request, Session
from fedtune.engines.inline import InlineGrid
from fedtune.errors import RoundError
from fedtune.relay.folder import RunFolder
from fedtune.relay.frames import Frame, encode
from fedtune.transport.codec_grid import CodecGrid
from fedtune.transport.coded_records import (
    OLD,
    VERSION,
    as_record,
    bytes_in,
    facts_of,
    join,
    wrap,
)
from fedtune.transport.coder import Coder
from fedtune.transport.grid import EagerGrid
from fedtune.transport.messages import TRAIN, RoundTask, arrays_of, pack
from fedtune.transport.records import to_arrays
from fedtune.transport.settings import CodecSettings
from tests.client.driver import send
from tests.federation.scripted import in_a_task
from tests.transport.coded import MANIFEST, Tensors, draw, moved
from tests.transport.tensors import assert_bits

Work = Callable[[RecordDict], RecordDict]


def link(folder: RunFolder) -> CodecLink:
    return CodecLink(folder.path / "transport", dict)


def honest(content: RecordDict) -> RecordDict:
    return moved(0, content)


class Site:
    """A script that answers one request after the other, and can be started again.

    Attributes:
        seen: tensors of the requests that it was given.
    """

    def __init__(self, folder: RunFolder, work: Work = honest) -> None:
        self.folder, self.work = folder, work
        self.seen: list[Tensors] = []
        self.session = Session(folder, link(folder))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                request = self.session.next(30.0)
            except RoundError:
                return
            if request.kind == "over":
                request.reply(RecordDict())
                return
            self.seen.append(join(request.content))
            request.reply(self.work(request.content))

    def close(self) -> None:
        send(self.folder, encode("over", pack(config={"run": str(uuid4())})))
        self._thread.join(10.0)
        self.session.close()


class Server:
    """The coded grid of one client, which is asked over its socket."""

    def __init__(self, folder: RunFolder, **settings: object) -> None:
        given = {"codec": "nf4", "min_size": 1, **settings}
        self.settings = CodecSettings(**given)  # type: ignore[arg-type]
        self.frames: list[Frame] = []
        self.olds: list[str] = []

        def client(message: Message, context: Context) -> Message:
            self.olds.append(str(facts_of(message.content)[OLD]))
            frame = send(folder, encode(message.metadata.message_type, message.content))
            self.frames.append(frame)
            if frame.error is not None:
                raise RoundError(frame.error)
            return Message(frame.content, reply_to=message)

        self._below = InlineGrid(client, 1)  # type: ignore[arg-type]
        self.restart()

    def restart(self) -> None:
        """A server that knows nobody."""
        self.coded = CodecGrid(self._below, self.settings)
        self.grid = EagerGrid(self.coded, poll_interval_s=0.0)

    def train(self, params: Tensors, number: int, attempt: int = 1, resume: int = 0) -> Message:
        task = RoundTask("42", number, 9, attempt, MANIFEST.hash, 4, 0.0, True, 42, resume)
        content = pack(arrays=to_arrays(params), config=task.record())
        (reply,) = self.grid.send_and_receive([Message(content, 2, TRAIN)])
        return reply

    @property
    def believed(self) -> Tensors:
        return dict(self.coded._held[2].received)


@pytest.fixture(autouse=True)
def _task() -> Iterator[None]:
    with in_a_task():
        yield


@contextmanager
def started(folder: RunFolder, work: Work = honest) -> Iterator[Site]:
    site = Site(folder, work)
    try:
        yield site
    finally:
        site.close()


def test_a_started_again_session_decodes_the_next_difference(folder: RunFolder) -> None:
    server = Server(folder)
    for number in range(1, 4):
        with started(folder) as site:
            reply = server.train(draw(number), number)
        assert arrays_of(reply.content).keys() == draw(number).keys()
        (seen,) = site.seen
        assert_bits(seen, server.believed)
    assert [bool(old) for old in server.olds] == [False, True, True]


def test_a_session_that_has_lost_its_files_asks_once_more(folder: RunFolder) -> None:
    """Which is no reply to be kept, and nothing that the script hears of."""
    server = Server(folder)
    with started(folder) as site:
        server.train(draw(1), 1)
        for path in (folder.path / "transport").iterdir():
            path.unlink()
        kept = len(list(folder.replies.iterdir()))
        reply = server.train(draw(2), 2)
        assert arrays_of(reply.content).keys() == draw(2).keys()
        assert len(site.seen) == 2
        assert_bits(site.seen[-1], server.believed)
        assert len(list(folder.replies.iterdir())) == kept + 1
    assert [bool(old) for old in server.olds] == [False, True, False]
    assert ["resend" in frame.content for frame in server.frames] == [False, True, False]


def test_a_round_that_comes_again_is_not_trained_again(folder: RunFolder) -> None:
    """Its bytes are others: nothing has changed since the attempt before."""
    server = Server(folder)
    with started(folder) as site:
        server.train(draw(1), 1)
        first = server.train(draw(2), 2)
        again = server.train(draw(2), 2, attempt=2)
        assert len(site.seen) == 2
        assert_bits(arrays_of(first.content), arrays_of(again.content))
        assert_bits(site.seen[-1], server.believed)
        server.train(draw(3), 3)
        assert len(site.seen) == 3
        assert_bits(site.seen[-1], server.believed)
    assert all(server.olds[1:])


def test_another_round_from_the_same_parameters_is_another_one(folder: RunFolder) -> None:
    server = Server(folder)
    with started(folder) as site:
        for number in (1, 2, 3):
            server.train(draw(1), number)
        server.train({**draw(1), "z": torch.ones(())}, 3)
        assert len(site.seen) == 4


def test_the_kept_reply_is_the_encoded_one(folder: RunFolder) -> None:
    """With what the codec made of it; a script that starts again finds it."""
    server = Server(folder, feedback=True)
    with started(folder):
        first = server.train(draw(1), 1)
    server.coded._held.clear()
    with started(folder) as site:
        again = server.train(draw(1), 1)
        assert site.seen == []
    assert bytes_in(server.frames[0].content) == bytes_in(server.frames[1].content)
    assert_bits(arrays_of(first.content), arrays_of(again.content))


def test_a_round_that_comes_in_another_way_is_not_trained_again(folder: RunFolder) -> None:
    """A new server sends all: other bits, but the same parameters are meant."""
    server = Server(folder, feedback=True)
    with started(folder) as site:
        for number in (1, 2):
            first = server.train(draw(number), number)
        server.restart()
        again = server.train(draw(2), 2)
        assert len(site.seen) == 2
        assert server.olds[1] != "" == server.olds[2]
        assert_bits(arrays_of(first.content), arrays_of(again.content))
        assert not server.coded._held  # the site has what it had trained from
        server.train(draw(3), 3)
        assert_bits(site.seen[-1], server.believed)
        other = server.train(draw(4), 3)  # other parameters are another request
        assert len(site.seen) == 4
        assert arrays_of(other.content).keys() == draw(4).keys()


def test_where_updates_are_whole_they_belong_to_what_a_site_had(folder: RunFolder) -> None:
    server = Server(folder, direction="down")
    with started(folder) as site:
        for number in (1, 2):
            server.train(draw(number), number)
        server.restart()
        server.train(draw(2), 2)
        assert len(site.seen) == 3
        assert_bits(site.seen[-1], server.believed)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reply_that_no_codec_takes_is_refused_by_name(folder: RunFolder, bad: float) -> None:
    """Nothing of it is kept: the same round may be tried again."""
    spoiled: list[int] = []

    def work(content: RecordDict) -> RecordDict:
        params = arrays_of(honest(content))
        if not spoiled:
            spoiled.append(1)
            params["b"][1, 1] = bad
        return pack(arrays=params)

    server = Server(folder, feedback=True)
    with started(folder, work) as site:
        reply = server.train(draw(1), 1)
        assert reply.error.reason.startswith("arrays/b: expected finite values, received NaN")
        assert not list(folder.replies.iterdir())
        assert not list((folder.path / "transport").glob("residual/*"))
        reply = server.train(draw(1), 1)
        assert arrays_of(reply.content).keys() == draw(1).keys()
        assert len(site.seen) == 2
        assert_bits(site.seen[-1], server.believed)


@pytest.mark.parametrize("damage", [b"", b"noise" * 9, bytes(100)])
def test_what_was_left_over_may_be_damaged(folder: RunFolder, damage: bytes) -> None:
    """It is lost then; the script goes on."""
    server = Server(folder, feedback=True)
    residual = folder.path / "transport" / "residual"
    with started(folder) as site:
        server.train(draw(1), 1)
        (file,) = residual.iterdir()
        file.write_bytes(damage)
        reply = server.train(draw(2), 2, resume=1)
        assert arrays_of(reply.content).keys() == draw(2).keys()
        assert len(site.seen) == 2
    assert len(list(residual.iterdir())) == 2


@pytest.mark.parametrize(
    "other",
    [torch.zeros(9, 9), torch.ones(17, 9), torch.full((9, 17), torch.nan), torch.ones(9, 17).int()],
    ids=["smaller", "transposed", "nan", "integers"],
)
def test_what_was_left_over_may_be_of_another_tensor(
    folder: RunFolder, other: torch.Tensor
) -> None:
    """That of a script with another rank; it counts for nothing, and the others stay."""
    server = Server(folder, feedback=True)
    with started(folder):
        server.train(draw(1), 1)
        (file,) = (folder.path / "transport" / "residual").iterdir()
        lost = load_file(file)
        updates = []
        for wrong in (other, torch.zeros(9, 17)):
            save_file({**lost, "arrays/a": wrong}, file)
            updates.append(arrays_of(server.train(draw(2), 2 + len(updates), resume=1).content))
    assert_bits(*updates)


def test_a_whole_message_replaces_the_difference_that_waits(folder: RunFolder) -> None:
    """Of a server that was killed; its trainer, still busy, has lost what it is a difference to."""
    server = Server(folder)
    with started(folder):
        server.train(draw(1), 1)
    task = RoundTask("42", 2, 9, 1, MANIFEST.hash, 4, 0.0, True, 42, 0)
    content = pack(arrays=to_arrays(draw(2)), config=task.record())
    ways = [
        Coder(server.settings, refactors=False).code(content, held)[0]
        for held in (server.coded._held[2], None)
    ]
    shutil.rmtree(folder.path / "transport")
    session, answers = Session(folder, link(folder)), []
    threads = [
        threading.Thread(target=lambda w=way: answers.append(send(folder, encode(TRAIN, w))))
        for way in ways
    ]
    for busy, thread in enumerate(threads, start=1):
        thread.start()
        while session._busy < busy or not session._requests:
            time.sleep(0.01)
    request = session.next(10.0)
    request.reply(honest(request.content))
    for thread in threads:
        thread.join(10.0)
    session.close()
    assert [bytes_in(frame.content) is not None for frame in answers] == [True, True]


@pytest.mark.parametrize("data", [b"", b"noise", b"FTQB" + bytes(40)])
def test_bytes_that_no_server_sends_are_refused(folder: RunFolder, data: bytes) -> None:
    server = Server(folder)
    with started(folder) as site:
        server.train(draw(1), 1)
        held = server.coded._held[2].name
        facts = {**server.settings.record(), VERSION: "0", OLD: held}
        content = wrap(pack(config={"run": "42", "round": 2}), as_record(data), facts)
        assert str(send(folder, encode(TRAIN, content)).error).startswith("payload: expected ")
        assert len(site.seen) == 1
        server.train(draw(2), 2)
        assert_bits(site.seen[-1], server.believed)
    assert all(server.olds[1:])


def test_messages_without_a_codec_pass(folder: RunFolder) -> None:
    session = Session(folder, link(folder))
    answers: list[Frame] = []
    content = pack(arrays=draw(1), config={"run": "42", "round": 1})
    asking = threading.Thread(target=lambda: answers.append(send(folder, encode(TRAIN, content))))
    asking.start()
    request: Request = session.next(10.0)
    assert request.content == content
    request.reply(content)
    asking.join(10.0)
    assert answers[0].content == content
    assert not (folder.path / "transport").exists()
    session.close()
