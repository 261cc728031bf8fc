"""The coded grid: what clients have is what the server thinks, and its callers do not notice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from flwr.app import Message, RecordDict

from fedtune.transport.coded_records import bytes_in, join
from fedtune.transport.messages import SETUP, TRAIN, arrays_of, pack
from fedtune.transport.records import count_bytes, to_arrays
from tests.federation.scripted import in_a_task
from tests.transport.coded import MANIFEST, SHAPES, Bench, added, draw, moved, named, task
from tests.transport.tensors import LOSSY, assert_bits, block_bound


@pytest.fixture(autouse=True)
def _task() -> Iterator[None]:
    with in_a_task():
        yield


@pytest.mark.parametrize("on", ["delta", "weights"])
@pytest.mark.parametrize("codec", LOSSY)
def test_a_client_has_what_the_server_thinks(tmp_path: Path, codec: str, on: str) -> None:
    """Parameters, control variate and terms of the base, over rounds; and what is meant is near."""
    bench = Bench(tmp_path, 2, codec=codec, on=on)
    for number in range(4):
        params, control, base = draw(number), draw(10 + number), draw(number // 2)
        content = pack(
            arrays=params, extras={"control": control}, base=base, config=task(1).record()
        )
        replies = list(
            bench.grid.send_and_receive([Message(content, node, TRAIN) for node in bench.nodes])
        )
        assert not any(reply.has_error() for reply in replies)
        meant = named(params) | named(control, "control") | named(base, "base")
        for client in range(2):
            assert_bits(bench.seen[client], bench.believed(client))
            assert bench.seen[client].keys() == meant.keys()
            for name, tensor in bench.seen[client].items():
                # nf4 and fp4 err by a sixth of a block's largest value, which is below 2 * 4.
                assert float((tensor - meant[name]).abs().max()) < 2 * 4 * 0.18


@pytest.mark.parametrize("codec", ["bf16", "nf4"])
def test_an_update_is_added_to_what_was_meant(tmp_path: Path, codec: str) -> None:
    """Not to what the client had: of its error nothing comes back."""
    bench = Bench(tmp_path, codec=codec)
    for number in range(3):
        params = draw(number, scale=8.0)
        (reply,) = bench.ask(params)
        found, step = arrays_of(reply.content), draw(1000, scale=0.01)
        for name in SHAPES:
            exact = params[name].double() + step[name].double()
            error = (found[name].double() - exact).abs().reshape(-1)
            # The client takes the difference of numbers below 64 in fp32, and so adds the server.
            assert (error <= block_bound(codec, step[name] * 1.01) + 4 * 64 * 2**-24).all()
        lost = (bench.seen[0]["arrays/b"] - params["b"]).abs().max()
        assert float(lost) > 10 * float(block_bound(codec, step["b"]).max())


def test_what_is_not_coded_arrives_as_it_is(tmp_path: Path) -> None:
    """In both directions: one dimension, integers, names that are excluded, small tensors."""
    bench = Bench(tmp_path, min_size=200, exclude=("b",))
    params = {**draw(1), "count": torch.arange(7), "mask": torch.ones(20, 20, dtype=torch.bool)}
    (reply,) = bench.ask(params)
    assert_bits(bench.seen[0], named(params))
    assert_bits(named(arrays_of(reply.content)), bench.sent[0])


@pytest.mark.parametrize("codec", ["bf16", "fp16"])
def test_narrow_tensors_travel_without_loss(tmp_path: Path, codec: str) -> None:
    """bf16 under 16 bits: differences of bits, there and back."""
    bench = Bench(tmp_path, codec=codec)

    def work(client: int, content: RecordDict) -> RecordDict:
        return pack(arrays={n: (1.01 * t).to(t.dtype) for n, t in arrays_of(content).items()})

    bench.work = work
    for number in range(3):
        params = {name: tensor.bfloat16() for name, tensor in draw(number).items()}
        (reply,) = bench.ask(params)
        assert_bits(bench.seen[0], named(params))
        assert_bits(named(arrays_of(reply.content)), bench.sent[0])


def test_a_zero_that_changes_its_sign_travels(tmp_path: Path) -> None:
    bench = Bench(tmp_path, codec="bf16")
    zeros = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in SHAPES.items()}
    bench.ask(zeros)
    bench.ask({name: -tensor for name, tensor in zeros.items()})
    assert all(torch.signbit(tensor).all() for tensor in bench.seen[0].values())


def test_the_error_of_a_message_is_in_the_next_difference(tmp_path: Path) -> None:
    """30 rounds at 4 bits: a client is off by what the codec makes of the last difference alone."""
    bench = Bench(tmp_path)
    params, errors = draw(0), []
    bench.ask(params)
    for number in range(30):
        before = bench.believed()
        params = added(params, draw(50 + number, scale=0.1))
        bench.ask(params)
        for name, tensor in named(params).items():
            off = (bench.seen[0][name].double() - tensor.double()).abs().reshape(-1)
            last = block_bound("nf4", tensor.double() - before[name].double())
            assert (off <= last + 2 * 8 * 2**-24).all()  # two sums of numbers below 8 in fp32
        errors.append(float((bench.seen[0]["arrays/b"] - params["b"]).norm()))
    # Would they add up, the last would be sqrt(30) times the first.
    assert max(errors) < 1.5 * errors[0]


def test_a_round_without_news_costs_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path, exclude=("a",))
    for _ in range(3):
        bench.ask(draw(1))
    sizes = [len(bytes_in(content) or b"") for _, content in bench.network.pushed]
    assert sizes[0] > 4 * 9 * 17
    assert sizes[1] == sizes[2] < 150  # the index alone
    assert_bits(bench.seen[0], bench.believed())


@pytest.mark.parametrize("codec", ["int8", "nf4"])
def test_new_factors_are_never_coarser_than_bf16(tmp_path: Path, codec: str) -> None:
    """Terms of the base always, and all parameters of a method that factorizes anew."""
    bench = Bench(tmp_path, codec=codec)
    for refactors in (False, True):
        bench.restart(refactors=refactors)
        for number in range(3):
            params, base = draw(number), draw(10 + number)
            content = pack(arrays=params, base=base, config=task(1).record())
            list(bench.grid.send_and_receive([Message(content, bench.nodes[0], TRAIN)]))
            fine = named(base, "base") | (named(params) if refactors else {})
            for name, tensor in fine.items():
                assert ((bench.seen[0][name] - tensor).abs() <= tensor.abs() * 2**-8).all()
        if not refactors:
            assert ((bench.seen[0]["arrays/b"] - params["b"]).abs() > params["b"].abs() / 256).any()


# --- directions, and what is counted ---


def test_up_alone(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 2, direction="up")
    for number in range(3):
        params = draw(number)
        replies = bench.ask(params)
        for client, reply in enumerate(replies):
            assert_bits(bench.seen[client], named(params))
            found = arrays_of(reply.content)
            assert not torch.equal(found["a"], bench.sent[client]["arrays/a"])
            assert torch.equal(found["bias"], bench.sent[client]["arrays/bias"])
        assert not bench.coded._held  # nobody needs what a client has
    assert not bench.versions(0)


def test_down_alone(tmp_path: Path) -> None:
    """What has become of the parameters that arrived, added to those that were meant."""
    bench = Bench(tmp_path, direction="down")
    for number in range(3):
        (reply,) = bench.ask(draw(number))
        assert_bits(bench.seen[0], bench.believed())
        meant, seen, sent = named(draw(number)), bench.seen[0], bench.sent[0]
        expected = {name: sent[name] + (meant[name] - seen[name]) for name in sent}
        assert_bits(named(arrays_of(reply.content)), expected)


def test_bytes_are_those_of_both_sides(tmp_path: Path) -> None:
    """By hand: records as they leave and arrive below, and as they would have without a codec."""
    bench = Bench(tmp_path, 2)
    arrived: list[RecordDict] = []

    def deliver(reply: Message) -> list[Message]:
        arrived.append(reply.content)
        return [reply]

    bench.network.deliver = deliver
    raw_up = raw_down = 0
    for number in range(2):
        params = draw(number)
        for client in range(2):
            raw_up += count_bytes(moved(client, pack(arrays=params)))
            raw_down += count_bytes(pack(arrays=params, config=task(1).record()))
        bench.ask(params)
    traffic = bench.grid.traffic
    assert traffic.total == {
        "bytes_up": sum(map(count_bytes, arrived)),
        "bytes_down": sum(count_bytes(content) for _, content in bench.network.pushed),
        "bytes_up_raw": raw_up,
        "bytes_down_raw": raw_down,
    }
    coded = [len(bytes_in(content) or b"") for content in arrived]
    assert min(coded) > 0.5 * (9 * 17 + 4 * 50) + 4 * 6  # half a byte a value; bias and z in fp32
    assert traffic.of(bench.nodes[0]) == traffic.of(bench.nodes[1])
    assert 0 < traffic.codec_s < 60
    # Wire bytes are payload, index and record: the payload is a quarter of what it was in fp32.
    assert all(count_bytes(sent) - len(bytes_in(sent) or b"") < 400 for sent in arrived)


def test_seconds_that_a_client_needed_count(tmp_path: Path) -> None:
    bench = Bench(tmp_path)

    def deliver(reply: Message) -> list[Message]:
        reply.content.config_records["codec"]["seconds"] = 500.0
        return [reply]

    bench.network.deliver = deliver
    bench.ask(draw(1))
    assert 500 < bench.grid.traffic.codec_s < 560


@pytest.mark.parametrize("lie", [float("nan"), float("inf"), -1.0, 1e9, "long", True, [1.0]])
def test_seconds_of_a_client_that_are_none_do_not_count(tmp_path: Path, lie: object) -> None:
    bench = Bench(tmp_path)

    def deliver(reply: Message) -> list[Message]:
        reply.content.config_records["codec"]["seconds"] = lie  # type: ignore[assignment]
        return [reply]

    bench.network.deliver = deliver
    (reply,) = bench.ask(draw(1))
    assert arrays_of(reply.content)
    assert 0 < bench.grid.traffic.codec_s < 60


@pytest.mark.parametrize("kind", [TRAIN, SETUP])
def test_nothing_that_it_was_given_changes(tmp_path: Path, kind: str) -> None:
    bench = Bench(tmp_path)
    bench.coded.begin(draw(1))
    facts = {**task(1).record(), "manifest": MANIFEST.to_json()}
    content = pack(arrays=to_arrays(draw(1)), config=facts)
    before, message = (dict(content), join(content)), Message(content, bench.nodes[0], kind)
    bench.grid.push([message])
    assert message.content is content
    assert dict(content) == before[0]
    assert_bits(join(content), before[1])
