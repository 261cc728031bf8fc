"""The table of everything that fedtune trains; one contract is tested over every entry."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from torch import Tensor, nn

from fedtune.adapters import load_base
from fedtune.config import ModelArguments
from tests.tiny import tiny_gpt2, tiny_llama, tokens

Base = Callable[[Path], nn.Module]  # directory with a saved tiny Llama -> base model


@dataclass(frozen=True)
class Variant:
    """One adapter on one base.

    Attributes:
        config: PEFT config, or None to train the whole model.
        base: builds the same base at every call.
        prepare: last change to the model before training, like freezing lora_A.
        atol: allowed difference of logits after export; 0 means equal bits.
        continues: whether PEFT's own checkpoint is enough to continue from.
    """

    name: str
    config: PeftConfig | None
    base: Base
    prepare: Callable[[nn.Module], None] = lambda model: None
    atol: float = 0.0
    continues: bool = True

    def build(self, saved: Path, seed: int) -> nn.Module:
        """The model with a fresh adapter that depends on `seed`."""
        model = self.base(saved)
        torch.manual_seed(seed)
        if self.config is not None:
            model = get_peft_model(model, copy.deepcopy(self.config))
        self.prepare(model)
        return model


def llama(**kw: Any) -> Base:
    return lambda saved: tiny_llama(**kw)


def gpt2(saved: Path) -> nn.Module:
    return tiny_gpt2()


def quantized(**kw: Any) -> Base:
    def build(saved: Path) -> nn.Module:
        model, _ = load_base(ModelArguments(model_name_or_path=str(saved), **kw), task="causal_lm")
        return model

    return build


def freeze_a(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            parameter.requires_grad = False


def freeze_embeddings(model: nn.Module) -> None:
    model.get_input_embeddings().requires_grad_(False)


def lora(**kw: Any) -> LoraConfig:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    return LoraConfig(**{**settings, "task_type": "CAUSAL_LM", **kw})


PROMPT = {"num_virtual_tokens": 5, "task_type": "CAUSAL_LM"}
BIASED = llama(attention_bias=True)
TIED = llama(tie_word_embeddings=True)
CLASSIFIER = llama(num_labels=3)

VARIANTS = [
    Variant("lora", lora(), llama()),
    Variant("rslora", lora(use_rslora=True), llama()),
    Variant(
        "patterns",
        lora(rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"v_proj": 32}),
        llama(),
    ),
    Variant("all-linear", lora(target_modules="all-linear"), llama()),
    Variant("lm_head", lora(modules_to_save=["lm_head"]), llama()),
    Variant("lm_head-tied", lora(modules_to_save=["lm_head"]), TIED),
    Variant(
        "embeddings-kept-tied",
        lora(modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True),
        TIED,
    ),
    Variant("bias-lora_only", lora(target_modules=["q_proj"], bias="lora_only"), BIASED),
    Variant("bias-all", lora(target_modules=["q_proj"], bias="all"), BIASED),
    Variant("lora_bias", lora(lora_bias=True), BIASED),
    Variant("embed_tokens", lora(target_modules=["embed_tokens", "q_proj"]), llama()),
    Variant("embed_tokens-tied", lora(target_modules=["embed_tokens", "q_proj"]), TIED),
    Variant("trainable_tokens", lora(trainable_token_indices=[3, 5]), llama()),
    Variant("conv1d", lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), gpt2),
    Variant("dora", lora(use_dora=True), llama()),
    Variant("ffa", lora(), llama(), prepare=freeze_a),
    Variant("seq_cls", lora(task_type="SEQ_CLS"), CLASSIFIER),
    Variant("no-task-type", lora(task_type=None), llama()),
    Variant("ia3", IA3Config(task_type="CAUSAL_LM"), llama()),
    Variant("ia3-conv1d", IA3Config(task_type="CAUSAL_LM"), gpt2),
    Variant("loha", LoHaConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"), llama()),
    Variant("vera", VeraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM"), llama()),
    Variant(
        "p_tuning-mlp",
        PromptEncoderConfig(encoder_hidden_size=24, **PROMPT),
        llama(),
        continues=False,
    ),
    Variant(
        "p_tuning-lstm",
        PromptEncoderConfig(
            encoder_hidden_size=24, encoder_reparameterization_type="LSTM", **PROMPT
        ),
        llama(),
        atol=1e-6,  # a batch of another size is another kernel
        continues=False,
    ),
    Variant(
        "p_tuning-seq_cls",
        PromptEncoderConfig(encoder_hidden_size=24, **{**PROMPT, "task_type": "SEQ_CLS"}),
        CLASSIFIER,
        continues=False,
    ),
    Variant("prompt_tuning", PromptTuningConfig(**PROMPT), llama()),
    Variant("prefix", PrefixTuningConfig(**PROMPT), llama()),
    Variant(
        "prefix-projection",
        PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=24, **PROMPT),
        llama(),
        atol=1e-6,  # a batch of another size is another kernel
        continues=False,
    ),
    Variant("full", None, llama()),
    Variant("full-tied", None, TIED),
    Variant("full-gpt2", None, gpt2),
    Variant("full-frozen-embeddings", None, llama(), prepare=freeze_embeddings),
    Variant("full-seq_cls", None, CLASSIFIER),
    Variant("nf4", lora(), quantized(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    Variant("fp4", lora(), quantized(load_in_4bit=True, bnb_4bit_quant_type="fp4")),
    Variant("int8", lora(), quantized(load_in_8bit=True)),
]


def batch(model: nn.Module) -> dict[str, Tensor]:
    """Two rows with labels for the model's task."""
    ids = tokens()
    classifier = model.config.architectures == ["LlamaForSequenceClassification"] or hasattr(
        model, "score"
    )
    return {"input_ids": ids, "labels": torch.tensor([0, 2]) if classifier else ids}


def logits(model: nn.Module) -> Tensor:
    """Evaluation logits."""
    model.eval()
    with torch.no_grad():
        return model(input_ids=tokens()).logits.clone()


def train_loss(model: nn.Module) -> Tensor:
    """Loss in train mode, where a prompt encoder and (GPT-2) dropout run."""
    model.train()
    torch.manual_seed(0)
    with torch.no_grad():
        return model(**batch(model)).loss.clone()


def train(model: nn.Module, steps: int = 3) -> torch.optim.Optimizer:
    """A few AdamW steps; returns the optimizer."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch(model)).loss.backward()
        optimizer.step()
    return optimizer
