"""NormalFloat4 (QLoRA, arXiv:2305.14314): levels of equal share under a normal distribution."""

from __future__ import annotations

from fedtune.transport.codecs.block4 import Block4Codec

__all__ = ["Nf4Codec"]


class Nf4Codec(Block4Codec):
    """The codebook of bitsandbytes, not symmetric: 7 levels below zero, 8 above."""

    name, number = "nf4", 4
    book = (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    )
