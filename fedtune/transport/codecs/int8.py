"""int8: blocks of 256 values, one fp32 step each, codes -127..127.

    step = max|x| / 127    code = round(x / step)    x' = code * step

The largest value always gets the code 127 or -127, nothing clips, and

    |x - x'| <= max|x| / 254 * (1 + 2^-14)

where 2^-14 is four roundings of 2^-24 of max|x|: to fp32, of 1 / step, of x / step and of x'.
Encoding x' again finds the same codes, and the same step: rounded to fp32, s = m / 127 is also
(127 s) / 127, whatever m. 1.0156 bytes a value.
Memory beyond input and payload: 1 MB.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fedtune.transport.codecs.base import (
    CHUNK,
    FLOOR,
    Bytes,
    Codec,
    block_maxima,
    empty,
    fp32_blocks,
    refused,
    store,
)

__all__ = ["Int8Codec"]

BLOCK = 256
STEP = 4  # bytes
LARGEST = torch.finfo(torch.float32).max
RECORD = STEP + BLOCK  # bytes: the step, then the codes


class Int8Codec(Codec):
    """Records of a step and 256 codes; the last one is as short as its block."""

    name, number, block = "int8", 3, BLOCK
    limit = 2.0**128 - 2.0**103  # fp32's

    def encode(self, flat: Tensor) -> Iterator[Bytes]:
        """One pass over chunks of blocks."""
        left, most = flat.numel(), min(CHUNK // BLOCK, -(-flat.numel() // BLOCK))
        room = np.empty((most, BLOCK), np.float32)
        records = np.empty((most, RECORD), np.uint8)
        for blocks in fp32_blocks(flat, BLOCK):
            rows, work = len(blocks), room[: len(blocks)]
            largest = block_maxima(blocks, work)
            steps = np.where(largest >= FLOOR, largest / np.float32(127), np.float32(0))
            inverse = np.divide(1, steps, out=np.zeros_like(steps), where=steps > 0)
            np.rint(np.multiply(blocks, inverse[:, None], out=work), out=work)
            records[:rows, :STEP] = steps.view(np.uint8).reshape(rows, STEP)
            np.copyto(records[:rows, STEP:].view(np.int8), work, casting="unsafe")
            size = min(left, work.size)
            left -= size
            yield records.reshape(-1)[: STEP * rows + size]

    def decode(self, data: Bytes, dtype: torch.dtype, count: int) -> Tensor:
        """One product a value."""
        if len(data) != (size := count + STEP * -(-count // BLOCK)):
            raise refused(f"{size} bytes of int8 blocks", f"{len(data)}")
        out, bound = empty(count, dtype), min(torch.finfo(dtype).max, LARGEST)
        most = min(CHUNK // BLOCK, -(-count // BLOCK))
        room = np.empty((most, BLOCK), np.float32)
        for start in range(0, count, CHUNK):
            piece = data[start // BLOCK * RECORD :][: most * RECORD]
            rows = -(-len(piece) // RECORD)
            if len(piece) < rows * RECORD:
                piece = np.pad(piece, (0, rows * RECORD - len(piece)))
            records, values = piece.reshape(rows, RECORD), room[:rows]
            steps = records[:, :STEP].copy().view("<f4")
            low, high = float(steps.min()), float(steps.max())
            if not 0 <= low <= high < math.inf:  # NaN too
                raise refused("finite steps >= 0", f"{low} to {high}")
            np.copyto(values, records[:, STEP:].view(np.int8))
            with np.errstate(over="ignore"):
                np.multiply(values, steps, out=values)
            if 128 * high > bound:  # a step rounded up may lead beyond the largest
                np.clip(values, -bound, bound, out=values)
            store(out, start, values)
        return out
