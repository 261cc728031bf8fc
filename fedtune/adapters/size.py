"""How large a model is, whatever holds it."""

from __future__ import annotations

import math

from torch import Tensor, nn

from fedtune.adapters.names import base_model, owned_tensors

__all__ = ["exchanged_bytes", "resident_bytes"]


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all parameters as they lie in memory, adapter included; tied ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def exchanged_bytes(model: nn.Module) -> int:
    """Bytes of the base model alone, as it would be trained and sent in full; tied ones once.

    Quantized weights count by what they stand for, in the dtype of the checkpoint.
    """
    base = base_model(model)
    adapters = getattr(model, "peft_config", {})
    owned = {id(t) for name in adapters for t in owned_tensors(model, name).values()}
    dtype = getattr(base.config, "dtype", None) if getattr(base, "is_quantized", False) else None
    return sum(
        _values(parameter) * (parameter.element_size() if dtype is None else dtype.itemsize)
        for parameter in base.parameters()
        if id(parameter) not in owned
    )


def _values(parameter: Tensor) -> int:
    """Values that a parameter stands for; bitsandbytes packs two of 4 bits into a byte."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else math.prod(packed.shape)
