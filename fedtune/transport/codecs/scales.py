"""Scales of blocks in one byte each, that cover any range: for the 4-bit codecs.

The bits of a positive fp32 number, read as an integer u, grow with it and are its logarithm made of
straight pieces, 2^23 to the octave. A group of 256 scales keeps its largest u as `base`, and of
each scale

    code = (base - u) >> shift        decoded: u' = base - (code << shift) >= u

with the least shift that keeps codes within a byte. Scales are rounded up, by less than 2^shift, so
no value clips, and never above the largest of the group. Relative to the scale that is less than
2^(shift - 23): 0.8 % for a group within two octaves. A group that needs a shift above 18 (scales
more than 245 x apart) has codes of two bytes, which cover all of fp32 with a shift of 15. So

    scale <= scale' < scale * (1 + 2^-5)

always. The highest code means zero. u' is on the same grid as u, so coding u' again gives u', and
the scales of bf16 or fp16 tensors stay numbers of their dtype (fp16's subnormals aside).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.transport.codecs.base import FLOOR, Bytes, Floats, refused

__all__ = ["GROUP", "MAX_EXCESS", "decode_scales", "encode_scales", "least_bytes"]

GROUP = 256  # scales
HEAD = 5  # bytes of a group: base, kind
NARROW, WIDE = 0xFF, 0xFFFF  # codes that mean zero
NARROW_SHIFTS, WIDE_SHIFTS = np.arange(19, dtype=np.int32), np.arange(16, dtype=np.int32)
WIDE_KIND = 0x80
MAX_EXCESS = 2.0**-5


def encode_scales(scales: Floats) -> tuple[list[Bytes], Floats]:
    """Bytes of scales >= 0, (n,), and the scales that they decode to."""
    groups = np.zeros((-(-len(scales) // GROUP), GROUP), np.float32)
    groups.reshape(-1)[: len(scales)] = np.where(scales >= FLOOR, scales, 0)
    bits = groups.view(np.int32)
    base = bits.max(1, initial=0, keepdims=True)
    span = base - np.where(bits > 0, bits, base).min(1, initial=2**31 - 1, keepdims=True)
    shift = (span >= NARROW << NARROW_SHIFTS).sum(1, keepdims=True, dtype=np.int32)
    wide = shift == len(NARROW_SHIFTS)
    shift = np.where(wide, (span >= WIDE << WIDE_SHIFTS).sum(1, keepdims=True), shift)
    shift = shift.astype(np.int32)
    steps = (base - bits) >> shift
    codes = np.where(bits > 0, steps, np.where(wide, WIDE, NARROW).astype(np.int32))
    decoded = np.where(bits > 0, base - (steps << shift), 0).astype(np.int32, copy=False)
    flat, is_wide = codes.reshape(-1)[: len(scales)], _spread(wide, len(scales))
    parts = (
        base.astype("<u4"),
        (shift | np.where(wide, WIDE_KIND, 0)).astype(np.uint8),
        flat[~is_wide].astype(np.uint8),
        flat[is_wide].astype("<u2"),
    )
    out: Floats = decoded.reshape(-1)[: len(scales)].view(np.float32)
    return [part.reshape(-1).view(np.uint8) for part in parts], out


def least_bytes(count: int) -> int:
    """The fewest bytes that `count` scales take."""
    return HEAD * -(-count // GROUP) + count


def decode_scales(data: Bytes, count: int) -> tuple[Floats, Bytes]:
    """The scales (n,) and the bytes that follow; FrameError on bytes that are no scales.

    `data` holds at least `least_bytes(count)`.
    """
    groups = -(-count // GROUP)
    base = data[: 4 * groups].copy().view("<u4").astype(np.int64)
    kind = data[4 * groups : HEAD * groups]
    wide, shift = kind >= WIDE_KIND, (kind & (WIDE_KIND - 1)).astype(np.int64)
    if np.any(shift >= np.where(wide, len(WIDE_SHIFTS), len(NARROW_SHIFTS))):
        raise refused("shifts up to 18 or 15", f"{shift.max()}")
    is_wide = _spread(wide, count)
    end = HEAD * groups + count - (wides := int(is_wide.sum()))
    if len(data) < end + 2 * wides:
        raise refused(f"{end + 2 * wides} bytes of scales", f"{len(data)}")
    codes = np.empty(count, np.int64)
    codes[~is_wide] = data[HEAD * groups : end]
    codes[is_wide] = data[end : end + 2 * wides].copy().view("<u2")
    bits = _spread(base, count) - (codes << _spread(shift, count))
    zero = codes == np.where(is_wide, WIDE, NARROW)
    floor, infinite = (int(np.float32(x).view(np.int32)) for x in (FLOOR, np.inf))
    if np.any(~zero & ((bits < floor) | (bits >= infinite))):
        raise refused(f"scales of 0 or {FLOOR:.1e} and more", "others")
    bits[zero] = 0
    return bits.astype(np.int32).view(np.float32), data[end + 2 * wides :]


def _spread(groups: NDArray[Any], count: int) -> NDArray[Any]:
    """A value of each group for each of its scales."""
    return np.repeat(groups.reshape(-1), GROUP)[:count]
