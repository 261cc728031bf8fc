"""What is trained is fp32 on a half-precision checkpoint, and learns as it does on an fp32 one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from fedtune.adapters import (
    attach_adapter,
    collect,
    describe,
    export_adapter,
    load_base,
    train_in_fp32,
    warn_of_half_precision,
)
from fedtune.config import AdapterArguments, ModelArguments
from tests.adapters.variants import logits, lora, train
from tests.tiny import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", params=HALF, ids=str)
def checkpoint(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("half")
    tiny_llama().to(request.param).save_pretrained(directory)
    tiny_tokenizer(eos_token="</s>", unk_token="<unk>").save_pretrained(directory)
    return directory


def built(checkpoint: Path, **settings: Any) -> nn.Module:
    base, _ = load_base(ModelArguments(model_name_or_path=str(checkpoint)), task="causal_lm")
    return attach_adapter(base, AdapterArguments(**settings), "causal_lm", 0)


def trained_dtypes(model: nn.Module) -> set[torch.dtype]:
    return {p.dtype for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "settings",
    [
        {"peft_method": "none"},
        {"peft_method": "lora", "modules_to_save": "lm_head"},
        {"peft_method": "lora", "modules_to_save": "embed_tokens,lm_head"},
        {"peft_method": "dora"},
        {"peft_method": "ia3"},
        {"peft_method": "p_tuning"},
        {"peft_method": "prefix_tuning"},
    ],
    ids=lambda s: "-".join(s.values()),
)
def test_all_that_is_trained_is_fp32_and_runs(settings: dict[str, Any], checkpoint: Path) -> None:
    model = built(checkpoint, **settings)
    assert trained_dtypes(model) == {torch.float32}
    before = collect(model)
    train(model)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert any(not torch.equal(before[name], value) for name, value in collect(model).items())
    if settings["peft_method"] == "lora":  # a frozen base stays as it is
        frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
        assert frozen <= set(HALF)
    frozen = next(iter(model.parameters())).dtype
    if frozen != torch.float16:  # no autocast over fp16 on a CPU
        with torch.autocast("cpu", torch.bfloat16):
            assert logits(model).isfinite().all()


def test_a_full_model_moves_as_it_does_from_an_fp32_checkpoint(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Small steps: of weights of 0.01 and more, bf16 would round 2e-5 away."""
    start = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model = built(checkpoint, peft_method="none")
    optimizers = [torch.optim.AdamW(one.parameters(), lr=2e-5) for one in (start, model)]
    for one, optimizer in zip((start, model), optimizers, strict=True):
        one.eval()
        ids = torch.arange(3, 15)[None]
        one(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in start.state_dict().items())
    assert {entry.dtype for entry in describe(model).entries.values()} == {"float32"}
    export_adapter(tmp_path / "model", collect(model), {}, describe(model))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in start.state_dict().items())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")  # as the base loads
    assert plain.dtype == AutoModelForCausalLM.from_pretrained(checkpoint).dtype


def test_a_copy_in_fp32_gives_its_layers_dtype_back() -> None:
    base = tiny_llama().to(torch.bfloat16)
    model = get_peft_model(base, lora(modules_to_save=["lm_head"]))
    want = logits(model)
    train_in_fp32(model)
    assert logits(model).dtype == want.dtype
    assert torch.equal(logits(model), want)  # fp32 sums of bf16 values, rounded


def test_a_warning_names_the_dtype(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_half_precision(tiny_llama())
        warn_of_half_precision(get_peft_model(tiny_llama().to(torch.bfloat16), lora()))
        assert not caplog.records
        warn_of_half_precision(tiny_llama().to(torch.bfloat16))
    assert "trained parameters are bfloat16 (`model.embed_tokens.weight`" in caplog.text
