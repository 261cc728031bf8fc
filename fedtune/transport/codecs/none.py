"""The values as they are, of any dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fedtune.transport.codecs.base import (
    Bytes,
    Codec,
    as_bytes,
    chunks,
    empty,
    finite,
    load,
    refused,
)

__all__ = ["NoneCodec"]


class NoneCodec(Codec):
    """Lossless: 4 bytes an fp32 value."""

    name, number, limit = "none", 0, math.inf

    def encode(self, flat: Tensor) -> Iterator[Bytes]:
        """The tensor's own bytes."""
        yield from (as_bytes(part) for part in chunks(flat))

    def decode(self, data: Bytes, dtype: torch.dtype, count: int) -> Tensor:
        """A copy of the bytes."""
        if len(data) != (size := count * dtype.itemsize):
            raise refused(f"{size} bytes of values", f"{len(data)}")
        if dtype == torch.bool and count and data.max() > 1:
            raise refused("0 or 1 as a bool", "another byte")
        return finite(load(data, empty(count, dtype)))
