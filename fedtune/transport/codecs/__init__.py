"""Quantized transport of one tensor: `encode` to bytes that say what they are, `decode` them.

Pure: no state, no randomness, arguments stay as they are. Only finite values travel.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fedtune.errors import ConfigError, ManifestError
from fedtune.nearest import nearest
from fedtune.transport.codecs.base import Bytes, Codec, magnitude, refused
from fedtune.transport.codecs.bf16 import Bf16Codec
from fedtune.transport.codecs.fp4 import Fp4Codec
from fedtune.transport.codecs.fp16 import Fp16Codec
from fedtune.transport.codecs.int8 import Int8Codec
from fedtune.transport.codecs.nf4 import Nf4Codec
from fedtune.transport.codecs.none import NoneCodec
from fedtune.transport.codecs.payload import (
    DTYPES,
    MAX_DIMENSIONS,
    MAX_SIZE,
    Header,
    read_payload,
    write_payload,
)
from fedtune.transport.codecs.zstd import ZstdCodec

__all__ = ["CODECS", "Codec", "Encoded", "decode", "encode", "opened"]

# What `--codec` chooses from.
CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (NoneCodec(), Bf16Codec(), Fp16Codec(), Int8Codec(), Nf4Codec(), Fp4Codec())
}
_BY_NAME = {**CODECS, "zstd": ZstdCodec()}
_BY_NUMBER = {codec.number: codec for codec in _BY_NAME.values()}


def encode(tensor: Tensor, codec: str = "none", *, name: str = "tensor") -> bytes:
    """A payload of the values of `tensor`.

    `codec` is a key of `CODECS`, under which integers and bools go as they are, or `zstd`, which is
    for them: for differences of bits (`transport/bits.py`).

    Raises ManifestError with `name` on NaN, Inf and values too large for the codec, ConfigError on
    a codec that is none.
    """
    if codec not in _BY_NAME:
        raise ConfigError(f"--codec: unknown codec {codec!r}. {nearest(codec, CODECS)}")
    tensor = tensor.detach().cpu()
    _check_form(tensor, name)
    flat = tensor.contiguous().view(-1)
    chosen, dtype = _BY_NAME[codec], tensor.dtype
    if dtype.is_floating_point:
        _check_values(flat, chosen, name)
    if not chosen.accepts(dtype):
        chosen = CODECS["none"]
    return write_payload(Header(chosen.number, dtype, tuple(tensor.shape)), chosen.encode(flat))


def decode(payload: bytes | bytearray | memoryview) -> Tensor:
    """The tensor of a payload, on the CPU, of the dtype and shape it was encoded from.

    Raises FrameError on anything but a whole payload of a known codec and version.
    """
    return opened(payload).values()


class Encoded(NamedTuple):
    """A payload with a good header and checksum: what it says it holds, before that is made.

    Attributes:
        codec: name of its codec.
    """

    codec: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    data: Bytes

    def values(self) -> Tensor:
        """As `decode` returns them, and raising what it does."""
        codec = _BY_NAME[self.codec]
        return codec.decode(self.data, self.dtype, math.prod(self.shape)).reshape(self.shape)


def opened(payload: bytes | bytearray | memoryview) -> Encoded:
    """A payload before it is decoded; raises FrameError as `decode` does."""
    header, data = read_payload(payload)
    codec = _BY_NUMBER.get(header.codec)
    if codec is None:
        raise refused(f"codec 0 to {max(_BY_NUMBER)}", f"{header.codec}")
    if not codec.accepts(header.dtype):
        raise refused(f"{header.dtype} under codec none", codec.name)
    return Encoded(codec.name, header.dtype, header.shape, data)


def _check_form(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ManifestError(
            f"{name}: expected a dense tensor of {known}, received {tensor.dtype} "
            f"({tensor.layout}). Convert it first."
        )
    if tensor.dim() > MAX_DIMENSIONS or any(size > MAX_SIZE for size in tensor.shape):
        raise ManifestError(
            f"{name}: expected up to {MAX_DIMENSIONS} dimensions of up to {MAX_SIZE}, received "
            f"{tuple(tensor.shape)}. Cut the tensor."
        )


def _check_values(flat: Tensor, codec: Codec, name: str) -> None:
    largest = magnitude(flat)
    if not math.isfinite(largest):
        raise ManifestError(
            f"{name}: expected finite values, received NaN or Inf. Lower the learning rate, or "
            "look for the batch that made it."
        )
    if flat.dtype.itemsize > codec.item_bytes and largest >= codec.limit:
        raise ManifestError(
            f"{name}: expected magnitudes below {codec.limit:.6g} under --codec {codec.name}, "
            f"received {largest:.6g}. Use --codec bf16 or none."
        )
