"""Each value in 16 bits, rounded to nearest, ties to even; what bf16.py and fp16.py share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fedtune.transport.codecs.base import (
    SERIAL,
    Bytes,
    Codec,
    as_bytes,
    chunks,
    empty,
    load,
    refused,
    valid,
)

__all__ = ["HalfCodec"]


class HalfCodec(Codec):
    """2 bytes a value; tensors of 16 bits and less go as they are."""

    item_bytes = 2
    wire: torch.dtype

    def encode(self, flat: Tensor) -> Iterator[Bytes]:
        """A conversion, chunk by chunk."""
        scratch = torch.empty(min(SERIAL, flat.numel()), dtype=self.wire)
        yield from (as_bytes(scratch[: len(part)].copy_(part)) for part in chunks(flat))

    def decode(self, data: Bytes, dtype: torch.dtype, count: int) -> Tensor:
        """The conversion back, exact."""
        if len(data) != 2 * count:
            raise refused(f"{2 * count} bytes of values", f"{len(data)}")
        out = empty(count, dtype)
        scratch = torch.empty(min(SERIAL, count), dtype=self.wire)
        for start in range(0, count, SERIAL):
            part = out[start : start + SERIAL]
            size = part.numel()
            part.copy_(load(data[2 * start : 2 * (start + size)], scratch[:size]))
        return valid(out)
