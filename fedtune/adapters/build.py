"""From settings to a model: base model and tokenizer, then the adapter on it."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fedtune.adapters.alone import NEW_HEAD
from fedtune.adapters.live import ADALORA
from fedtune.adapters.precision import train_in_fp32
from fedtune.adapters.quant import keep_trainable, quantization_config
from fedtune.config import AdapterArguments, ModelArguments
from fedtune.errors import ConfigError
from fedtune.lists import split_names

__all__ = ["Task", "attach_adapter", "build_peft_config", "load_base", "load_config", "seeded"]

Task = Literal["causal_lm", "seq_cls"]
METHODS = ("lora", "dora", "p_tuning", "prompt_tuning", "prefix_tuning", "ia3", "none")
# What libraries raise on a file that is none of theirs, or damaged.
DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)
HEAD_SEED = 0  # a new classification head is the same at every site


def build_peft_config(adapter: AdapterArguments, task_type: str) -> PeftConfig | None:
    """PEFT's config for `--peft_method`; None for `none`. `task_type`: causal_lm or seq_cls.

    Raises:
        ConfigError: an unknown method; AdaLoRA with the reason.
    """
    method = adapter.peft_method
    common: dict[str, Any] = {"task_type": task_type.upper()}
    modules: dict[str, Any] = {"modules_to_save": split_names(adapter.modules_to_save) or None}
    tokens: dict[str, Any] = {"num_virtual_tokens": adapter.num_virtual_tokens}
    match method:
        case "none":
            return None
        case "lora" | "dora":
            return LoraConfig(
                r=adapter.lora_r,
                lora_alpha=_whole(adapter.lora_alpha),
                lora_dropout=adapter.lora_dropout,
                target_modules=_target_modules(adapter.lora_target_modules),
                use_rslora=adapter.use_rslora,
                use_dora=method == "dora",
                **modules,
                **common,
            )
        case "ia3":
            return IA3Config(**modules, **common)
        case "p_tuning":
            return PromptEncoderConfig(
                encoder_hidden_size=adapter.encoder_hidden_size,
                encoder_reparameterization_type=adapter.encoder_reparameterization_type,
                **tokens,
                **common,
            )
        case "prompt_tuning":
            return PromptTuningConfig(**tokens, **common)
        case "prefix_tuning":
            return PrefixTuningConfig(
                prefix_projection=adapter.prefix_projection,
                encoder_hidden_size=adapter.encoder_hidden_size,
                **tokens,
                **common,
            )
    if method == "adalora":
        raise ConfigError(f"--peft_method: {ADALORA}")
    raise ConfigError(
        f"--peft_method: expected one of {', '.join(METHODS)}, received {method!r}. "
        "Choose one of them."
    )


def attach_adapter(
    model: PreTrainedModel, adapter: AdapterArguments, task: Task, seed: int
) -> nn.Module:
    """A PeftModel around `model`, or `model` itself for `none`.

    The initial adapter depends on `seed` alone; the global RNG is left as it was. What is trained
    is fp32, whatever the dtype of the checkpoint (`precision.py`).

    Raises:
        ConfigError: PEFT cannot put this adapter on this model, or `none` on a quantized model.
    """
    config = build_peft_config(adapter, task)
    if config is None:
        if getattr(model, "is_quantized", False):
            raise ConfigError(
                "--peft_method none: expected a base model in full precision, received a quantized "
                "one. Drop --load_in_4bit / --load_in_8bit, or train an adapter."
            )
        train_in_fp32(model)
        return model
    try:
        with seeded(seed):
            attached: nn.Module = get_peft_model(model, copy.deepcopy(config))
    except ValueError as error:
        raise ConfigError(
            f"--peft_method {adapter.peft_method}: expected an adapter that fits "
            f"{type(model).__name__}, received: {' '.join(str(error).split())} "
            "Set --lora_target_modules or choose another method."
        ) from None
    train_in_fp32(attached)
    return attached


def load_base(
    model: ModelArguments,
    *,
    task: Task,
    num_labels: int | None = None,
    id2label: dict[int, str] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Base model and tokenizer; quantized and prepared for training on request.

    The tokenizer always has a pad token (its own, else eos, else unk), and the model's config
    agrees with it. A new classification head is initialized with a fixed seed.

    Raises:
        ConfigError: no such model, no tokenizer, no possible pad token, or two quantizations.
    """
    path = os.path.expanduser(model.model_name_or_path or _embedded_model())
    options: dict[str, Any] = {"quantization_config": quantization_config(model)}
    if task == "seq_cls":
        options |= _labels(num_labels, id2label)
    _check_path(path)
    tokenizer = _load_tokenizer(path)
    auto = AutoModelForCausalLM if task == "causal_lm" else AutoModelForSequenceClassification
    try:
        with seeded(HEAD_SEED):
            loaded: Any = auto.from_pretrained(
                path,
                output_loading_info=True,
                **{key: value for key, value in options.items() if value is not None},
            )
    except DAMAGED as error:
        raise _no_model(path, f"a model for {task}", error) from None
    base: PreTrainedModel = loaded[0]
    new_head = task == "seq_cls" and bool(loaded[1]["missing_keys"])
    if options["quantization_config"] is not None:
        base = prepare_model_for_kbit_training(  # type: ignore[no-untyped-call]
            base, use_gradient_checkpointing=False
        )
        keep_trainable(base)
    _align_pad(base, tokenizer)
    if new_head:
        setattr(base, NEW_HEAD, True)
    return base, tokenizer


def load_config(model_name_or_path: str) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Config and tokenizer of a base model; its weights are not read. Raises ConfigError."""
    path = os.path.expanduser(model_name_or_path)
    _check_path(path)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path)
    except DAMAGED as error:
        raise _no_model(path, "a model's config", error) from None
    return config, _load_tokenizer(path)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's RNGs (CPU and every CUDA device) start at `seed` inside and are restored after."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _target_modules(text: str | None) -> str | list[str] | None:
    names = split_names(text)
    return "all-linear" if names == ["all-linear"] else names or None


def _whole(alpha: float) -> int:
    """As PEFT writes it into its config: an int where it is one (it computes with both)."""
    return int(alpha) if float(alpha).is_integer() else alpha  # type: ignore[return-value]


def _embedded_model() -> str:
    from fedtune.assets import MODEL_DIR

    return str(MODEL_DIR)


def _labels(num_labels: int | None, id2label: dict[int, str] | None) -> dict[str, Any]:
    if id2label is None:
        return {"num_labels": num_labels}
    return {"id2label": id2label, "label2id": {label: i for i, label in id2label.items()}}


def _check_path(path: str) -> None:
    """Tell a missing directory, an adapter and an unreachable hub id apart."""
    directory = Path(path)
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            kind = "an adapter" if (directory / "adapter_config.json").is_file() else "a directory"
            raise _no_model(path, f"a model directory with config.json, received {kind} without it")
        return
    if path.startswith((".", "/")) or path.count("/") > 1:
        raise _no_model(path, "a model directory, received a path that does not exist")
    try:
        AutoConfig.from_pretrained(path)
    except DAMAGED as error:
        raise _no_model(path, "a model directory or a hub id that can be reached", error) from None


def _load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # tokenizers raises no other for a file that it cannot parse
        raise _no_model(path, "a tokenizer beside the model, received none that loads") from error
    return tokenizer


def _align_pad(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token_id is None:  # 0 is a valid id
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            f"Tokenizer of {tokenizer.name_or_path}: expected a pad, eos or unk token, received "
            "none of them. Set `pad_token` in its tokenizer_config.json."
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:  # a classifier has none
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def _no_model(path: str, expected: str, error: Exception | None = None) -> ConfigError:
    words = str(error).strip() or type(error).__name__
    received = f", received: {words.splitlines()[0]}" if error else ""
    return ConfigError(
        f"--model_name_or_path {path}: expected {expected}{received.rstrip('. ')}. "
        "Give a directory that save_pretrained wrote, or a hub id."
    )
