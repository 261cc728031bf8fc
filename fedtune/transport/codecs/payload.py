"""A payload: bytes that say what they are. `docs/wire-format.md` is the format.

Magic "FTQT", version, codec, dtype, number of dimensions, shape as u32 each, data, crc32.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

from fedtune.transport.codecs.base import Bytes, refused

__all__ = ["DTYPES", "Header", "read_payload", "write_payload"]

MAGIC, VERSION = b"FTQT", 1
FIXED = struct.Struct("<4s4B")
CHECKSUM = struct.Struct("<I")
MAX_DIMENSIONS = 64  # torch's
MAX_SIZE = 2**32 - 1  # of one dimension

# A dtype's number is its place.
DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


class Header(NamedTuple):
    """What the data of a payload is."""

    codec: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many values there are."""
        return math.prod(self.shape)


def write_payload(header: Header, data: Iterable[Bytes]) -> bytes:
    """Header, data and checksum in one piece, each copied once."""
    dtype, dimensions = DTYPES.index(header.dtype), len(header.shape)
    head = FIXED.pack(MAGIC, VERSION, header.codec, dtype, dimensions)
    head += struct.pack(f"<{dimensions}I", *header.shape)
    out, crc = io.BytesIO(head), zlib.crc32(head)
    out.seek(0, io.SEEK_END)
    for part in data:
        crc = zlib.crc32(part.data, crc)
        out.write(part.data)
    out.write(CHECKSUM.pack(crc))
    return out.getvalue()


def read_payload(payload: bytes | bytearray | memoryview) -> tuple[Header, Bytes]:
    """Header and data of a whole payload, nothing copied; FrameError on anything else."""
    view = memoryview(payload).cast("B")
    size = len(view)
    if size < FIXED.size + CHECKSUM.size:
        raise refused(f"at least {FIXED.size + CHECKSUM.size} bytes", f"{size}", "Send it again")
    magic, version, codec, dtype, dimensions = FIXED.unpack_from(view)
    if magic != MAGIC:
        raise refused(f"{MAGIC!r} at the start", f"{magic!r}", "Pass what encode() returned")
    if version != VERSION:
        raise refused(f"format {VERSION}", f"{version}")
    start, end = FIXED.size + 4 * dimensions, size - CHECKSUM.size
    stored, computed = CHECKSUM.unpack_from(view, end)[0], zlib.crc32(view[:end])
    if stored != computed:
        received = f"{computed:08x} over {size} bytes: changed, cut or padded on the way"
        raise refused(f"checksum {stored:08x}", received, "Send it again")
    if dtype >= len(DTYPES):
        known = f"a dtype from 0 to {len(DTYPES) - 1}"
        raise refused(known, f"{dtype}")
    if dimensions > MAX_DIMENSIONS or start > end:
        limit = f"a shape of up to {MAX_DIMENSIONS} dimensions"
        raise refused(limit, f"{dimensions} in {size} bytes", "Send it again")
    shape = struct.unpack_from(f"<{dimensions}I", view, FIXED.size)
    if math.prod(max(1, length) for length in shape) >= 2**63:
        raise refused("a shape below 2^63 values", f"{shape}", "Send it again")
    return Header(codec, DTYPES[dtype], shape), np.frombuffer(view, np.uint8)[start:end]
