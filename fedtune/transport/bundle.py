"""All coded tensors of a message in one piece of bytes; `docs/wire-format.md` is the format.

Magic "FTQB", version, length of the index, index (JSON, zlib), payloads one after the other. The
index says which tensors a payload holds; small ones share one, each from a multiple of `align` on,
so that no block of a codec spans two of them.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fedtune.adapters import Entry
from fedtune.errors import FrameError
from fedtune.transport.codecs.base import refused
from fedtune.transport.codecs.payload import MAX_DIMENSIONS, MAX_SIZE

__all__ = ["Part", "Slot", "read_bundle", "write_bundle"]

MAGIC, VERSION = b"FTQB", 1
FIXED = struct.Struct("<4sBI")
MAX_VALUES = 2**59  # of a tensor; what numpy and torch can count the bytes of
MAX_INDEX_BYTES = 2**24  # decompressed; 100 bytes a tensor, and some times as much in memory
MAX_EXPANSION = 256  # of a compressed index; names of tensors come to 60


class Slot(NamedTuple):
    """One tensor's place in a payload."""

    name: str
    entry: Entry

    @property
    def numel(self) -> int:
        """How many values it has."""
        return math.prod(self.entry.shape)


class Part(NamedTuple):
    """A payload and the tensors in it.

    Attributes:
        kind: what the values are (`differences.py`).
        align: every tensor starts at a multiple of this.
        payload: as `codecs.encode` wrote it, (n,) values; empty for the kind `same`.
    """

    kind: str
    align: int
    slots: tuple[Slot, ...]
    payload: bytes | memoryview

    def places(self) -> Iterable[tuple[Slot, int]]:
        """Each tensor and the index of its first value."""
        start = 0
        for slot in self.slots:
            yield slot, start
            start += -(-slot.numel // self.align) * self.align


def write_bundle(parts: Sequence[Part]) -> bytes:
    """As bytes, each payload copied once."""
    rows = [
        [
            part.kind,
            part.align,
            len(part.payload),
            [[slot.name, *slot.entry] for slot in part.slots],
        ]
        for part in parts
    ]
    text = json.dumps(rows).encode()
    index = zlib.compress(text, 9)
    if len(text) > MAX_EXPANSION * len(index):
        index = zlib.compress(text, 0)
    head = FIXED.pack(MAGIC, VERSION, len(index))
    return b"".join([head, index, *(part.payload for part in parts)])


def read_bundle(data: bytes) -> list[Part]:
    """Inverse of `write_bundle`, payloads not copied; FrameError on anything else."""
    try:
        return _read(data)
    except FrameError:
        raise
    except Exception as problem:  # bytes from outside may be wrong in any way
        received = f"{len(data)} bytes that are none ({type(problem).__name__}: {problem})"
        raise refused("a bundle of tensors", received) from None


def _read(data: bytes) -> list[Part]:
    magic, version, length = FIXED.unpack_from(data)
    if magic != MAGIC:
        raise refused(f"{MAGIC!r} at the start of a bundle", f"{magic!r}")
    if version != VERSION:
        raise refused(f"bundle format {VERSION}", f"{version}")
    view, start = memoryview(data), FIXED.size + length
    unpacker = zlib.decompressobj()
    most = min(MAX_INDEX_BYTES, MAX_EXPANSION * length)
    text = unpacker.decompress(view[FIXED.size : start], most)
    if not unpacker.eof or unpacker.unused_data:
        raise ValueError("the index is cut off, too long or padded")
    parts = []
    for kind, align, size, slots in json.loads(text):
        if not _is_size(size, len(data) - start) or not _is_size(align, MAX_SIZE) or not align:
            raise ValueError("a payload is cut off")
        read = tuple(
            Slot(str(name), Entry(_shape(shape), str(dtype))) for name, shape, dtype in slots
        )
        parts.append(Part(str(kind), align, read, view[start : start + size]))
        start += size
    if start != len(data):
        raise ValueError(f"{len(data) - start} bytes too many")
    names = [slot.name for part in parts for slot in part.slots]
    if len(set(names)) < len(names):
        raise ValueError("a tensor comes twice")
    return parts


def _shape(sizes: list[int]) -> tuple[int, ...]:
    if len(sizes) > MAX_DIMENSIONS or not all(_is_size(size, MAX_SIZE) for size in sizes):
        raise ValueError("a shape that is none")
    if math.prod(max(1, size) for size in sizes) > MAX_VALUES:
        raise ValueError("a shape beyond all memory")
    return tuple(sizes)


def _is_size(number: object, most: int) -> bool:
    return type(number) is int and 0 <= number <= most
