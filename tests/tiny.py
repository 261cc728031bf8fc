"""Tiny random models, built from configs: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB = 64
LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def tiny_llama(seed: int = 0, *, num_labels: int | None = None, **kw: Any) -> PreTrainedModel:
    """A Llama of about 20,000 parameters, k and v narrower than q; a classifier with num_labels."""
    torch.manual_seed(seed)
    if num_labels is not None:
        return LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=num_labels, **kw))
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, **kw}))


def tiny_gpt2(seed: int = 0, **kw: Any) -> PreTrainedModel:
    """A GPT-2 of about 30,000 parameters: Conv1D layers (weights stored as (in, out)), tied."""
    torch.manual_seed(seed)
    size = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**{**size, "bos_token_id": 1, "eos_token_id": 2, **kw}))


def tokens(rows: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    """Random token ids without the pad id, shape (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)


def tiny_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Words `w3` to `w63` and three special tokens; none is a special token unless it is named."""
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)
