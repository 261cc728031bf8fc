"""Lost, doubled, late and broken messages under a codec: one whole message, never a wrong model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict

from fedtune.errors import RoundError
from fedtune.transport.coded_records import OLD, RESEND, facts_of, resend
from fedtune.transport.messages import EVALUATE, TRAIN, arrays_of, pack
from tests.federation.scripted import in_a_task
from tests.transport.coded import Bench, draw, task


@pytest.fixture(autouse=True)
def _task() -> Iterator[None]:
    with in_a_task():
        yield


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Two clients that have had two rounds."""
    bench = Bench(tmp_path, 2)
    for number in range(2):
        assert len(bench.ask(draw(number))) == 2
    bench.network.pushed.clear()
    return bench


# --- what a client has ---


def test_a_client_without_its_files_gets_one_whole_message(bench: Bench) -> None:
    """The layers above see one message and one reply, of the node that was asked."""
    bench.forget(1)
    messages = [
        Message(pack(arrays=draw(2), config=task(1).record()), node, TRAIN) for node in bench.nodes
    ]
    ids = bench.grid.push(messages)
    seen = {}
    while len(seen) < 2:
        for reply in bench.grid.pull(ids):
            assert arrays_of(reply.content)
            seen[reply.metadata.reply_to_message_id] = bench.grid.node_of(reply)
            assert reply.metadata.src_node_id == bench.grid.node_of(reply)
    assert seen == dict(zip(ids, bench.nodes, strict=True))
    assert bench.wholes() == [False, False, True]
    assert not bench.grid._asked
    assert not bench.coded._flights
    assert not bench.coded._again
    bench.assert_goes_on()


def test_the_whole_message_is_counted_too(bench: Bench) -> None:
    before = bench.grid.traffic
    bench.forget(1)
    bench.ask(draw(2))
    traffic = bench.grid.traffic - before
    first, second = (traffic.of(node) for node in bench.nodes)
    assert second["bytes_down"] > first["bytes_down"] + 2 * (9 * 17 + 4 * 50)
    assert second["bytes_up"] == first["bytes_up"]  # to ask again takes the name of a record
    assert second["bytes_down_raw"] == first["bytes_down_raw"]


# --- what is asked for without end ---


def test_who_asks_again_and_again_is_refused_once(bench: Bench) -> None:
    def deliver(reply: Message) -> list[Message]:
        if reply.metadata.src_node_id == bench.nodes[0]:
            reply.content = resend()
        return [reply]

    bench.network.deliver = deliver
    for sent in ([False, False, True], [True, False]):
        replies = bench.ask(draw(2))
        (refused,) = [reply.error.reason for reply in replies if reply.has_error()]
        assert "received the wish for it once more" in refused
        assert len(replies) == 2
        assert bench.wholes() == sent
    bench.network.deliver = lambda reply: [reply]
    bench.assert_goes_on(whole=1)


# --- what is lost, late or doubled ---


def test_a_lost_reply(bench: Bench) -> None:
    bench.network.deliver = lambda reply: [] if reply.metadata.src_node_id == 2 else [reply]
    assert len(bench.ask(draw(2))) == 1
    bench.network.deliver = lambda reply: [reply]
    bench.assert_goes_on()


def test_two_lost_replies(bench: Bench) -> None:
    """The client still has what it answered for last."""
    bench.network.deliver = lambda reply: []
    bench.ask(draw(2))
    bench.ask(draw(3))
    bench.network.deliver = lambda reply: [reply]
    bench.assert_goes_on()


def test_a_lost_message(bench: Bench) -> None:
    content = pack(arrays=draw(2), config=task(1).record())
    bench.network.loses = lambda message: True
    bench.grid.push([Message(content, node, TRAIN) for node in bench.nodes])
    bench.network.loses = lambda message: False
    bench.assert_goes_on()


def test_a_lost_whole_message(bench: Bench) -> None:
    """Then it is known already that the client needs one."""
    bench.forget(1)
    bench.network.loses = lambda message: facts_of(message.content)[OLD] == ""
    assert len(bench.ask(draw(2))) == 1
    bench.network.loses = lambda message: False
    bench.wholes()
    bench.assert_right(bench.ask(draw(3)), 3)
    assert bench.wholes() == [False, True]


def test_a_message_that_comes_twice(bench: Bench) -> None:
    bench.network.times = lambda message: 2
    for number in range(3):
        bench.assert_right(bench.ask(draw(number)), number)
    assert not any(bench.wholes())


def test_a_message_that_comes_again_after_the_next_one(bench: Bench) -> None:
    """Its client goes back to it, and says what it lacks for the one after."""
    content = pack(arrays=draw(2), config=task(1).record())
    ids = bench.grid.push([Message(content, node, TRAIN) for node in bench.nodes])
    again = bench.network.waiting[ids[0]]
    bench.asked |= set(ids)
    bench.replies()
    bench.ask(draw(3))
    bench.wholes()
    bench.network._run(again)
    bench.assert_goes_on()


def test_a_reply_that_comes_twice(bench: Bench) -> None:
    """Without its tensors: nobody asked for it."""
    bench.network.deliver = lambda reply: [reply, reply]
    replies = bench.ask(draw(2))
    assert [len(arrays_of(reply.content)) for reply in replies] == [4, 0, 4, 0]
    assert not any(facts_of(reply.content) for reply in replies)
    bench.network.deliver = lambda reply: [reply]
    bench.assert_goes_on()


def test_what_several_are_sent_whole_is_kept_once(bench: Bench) -> None:
    for client in range(2):
        bench.forget(client)
    bench.ask(draw(2))
    first, second = bench.coded._held.values()
    assert first.received is second.received


def test_a_wish_for_a_whole_message_that_comes_twice(bench: Bench) -> None:
    """It is sent once, and what answers it is the answer."""
    bench.forget(1)
    bench.network.deliver = lambda reply: [reply] * (2 if RESEND in reply.content else 1)
    bench.wholes()
    bench.assert_right(bench.ask(draw(2)), 2)
    assert bench.wholes() == [False, False, True]
    bench.network.deliver = lambda reply: [reply]
    bench.assert_goes_on()


def test_a_node_that_has_left_is_sent_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower then has no id for its message."""
    push = bench.network.push_messages
    gone = bench.nodes[0]

    def without_one(messages: Iterable[Message]) -> Iterable[str]:
        outgoing = list(messages)
        ids = iter(push([m for m in outgoing if m.metadata.dst_node_id != gone]))
        return [None if m.metadata.dst_node_id == gone else next(ids) for m in outgoing]  # type: ignore[misc]

    monkeypatch.setattr(bench.network, "push_messages", without_one)
    replies = bench.ask(draw(2))
    assert [bench.grid.node_of(reply) for reply in replies] == bench.nodes[1:]
    monkeypatch.undo()
    bench.assert_goes_on()


def test_a_node_that_has_left_when_it_gets_all_has_failed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.forget(1)
    push = bench.network.push_messages

    def none_of_the_whole(messages: Iterable[Message]) -> Iterable[str]:
        outgoing = list(messages)
        whole = facts_of(outgoing[0].content)[OLD] == ""
        return [None] if whole else push(outgoing)  # type: ignore[list-item]

    monkeypatch.setattr(bench.network, "push_messages", none_of_the_whole)
    first, second = bench.ask(draw(2))
    assert first.has_content()
    assert "it has left" in second.error.reason
    monkeypatch.undo()
    bench.assert_goes_on(whole=1)


def test_messages_that_are_too_large_end_the_round(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower returns no ids then."""
    monkeypatch.setattr(bench.network, "push_messages", lambda messages: [])
    with pytest.raises(RoundError, match=r"take 2 messages of 0\.0 MB, it took 0\. Train fewer"):
        bench.ask(draw(2))
    monkeypatch.undo()
    bench.assert_goes_on()


def test_a_reply_that_comes_after_the_next_message(bench: Bench) -> None:
    late: list[Message] = []
    bench.network.deliver = lambda reply: late.append(reply) or []  # type: ignore[func-returns-value]
    bench.ask(draw(2))
    bench.network.deliver = lambda reply: [late.pop(), reply] if late else [reply]
    replies = bench.ask(draw(3))
    assert sum(bool(arrays_of(reply.content)) for reply in replies) == 2
    bench.network.deliver = lambda reply: [reply]
    bench.assert_goes_on()


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("worked_backwards", [False, True])
def test_two_messages_to_a_client_in_any_order(
    bench: Bench, backwards: bool, worked_backwards: bool
) -> None:
    """A round under way when the global parameters are to be scored."""
    late: list[Message] = []
    ids = {}
    for kind, seed in ((TRAIN, 2), (EVALUATE, 3)):
        content = pack(arrays=draw(seed), config=task(1).record())
        ids[kind] = bench.grid.push([Message(content, node, kind) for node in bench.nodes])
    bench.network.deliver = lambda reply: late.append(reply) or []  # type: ignore[func-returns-value]
    for kind in (EVALUATE, TRAIN) if worked_backwards else (TRAIN, EVALUATE):
        for _ in bench.nodes:
            list(bench.grid.pull(ids[kind]))
    assert len(late) == 4
    for reply in reversed(late) if backwards else late:
        taken = bench.coded._take(reply)
        assert taken is not None
        assert taken.has_content()
    bench.network.deliver = lambda reply: [reply]
    bench.wholes()
    # What was answered for last is not always what was worked on last.
    bench.assert_goes_on(whole=2 if backwards else 0)


@pytest.mark.parametrize("forgets", [False, True])
def test_a_node_that_leaves_and_returns_has_what_it_had(bench: Bench, forgets: bool) -> None:
    bench.network.absent = {bench.nodes[0]}
    bench.grid.get_node_ids()
    bench.ask(draw(2), nodes=bench.nodes[1:])
    bench.network.absent = set()
    bench.grid.get_node_ids()
    if forgets:
        bench.forget(0)
    bench.assert_goes_on(whole=1 if forgets else 0)


def test_a_new_server_sends_whole_messages(bench: Bench) -> None:
    bench.restart()
    bench.assert_goes_on(whole=2)


# --- what is wrong ---


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_client_that_fails_is_heard_and_starts_anew_the_second_time(
    bench: Bench, times: int
) -> None:
    def fail(client: int, content: RecordDict) -> RecordDict:
        raise RuntimeError("no rows")

    honest, bench.work = bench.work, fail
    for _ in range(times):
        replies = bench.ask(draw(2))
        assert [reply.error.reason for reply in replies] == ["no rows"] * 2
    bench.work = honest
    bench.assert_goes_on(whole=0 if times == 1 else 2)
    bench.work = fail
    bench.ask(draw(2))
    bench.work = honest
    bench.assert_goes_on()
