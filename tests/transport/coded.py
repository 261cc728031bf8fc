"""A federation of scripted clients with real files, behind a `CodecGrid` and a bad network."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedtune.adapters import Entry, Manifest
from fedtune.client.codec_link import CodecLink
from fedtune.engines.inline import InlineGrid
from fedtune.transport.codec_grid import CodecGrid
from fedtune.transport.coded_records import OLD, SEPARATOR, facts_of, join, resend
from fedtune.transport.grid import EagerGrid
from fedtune.transport.messages import SETUP, TRAIN, RoundTask, arrays_of, pack
from fedtune.transport.records import to_arrays
from fedtune.transport.settings import CodecSettings
from tests.transport.tensors import assert_bits

SHAPES = {"a": (9, 17), "b": (4, 50), "bias": (5,), "z": ()}
MANIFEST = Manifest(
    peft_type="LORA",
    base_hash="base",
    adapter_config={"peft_type": "LORA", "r": 2},
    entries={name: Entry(shape, "float32") for name, shape in SHAPES.items()},
    export={name: name for name in SHAPES},
)

Tensors = dict[str, Tensor]
# What a client makes of what it was sent.
Work = Callable[[int, RecordDict], RecordDict]


def draw(seed: int, scale: float = 1.0) -> Tensors:
    """Random tensors of the manifest."""
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def added(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Tensors:
    return {name: left[name] + right[name] for name in left}


def task(number: int, resume: int = 0) -> RoundTask:
    return RoundTask("42", number, 9, 1, MANIFEST.hash, 4, 0.0, True, 42, resume_round=resume)


def moved(client: int, content: RecordDict) -> RecordDict:
    """An honest update: a small step that depends on the client."""
    params = arrays_of(content)
    step = draw(1000 + client, scale=0.01)
    new = {name: params[name] + step.get(name, 0) for name in params}
    return pack(arrays=new, config={"client": client})


class Network(InlineGrid):
    """Sees every message and reply; `deliver` decides what of a reply arrives.

    Attributes:
        pushed: contents by node, in order.
        absent: nodes that have left.
        times: how often a message is delivered.
        waiting: messages that no client has worked on.
        loses: which messages do not arrive.
    """

    def __init__(self, client: ClientApp, num_clients: int) -> None:
        super().__init__(client, num_clients)
        self.pushed: list[tuple[int, RecordDict]] = []
        self.absent: set[int] = set()
        self.times: Callable[[Message], int] = lambda message: 1
        self.loses: Callable[[Message], bool] = lambda message: False
        self.waiting = self._queue
        self.deliver: Callable[[Message], Iterable[Message]] = lambda reply: [reply]

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in super().get_node_ids() if node not in self.absent]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        outgoing = list(messages)
        self.pushed += [(message.metadata.dst_node_id, message.content) for message in outgoing]
        ids = list(super().push_messages(outgoing))
        for message_id, message in zip(ids, outgoing, strict=True):
            if self.loses(message):
                del self.waiting[message_id]
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [out for reply in super().pull_messages(message_ids) for out in self.deliver(reply)]

    def _run(self, message: Message) -> Message:
        return [super(Network, self)._run(message) for _ in range(self.times(message))][-1]


class Bench:
    """Clients of one directory each, and the grids above them.

    Attributes:
        seen: all tensors of the last request of each client, as it has opened it.
        sent: all tensors of its last reply, before they are encoded.
        own: the parameters that its model has before the run.
        work: what a client answers.
        opened: called with each request and what its client has made of it.
    """

    def __init__(self, directory: Path, clients: int = 1, **settings: Any) -> None:
        self.settings = CodecSettings(**{"codec": "nf4", "min_size": 1, **settings})
        self.directory = directory
        self.seen: dict[int, Tensors] = {}
        self.sent: dict[int, Tensors] = {}
        self.own: dict[int, Tensors] = {}
        self.asked: set[str] = set()
        self.work: Work = moved
        self.opened: Callable[[Message, RecordDict], None] = lambda message, content: None
        self.network = Network(self._app(), clients)
        self.nodes = list(self.network.get_node_ids())
        self.restart()

    def restart(self, **given: Any) -> None:
        """A new server."""
        self.coded = CodecGrid(self.network, self.settings, **given)
        self.grid = EagerGrid(self.coded, poll_interval_s=0.0, wire=self.coded.wire)

    def forget(self, client: int) -> None:
        """A client loses its files."""
        shutil.rmtree(self.files(client), ignore_errors=True)

    def files(self, client: int) -> Path:
        return self.directory / f"client-{client}"

    def versions(self, client: int) -> list[Path]:
        return sorted(self.files(client).glob("version-*"))

    def ask(
        self,
        params: Mapping[str, Tensor],
        number: int = 1,
        *,
        nodes: Iterable[int] = (),
        **more: Any,
    ) -> list[Message]:
        """One round; the replies of all that answer."""
        record = to_arrays(params)
        messages = [
            Message(pack(arrays=record, config=task(number, **more).record()), node, TRAIN)
            for node in nodes or self.nodes
        ]
        self.asked |= set(self.grid.push(messages))
        return self.replies()

    def replies(self) -> list[Message]:
        """Let every client work on what there is for it; all replies."""
        found: list[Message] = []
        for _ in range(100):  # more would have no end
            if not self.network.waiting:
                return found
            found += list(self.grid.pull(self.asked))
        raise AssertionError(f"{len(self.network.waiting)} messages wait on")

    def set_up(self, *nodes: int) -> list[Message]:
        content = {"run": "42", "manifest": MANIFEST.to_json()}
        messages = [Message(pack(arrays={}, config=content), node, SETUP) for node in nodes]
        return list(self.grid.send_and_receive(messages))

    def wholes(self) -> list[bool]:
        """Of each message since the last look, whether it was whole."""
        found = [facts_of(content)[OLD] == "" for _, content in self.network.pushed]
        self.network.pushed.clear()
        return found

    def assert_right(self, replies: list[Message], seed: int) -> None:
        """All have answered, have what the server thinks, and that is near `draw(seed)`."""
        assert [reply.has_content() for reply in replies] == [True] * len(self.nodes)
        for client in range(len(self.nodes)):
            assert_bits(self.seen[client], self.believed(client))
            for name, tensor in draw(seed).items():
                # A sixth of the largest difference, of two values below 4.
                off = (self.seen[client][f"arrays/{name}"] - tensor).abs().max()
                assert float(off) < 8 * 0.18

    def assert_goes_on(self, *, whole: int = 0) -> None:
        """The next round is right, with so many whole messages; the one after it has none."""
        self.wholes()
        self.assert_right(self.ask(draw(7)), 7)
        assert sum(self.wholes()) == whole
        self.assert_right(self.ask(draw(8)), 8)
        assert self.wholes() == [False] * len(self.nodes)

    def believed(self, client: int = 0) -> Tensors:
        """What the server holds for what a client has."""
        return dict(self.coded._held[self.nodes[client]].received)

    def _app(self) -> ClientApp:
        app = ClientApp()

        @app.train()
        def train(message: Message, context: Context) -> Message:
            client, link = self._link(context)
            opened = link.open(message.content)
            if opened is None:
                return Message(resend(), reply_to=message)
            self.seen[client] = join(opened.content)
            self.opened(message, opened.content)
            reply = self.work(client, opened.content)
            self.sent[client] = join(reply)
            return Message(opened.seal(reply), reply_to=message)

        @app.evaluate()
        def evaluate(message: Message, context: Context) -> Message:
            client, link = self._link(context)
            opened = link.open(message.content)
            if opened is None:
                return Message(resend(), reply_to=message)
            self.seen[client] = join(opened.content)
            return Message(opened.seal(pack(metrics={"loss": 1.0})), reply_to=message)

        @app.query("setup")
        def setup(message: Message, context: Context) -> Message:
            opened = self._link(context)[1].open(message.content)
            assert opened is not None
            return Message(opened.seal(pack(config={"client": "me"})), reply_to=message)

        return app

    def _link(self, context: Context) -> tuple[int, CodecLink]:
        client = int(context.node_config["partition-id"])
        return client, CodecLink(self.files(client), lambda: self.own.get(client, {}))


def named(params: Mapping[str, Tensor], record: str = "arrays") -> Tensors:
    """As a version names them."""
    return {f"{record}{SEPARATOR}{name}": tensor for name, tensor in params.items()}
