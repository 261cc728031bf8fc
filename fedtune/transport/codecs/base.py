"""What a codec is: a pure map from the values of one tensor to bytes and back.

A codec sees finite values only, flat, on the CPU, and works on `CHUNK` of them at a time: what it
needs besides input and output stays in the cache. One thread does it, so the work on blocks is
numpy's, and torch gets `SERIAL` values a call: more it would share with other threads, and where
another process has their core, wait for them each time. Hosts are little-endian, as is the format.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtune.errors import FrameError

__all__ = [
    "CHUNK",
    "FLOOR",
    "SERIAL",
    "Bytes",
    "Codec",
    "Floats",
    "as_bytes",
    "block_maxima",
    "chunks",
    "convert",
    "empty",
    "fp32_blocks",
    "load",
    "magnitude",
    "refused",
    "store",
    "valid",
]

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

CHUNK = 1 << 16  # values; 256 kB of fp32, which a core's L2 cache holds with its results
SERIAL = 1 << 15  # values
MOST_TEXT = 200  # characters
FLOOR = 2.0**-110  # 7.7e-34: a block without a larger value becomes zeros; 1 / scale stays in fp32


class Codec(ABC):
    """One way to write values.

    Attributes:
        name: What `--codec` calls it.
        number: What a payload calls it.
        limit: Values from here on would become Inf.
        item_bytes: It is for floats of more bytes than this; others lose nothing by going as is.
        block: Values that share a scale.
    """

    name: str
    number: int
    limit: float
    item_bytes: int = 0
    block: int = 1

    def accepts(self, dtype: torch.dtype) -> bool:
        """Whether it is for values of `dtype`."""
        return dtype.is_floating_point and dtype.itemsize > self.item_bytes

    @abstractmethod
    def encode(self, flat: Tensor) -> Iterator[Bytes]:
        """The bytes of finite values (n,), piece by piece; a piece is used before the next."""

    @abstractmethod
    def decode(self, data: Bytes, dtype: torch.dtype, count: int) -> Tensor:
        """`count` values (n,); FrameError, before anything large is made, on other bytes."""


def empty(count: int, dtype: torch.dtype) -> Tensor:
    """Room for values. A large array of numpy comes in huge pages: touched first 5 x as fast."""
    room = np.empty(max(1, count) * dtype.itemsize, np.uint8)
    return torch.from_numpy(room).view(dtype)[:count]


def as_bytes(tensor: Tensor) -> Bytes:
    """The bytes of a contiguous tensor, not copied."""
    flat: Bytes = tensor.reshape(-1).view(torch.uint8).numpy()
    return flat


def load(data: NDArray[Any], into: Tensor) -> Tensor:
    """Copy bytes into a tensor: what is read-only or not aligned is no tensor by itself."""
    np.copyto(as_bytes(into), data)
    return into


def refused(
    expected: str, received: str, fix: str = "Use the same fedtune on both sides"
) -> FrameError:
    """The error of bytes that are no payload; what they say may be long, and is cut."""
    return FrameError(f"payload: expected {_cut(expected)}, received {_cut(received)}. {fix}.")


def _cut(text: str) -> str:
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}..."


def chunks(flat: Tensor, size: int = SERIAL) -> Iterator[Tensor]:
    """The values, `size` at a time, not copied."""
    yield from (flat[start : start + size] for start in range(0, flat.numel(), size))


def convert(flat: Tensor, into: Tensor) -> None:
    """Write the values as those of another dtype."""
    for part, place in zip(chunks(flat), chunks(into), strict=True):
        place.copy_(part)


def fp32_blocks(flat: Tensor, block: int) -> Iterator[Floats]:
    """The values as fp32, (rows, block) a time; zeros fill the last row."""
    scratch = torch.empty(min(CHUNK, flat.numel() + block))
    for part in chunks(flat, CHUNK):
        rows, size = -(-part.numel() // block), part.numel()
        if part.dtype != torch.float32 or size < rows * block:
            convert(part, scratch[:size])
            scratch[size : rows * block] = 0
            part = scratch[: rows * block]
        yield part.numpy().reshape(rows, block)


def block_maxima(blocks: Floats, work: Floats) -> Floats:
    """max|x| of each row; as integers the bits of positive numbers have the same order."""
    bits = np.bitwise_and(blocks.view(np.int32), 0x7FFFFFFF, out=work.view(np.int32))
    largest: Floats = np.maximum.reduce(bits, axis=1).view(np.float32)
    return largest


def magnitude(flat: Tensor) -> float:
    """max|x| without a temporary, NaN where there is one; 0 of no values and of integers."""
    if not flat.numel() or not flat.dtype.is_floating_point:
        return 0.0
    ends = [torch.stack(torch.aminmax(part)) for part in chunks(flat)]
    return float(torch.stack(ends).abs().max())


def valid(flat: Tensor) -> Tensor:
    """The decoded values themselves, which must be finite as encoded ones are, a bool 0 or 1."""
    if flat.dtype == torch.bool and as_bytes(flat).max(initial=0) > 1:
        raise refused("0 or 1 as a bool", "another byte")
    if not math.isfinite(magnitude(flat)):
        raise refused("finite values", "NaN or Inf", "Look for them at the sender")
    return flat


def store(out: Tensor, start: int, values: Floats) -> None:
    """Write fp32 values to their place, rounded to the dtype; padding falls off the end."""
    place = out[start : start + values.size]
    part = values.reshape(-1)[: place.numel()]
    if out.dtype == torch.float32:
        np.copyto(place.numpy(), part)
    else:
        convert(torch.from_numpy(part), place)
