"""Lossless: planes of bytes, each compressed (Zstandard, RFC 8878), for differences of bits.

A plane holds the first bytes of 65536 values, or the second ones, and so on: high bytes of small
integers are nearly all zero, and each plane gets a Huffman table of its own. Matches shorter than 7
bytes cost more than they save there: without them, and with a table of 64 places to look for the
others, level 1 is up to 7 % smaller and 1.5 x as fast.
Memory beyond input and payload: 1 MB.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

import numpy as np
import torch
import zstandard
from torch import Tensor

from fedtune.transport.codecs.base import Bytes, Codec, as_bytes, empty, refused, valid

__all__ = ["ZstdCodec"]

ROWS = 1 << 16  # values of a plane
LENGTH = struct.Struct("<I")
LEAST = LENGTH.size + 10  # bytes: of a frame that says one byte, again and again


class ZstdCodec(Codec):
    """For each run of `ROWS` values a frame per byte of the dtype, the lowest first."""

    name, number, limit = "zstd", 6, math.inf

    def accepts(self, dtype: torch.dtype) -> bool:
        """Any."""
        return True

    def encode(self, flat: Tensor) -> Iterator[Bytes]:
        """Plane by plane."""
        level = zstandard.ZstdCompressionParameters.from_level(1, min_match=7, hash_log=6)
        compressor = zstandard.ZstdCompressor(compression_params=level)
        words = as_bytes(flat).view(f"<u{flat.itemsize}")
        room = np.empty(min(ROWS, len(words)), np.uint8)
        for start in range(0, len(words), ROWS):
            part = words[start : start + ROWS]
            plane = room[: len(part)]
            for shift in range(0, 8 * flat.itemsize, 8):
                np.copyto(plane, part >> shift, casting="unsafe")
                frame = compressor.compress(plane.data)
                yield np.frombuffer(LENGTH.pack(len(frame)) + frame, np.uint8)

    def decode(self, data: Bytes, dtype: torch.dtype, count: int) -> Tensor:
        """Plane by plane; a frame is opened only if it says the size that a plane has."""
        least = LEAST * dtype.itemsize * -(-count // ROWS)
        if len(data) < least:
            raise refused(f"at least {least} bytes of frames", f"{len(data)}")
        decompressor = zstandard.ZstdDecompressor(max_window_size=ROWS)
        out = empty(count, dtype)
        words = as_bytes(out).view(f"<u{dtype.itemsize}")
        for start in range(0, count, ROWS):
            part = words[start : start + ROWS]
            part[:] = 0
            for shift in range(0, 8 * dtype.itemsize, 8):
                frame, data = _cut(data)
                part |= _expand(decompressor, frame, len(part)).astype(words.dtype) << shift
        if len(data):
            raise refused("the end after the last frame", f"{len(data)} bytes more")
        return valid(out)


def _cut(data: Bytes) -> tuple[Bytes, Bytes]:
    """The first frame, and what follows it."""
    if len(data) < LENGTH.size:
        raise refused("the length of a frame", f"{len(data)} bytes")
    end = LENGTH.size + LENGTH.unpack_from(data.data)[0]
    if len(data) < end:
        raise refused(f"a frame of {end - LENGTH.size} bytes", f"{len(data) - LENGTH.size}")
    return data[LENGTH.size : end], data[end:]


def _expand(decompressor: zstandard.ZstdDecompressor, frame: Bytes, size: int) -> Bytes:
    """The bytes of a frame; what it says of its size is room that would be made for it."""
    try:
        if (said := zstandard.frame_content_size(frame.data)) != size:
            raise refused(f"a frame of {size} values", f"{said}")
        plane = decompressor.decompress(frame.data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise refused("a whole frame of zstd", f"{error}", "Send it again") from None
    return np.frombuffer(plane, np.uint8)
