"""Clients of one history share what is encoded; who has the first parameters is sent nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from flwr.app import Message

from fedtune.transport import codec_grid, coder
from fedtune.transport.coded_records import OLD, bytes_in, facts_of
from fedtune.transport.messages import EVALUATE, SETUP, TRAIN, pack
from tests.federation.scripted import in_a_task
from tests.transport.coded import MANIFEST, Bench, draw, named
from tests.transport.tensors import assert_bits


@pytest.fixture(autouse=True)
def _task() -> Iterator[None]:
    with in_a_task():
        yield


# --- one for many ---


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by every encoding at the server."""
    made: list[int] = []
    encode = coder.code

    def counted(*given: object, **more: object) -> object:
        made.append(1)
        return encode(*given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(coder, "code", counted)
    return made


def test_equal_clients_share_one_encoding(tmp_path: Path, calls: list[int]) -> None:
    bench = Bench(tmp_path, 5)
    for number in range(3):
        bench.ask(draw(number))
        assert len(calls) == number + 1
        records = {id(content["coded"]) for _, content in bench.network.pushed[-5:]}
        assert len(records) == 1


def test_clients_of_another_history_get_their_own(tmp_path: Path, calls: list[int]) -> None:
    """Two of five are asked in the second round: two groups in the third, one in the fourth."""
    bench = Bench(tmp_path, 5)
    counts = []
    for number, nodes in enumerate((bench.nodes, bench.nodes[:2], bench.nodes, bench.nodes)):
        calls.clear()
        bench.ask(draw(number), nodes=nodes)
        counts.append(len(calls))
        for client, node in enumerate(bench.nodes):
            if node in nodes:
                assert_bits(bench.seen[client], bench.believed(client))
    assert counts == [1, 1, 2, 2]  # what they have differs from then on, by what nf4 made of it
    first, second = bench.seen[0], bench.seen[4]
    assert not torch.equal(first["arrays/a"], second["arrays/a"])
    assert torch.equal(first["arrays/bias"], second["arrays/bias"])


def test_only_so_many_histories_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[int]
) -> None:
    """Whose is forgotten gets a whole message: of four, asked one by one, the first two."""
    each = 2 * sum(tensor.nbytes for tensor in draw(0).values())  # what they have, and should have
    monkeypatch.setattr(codec_grid, "MOST_BYTES", 3 * each - 1)
    bench = Bench(tmp_path, 4)
    for number, node in enumerate(bench.nodes):
        bench.ask(draw(number), nodes=[node])
    assert bench.coded._held.keys() == set(bench.nodes[2:])
    bench.wholes()
    assert all(reply.has_content() for reply in bench.ask(draw(5)))
    assert bench.wholes() == [True, True, False, False]
    assert len(calls) == 4 + 3


def test_one_history_is_always_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec_grid, "MOST_BYTES", 0)
    bench = Bench(tmp_path, 2)
    bench.ask(draw(1))
    assert bench.coded._held.keys() == {bench.nodes[1]}


def test_messages_of_other_kinds_pass(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    content = pack(arrays=draw(1), config={"round": 1})
    list(bench.grid.send_and_receive([Message(content, bench.nodes[0], "query.other")]))
    bench.restart(kinds={TRAIN})
    list(bench.grid.send_and_receive([Message(content, bench.nodes[0], EVALUATE)]))
    assert [sent for _, sent in bench.network.pushed] == [content, content]


# --- begin ---


def test_a_client_with_the_first_parameters_is_sent_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 3)
    first = draw(1)
    nearly = {**first, "z": first["z"] + 1}
    bench.own = {0: first, 1: nearly, 2: {}}
    bench.coded.begin(first)
    for reply in bench.set_up(*bench.nodes):
        assert not facts_of(reply.content)
        assert reply.content["config"] == {"client": "me"}
    assert [len(bench.versions(client)) for client in range(3)] == [1, 0, 0]
    bench.network.pushed.clear()
    bench.ask(first)
    assert [facts_of(content)[OLD] == "" for _, content in bench.network.pushed] == [
        False,
        True,
        True,
    ]
    sizes = [len(bytes_in(content) or b"") for _, content in bench.network.pushed]
    assert sizes[0] < 150  # the index alone
    assert sizes[1] == sizes[2] > 2 * 9 * 17
    assert_bits(bench.seen[0], named(first))
    for client in (1, 2):
        assert_bits(bench.seen[client], bench.believed(client))
    bench.ask(draw(2))
    for client in range(3):
        assert_bits(bench.seen[client], bench.believed(client))


def test_who_is_set_up_again_goes_on_from_what_he_has_kept(tmp_path: Path) -> None:
    """Though a script that was started again has a model with the first parameters."""
    bench = Bench(tmp_path, 2)
    first = draw(1)
    bench.own = {0: first, 1: first}
    bench.coded.begin(first)
    bench.set_up(*bench.nodes)
    for number in range(3):
        bench.ask(draw(number))
    kept = bench.versions(0)
    assert len(kept) == 2
    bench.forget(1)
    bench.set_up(*bench.nodes)
    assert bench.versions(0) == kept
    bench.network.pushed.clear()
    bench.ask(draw(4))
    assert bench.wholes() == [False, False, True]  # a difference to the last, which is lost at one
    for client in range(2):
        assert_bits(bench.seen[client], bench.believed(client))


def test_a_lost_answer_to_the_set_up_is_given_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.own = {0: draw(1)}
    bench.coded.begin(draw(1))
    bench.network.deliver = lambda reply: []
    content = pack(arrays={}, config={"run": "42", "manifest": MANIFEST.to_json()})
    ids = bench.grid.push([Message(content, bench.nodes[0], SETUP)])
    assert list(bench.grid.pull(ids)) == []
    bench.network.deliver = lambda reply: [reply]
    bench.set_up(*bench.nodes)
    assert bench.coded._held.keys() == set(bench.nodes)


def test_nobody_is_asked_where_nothing_is_coded_downwards(tmp_path: Path) -> None:
    bench = Bench(tmp_path, direction="up")
    bench.coded.begin(draw(1))
    bench.own = {0: draw(1)}
    bench.set_up(*bench.nodes)
    assert not facts_of(bench.network.pushed[0][1])
    assert not bench.versions(0)
