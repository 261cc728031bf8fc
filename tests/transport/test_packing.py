"""Arrays packed for the way are the same arrays at its end."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedtune._flower.task_message import task_identity
from fedtune.errors import FrameError
from fedtune.transport.packed_grid import PackedGrid
from fedtune.transport.packing import pack_arrays, packed, unpack_arrays


def arrays():
    return ArrayRecord(
        {
            "matrix": Array(np.arange(6, dtype=np.float32).reshape(2, 3)),
            "ünïcode": Array("bfloat16", (2,), "fedtune.raw", b"\x80\x3f\x00\x40"),
            "scalar": Array(np.array(3.5)),
            "empty": Array(np.zeros((0, 4), np.int64)),
        }
    )


def same(one, other):
    assert list(one) == list(other)
    for name in one:
        fields = ("dtype", "shape", "stype", "data")
        assert [getattr(one[name], f) for f in fields] == [getattr(other[name], f) for f in fields]


@pytest.mark.parametrize("record", [arrays(), ArrayRecord()], ids=["some", "none"])
def test_there_and_back(record):
    packed_record = pack_arrays(record)
    assert len(packed_record) == 1
    same(unpack_arrays(packed_record), record)


def test_what_is_not_packed_stays():
    record = arrays()
    assert unpack_arrays(record) is record


@pytest.mark.parametrize("cut", [0, 3, 20, -1])
def test_cut_or_padded_bytes_are_refused(cut):
    (array,) = pack_arrays(arrays()).values()
    for data in (array.data[:cut], array.data + b"x"):
        broken = ArrayRecord({"packed": Array("uint8", (len(data),), array.stype, data)})
        with pytest.raises(FrameError, match="Use the same fedtune"):
            unpack_arrays(broken)


class Loop:
    """A grid whose nodes are one ClientApp function behind the mod `packed`."""

    def __init__(self, function):
        self.function = function
        self.waiting = []

    def get_node_ids(self):
        return [1, 2]

    def push_messages(self, messages):
        self.waiting = list(messages)
        return [str(i) for i, _ in enumerate(self.waiting)]

    def pull_messages(self, message_ids):
        return [packed(message, None, self.function) for message in self.waiting]


def test_a_grid_and_a_mod_are_invisible_to_both_sides():
    seen = []

    def client(message, context):
        seen.append(message.content["arrays"])
        content = RecordDict(
            {"arrays": message.content["arrays"], "config": ConfigRecord({"a": 1})}
        )
        return Message(content, reply_to=message)

    loop = Loop(client)
    grid = PackedGrid(loop)
    with task_identity(run_id=1, node_id=1):
        content = RecordDict({"arrays": arrays(), "config": ConfigRecord({"b": 2})})
        ids = grid.push_messages([Message(content, node, "train") for node in grid.get_node_ids()])
        first, second = (message.content["arrays"] for message in loop.waiting)
        assert first is second  # shared by all messages, so it travels once
        assert list(content["arrays"]) == list(arrays())  # the caller's record is as it was
        replies = list(grid.pull_messages(ids))
    for record in [*seen, *(reply.content["arrays"] for reply in replies)]:
        same(record, arrays())
    assert replies[0].content["config"]["a"] == 1


def test_a_reply_is_packed_only_for_who_wants_it():
    def client(message, context):
        assert set(message.content) == {"config"}
        return Message(RecordDict({"arrays": arrays()}), reply_to=message)

    with task_identity(run_id=1, node_id=1):
        content = RecordDict({"config": ConfigRecord({"b": 2})})
        stock = packed(Message(content, 1, "query.initial"), None, client)
        same(stock.content["arrays"], arrays())

        loop = Loop(client)
        grid = PackedGrid(loop)
        ids = grid.push_messages([Message(content, 1, "query.initial")])
        (reply,) = loop.pull_messages(ids)
        assert len(reply.content["arrays"]) == 1
        (reply,) = grid.pull_messages(grid.push_messages([Message(content, 1, "query.initial")]))
        same(reply.content["arrays"], arrays())


def test_a_broken_reply_does_not_stop_the_server():
    class Broken(Loop):
        def pull_messages(self, message_ids):
            (reply,) = super().pull_messages(message_ids)
            (array,) = reply.content["arrays"].values()
            cut = array.data[:-1]
            broken = ArrayRecord({"packed": Array("uint8", (len(cut),), array.stype, cut)})
            reply.content = RecordDict({"arrays": broken})
            return [reply]

    grid = PackedGrid(Broken(lambda m, _: Message(m.content, reply_to=m)))
    with task_identity(run_id=1, node_id=1):
        content = RecordDict({"arrays": arrays()})
        (reply,) = grid.pull_messages(grid.push_messages([Message(content, 1, "train")]))
    assert list(reply.content["arrays"]) == ["packed"]
