"""IEEE half precision: 11 significant bits from 6.1e-5 to 65504, steps of 6.0e-8 below."""

from __future__ import annotations

import torch

from fedtune.transport.codecs.half import HalfCodec

__all__ = ["Fp16Codec"]


class Fp16Codec(HalfCodec):
    """Values that would round to Inf are refused, not clamped; small ones may become zero."""

    name, number, wire = "fp16", 2, torch.float16
    limit = 65520.0
