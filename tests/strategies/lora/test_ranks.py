"""One adapter at another rank: what is cut, and that what is padded can train."""

from __future__ import annotations

import math

import pytest
import torch

import fedtune
from fedtune.adapters import collect
from fedtune.strategies.lora.names import LoraModule, lora_modules, variants
from fedtune.strategies.lora.ranks import initial, resize
from tests.strategies.lora.oracles import deltas, peft_net, relative, trained

LINEAR = LoraModule("x", "x.lora_B.weight", "x.lora_A.weight")
EMBEDDING = LoraModule("x", "x.lora_embedding_B", "x.lora_embedding_A")


def test_a_fresh_adapter_starts_as_in_peft() -> None:
    b, a = initial(LINEAR, 500, 64, 16, "0")
    assert not b.any()
    assert float(a.abs().max()) <= 1 / math.sqrt(64)
    # 16 x 64 uniform values: the deviation is within 10 % of bound / sqrt(3).
    assert float(a.std()) == pytest.approx(1 / 8 / math.sqrt(3), rel=0.1)
    b, a = initial(EMBEDDING, 64, 500, 16, "0")
    assert not a.any()
    assert float(b.std()) == pytest.approx(1, rel=0.1)


def test_padding_keeps_the_product_and_trains() -> None:
    params = trained(collect(peft_net(2, alpha=2)), 0)
    wide = resize(params, 5)
    got, want = deltas(peft_net(5, alpha=5), wide), deltas(peft_net(2, alpha=2), params)
    assert relative(got, want) <= 1e-15
    for module in lora_modules(wide).values():
        zero = (wide[module.b][:, 2:] == 0).all() and (wide[module.a][2:] == 0).all()
        assert not zero


def test_each_module_its_rank() -> None:
    params = collect(peft_net(3))
    ranks = dict(zip(lora_modules(params), (1, 3, 6), strict=True))
    resized = resize(params, ranks)
    for name, module in lora_modules(resized).items():
        assert resized[module.a].shape[0] == resized[module.b].shape[1] == ranks[name]


def test_cutting_after_flora_changes_nothing() -> None:
    out = fedtune.aggregate("flora", [trained(collect(peft_net(4)), 1)])
    assert all(not d.any() for d in deltas(peft_net(2), resize(out.params, 2)).values())


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["a.lora_A.weight", "a.lora_B.weight"], {"lora"}),
        (["a.lora_embedding_A", "score.modules_to_save.weight"], {"lora"}),
        (["a.lora_A.weight", "a.lora_magnitude_vector.weight"], {"lora", "dora"}),
        (["a.lora_B.weight", "a.lora_B.bias"], {"lora", "lora_bias"}),
        (["a.lora_A.weight", "a.lora_diag"], {"lora", "lora_diag"}),
        (["prompt_encoder.embedding.weight"], {"other"}),
    ],
)
def test_variants(names: list[str], found: set[str]) -> None:
    assert variants(names) == found


def test_modules_are_found_by_either_factor() -> None:
    found = lora_modules(["m.q.lora_B.weight", "lora_A.weight", "m.e.lora_embedding_A", "bias"])
    assert list(found) == ["", "m.e", "m.q"]
    assert found["m.q"].a == "m.q.lora_A.weight"
    assert [module.embedding for module in found.values()] == [False, True, False]
    assert torch.is_tensor(initial(found[""], 2, 3, 1, "").A)
