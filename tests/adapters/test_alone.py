"""The base model without its adapter: the same logits as before one was put on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from fedtune.adapters.alone import NEW_HEAD, base_alone, has_virtual_tokens
from fedtune.adapters.build import load_base
from fedtune.config import ModelArguments
from tests.adapters.variants import VARIANTS, Variant, logits
from tests.tiny import tiny_llama, tokens


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_kind_of_adapter(variant: Variant, saved: Path) -> None:
    """Built and drawn once more, so that it does something; what trains is what trained before."""
    base = variant.base(saved).eval()
    model = variant.build(saved, 3).eval()
    with torch.no_grad():
        if variant.config is not None:
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_B" in name:
                    parameter.normal_(0, 0.5)
        expected, before = logits(base), logits(model)
        trained = {name: p.requires_grad for name, p in model.named_parameters()}
        with base_alone(model):
            alone = logits(model)
        after = logits(model)
    assert torch.equal(alone, expected)
    assert torch.equal(after, before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained


def test_a_start_that_rewrites_the_base() -> None:
    """PiSSA leaves a rest in the base: only with the adapter it is the base again."""
    ids, base = tokens(), tiny_llama(1).eval()
    with torch.no_grad():
        expected = base(ids).logits
        config = LoraConfig(
            r=2, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM"
        )
        model = get_peft_model(base, config).eval()
        with base_alone(model):
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_only_prompts_of_tokens_lie_before_a_row(saved: Path) -> None:
    with_tokens = {
        variant.name
        for variant in VARIANTS
        if variant.config is not None and has_virtual_tokens(variant.build(saved, 3))
    }
    prompts = {v.name for v in VARIANTS if v.config is not None and v.config.is_prompt_learning}
    prefixes = {v.name for v in VARIANTS if v.config and v.config.peft_type == "PREFIX_TUNING"}
    assert with_tokens == prompts - prefixes
    assert with_tokens
    assert prefixes


def test_a_new_head_is_known(saved: Path, tmp_path: Path) -> None:
    """A checkpoint of a classifier brings its head, that of a language model does not."""
    new, tokenizer = load_base(
        ModelArguments(model_name_or_path=None), task="seq_cls", num_labels=3
    )
    assert getattr(new, NEW_HEAD)
    new.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = ModelArguments(model_name_or_path=str(tmp_path))
    assert not hasattr(load_base(settings, task="seq_cls", num_labels=3)[0], NEW_HEAD)
