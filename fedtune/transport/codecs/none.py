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
    load,
    refused,
    valid,
)

__all__ = ["NoneCodec"]


class NoneCodec(Codec):
    """Lossless: 4 bytes an fp32 value."""

    name, number, limit = "none", 0, math.inf

    def accepts(self, dtype: torch.dtype) -> bool:
        """Any."""
        return True

    def encode(self, flat: Tensor) -> Iterator[Bytes]:
        """The tensor's own bytes."""
        yield from (as_bytes(part) for part in chunks(flat))

    def decode(self, data: Bytes, dtype: torch.dtype, count: int) -> Tensor:
        """A copy of the bytes."""
        if len(data) != (size := count * dtype.itemsize):
            raise refused(f"{size} bytes of values", f"{len(data)}")
        return valid(load(data, empty(count, dtype)))
