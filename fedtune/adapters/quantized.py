"""What bitsandbytes has made of a weight: its values, their hash, and how far off they are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Quantized", "quantized"]

SCALES = 0.01  # double quantization leaves the scales that far off
PART = 2**22


class Quantized(NamedTuple):
    """One tensor as it lies in memory. See `fingerprint.BaseTensor`.

    Attributes:
        squares: expected sum of squares of what quantizing has left.
        relative: what the values are off by besides, relative to their own.
        values: writes it out.
    """

    kind: str
    sha: str
    squares: float
    relative: float
    values: Callable[[], Tensor]


def quantized(module: nn.Module, tensor: Tensor) -> Quantized | None:
    """A weight in 4 or 8 bits, or None for any other tensor."""
    if type(tensor).__name__ == "Params4bit" and getattr(tensor, "quant_state", None) is not None:
        return _four_bits(tensor)
    if type(tensor).__name__ == "Int8Params" and tensor.dtype == torch.int8:
        scales = getattr(tensor, "SCB", None)
        if scales is None:
            scales = getattr(getattr(module, "state", None), "SCB", None)
        return None if scales is None else _eight_bits(tensor.data, scales)
    return None


def _four_bits(tensor: Any) -> Quantized:
    from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise

    state, data = tensor.quant_state, tensor.data
    scales = state.absmax
    if state.nested:
        scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
    nested = " twice" if state.nested else ""
    kind = f"{state.quant_type}/{state.blocksize}{nested} of {state.dtype} on {data.device.type}"

    def values() -> Tensor:
        written: Tensor = dequantize_4bit(data, state)
        return written

    squares = _expected_squares(state.code.float().cpu())[_pairs()].sum(1)
    codes = data.reshape(-1).view(torch.uint8).cpu()
    per_scale, factors = state.blocksize // 2, scales.float().cpu().reshape(-1).square()
    left = sum(
        float((part * factors[start : start + len(part)]).sum())
        for start, part in _by_scale(codes, squares, per_scale)
    )
    relative = SCALES if state.nested else 0.0
    return Quantized(kind.replace("torch.", ""), _sha(codes, scales), left, relative, values)


def _eight_bits(codes: Tensor, scales: Tensor) -> Quantized:
    def values() -> Tensor:
        return codes.float() * (scales.to(codes.device).float()[:, None] / 127)

    left = float(scales.double().square().sum()) * codes.shape[1] / 127**2 / 12
    return Quantized(f"int8 on {codes.device.type}", _sha(codes, scales), left, 0.0, values)


def _by_scale(codes: Tensor, squares: Tensor, per_scale: int) -> Any:
    """(number of the first scale, expected squares of each scale's codes), a part at a time."""
    whole = max(1, PART // per_scale)
    for start in range(0, -(-len(codes) // per_scale), whole):
        part = codes[start * per_scale : (start + whole) * per_scale]
        found = squares[part.long()]
        short = -len(found) % per_scale
        found = torch.cat([found, found.new_zeros(short)]) if short else found
        yield start, found.reshape(-1, per_scale).sum(1)


def _expected_squares(code: Tensor) -> Tensor:
    """Of each code: the mean square of what rounding to it leaves, for an even density."""
    values, order = code.sort()
    middles = (values[1:] + values[:-1]) / 2
    low = torch.cat([values[:1], middles]) - values
    high = torch.cat([middles, values[-1:]]) - values
    width = (high - low).clamp(min=1e-12)
    found = torch.empty_like(values)
    found[order] = (high**3 - low**3) / (3 * width)
    return found


def _pairs() -> Tensor:
    """(256, 2): the two codes of a byte."""
    byte = torch.arange(256)
    return torch.stack([byte >> 4, byte & 15], 1)


def _sha(codes: Tensor, scales: Tensor) -> str:
    digest = hashlib.sha256(str(tuple(codes.shape)).encode())
    for tensor in (codes, scales.float()):
        flat = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
        for start in range(0, len(flat), PART):
            digest.update(flat[start : start + PART].numpy().data)
    return digest.hexdigest()[:32]
