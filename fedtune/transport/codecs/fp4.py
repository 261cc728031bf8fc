"""FP4 as bitsandbytes has it: sign, two bits of exponent, one of mantissa, over 12."""

from __future__ import annotations

from fedtune.transport.codecs.block4 import Block4Codec

__all__ = ["Fp4Codec"]

LEVELS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # in the order of the codes


class Fp4Codec(Block4Codec):
    """Symmetric; code 8 is zero too and is never written."""

    name, number = "fp4", 5
    book = (*(level / 12 for level in LEVELS), 0.0, *(-level / 12 for level in LEVELS[1:]))
