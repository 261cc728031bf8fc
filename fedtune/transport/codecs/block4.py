"""4 bits a value: blocks of 64, a scale each, codes of a 16-value codebook within [-1, 1].

    scale' = max|x| rounded up (scales.py)    code: book[code] is nearest to x / scale'
    x' = book[code] * scale'

The product is one rounding in fp32, then one to the tensor's dtype: bit for bit what bitsandbytes'
dequantization makes of equal codes and scales. With `gap` the widest distance of two neighbours in
the book,

    |x - x'| <= scale' * (gap / 2 + 2^-15) < max|x| * (gap / 2 + 2^-15) * (1 + 2^-5)

2^-15 is the resolution of the table of 65536 cells in which a code is looked up. 0.5159 bytes a
value. The book holds 1 and -1, so the largest value decodes to the scale itself, and encoding x'
again gives x' (fp16's subnormals aside).
Memory beyond input and payload: 10 % of an fp32 input for the scales, and 1 MB.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtune.transport.codecs.base import (
    CHUNK,
    Bytes,
    Codec,
    block_maxima,
    empty,
    fp32_blocks,
    refused,
    store,
)
from fedtune.transport.codecs.scales import decode_scales, encode_scales, least_bytes

__all__ = ["BLOCK", "Block4Codec"]

BLOCK = 64
HALF, CELLS = 32768, 32640  # v in [-1, 1] lies in cell trunc(v * CELLS) + HALF of 65536


class Block4Codec(Codec):
    """All scales, then two codes a byte, the earlier value in the high half.

    Attributes:
        book: The value of each code, as numbers of fp32.
    """

    block, limit = BLOCK, 2.0**128 - 2.0**103  # fp32's
    book: tuple[float, ...]

    @cached_property
    def _nearest(self) -> Bytes:
        """The code of every cell, (65536,). Of equal values the first code."""
        values, codes = np.unique(np.array(self.book, np.float32), return_index=True)
        cell = np.arange(-HALF, HALF)
        middle = (cell + np.sign(cell) / 2) / CELLS
        near = np.searchsorted((values[:-1] + values[1:]) / 2, middle)
        return codes[near].astype(np.uint8)

    @cached_property
    def _pairs(self) -> NDArray[np.float64]:
        """Two fp32 values for each byte, (256,), in the room of one fp64 number."""
        book = np.array(self.book, np.float32)
        byte = np.arange(256)
        return np.stack([book[byte >> 4], book[byte & 15]], 1).view(np.float64).reshape(-1)

    def encode(self, flat: Tensor) -> Iterator[Bytes]:
        """One pass for the scales, one for the codes."""
        count = flat.numel()
        room = np.empty(min(CHUNK, count + BLOCK), np.float32)
        cells, codes = np.empty(room.shape, np.intp), np.empty(room.shape, np.uint8)
        maxima = [
            block_maxima(blocks, room[: blocks.size].reshape(blocks.shape))
            for blocks in fp32_blocks(flat, BLOCK)
        ]
        parts, scales = encode_scales(np.concatenate([*maxima, np.empty(0, np.float32)]))
        yield from parts
        factors = np.divide(CELLS, scales, out=np.zeros_like(scales), where=scales > 0)
        start = 0
        for blocks in fp32_blocks(flat, BLOCK):
            rows, size = len(blocks), blocks.size
            by_row = factors[start // BLOCK :][:rows, None]
            np.multiply(blocks, by_row, out=room[:size].reshape(blocks.shape))
            np.copyto(cells[:size], room[:size], casting="unsafe")
            cells[:size] += HALF
            np.take(self._nearest, cells[:size], out=codes[:size], mode="clip")
            yield _pack(codes[:size])[: (min(count - start, size) + 1) // 2]
            start += size

    def decode(self, data: Bytes, dtype: torch.dtype, count: int) -> Tensor:
        """Two values a look-up, and one product each."""
        rows, packed = -(-count // BLOCK), (count + 1) // 2
        if len(data) < (size := least_bytes(rows) + packed):
            raise refused(f"at least {size} bytes of blocks", f"{len(data)}")
        scales, data = decode_scales(data, rows)
        if len(data) != packed:
            raise refused(f"{packed} bytes of codes", f"{len(data)}")
        if count and float(scales.max()) > torch.finfo(dtype).max:
            raise refused(f"scales within {dtype}", f"{scales.max():.3g}")
        out = empty(count, dtype)
        room = np.zeros(min(CHUNK, rows * BLOCK), np.float32)
        for start in range(0, count, CHUNK):
            piece = data[start // 2 : (start + CHUNK) // 2]
            by_row = scales[start // BLOCK : (start + CHUNK) // BLOCK, None]
            direct = dtype == torch.float32 and start + CHUNK <= count
            values = out[start : start + CHUNK].numpy() if direct else room
            pairs = values.view(np.float64)[: len(piece)]
            np.take(self._pairs, piece, out=pairs, mode="clip")
            blocks = values[: by_row.size * BLOCK].reshape(-1, BLOCK)
            np.multiply(blocks, by_row, out=blocks)
            if not direct:
                store(out, start, blocks)
        return out


def _pack(codes: Bytes) -> Bytes:
    """Two codes a byte; read as 16 bits, a pair is `second << 8 | first`."""
    pairs = codes.view("<u2")
    packed: Bytes = ((pairs << 4) | (pairs >> 8)).astype(np.uint8)
    return packed
