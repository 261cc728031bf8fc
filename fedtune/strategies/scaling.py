"""One scaling per LoRA layer for all clients: a rule that averages factors needs it.

    s_k B_k A_k = s (s_k / s B_k) A_k          s = sum p_k s_k

Clients with equal scaling are left as they are, bit for bit; that is what a federation has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedtune.errors import ConfigError
from fedtune.strategies.given import is_number
from fedtune.strategies.lora.names import LoraModule, lora_modules

__all__ = ["Scaling", "common_scaling"]

Scaling = float | Mapping[str, float] | Sequence[float | Mapping[str, float]]


def common_scaling(
    updates: Sequence[Mapping[str, Tensor]], weights: Sequence[float], scaling: Scaling
) -> tuple[list[Mapping[str, Tensor]], dict[str, float]]:
    """The updates as if all clients had one scaling, and that scaling by module.

    Args:
        updates: of each client.
        weights: of each client, not normalised.
        scaling: of all; by module; or a list with either of them for each client.

    Raises:
        ConfigError: a list of another length, a module without a scaling, or one that is not > 0.
    """
    own = _one_each(scaling, len(updates))
    if len(own) != len(updates):
        raise ConfigError(
            f"scaling: expected one per update ({len(updates)}), received {len(own)}. "
            "Give a number, a dict by module, or a list with one of them per update."
        )
    modules = lora_modules(updates[0])
    common = {}
    changed = [dict(update) for update in updates]
    for name, module in modules.items():
        factors = [_of(one, name) for one in own]
        common[name] = _mean(factors, weights)
        for update, factor in zip(changed, factors, strict=True):
            if factor != common[name]:
                _rescale(update, module, factor / common[name])
    return list(changed), common


def _one_each(scaling: Scaling, clients: int) -> Sequence[float | Mapping[str, float]]:
    """One scaling per client, each of numbers > 0."""
    listed = isinstance(scaling, Sequence) and not isinstance(scaling, str)
    own = list(scaling) if listed else [scaling] * clients  # type: ignore[arg-type]
    for one in own:
        for module, value in one.items() if isinstance(one, Mapping) else [("", one)]:
            if not is_number(value) or not 0 < value < math.inf:  # type: ignore[operator]
                where = f" for `{module}`" if module else ""
                raise ConfigError(
                    f"scaling: expected a number > 0{where}, received {value!r}. Give a number, a "
                    "dict by module, or a list with one of them per update."
                )
    return own  # type: ignore[return-value]


def _of(scaling: float | Mapping[str, float], module: str) -> float:
    value = scaling.get(module) if isinstance(scaling, Mapping) else scaling
    if value is None:
        raise ConfigError(
            f"scaling: expected one for every LoRA module, received none for `{module}`. "
            "Name it without `.lora_A.weight`."
        )
    return float(value)


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    if len(set(values)) == 1:
        return values[0]
    return math.fsum(w * v for w, v in zip(weights, values, strict=True)) / math.fsum(weights)


def _rescale(update: dict[str, Tensor], module: LoraModule, factor: float) -> None:
    bias = module.b.replace("lora_B.weight", "lora_B.bias")
    for name in {module.b, bias} & update.keys():
        wide = torch.promote_types(update[name].dtype, torch.float32)
        update[name] = (update[name].double() * factor).to(wide)
