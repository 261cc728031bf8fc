"""bfloat16: the exponents of fp32, 8 significant bits, relative error <= 2^-9."""

from __future__ import annotations

import torch

from fedtune.transport.codecs.half import HalfCodec

__all__ = ["Bf16Codec"]


class Bf16Codec(HalfCodec):
    """Any magnitude of fp32 that does not round to Inf."""

    name, number, wire = "bf16", 1, torch.bfloat16
    limit = 2.0**128 - 2.0**119
