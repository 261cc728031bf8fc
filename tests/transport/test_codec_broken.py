"""Replies that no honest client sends: an error with a reason, and the run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedtune.adapters import Entry
from fedtune.transport.bundle import Part, Slot, write_bundle
from fedtune.transport.codecs import encode
from fedtune.transport.coded_records import as_record, bytes_in, facts_of, resend
from fedtune.transport.differences import Form, code
from fedtune.transport.messages import arrays_of, pack
from fedtune.transport.records import config_of
from tests.federation.scripted import in_a_task
from tests.transport.coded import Bench, draw
from tests.transport.tensors import assert_bits


@pytest.fixture(autouse=True)
def _task() -> Iterator[None]:
    with in_a_task():
        yield


Record = ArrayRecord | ConfigRecord | MetricRecord


def with_bytes(data: bytes) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        content["coded"] = as_record(data)

    return change


def mapped(how: Callable[[bytes], bytes]) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        content["coded"] = as_record(how(bytes_in(content) or b""))

    return change


def tensors(named: dict[str, Tensor]) -> Callable[[RecordDict], None]:
    """Whole tensors under any names."""
    return with_bytes(code(named, dict.fromkeys(named, Form("value")), {}).data)


def difference(name: str, entry: Entry, values: Tensor, kind: str = "delta") -> bytes:
    return write_bundle([Part(kind, 64, (Slot(name, entry),), encode(values.reshape(-1), "nf4"))])


A = Entry((9, 17), "float32")
REFUSED: dict[str, Callable[[RecordDict], None]] = {
    "nothing": with_bytes(b""),
    "noise": with_bytes(bytes(range(256)) * 3),
    "half of it": mapped(lambda data: data[: len(data) // 2]),
    "all but a byte": mapped(lambda data: data[:-1]),
    "a byte more": mapped(lambda data: data + b"\0"),
    "a changed byte": mapped(lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]),
    "twice": mapped(lambda data: 2 * data),
    "a difference to what nobody has": with_bytes(difference("arrays/q", A, torch.ones(9, 17))),
    "a difference to another shape": with_bytes(
        difference("arrays/a", Entry((17, 9), "float32"), torch.ones(9, 17))
    ),
    "a difference to another dtype": with_bytes(
        difference("arrays/a", Entry((9, 17), "float16"), torch.ones(9, 17))
    ),
    "too few differences": with_bytes(difference("arrays/a", A, torch.ones(9, 16))),
    "too many differences": with_bytes(difference("arrays/a", A, torch.ones(9, 18))),
    "differences of another dtype": with_bytes(
        difference("arrays/a", A, torch.ones(9, 17).double())
    ),
    "differences of bits of floats": with_bytes(
        difference("arrays/a", A, torch.ones(9, 17), kind="bits")
    ),
    "another kind": with_bytes(difference("arrays/a", A, torch.ones(9, 17), kind="other")),
    "values of another dtype": with_bytes(
        difference("arrays/a", A, torch.ones(9, 17).half(), kind="value")
    ),
    "a record that is plain": tensors({"config/x": torch.ones(3)}),
    "figures as tensors": tensors({"metrics/num-examples": torch.ones(3)}),
}


def change(bench: Bench, how: Callable[[RecordDict], None]) -> list[Message]:
    """A round in which the first client's reply is changed on the way."""

    def deliver(reply: Message) -> list[Message]:
        if reply.metadata.src_node_id == bench.nodes[0]:
            how(reply.content)
        return [reply]

    def work(client: int, content: RecordDict) -> RecordDict:
        reply = honest(client, content)
        reply["metrics"] = MetricRecord({"num-examples": 3})
        return reply

    honest, bench.work = bench.work, work
    bench.network.deliver = deliver
    replies = bench.ask(draw(1))
    bench.network.deliver, bench.work = lambda reply: [reply], honest
    return replies


def assert_goes_on(bench: Bench) -> None:
    for number in (2, 3):
        replies = bench.ask(draw(number))
        assert [len(arrays_of(reply.content)) for reply in replies] == [4, 4]
        for client in range(2):
            assert_bits(bench.seen[client], bench.believed(client))


@pytest.mark.parametrize("how", REFUSED)
@pytest.mark.parametrize("round_before", [False, True])
def test_a_reply_that_cannot_be_decoded_is_an_error(
    tmp_path: Path, how: str, round_before: bool
) -> None:
    bench = Bench(tmp_path, 2)
    if round_before:
        bench.ask(draw(0))
    bad, good = change(bench, REFUSED[how])
    assert bad.has_error()
    assert bad.error.reason.startswith("payload: expected ")
    assert bad.error.code > 8  # Flower's own codes
    assert bad.metadata.src_node_id == bench.nodes[0]
    assert len(arrays_of(good.content)) == 4
    assert bench.coded._held.keys() == set(bench.nodes if round_before else bench.nodes[1:])
    assert_goes_on(bench)


def test_every_changed_byte_is_an_error(tmp_path: Path) -> None:
    """Of every seventh: of index, payload and checksums; some bits of zlib's say nothing."""
    bench, sizes, spared = Bench(tmp_path), [], 0
    change(bench, mapped(lambda data: sizes.append(len(data)) or data))  # type: ignore[func-returns-value]
    for place in range(0, sizes[0] - 20, 7):

        def flip(data: bytes, at: int = place) -> bytes:
            return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]

        (reply,) = change(bench, mapped(flip))
        spared += reply.has_content()
        if reply.has_error():
            assert reply.error.reason.startswith("payload: expected ")
    assert spared <= 1


def put(name: str, record: Record) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        content[name] = record

    return change


def drop(*names: str) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        for name in names:
            del content[name]

    return change


DATA = Array("uint8", (3,), "fedtune.coded", b"abc")
PLAIN = Array("uint8", (3,), "numpy.ndarray", b"abc")
ODD: dict[str, Callable[[RecordDict], None]] = {
    "nothing coded": drop("coded"),
    "nothing at all": drop("coded", "codec", "config", "metrics"),
    "another name": put("coded", ArrayRecord({"other": DATA})),
    "two arrays": put("coded", ArrayRecord({"coded": DATA, "other": DATA})),
    "no array": put("coded", ArrayRecord()),
    "plain arrays": put("coded", ArrayRecord({"coded": PLAIN})),
    "config instead": put("coded", ConfigRecord({"coded": b"abc"})),
    "a tensor without a record": tensors({"x": torch.ones(3)}),
    "a tensor without a name": tensors({"arrays/": torch.ones(3), "/": torch.ones(2)}),
    "a record that nobody knows": tensors({"other/x/y": torch.ones(3)}),
}


@pytest.mark.parametrize("how", ODD)
def test_an_odd_reply_arrives_without_its_parameters(tmp_path: Path, how: str) -> None:
    """Which its caller refuses, as it does without a codec."""
    bench = Bench(tmp_path, 2)
    bench.ask(draw(0))
    bad, good = change(bench, ODD[how])
    assert not (arrays_of(bad.content).keys() & draw(0).keys())
    assert not facts_of(bad.content)
    assert config_of(bad.content) in ({"client": 0}, {})
    assert len(arrays_of(good.content)) == 4
    assert_goes_on(bench)


@pytest.mark.parametrize("how", [drop("codec"), put("codec", MetricRecord({"seconds": 1.0}))])
def test_the_time_it_took_need_not_be_said(
    tmp_path: Path, how: Callable[[RecordDict], None]
) -> None:
    bench = Bench(tmp_path, 2)
    assert [len(arrays_of(reply.content)) for reply in change(bench, how)] == [4, 4]


@pytest.mark.parametrize("record", [ConfigRecord({"a": 1}), MetricRecord(), ArrayRecord()])
def test_the_wish_for_a_whole_message_has_one_name(tmp_path: Path, record: ConfigRecord) -> None:
    bench = Bench(tmp_path, 2)
    bench.ask(draw(0))
    replies = change(bench, put("resend", record))
    assert len(replies) == 2
    assert_goes_on(bench)


def test_a_wish_for_a_message_that_was_not_coded_is_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 2, direction="up")
    for _ in range(2):
        bad, good = change(bench, lambda content: content.update(resend()))
        assert "once more" in bad.error.reason
        assert len(arrays_of(good.content)) == 4
    assert len(bench.network.pushed) == 4


@pytest.mark.parametrize("direction", ["both", "down"])
def test_an_update_of_another_version(tmp_path: Path, direction: str) -> None:
    """Is a difference to what was meant all the same; where it is none, it is refused."""
    bench = Bench(tmp_path, direction=direction)

    def older(content: RecordDict) -> None:
        content.config_records["codec"]["version"] = "another"

    for _ in range(2):
        (reply,) = change(bench, older)
        assert reply.has_error() == (direction == "down")
        assert not bench.coded._held
    assert all(bench.wholes())
    bench.ask(draw(2))
    assert_bits(bench.seen[0], bench.believed())


def test_more_or_other_tensors_than_asked_for_are_for_the_caller_to_refuse(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 2)
    more = {"arrays/a": torch.ones(2), "control/a": torch.ones(2), "arrays/new": torch.ones(2)}
    bad, _ = change(bench, tensors(more))
    assert arrays_of(bad.content).keys() == {"a", "new"}
    assert arrays_of(bad.content, "control").keys() == {"a"}
    assert_goes_on(bench)


@pytest.mark.parametrize("codec", ["bf16", "nf4"])
def test_what_a_client_cannot_encode_is_an_error_with_the_name(tmp_path: Path, codec: str) -> None:
    bench = Bench(tmp_path, codec=codec)

    def work(client: int, content: RecordDict) -> RecordDict:
        params = arrays_of(content)
        params["b"][2, 3] = float("nan")
        return pack(arrays=params)

    honest, bench.work = bench.work, work
    (reply,) = bench.ask(draw(0))
    assert reply.error.reason.startswith("arrays/b: expected finite values")
    bench.work = honest
    bench.ask(draw(1))
    assert_bits(bench.seen[0], bench.believed())
