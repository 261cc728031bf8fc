"""Terms beside a frozen base: each kind of layer computes as if they were in its weight."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fedtune.adapters import collect, describe, load
from fedtune.adapters.base_terms import base_terms, set_base_terms
from fedtune.errors import ManifestError
from fedtune.strategies.lora.factors import Factors
from tests.federation.dense import WRAPPER, dequantized, four_bit, llama, logits, off
from tests.strategies.lora.oracles import add_to_base, lora_layers, peft_net, put, trained
from tests.tiny import tiny_llama, tiny_tokenizer

TOKENS = torch.tensor([[0, 3, 10], [7, 1, 1]])


def terms_for(model: Any, rank: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    terms = {}
    for name, layer in lora_layers(model).items():
        terms[name + ".base_B"] = torch.randn(layer.out_features, rank, generator=generator)
        terms[name + ".base_A"] = torch.randn(rank, layer.in_features, generator=generator)
    return terms


def factors_of(terms: dict[str, Tensor]) -> dict[str, Factors]:
    names = {name.rpartition(".")[0] for name in terms}
    return {n: Factors(terms[n + ".base_B"], terms[n + ".base_A"]) for n in names}


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS)
    return found


@pytest.mark.parametrize(
    ("dtype", "within"),
    # the term is in fp32; bf16 keeps 8 bits of every layer's output and of the dense weights
    [(torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 3e-2)],
    ids=str,
)
def test_every_kind_of_layer(dtype: torch.dtype, within: float) -> None:
    """Embedding, Linear and Conv1D, none square, with an adapter that does something."""
    model, dense = peft_net(dtype=dtype), peft_net(dtype=dtype)
    params = trained(collect(model), seed=3)
    for net in (model, dense):
        put(net, params)
    terms = terms_for(model)
    plain = outputs(model)
    set_base_terms(model, terms)
    add_to_base(dense, factors_of(terms))
    wanted = outputs(dense)
    assert off(plain.double(), wanted.double()) > 0.1
    found = outputs(model)
    assert found.dtype == dtype
    assert off(found.double(), wanted.double()) <= within
    set_base_terms(model, {})
    assert torch.equal(outputs(model), plain)


def test_a_scaled_embedding_scales_its_term() -> None:
    """Gemma's embedding multiplies what it looks up."""

    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * self.embed_scale

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = Scaled(11, 6)

        def forward(self, ids: Tensor) -> Tensor:
            found: Tensor = self.emb(ids)
            return found

    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["emb"])).double()
    dense = copy.deepcopy(model)
    terms = {name: term.double() for name, term in terms_for(model).items()}
    set_base_terms(model, terms)
    add_to_base(dense, factors_of(terms))
    torch.testing.assert_close(outputs(model), outputs(dense))


def test_gradients_flow_through_the_terms_but_not_into_them() -> None:
    model, dense = peft_net(), peft_net()
    terms = {name: term.double() for name, term in terms_for(model).items()}
    put(model, trained(collect(model), seed=3))
    put(dense, collect(model))
    set_base_terms(model, terms)
    add_to_base(dense, factors_of(terms))
    for net in (model, dense):
        net(TOKENS).square().sum().backward()
    for (name, left), (_, right) in zip(
        model.named_parameters(), dense.named_parameters(), strict=True
    ):
        if left.requires_grad:
            torch.testing.assert_close(left.grad, right.grad, msg=name)
    assert all(tensor.grad is None for tensor in base_terms(model).values())


def test_terms_are_no_part_of_a_checkpoint() -> None:
    model = peft_net()
    before = describe_names(model)
    set_base_terms(model, terms_for(model))
    assert describe_names(model) == before


def describe_names(model: nn.Module) -> tuple[list[str], list[str], list[str]]:
    return (
        list(model.state_dict()),
        [name for name, _ in model.named_parameters()],
        [name for name, _ in model.named_buffers()],
    )


def test_references_are_without_terms() -> None:
    """DPO's: the base with no adapter, or with the first one as `ref`."""
    model = peft_net()
    model.add_adapter("ref", copy.deepcopy(model.peft_config["default"]))
    model.double()
    put(model, trained(collect(model), seed=3))

    def references() -> list[Tensor]:
        with model.disable_adapter():
            found = [outputs(model)]
        model.set_adapter("ref")
        found.append(outputs(model))
        model.set_adapter("default")
        return found

    plain, before = outputs(model), references()
    set_base_terms(model, terms_for(model))
    assert all(map(torch.equal, references(), before))
    assert not torch.equal(outputs(model), plain)


def test_every_load_says_what_is_in_the_base() -> None:
    """With terms they are put in place of the last ones, without they are gone."""
    model = peft_net()
    params, manifest = collect(model), describe_small(model)
    first, second = terms_for(model, rank=2), terms_for(model, rank=5)
    for terms in (first, second):
        load(model, params, manifest, base=terms)
        assert base_terms(model).keys() == terms.keys()
        assert all(torch.equal(base_terms(model)[name], value) for name, value in terms.items())
        assert {len(layer._forward_hooks) for layer in lora_layers(model).values()} == {1}
    load(model, params, manifest)
    assert not base_terms(model)
    assert {len(layer._forward_hooks) for layer in lora_layers(model).values()} == {0}


def describe_small(model: Any) -> Any:
    model.base_model.model.config = tiny_llama().config
    return describe(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, n: t.pop(n + ".base_A"), "received .* and None"),
        (lambda t, n: t.pop(n + ".base_B"), "received None and"),
        (lambda t, n: t.update({n + ".base_B": t[n + ".base_A"].T}), "expected a base term"),
        (lambda t, n: t.update({n + ".base_A": t[n + ".base_A"][:1]}), "expected a base term"),
        (lambda t, n: t.update({"no.such.base_B": t[n + ".base_B"]}), "received NoneType"),
    ],
    ids=["without-a", "without-b", "turned", "cut", "unknown"],
)
def test_terms_that_do_not_fit_change_nothing(change: Any, message: str) -> None:
    model = peft_net()
    good = terms_for(model)
    set_base_terms(model, good)
    before, bad = outputs(model), dict(good)
    change(bad, next(iter(lora_layers(model))))
    with pytest.raises(ManifestError, match=message):
        set_base_terms(model, bad)
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("kind", ["conv", "attention"])
def test_other_layers_are_refused(kind: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = (
                nn.Conv2d(3, 4, 2) if kind == "conv" else nn.MultiheadAttention(6, 2, bias=False)
            )

    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["layer"]))
    name, layer = next(iter(lora_layers(model).items()))
    terms = {
        name + ".base_B": torch.zeros(layer.out_features, 2),
        name + ".base_A": torch.zeros(2, layer.in_features),
    }
    with pytest.raises(ManifestError, match="expected a Linear, Conv1D or Embedding"):
        set_base_terms(model, terms)


def test_a_four_bit_base_keeps_its_bits(tmp_path: Path) -> None:
    """Against the dequantized base with the term in its weights; the nf4 bits are not touched.

    1e-3: bitsandbytes computes a 4-bit layer in its own order, and in fp32.
    """
    llama().save_pretrained(tmp_path)
    tiny_tokenizer(pad_token="<unk>").save_pretrained(tmp_path)
    base = four_bit(tmp_path)
    plain = dequantized(base)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    terms = {name: 0.1 * term for name, term in terms_for(model).items()}
    layers = {n: layer.get_base_layer() for n, layer in lora_layers(model).items()}
    bits = {name: layer.weight.data.clone() for name, layer in layers.items()}
    for name, term in factors_of(terms).items():
        plain.get_submodule(name.removeprefix(WRAPPER)).weight.data += term.B @ term.A
    before = logits(model)
    set_base_terms(model, terms)
    wanted = logits(plain)
    assert off(before, wanted) > 0.05
    assert off(logits(model), wanted) <= 1e-3
    assert all(torch.equal(layers[name].weight.data, value) for name, value in bits.items())
