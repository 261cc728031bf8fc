"""Error feedback (arXiv:1809.07599, 1901.09847): what a codec lost goes with the next update.

    sent = C(delta + residual)        residual <- delta + residual - sent

so sum(sent) + residual = sum(delta): over the rounds nothing is lost. The residual belongs to one
tensor of one client and direction. Memory: one fp32 tensor (fp64 for fp64).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedtune.transport.codecs import decode, encode

__all__ = ["ErrorFeedback", "feed_back"]


class ErrorFeedback(NamedTuple):
    """What to send now, and what to add next time; no residual for integers and bools."""

    payload: bytes
    residual: Tensor | None


def feed_back(
    delta: Tensor, residual: Tensor | None, codec: str, *, name: str = "tensor"
) -> ErrorFeedback:
    """Encode `delta` with what earlier payloads lost; the payload has the dtype of `delta`."""
    if not delta.is_floating_point():
        return ErrorFeedback(encode(delta, codec, name=name), None)
    wanted = delta.detach().to(torch.promote_types(delta.dtype, torch.float32))
    if residual is not None:
        wanted = wanted + residual
    payload = encode(wanted.to(delta.dtype), codec, name=name)
    return ErrorFeedback(payload, wanted - decode(payload))
