"""Differences of bit patterns: exact, and small where values hardly moved.

    difference = fold(bits(new) - bits(old))        fold: 0, -1, 1, -2, 2 ... -> 0, 1, 2, 3, 4 ...

modulo 2^bits, so `bit_sum` gives back every pattern, -0.0 and each NaN too. A value that moved to
the next number differs by 1, whatever its exponent; folded, the high bytes are 0 for both signs.
Xor, the other way, makes neighbours differ in many bits where a carry runs. Bytes of each:
`benchmarks/lossless.py`.
Memory: the result, and 0.5 MB.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtune.errors import ManifestError
from fedtune.transport.codecs.base import CHUNK, empty

__all__ = ["bit_difference", "bit_sum", "same_bits"]

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are alike to the bit: 0.0 is not -0.0, and a NaN is itself."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    integer = INTEGERS.get(left.itemsize, torch.uint8)
    flats = [tensor.detach().contiguous().view(-1).view(integer) for tensor in (left, right)]
    return torch.equal(*flats)


def bit_difference(new: Tensor, old: Tensor, *, name: str = "tensor") -> Tensor:
    """Integers of the size of the values, on the CPU; ManifestError if dtypes or shapes differ."""
    integer = _integer(old.dtype, name)
    _check(new, old.dtype, old.shape, name)
    out = empty(old.numel(), integer)
    for ours, theirs, result, room in _chunks(new, old, out):
        np.subtract(ours, theirs, out=result)
        np.right_shift(result, 8 * integer.itemsize - 1, out=room)
        np.left_shift(result, 1, out=result)
        np.bitwise_xor(result, room, out=result)
    return out.view(old.shape)


def bit_sum(old: Tensor, difference: Tensor, *, name: str = "tensor") -> Tensor:
    """The `new` that `difference` was made of, bit for bit, on the CPU."""
    integer = _integer(old.dtype, name)
    _check(difference, integer, old.shape, name)
    out = empty(old.numel(), old.dtype)
    for theirs, folded, result, room in _chunks(old, difference, out):
        np.bitwise_and(folded, 1, out=room)
        np.negative(room, out=room)
        unsigned = f"u{folded.itemsize}"
        np.right_shift(folded.view(unsigned), 1, out=result.view(unsigned))
        np.bitwise_xor(result, room, out=result)
        np.add(result, theirs, out=result)
    return out.view(old.shape)


def _chunks(*tensors: Tensor) -> Iterator[tuple[NDArray[Any], ...]]:
    """The bits of each, and room for as many, `CHUNK` at a time."""
    kind = INTEGERS[tensors[0].itemsize]
    flat = [t.detach().cpu().contiguous().view(-1).view(kind).numpy() for t in tensors]
    room = np.empty(min(CHUNK, flat[0].size), flat[0].dtype)
    for start in range(0, flat[0].size, CHUNK):
        parts = [bits[start : start + CHUNK] for bits in flat]
        yield *parts, room[: parts[0].size]


def _integer(dtype: torch.dtype, name: str) -> torch.dtype:
    if not dtype.is_floating_point or dtype.itemsize not in INTEGERS:
        raise ManifestError(
            f"{name}: expected floating values of 2, 4 or 8 bytes, received {dtype}. "
            "Send it as it is."
        )
    return INTEGERS[dtype.itemsize]


def _check(tensor: Tensor, dtype: torch.dtype, shape: torch.Size, name: str) -> None:
    if (tensor.dtype, tensor.shape) != (dtype, shape):
        raise ManifestError(
            f"{name}: expected {dtype} {tuple(shape)}, received {tensor.dtype} "
            f"{tuple(tensor.shape)}. Compare tensors of one version of the model."
        )
