"""Lengths are those of trl's own preparation; rows that do not fit are named."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from datasets import Dataset
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, T5Config

from fedtune.config import DataArguments
from fedtune.data import (
    as_language_rows,
    check_lengths,
    check_row_lengths,
    context_length,
    readable_length,
    token_lengths,
)
from fedtune.errors import DataError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
RAW = {
    "text": {"text": ["short", "ends with one</s>", "été " * 5]},
    "pairs": {"instruction": ["Add.", "Greet."], "input": ["1 2", ""], "output": ["3", "Hi"]},
    "messages": {"messages": [CHAT, CHAT * 2]},
}


@pytest.mark.parametrize("kind", RAW)
def test_lengths_are_those_of_sft_trainer(kind, chat_tokenizer, tmp_path):
    """Also: trl closes every row with exactly one EOS, so that none is added here."""
    from trl import SFTConfig, SFTTrainer

    rows = as_language_rows(Dataset.from_dict(RAW[kind]), DataArguments(), chat_tokenizer)
    config = LlamaConfig(
        vocab_size=len(chat_tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=256,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=LlamaForCausalLM(config),
        args=SFTConfig(output_dir=str(tmp_path), max_length=None, report_to=[], use_cpu=True),
        train_dataset=rows,
        processing_class=chat_tokenizer,
    )
    ids = trainer.train_dataset["input_ids"]
    assert token_lengths(rows, chat_tokenizer) == [len(row) for row in ids]
    if kind != "messages":
        assert [list(row).count(chat_tokenizer.eos_token_id) for row in ids] == [1] * len(rows)
    if kind == "pairs":
        learned = [
            chat_tokenizer.decode([t for t in row if t != -100])
            for row in trainer.train_dataset["labels"]
        ]
        assert learned == ["3</s>", "Hi</s>"]


def test_classification_rows_have_no_eos(tokenizer):
    rows = Dataset.from_dict({"text": ["abc"], "labels": [0]})
    assert token_lengths(rows, tokenizer) == [3]


def test_lengths_do_not_depend_on_the_batch(tokenizer, monkeypatch):
    rows = Dataset.from_dict({"text": ["x" * i for i in range(1, 8)]})
    monkeypatch.setattr("fedtune.data.lengths.BATCH", 3)
    assert token_lengths(rows, tokenizer) == [i + 1 for i in range(1, 8)]


def test_context_length():
    assert context_length(LlamaConfig(max_position_embeddings=77)) == 77
    assert context_length(GPT2Config(n_positions=33)) == 33
    assert context_length(T5Config()) is None
    assert context_length(SimpleNamespace(max_seq_len=12)) == 12


@pytest.mark.parametrize(
    ("lengths", "settings", "truncated"),
    [
        ([3, 8], {"max_length": None, "context": 8}, 0),
        ([3, 9], {"max_length": None, "context": None}, 0),
        ([3, 9, 10], {"max_length": 8, "context": 8}, 2),
        ([3, 9], {"max_length": 8, "context": None}, 1),
        ([3, 9, 10], {"max_length": None, "context": 8}, 2),
        ([3, 9, 10], {"max_length": None, "context": 12, "virtual_tokens": 3}, 1),
        ([3, 8], {"max_length": 8, "context": 8, "strict": True}, 0),
        ([], {"max_length": None, "context": 8}, 0),
    ],
)
def test_rows_that_fit_or_are_truncated(lengths, settings, truncated):
    assert check_lengths(lengths, **settings) == truncated


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"max_length": None, "context": 8, "where": "rows of client-1", "strict": True},
            "rows of client-1: expected at most 8 tokens (the model's context), received 12 in row "
            "3 (rows count from 1); 2 of 3 rows are too long. Fix: shorten them, or leave out "
            "--strict_length, which cuts them.",
        ),
        (
            {"max_length": 9, "context": 8},
            "--max_length: expected at most 8 (the context), received 9. Fix: --max_length 8",
        ),
        (
            {"max_length": 8, "context": 8, "virtual_tokens": 3},
            "--max_length: expected at most 5 (the context minus 3 virtual tokens), received 8. "
            "Fix: --max_length 5",
        ),
        (
            {"max_length": 4, "context": 8, "virtual_tokens": 8},
            "--num_virtual_tokens: expected fewer than 8 (the model's context), received 8: no "
            "room is left for text. Fix: --num_virtual_tokens 4",
        ),
        (
            {"max_length": 0, "context": 8},
            "--max_length: expected at least 1, received 0. Fix: --max_length 8",
        ),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(DataError) as caught:
        check_lengths([3, 9, 12], **settings)
    assert str(caught.value) == message


def test_rows_against_a_model(tokenizer):
    """Context 8, of which a prompt takes 3; "x" and its EOS are 2 tokens."""
    prompt = SimpleNamespace(num_virtual_tokens=3)
    config = LlamaConfig(max_position_embeddings=8)
    model = SimpleNamespace(config=config, active_peft_config=prompt)
    rows = Dataset.from_dict({"text": ["x", "xxxx", "xxxxx"]})
    assert readable_length(model) == 5
    assert readable_length(SimpleNamespace(config=config)) == 8
    assert readable_length(SimpleNamespace(config=T5Config())) is None
    assert check_row_lengths(rows, model, tokenizer, 5, "rows") == 1
    with pytest.raises(DataError, match="held-out rows: expected at most 5 .*received 6 in row 3 "):
        check_row_lengths(rows, model, tokenizer, None, "held-out rows", strict=True)
    assert check_row_lengths(rows, model, tokenizer, None, "held-out rows") == 1
