"""The eager grid: replies one by one, none of them kept, every byte counted, a limit in time."""

from __future__ import annotations

import gc
import time
import weakref
from collections import Counter
from collections.abc import Iterable

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.engines.inline import InlineGrid
from fedtune.server.checkpoint import ServerState
from fedtune.transport.grid import EagerGrid
from fedtune.transport.messages import TRAIN, Member, RoundTask, pack
from fedtune.transport.records import count_bytes, to_arrays
from fedtune.transport.traffic import Traffic
from tests.federation.scripted import MANIFEST, Script, first_params, in_a_task, serve
from tests.federation.small import central, result_of, server_run

CLIENTS = 50


class Census(InlineGrid):
    """Counts the replies that are alive each time another one is born."""

    def __init__(self, client: ClientApp, num_clients: int, at_once: int = 1) -> None:
        super().__init__(client, num_clients)
        self.at_once = at_once
        self.births: list[weakref.ref[Message]] = []
        self.most = 0

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = super().pull_messages(message_ids)
        self.births += [weakref.ref(reply) for reply in replies]
        self.most = max(self.most, sum(birth() is not None for birth in self.births))
        return replies


def echo(app: ClientApp | None = None) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(pack(arrays=first_params(), config={"round": 1}), reply_to=message)

    return app


def asks(grid: EagerGrid) -> list[Message]:
    content = pack(arrays=first_params(), config={"round": 1})
    return [Message(content, node, TRAIN) for node in grid.get_node_ids()]


def test_replies_are_folded_as_they_arrive_and_dropped() -> None:
    """Without the garbage collector: reference counts alone free a reply before the next is made.

    Two at most: the new one, and the last one where a loop variable still holds it.
    """
    script = Script()
    with in_a_task():
        census = Census(script.app(), CLIENTS)
        grid = EagerGrid(census)
        names = {node: f"client-{k:02d}" for k, node in enumerate(grid.get_node_ids())}
        members = [Member(node, name) for node, name in names.items()]
        workflow = central(grid)
        state = ServerState(0, first_params(), {}, MANIFEST)
        gc.collect()
        gc.disable()
        try:
            played = workflow.play(1, 1, members, state)
        finally:
            gc.enable()
    assert len(census.births) == len(played.figures["replies"]) == CLIENTS
    assert census.most <= 2
    assert sum(birth() is not None for birth in census.births) == 0


def test_a_reply_is_handed_out_before_the_next_client_runs() -> None:
    """Eager: the caller sees reply k when only k clients have run."""
    ran: list[int] = []
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        ran.append(int(context.node_config["partition-id"]))
        return Message(RecordDict(), reply_to=message)

    with in_a_task():
        grid = EagerGrid(InlineGrid(app, 5))
        for seen, _ in enumerate(grid.send_and_receive(asks(grid)), start=1):
            assert len(ran) == seen
    assert ran == [0, 1, 2, 3, 4]


def test_no_time_is_spent_waiting_when_replies_are_there() -> None:
    """Fifty clients, a poll every 10 s: only an empty pull sleeps."""
    with in_a_task():
        grid = EagerGrid(InlineGrid(echo(), CLIENTS), poll_interval_s=10)
        started = time.monotonic()
        assert len(list(grid.send_and_receive(asks(grid)))) == CLIENTS
    assert time.monotonic() - started < 5


class Deaf(InlineGrid):
    """Runs nothing."""

    pulls = 0

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.pulls += 1
        return []


def test_a_grid_that_never_answers_ends_at_the_time_limit() -> None:
    with in_a_task():
        deaf = Deaf(echo(), 2)
        grid = EagerGrid(deaf, poll_interval_s=0.02)
        started = time.monotonic()
        assert list(grid.send_and_receive(asks(grid), timeout=0.2)) == []
        seconds = time.monotonic() - started
    assert 0.2 <= seconds < 1.5  # the limit, at most one poll, and a busy machine
    assert 2 <= deaf.pulls <= 12
    assert grid.wait_s >= 0.15


def test_replies_that_came_in_time_are_kept_when_others_do_not() -> None:
    class Half(InlineGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            return super().pull_messages(set(message_ids) - {"m2"})

    with in_a_task():
        grid = EagerGrid(Half(echo(), 3), poll_interval_s=0.02)
        replies = list(grid.send_and_receive(asks(grid), timeout=0.2))
    assert [reply.metadata.src_node_id for reply in replies] == [2, 4]


class Lazy(InlineGrid):
    """Makes each reply when it is asked for."""

    made = 0

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = [
            reply for sent in message_ids for reply in super(Lazy, self).pull_messages([sent])
        ]
        for reply in replies:
            self.made += 1
            yield reply


def test_replies_that_are_there_are_decoded_one_by_one() -> None:
    with in_a_task():
        lazy = Lazy(echo(), 5)
        grid = EagerGrid(lazy)
        ids = grid.push(asks(grid))
        counts = [lazy.made for _ in grid.pull(ids)]
    assert counts == [1, 2, 3, 4, 5]


def test_who_stops_early_finds_the_others_later() -> None:
    with in_a_task():
        grid = EagerGrid(Lazy(echo(), 5))
        ids = grid.push(asks(grid))
        pulled = grid.pull(ids)
        first = next(pulled)
        pulled.close()  # type: ignore[attr-defined]
        others = list(grid.pull(ids))
    nodes = [grid.node_of(reply) for reply in (first, *others)]
    assert sorted(nodes) == grid.get_node_ids()


def test_nothing_to_send_is_nothing_to_wait_for() -> None:
    with in_a_task():
        assert list(EagerGrid(InlineGrid(echo(), 3)).send_and_receive([])) == []


def test_traffic_counts_bytes_of_both_directions() -> None:
    """Per message: array payloads and names, scalars as 8 bytes; errors carry no records."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            raise RuntimeError("down")
        return Message(pack(arrays={"w": torch.ones(7)}, config={"ok": 1}), reply_to=message)

    with in_a_task():
        grid = EagerGrid(InlineGrid(app, 3))
        messages = asks(grid)
        down = count_bytes(messages[0].content)
        replies = list(grid.send_and_receive(messages))
    assert [reply.has_error() for reply in replies] == [False, True, False]
    header = len(to_arrays({"w": torch.ones(7)})["w"].data) - 4 * 7  # numpy's, 128 bytes
    assert header == 128
    assert down == 2 * (1 + 128) + 4 * (2 * 3 + 3) + len("round") + 8
    up = 1 + 128 + 28 + len("ok") + 8
    nodes = grid.get_node_ids()
    each, replied = Counter(dict.fromkeys(nodes, down)), Counter({nodes[0]: up, nodes[2]: up})
    assert grid.traffic == Traffic(each, replied, each, replied)
    assert grid.traffic.total == {
        "bytes_up": 2 * up,
        "bytes_down": 3 * down,
        "bytes_up_raw": 2 * up,
        "bytes_down_raw": 3 * down,
    }


@pytest.mark.parametrize("clients", [1, 3])
def test_rounds_record_their_traffic(clients: int) -> None:
    """Round 0 distributes manifest and statics; scoring the pooled rows is no traffic."""
    state = result_of(serve(server_run(clients, num_rounds=2), Script()))
    first, one, two = state.history
    reply = pack(
        arrays=first_params(),
        metrics=dict.fromkeys(
            ["num-examples", "num-tokens", "num-steps", "train-loss", "train-s"], 1
        ),
        config={"client": "client-0", "round": 1, "manifest": MANIFEST.hash},
    )
    task = RoundTask("42", 1, 2, 1, MANIFEST.hash, 4, 0.0, True, 42)
    sent = pack(arrays=first_params(), config=task.record())
    setup = pack(arrays={}, config={"run": "42", "manifest": MANIFEST.to_json()})
    name = pack(config={"client": "client-0"})
    assert first["bytes_down"] == clients * count_bytes(setup)
    assert first["bytes_up"] == clients * count_bytes(name)
    assert one["bytes_up"] == two["bytes_up"] == clients * count_bytes(reply)
    assert one["bytes_down"] == clients * count_bytes(sent)
    assert two["bytes_down"] - one["bytes_down"] == clients * 8  # one round to keep is named
    for record in state.history:
        assert (record["bytes_up_raw"], record["bytes_down_raw"]) == (
            record["bytes_up"],
            record["bytes_down"],
        )
