"""All arrays of a record as one, on the way through a deployment.

Flower moves every array in requests of its own, from process to process: 25 ms of CPU time there
and back, for each array and client. An adapter has hundreds. Packed, they travel as one array of
bytes: a JSON index of names, types and sizes, then the arrays' own bytes, untouched.

Only a server with a `PackedGrid` gets packed replies; a stock one still reads a site's arrays.
Loads no torch.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator

from flwr.app import Array, ArrayRecord, Context, Message, RecordDict

from fedtune.errors import FrameError

__all__ = ["MARK", "convert", "pack_arrays", "packed", "unpack_arrays"]

NAME, STYPE = "packed", "fedtune.packed"
MARK = "packed"  # record of a message without arrays, whose reply should come packed
LENGTH = struct.Struct(">I")


def pack_arrays(record: ArrayRecord) -> ArrayRecord:
    """One array that holds all of `record`."""
    index = [
        [name, array.dtype, list(array.shape), array.stype, len(array.data)]
        for name, array in record.items()
    ]
    text = json.dumps(index).encode()
    data = b"".join([LENGTH.pack(len(text)), text, *(array.data for array in record.values())])
    return ArrayRecord({NAME: Array("uint8", (len(data),), STYPE, data)})


def unpack_arrays(record: ArrayRecord) -> ArrayRecord:
    """What was packed; a record that is not packed is returned as it is. Raises FrameError."""
    if not _is_packed(record):
        return record
    (array,) = record.values()
    try:
        return ArrayRecord(dict(_unpack(array.data)))
    except Exception as problem:  # bytes from outside may be wrong in any way
        raise FrameError(
            f"arrays: expected {len(array.data)} bytes with an index, received others "
            f"({type(problem).__name__}: {problem}). Use the same fedtune on both sides."
        ) from None


def packed(message: Message, context: Context, call_next: Callable[..., Message]) -> Message:
    """A mod of a ClientApp: unpack what comes packed, and pack the reply to it."""
    content = message.content
    wanted = MARK in content or any(map(_is_packed, content.array_records.values()))
    content = convert(content, unpack_arrays)
    content.pop(MARK, None)
    message.content = content
    reply = call_next(message, context)
    if wanted and reply.has_content():
        reply.content = convert(reply.content, pack_arrays)
    return reply


def convert(content: RecordDict, change: Callable[[ArrayRecord], ArrayRecord]) -> RecordDict:
    """A copy of `content` with every array record changed; other records are shared."""
    return RecordDict(
        {
            name: change(record) if isinstance(record, ArrayRecord) else record
            for name, record in content.items()
        }
    )


def _is_packed(record: ArrayRecord) -> bool:
    return [array.stype for array in record.values()] == [STYPE]


def _unpack(data: bytes) -> Iterator[tuple[str, Array]]:
    (length,) = LENGTH.unpack_from(data)
    start = LENGTH.size + length
    for name, dtype, shape, stype, size in json.loads(data[LENGTH.size : start]):
        if not 0 <= size <= len(data) - start:
            raise ValueError(f"{name} is cut off")
        yield name, Array(dtype, tuple(shape), stype, data[start : start + size])
        start += size
    if start != len(data):
        raise ValueError(f"{len(data) - start} bytes too many")
