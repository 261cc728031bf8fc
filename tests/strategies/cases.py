"""Updates that every method has to cope with, and how to compare what it makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from fedtune.strategies import METHODS, Method
from fedtune.strategies.lora.factors import Factors
from fedtune.strategies.lora.names import lora_modules
from fedtune.strategies.method import Part
from tests.methods import method_of, named
from tests.strategies.one_round import SCALING

SHAPES = {
    "q.lora_A.weight": ((2, 7), torch.float32),
    "q.lora_B.weight": ((5, 2), torch.float32),
    "e.lora_embedding_A": ((2, 6), torch.bfloat16),
    "e.lora_embedding_B": ((3, 2), torch.bfloat16),
    "head.weight": ((3, 4), torch.bfloat16),
    "scale": ((), torch.float32),
}
RULES = [name for name, part in METHODS.items() if part.axis == "rule"]
every_method = pytest.mark.parametrize("name", METHODS)
every_rule = pytest.mark.parametrize("name", RULES)


def update(seed: int, rank: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn([rank if side == 2 else side for side in shape], generator=generator).to(
            dtype
        )
        for name, (shape, dtype) in SHAPES.items()
    }


def trained(method: Method | Part, old: Mapping[str, Tensor], seed: int, number: int = 1) -> dict:
    """What a client sends: what the method does not train is still the global value."""
    trains = method_of(method).rule.trains
    return {
        name: old[name] if name in old and not trains(name, number) else value
        for name, value in update(seed).items()
    }


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype
        for name in left
    )


def same_terms(left: Mapping[str, Factors], right: Mapping[str, Factors]) -> bool:
    return left.keys() == right.keys() and all(
        all(map(torch.equal, left[name], right[name])) for name in left
    )


def products(params: Mapping[str, Tensor], base: Mapping[str, Factors]) -> dict[str, Tensor]:
    """What is added to each layer's weight."""
    found = {}
    for name, module in lora_modules(params).items():
        if module.a in params and module.b in params:
            found[name] = SCALING * params[module.b].double() @ params[module.a].double()
        if name in base:
            found[name] = found[name] + base[name].B.double() @ base[name].A.double()
    return found


def asked_for(updates: Sequence[Mapping[str, Tensor]], weights: Sequence[int]) -> dict[str, Tensor]:
    """sum p_k s B_k A_k, by the definition."""
    parts = [products(one, {}) for one in updates]
    return {
        key: sum(w / sum(weights) * part[key] for w, part in zip(weights, parts, strict=True))
        for key in parts[0]
    }


def error(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], name: str) -> float:
    return float((found[name] - wanted[name]).norm() / wanted[name].norm())


def made(name: str) -> tuple[Method, int]:
    """The method by its defaults, and a number of clients that it can work with."""
    method = named(name)
    return method, max(5, method.rule.least_updates())
