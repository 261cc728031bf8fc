"""A client of lower rank inside a live adapter of higher rank, as a simulation has it.

The ranks that the client does not have are zero in both factors: then their product and both of
their gradients are zero, and an optimizer that works coordinate by coordinate (SGD, Adam) does not
move them. The live adapter trains as one of the client's own rank would, at the same scaling, up to
the rounding of larger matrix products. Adafactor is another matter: it clips by a mean over the
whole matrix, zeros included, so its steps may be larger by sqrt(R / r) at most.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import pad

from fedtune.strategies.lora.names import is_lora_a, is_lora_b

__all__ = ["cut", "widen"]


def widen(params: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """LoRA factors padded with zeros to `shapes` (of the same names); others as they are."""
    wide = dict(params)
    for name, tensor in params.items():
        missing = [end - size for size, end in zip(tensor.shape, shapes[name], strict=True)]
        if is_lora_a(name):
            wide[name] = pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, missing[0]))
        elif is_lora_b(name) and tensor.ndim > 1:
            wide[name] = pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, missing[1], 0, 0))
    return wide


def cut(params: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The inverse: the first ranks, contiguous."""
    return {
        name: tensor[tuple(slice(size) for size in shapes[name])].contiguous()
        for name, tensor in params.items()
    }
