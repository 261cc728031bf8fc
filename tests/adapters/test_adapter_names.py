"""Adapters of any name, and inside a model: the active one is what trains, under the same names."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from fedtune.adapters import (
    collect,
    collect_static,
    describe,
    export_adapter,
    load,
    params_from_peft_dir,
)
from fedtune.adapters.alone import base_alone
from fedtune.adapters.base_terms import base_terms
from fedtune.adapters.names import active_adapter
from fedtune.errors import ManifestError
from tests.adapters.variants import logits, lora, train
from tests.tiny import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore")

Way = Callable[[LoraConfig], nn.Module]


def default(config: LoraConfig) -> nn.Module:
    return get_peft_model(tiny_llama(), config)


def named(config: LoraConfig) -> nn.Module:
    return get_peft_model(tiny_llama(), config, adapter_name="ward")


def added(config: LoraConfig) -> nn.Module:
    """transformers' own page on PEFT."""
    model = tiny_llama()
    model.add_adapter(config)
    return model


def added_named(config: LoraConfig) -> nn.Module:
    model = tiny_llama()
    model.add_adapter(config, adapter_name="lora_A")  # a name like a part of the names
    return model


def injected(config: LoraConfig) -> nn.Module:
    model: nn.Module = inject_adapter_in_model(config, tiny_llama(), adapter_name="ward")
    return model


def second_of_two(config: LoraConfig) -> nn.Module:
    """Another adapter is there, of another rank, and not active."""
    model: Any = get_peft_model(tiny_llama(), lora(r=2))
    model.add_adapter("ward", config)
    model.set_adapter("ward")
    return model  # type: ignore[no-any-return]


def second_inside(config: LoraConfig) -> nn.Module:
    model = tiny_llama()
    model.add_adapter(lora(r=2), adapter_name="first")
    model.add_adapter(config, adapter_name="second")
    model.set_adapter("second")
    return model


WAYS = [named, added, added_named, injected, second_of_two, second_inside]
OPTIONS: list[dict[str, Any]] = [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}]


def build(way: Way, options: dict[str, Any], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return way(copy.deepcopy(lora(**options)))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_sites_with_any_name_are_one_adapter(
    way: Way, options: dict[str, Any], tmp_path: Path
) -> None:
    """The same manifest and tensors; what one trained is another's, and loads with PEFT."""
    other, plain = build(way, options, 1), build(default, options, 2)
    manifest = describe(plain)
    assert describe(other).hash == manifest.hash
    assert describe(other).export == manifest.export
    train(other)
    params = collect(other)
    assert params.keys() == manifest.entries.keys()
    load(plain, params, manifest)
    assert torch.equal(logits(plain), logits(other))
    for model, name in ((other, "other"), (plain, "plain")):
        export_adapter(tmp_path / name, collect(model), collect_static(model), describe(model))
        under_a_name = PeftModel.from_pretrained(tiny_llama(), tmp_path / name, adapter_name="x")
        assert torch.equal(logits(under_a_name), logits(other))
        continued, _ = params_from_peft_dir(tmp_path / name, manifest)
        assert all(torch.equal(continued[key], params[key]) for key in params)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_the_base_alone(way: Way) -> None:
    """No adapter inside, and the same training as before outside."""
    model = build(way, {"modules_to_save": ["lm_head"]}, 1)
    train(model)
    before, trained = logits(model), [p.requires_grad for p in model.parameters()]
    with torch.no_grad(), base_alone(model):
        assert torch.equal(logits(model), logits(tiny_llama()))
    assert torch.equal(logits(model), before)
    assert [p.requires_grad for p in model.parameters()] == trained


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_what_a_method_adds_to_the_base(way: Way) -> None:
    """It acts with the adapter that it came with, and with no other."""
    model, plain = build(way, {}, 1), build(default, {}, 1)
    manifest, params = describe(plain), collect(plain)
    module = next(iter(manifest.scaling))
    terms = {f"{module}.base_B": torch.ones(32, 1), f"{module}.base_A": torch.ones(1, 32)}
    load(model, params, manifest, base=terms)
    load(plain, params, manifest, base=terms)
    assert base_terms(model).keys() == terms.keys()
    assert torch.equal(logits(model), logits(plain))
    assert not torch.equal(logits(model), logits(tiny_llama()))
    if way is second_of_two:
        model.set_adapter("default")  # type: ignore[operator]
        load(plain, params, manifest)
        assert torch.equal(logits(model), logits(tiny_llama()))  # its B is zero, and no term acts


def test_two_active_adapters_are_refused() -> None:
    model: Any = second_of_two(lora())
    model.base_model.set_adapter(["default", "ward"])
    inside: Any = second_inside(lora())
    inside.set_adapter(["first", "second"])
    for both, names in ((model, "default, ward"), (inside, "first, second")):
        with pytest.raises(ManifestError, match=f"expected one that is active, received {names}"):
            describe(both)


def test_the_active_adapter_is_the_last_that_was_set() -> None:
    model: Any = second_of_two(lora())
    assert active_adapter(model) == "ward"
    model.set_adapter("default")
    assert active_adapter(model) == "default"
    assert describe(model).adapter_config["r"] == 2
    assert describe(model, "ward").adapter_config["r"] == 4 if _trains(model, "ward") else True


def _trains(model: nn.Module, name: str) -> bool:
    return any(f".{name}." in key for key, p in model.named_parameters() if p.requires_grad)
