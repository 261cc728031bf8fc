"""The rank of the new adapter when the largest client was not sampled."""

from __future__ import annotations

import pytest
import torch

from fedtune.adapters import collect
from fedtune.strategies.base import Round
from fedtune.strategies.lora import LORA_RULES
from fedtune.strategies.lora.factors import Factors
from fedtune.strategies.lora.names import lora_modules
from fedtune.strategies.lora.product_rule import ProductFold
from fedtune.strategies.lora.ranks import resize
from tests.strategies.lora.oracles import Params, peft_net, relative, trained

MIXED = sorted(name for name, rule in LORA_RULES.items() if rule.properties.mixed_ranks)
SLICED = ["hetlora", "raflora"]
MODULES = list(lora_modules(collect(peft_net())))
GLOBAL = dict.fromkeys(MODULES, 5)


def sampled() -> list[Params]:
    """Clients of ranks 1 and 3."""
    return [trained(collect(peft_net(rank)), rank) for rank in (1, 3)]


def fold(name: str, updates: list[Params] | None = None, **now: object) -> ProductFold:
    """A round that has not been closed."""
    scales = dict.fromkeys(MODULES, 2.0)
    settings = now.pop("settings", {})
    found = LORA_RULES[name](**settings).fold(Round(scaling=scales, **now))
    for k, update in enumerate(updates or sampled()):
        found.add(update, 1.0 + k)
    return found


def effect(params: Params, base: dict[str, Factors]) -> Params:
    """Dense addition to every layer."""
    return {
        name: 2.0 * params[module.b] @ params[module.a]
        + (base[name].B @ base[name].A if name in base else 0.0)
        for name, module in lora_modules(params).items()
    }


def ranks(params: Params) -> dict[str, int]:
    modules = lora_modules(params).items()
    assert all(params[m.a].shape[0] == params[m.b].shape[1] for _, m in modules)
    return {name: params[m.a].shape[0] for name, m in modules}


@pytest.mark.parametrize("name", MIXED)
def test_the_rank_is_the_global_one(name: str) -> None:
    """The clients' largest if it is unknown or less; the merged update is that of either rank."""
    plain, wide = fold(name), fold(name, rank=GLOBAL)
    small, large = plain.result(), wide.result()
    assert ranks(small) == dict.fromkeys(MODULES, 3)
    assert ranks(large) == GLOBAL
    for less in ({}, dict.fromkeys(MODULES, 2)):
        assert ranks(fold(name, rank=less).result()) == ranks(small)
    one = {MODULES[0]: 4}
    assert ranks(fold(name, rank=one).result()) == {**ranks(small), **one}
    if name == "flexlora":  # two clients of ranks 1 and 3 ask for rank 4: at 5 it is exact
        plain = fold(name, settings={"rank": 4})
        small = plain.result()
    assert relative(effect(large, wide.base), effect(small, plain.base)) <= 1e-14


@pytest.mark.parametrize("name", MIXED)
def test_no_slice_is_dead(name: str) -> None:
    """A row of A and a column of B that are both 0 would never train."""
    params = fold(name, rank=GLOBAL).result()
    for module in lora_modules(params).values():
        sizes = params[module.b].norm(dim=0) + params[module.a].norm(dim=1)
        assert bool((sizes > 1e-3).all())


@pytest.mark.parametrize("name", SLICED)
@pytest.mark.parametrize("known", [5, 4], ids=["whole", "in part"])
def test_slices_that_nobody_owned_keep_their_value(name: str, known: int) -> None:
    """Up to the rank of the previous adapter; behind it they start afresh."""
    before = trained(collect(peft_net(known)), 9)
    params = fold(name, rank=GLOBAL, reference=before).result()
    assert ranks(params) == GLOBAL
    owned = fold(name).result()
    for module in lora_modules(params).values():
        for key, axis in ((module.b, 1), (module.a, 0)):
            assert torch.equal(params[key].narrow(axis, 0, 3), owned[key])
            kept = params[key].narrow(axis, 3, known - 3)
            assert torch.equal(kept, before[key].narrow(axis, 3, known - 3))
        fresh = params[module.b][:, known:] @ params[module.a][known:]
        assert not fresh.any()


@pytest.mark.parametrize("name", MIXED)
def test_the_previous_adapter_does_not_matter_otherwise(name: str) -> None:
    """Slices that somebody owns are the clients'; FLoRA and FlexLoRA make new ones."""
    before = trained(collect(peft_net(5)), 9)
    now = {"rank": GLOBAL} if name not in SLICED else {}
    one, other = fold(name, reference=before, **now).result(), fold(name, **now).result()
    assert all(torch.equal(one[n], other[n]) for n in other)


def test_raflora_over_rounds_without_the_largest_client() -> None:
    """Nothing moves: with the previous adapter known, nothing changes either."""
    start = {n: t.float() for n, t in trained(collect(peft_net(5)), 9).items()}
    now = {"rank": GLOBAL, "reference": start}
    params = fold("raflora", [resize(start, 1), resize(start, 3)], **now).result()
    assert all(torch.equal(params[n], start[n]) for n in start)


def test_an_adaptive_rank_ends_at_the_global_one() -> None:
    """energy = 1 asks for all four ranks of the two clients."""
    every = {"energy": 1.0}
    assert ranks(fold("flexlora", settings=every).result()) == dict.fromkeys(MODULES, 4)
    for most in (1, 2, 3, 5):
        found = ranks(fold("flexlora", settings=every, rank=dict.fromkeys(MODULES, most)).result())
        assert found == dict.fromkeys(MODULES, min(most, 4))
    both = {"energy": 1.0, "rank": 2}
    assert ranks(fold("flexlora", settings=both, rank=GLOBAL).result()) == dict.fromkeys(MODULES, 2)
