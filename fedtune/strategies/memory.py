"""What the server keeps from round to round beside the global parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedtune.strategies.lora.cumulative import Cumulative

__all__ = ["MethodState", "ServerMemory", "not_finite"]

MethodState = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class ServerMemory:
    """Memory of a method.

    Attributes:
        method_state: tensors of the server optimizer and extras of the correction, per parameter.
        base: what the rule has added to the base.
        extras_clients: clients that the extras are a mean over.
    """

    method_state: MethodState = field(default_factory=dict)
    base: Cumulative = field(default_factory=Cumulative)
    extras_clients: int = 0

    def extra(self, name: str) -> dict[str, Tensor]:
        """One extra of the correction, by parameter; one that is missing is at zero."""
        return {key: state[name] for key, state in self.method_state.items() if name in state}


def not_finite(params: Mapping[str, Tensor], memory: ServerMemory) -> str:
    """Which of the parameters, or of what the server keeps, holds NaN or infinity; else empty."""
    places = {f"`{name}`": tensor for name, tensor in params.items()}
    for name, kept in memory.method_state.items():
        places |= {f"{key} of `{name}`": tensor for key, tensor in kept.items()}
    places |= {f"what is added to {name}": term for name, term in memory.base.tensors().items()}
    found = (where for where, tensor in places.items() if not _is_finite(tensor))
    return next(found, "")


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
