"""The server's step at the end of a round: a pure function of what was there and what came in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedtune.adapters import Manifest
from fedtune.strategies.base import Method
from fedtune.strategies.gathering import Gathering
from fedtune.strategies.lora.cumulative import Cumulative
from fedtune.strategies.lora.factors import Factors
from fedtune.strategies.lora.manifests import at_ranks, ranks_in
from fedtune.strategies.mean import toward
from fedtune.strategies.scaffold import next_control, widened

__all__ = ["MethodState", "ServerMemory", "advance", "not_finite"]

MethodState = dict[str, dict[str, Tensor]]
CONTROL = "control"  # SCAFFOLD's c among what is kept for a parameter


@dataclass(frozen=True)
class ServerMemory:
    """What the server keeps beside the global parameters.

    Attributes:
        manifest: of the global parameters; its ranks may change with a round.
        method_state: tensors of the method, per parameter.
        base: what the method has added to the base.
        control_clients: clients that the control variate is a mean over.
    """

    manifest: Manifest
    method_state: MethodState = field(default_factory=dict)
    base: Cumulative = field(default_factory=Cumulative)
    control_clients: int = 0

    @property
    def control(self) -> dict[str, Tensor]:
        """The control variate c; a name without one is at zero."""
        return {
            name: state[CONTROL] for name, state in self.method_state.items() if CONTROL in state
        }


def advance(
    method: Method,
    old: Mapping[str, Tensor],
    memory: ServerMemory,
    gathering: Gathering,
    result: Mapping[str, Tensor],
    *,
    clients: int,
    rate: float,
) -> tuple[dict[str, Tensor], ServerMemory]:
    """The new global parameters and memory.

    Args:
        old: the global parameters.
        result: of the fold; what it does not name stays as it is.
        clients: that have ever taken part, or do now.
        rate: how far the server goes to that result.
    """
    control = memory.control
    if method.has_control:
        control = widened(control, memory.control_clients, clients)
        share = len(gathering.stats) / clients
        control |= next_control(control, gathering.control.result(), share)
    new: dict[str, Tensor] = dict(old)
    state: MethodState = {name: dict(kept) for name, kept in memory.method_state.items()}
    for name, value in toward(old, result, rate).items():
        kept = {key: tensor for key, tensor in state.get(name, {}).items() if key != CONTROL}
        new[name], state[name] = method.step(old[name], value, kept)
    for name, value in control.items():
        state.setdefault(name, {})[CONTROL] = value
    terms: Mapping[str, Factors] = getattr(gathering.fold, "base", {})
    manifest = at_ranks(memory.manifest, ranks_in(new))
    base = method.cumulate(memory.base, terms)
    return new, ServerMemory(manifest, state, base, clients if control else 0)


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
