"""Any history of losses: a client never works on another model than the server thinks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from flwr.app import Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.transport.codec_grid import CodecGrid
from fedtune.transport.coded_records import OLD, facts_of, join
from fedtune.transport.messages import TRAIN, arrays_of, pack
from fedtune.transport.records import to_arrays
from tests.federation.scripted import in_a_task
from tests.transport.coded import SHAPES, Bench, draw, moved, named, task
from tests.transport.tensors import assert_bits

CLIENTS = 2
SETS = [draw(seed) for seed in range(4)]
STEPS = [draw(1000 + client, scale=0.01) for client in range(CLIENTS)]
FATES = ["fine", "not asked", "lost message", "lost reply", "late reply", "reply twice",
         "message twice", "fails", "asks again", "lost whole message"]  # fmt: skip
EVENTS = ["nothing", "files lost", "file damaged", "server restarts", "node away"]


class Step(NamedTuple):
    """One round: what happens before it, to whom; which parameters; each client's fate."""

    event: str
    whom: int
    params: int
    fates: tuple[str, ...]


class Watched(CodecGrid):
    """Knows every message that it ever made."""

    def _coded(self, message: Message, *given: Any) -> Any:
        flight = super()._coded(message, *given)
        made[id(flight.first)] = flight
        return flight


made: dict[int, Any] = {}


class Play:
    """Goes through a history, and checks every message that a client opens and every reply."""

    def __init__(self, directory: Path) -> None:
        self.bench = Bench(directory, CLIENTS)
        self.restart()
        self.fates = dict.fromkeys(self.bench.nodes, "fine")
        self.late: list[Message] = []
        self.meant: dict[str, Mapping[str, Any]] = {}  # by id of a message
        self.bench.network.loses = self.loses
        self.bench.network.deliver = self.deliver
        self.bench.work = self.work
        self.bench.opened = self.opened
        self.messages = 0

    def restart(self) -> None:
        self.bench.restart()
        self.bench.coded = Watched(self.bench.network, self.bench.settings)
        self.bench.grid.grid = self.bench.coded

    def loses(self, message: Message) -> bool:
        fate, whole = self.fates[message.metadata.dst_node_id], facts_of(message.content)[OLD] == ""
        return fate == "lost message" or (fate == "lost whole message" and whole)

    def deliver(self, reply: Message) -> list[Message]:
        match self.fates[reply.metadata.src_node_id]:
            case "lost reply":
                return []
            case "late reply":
                self.late.append(reply)
                return []
            case "reply twice":
                return [reply, reply]
            case "asks again" if reply.has_content():
                reply.content = RecordDict({"resend": facts_of(reply.content)})
        return [reply]

    def work(self, client: int, content: RecordDict) -> RecordDict:
        if self.fates[self.bench.nodes[client]] == "fails":
            raise RuntimeError("no rows")
        return moved(client, content)

    def opened(self, message: Message, content: RecordDict) -> None:
        """To the bit what the server thinks, and as near to what was meant as the codec can be.

        nf4 errs by e = 0.157 of a difference at most. That is to what the client has, so that
        an error is below e (D + e D + e e D ...) = 0.187 D, D the largest distance of two sets.
        """
        self.messages += 1
        flight, seen = made[id(message)], join(content)
        believed = flight.version.received
        assert_bits(seen, {name: believed[name] for name in seen})
        for name, tensor in join(flight.content).items():
            assert float((seen[name] - tensor).abs().max()) <= 0.187 * LARGEST

    def check(self, reply: Message) -> None:
        """A reply with parameters is the client's step from what was meant, but for nf4's error."""
        if reply.has_error() or not arrays_of(reply.content):
            return
        meant = self.meant[reply.metadata.reply_to_message_id]
        step = STEPS[self.bench.nodes.index(self.bench.grid.node_of(reply))]
        for name, tensor in arrays_of(reply.content).items():
            off = tensor - meant[name] - step[name]
            # nf4's of the step, and sums of numbers below 8 in fp32.
            assert float(off.abs().max()) < 0.157 * float(step[name].abs().max()) + 4 * 8 * 2**-24

    def go(self, step: Step) -> None:
        """One step."""
        bench, node = self.bench, self.bench.nodes[step.whom]
        bench.network.absent = {node} if step.event == "node away" else set()
        bench.grid.get_node_ids()
        if step.event == "files lost":
            bench.forget(step.whom)
        elif step.event == "file damaged":
            for path in bench.versions(step.whom):
                data = bytearray(path.read_bytes())
                data[len(data) // 2] ^= 1
                path.write_bytes(data)
        elif step.event == "server restarts":
            self.restart()
        self.fates = dict(zip(bench.nodes, step.fates, strict=True))
        twice = [n for n, fate in self.fates.items() if fate == "message twice"]
        bench.network.times = lambda message: 1 + (message.metadata.dst_node_id in twice)
        late, self.late = self.late, []
        record = to_arrays(SETS[step.params])
        messages = [
            Message(pack(arrays=record, config=task(1).record()), n, TRAIN)
            for n, fate in self.fates.items()
            if fate != "not asked"
        ]
        ids = bench.grid.push(messages)
        self.meant |= dict.fromkeys(ids, SETS[step.params])
        bench.asked |= set(ids)
        for reply in late:
            taken = bench.coded._take(reply)
            if taken is not None:
                self.check(taken)
        for reply in bench.replies():
            self.check(reply)


LARGEST = max(
    float((one[name] - other[name]).abs().max())
    for one in SETS
    for other in SETS
    for name in SHAPES
)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(
        st.builds(
            Step,
            st.sampled_from(EVENTS),
            st.integers(0, CLIENTS - 1),
            st.integers(0, len(SETS) - 1),
            st.tuples(*[st.sampled_from(FATES)] * CLIENTS),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_no_client_ever_works_on_another_model(steps: list[Step]) -> None:
    """And after whatever has happened, a calm round mends all: in the second nothing is whole."""
    made.clear()
    with TemporaryDirectory() as directory, in_a_task():
        play = Play(Path(directory))
        for step in steps:
            play.go(step)
        before = play.messages
        for params in (0, 1):
            play.bench.network.pushed.clear()
            play.go(Step("nothing", 0, params, ("fine",) * CLIENTS))
        assert play.messages == before + 2 * CLIENTS
        assert play.bench.wholes() == [False] * CLIENTS
        for client in range(CLIENTS):
            seen = play.bench.seen[client]
            assert_bits(seen, play.bench.believed(client))
            assert seen.keys() == named(SETS[1]).keys()
