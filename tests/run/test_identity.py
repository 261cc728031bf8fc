"""Hashes by content: equal for the same rows, model and tokenizer, however they are held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptEncoderConfig, get_peft_model
from transformers import AutoTokenizer

from fedtune.assets import MODEL_DIR
from fedtune.run.identity import model_sha256, rows_of, tokenizer_sha256
from tests.tiny import tiny_llama

ROWS = [{"text": f"row {n} é", "label": n % 2} for n in range(7)]


def dataset(rows: list[dict[str, Any]]) -> Dataset:
    return Dataset.from_list(rows)


def test_rows_are_the_same_in_any_order_and_partition():
    whole = rows_of([dataset(ROWS)])
    assert whole["rows"] == 7
    assert rows_of([dataset(ROWS[4:]), dataset(ROWS[:4][::-1])]) == whole


@pytest.mark.parametrize(
    "rows", [ROWS[:6], [*ROWS, ROWS[0]], [{**ROWS[0], "text": "Row 0"}, *ROWS[1:]]]
)
def test_other_rows_are_not(rows: list[dict[str, Any]]):
    assert rows_of([dataset(rows)])["sha256"] != rows_of([dataset(ROWS)])["sha256"]


CONFIGS = [
    LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    LoraConfig(task_type="CAUSAL_LM", use_dora=True, modules_to_save=["embed_tokens"]),
    IA3Config(task_type="CAUSAL_LM"),
    PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
    PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: str(config.peft_type))
def test_a_base_model_is_the_same_under_any_adapter(config: Any):
    torch.manual_seed(1)
    assert model_sha256(get_peft_model(tiny_llama(), config)) == model_sha256(tiny_llama())


def test_a_new_head_is_no_new_base():
    heads = [tiny_llama(num_labels=labels) for labels in (2, 3)]
    heads[1].model.load_state_dict(heads[0].model.state_dict())
    assert model_sha256(heads[0]) == model_sha256(heads[1])


def test_other_weights_are_another_base():
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.add_(1e-3)
    hashes = {model_sha256(model) for model in (tiny_llama(), tiny_llama(1), other)}
    assert len(hashes) == 3
    assert model_sha256(tiny_llama().bfloat16()) not in hashes


def test_a_tokenizer_is_the_same_before_and_after_its_use():
    fresh, used, other = (AutoTokenizer.from_pretrained(MODEL_DIR) for _ in range(3))
    used("some words", truncation=True, max_length=3, padding="max_length")
    other.add_tokens(["<new>"])
    assert tokenizer_sha256(used) == tokenizer_sha256(fresh)
    assert tokenizer_sha256(other) != tokenizer_sha256(fresh)
    other = AutoTokenizer.from_pretrained(MODEL_DIR)
    other.chat_template = "{{ messages }}"
    assert tokenizer_sha256(other) != tokenizer_sha256(fresh)
    assert tokenizer_sha256(None) is None
