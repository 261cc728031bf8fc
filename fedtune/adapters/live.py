"""Read a live model into a manifest: what is trained, under which names, at which scaling."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

from peft import PeftConfig, PeftMixedModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedtune.adapters.manifest import FULL, Entry, Manifest, digest
from fedtune.adapters.names import (
    active_adapter,
    base_model,
    has_adapter,
    owned_tensors,
    static_tensors,
    trainable_tensors,
    wrapper,
)
from fedtune.adapters.starts import refused_start
from fedtune.errors import ManifestError

__all__ = ["ADALORA", "describe"]

ADALORA = (
    "AdaLoRA is not supported: it prunes ranks by each site's own importance scores, and the "
    "Trainer never calls update_and_allocate. Use --peft_method lora or dora."
)
PROMPT_KINDS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")

# What a Trainer, a tokenizer, the hardware or a release may change in the config of one base model.
VOLATILE = frozenset(
    [
        "_name_or_path",
        "_attn_implementation",
        "attn_implementation",
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "gradient_checkpointing",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    ]
)
QUANTIZATION = [
    "quant_method",
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
]


def describe(model: nn.Module, adapter_name: str | None = None) -> Manifest:
    """The manifest of an adapter, or of a plain HuggingFace model that is trained in full.

    The active adapter, unless another one is named: of a PeftModel, or inside a model.

    Raises:
        ManifestError: AdaLoRA, a start that differs between sites (`starts.py`), a prompt method
            without an export, a PeftMixedModel, several active adapters, an unknown name, nothing
            to train, or something that is trained but that PEFT would not save.
    """
    adapter_name = adapter_name or active_adapter(model)
    config = _adapter_config(model, adapter_name)
    trainable = trainable_tensors(model, adapter_name)
    static = static_tensors(model, adapter_name)
    if not trainable:
        raise ManifestError(
            f"Nothing to train: expected parameters with requires_grad in adapter "
            f"`{adapter_name}`, received none. Attach an adapter, or unfreeze it."
        )
    peft_type = config["peft_type"] if config else FULL
    return Manifest(
        peft_type=peft_type,
        base_hash=base_hash(base_model(model)),
        adapter_config=config,
        entries=_entries(trainable),
        static=_entries(static),
        scaling=dict(_scaling(model, adapter_name)),
        export=_export_keys(model, adapter_name, trainable, static),
        config=_base_config(base_model(model)),
    )


def base_hash(base: nn.Module) -> str:
    """Hash of a base model's class and config, equal at every site that loads the same directory.

    Weights are not read: `fingerprint.py` compares them, in 4 and 8 bits of bitsandbytes too. Other
    quantization counts by its kind, not by its compute dtype.
    """
    config = _base_config(base)
    quantization = config.pop("quantization_config", None) or {}
    if quantization.get("quant_method") == "bitsandbytes":
        quantization = {}
    return digest(
        [type(base).__name__, _stable(config), {k: quantization.get(k) for k in QUANTIZATION}]
    )


def _stable(value: Any) -> Any:
    """Drop volatile and unset keys at every level (composite models nest configs)."""
    if not isinstance(value, dict):
        return value
    return {k: _stable(v) for k, v in value.items() if k not in VOLATILE and v is not None}


def _base_config(base: nn.Module) -> dict[str, Any]:
    config: dict[str, Any] = json_able(base.config.to_dict())  # type: ignore[union-attr,operator]
    return {**config, "architectures": [type(base).__name__]}


def _adapter_config(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """PEFT's config as JSON values; empty for a full model."""
    if not has_adapter(model):
        return {}
    if isinstance(model, PeftMixedModel):
        raise ManifestError(
            "Adapter: expected a PeftModel, received a PeftMixedModel, whose adapters have no "
            "checkpoint of one kind. Use peft.get_peft_model(model, config)."
        )
    adapters: Any = model.peft_config
    if adapter_name not in adapters:
        raise ManifestError(
            f"Adapter: expected one of {sorted(adapters)}, received `{adapter_name}`. "
            "Give the name of the adapter that is trained."
        )
    live: PeftConfig = adapters[adapter_name]
    config: dict[str, Any] = json_able(copy.deepcopy(live).to_dict())
    if config["peft_type"] == "ADALORA":
        raise ManifestError(ADALORA)
    if problem := refused_start(config):
        raise ManifestError(problem)
    if live.is_prompt_learning and config["peft_type"] not in PROMPT_KINDS:
        raise ManifestError(
            f"Prompt method: expected one of {', '.join(PROMPT_KINDS)}, received "
            f"{config['peft_type']}. Use --peft_method p_tuning, prompt_tuning or prefix_tuning."
        )
    if config["task_type"] is None:  # as PEFT's save_pretrained does
        base = type(base_model(model))
        config["auto_mapping"] = {
            "base_model_class": base.__name__,
            "parent_library": base.__module__,
        }
    return config


def json_able(value: Any) -> Any:
    """Copy with sets as sorted lists and enums, dtypes and the like as text."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(k.value if isinstance(k, Enum) else k): json_able(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(json_able(item) for item in value)
    if isinstance(value, list | tuple):
        return [json_able(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _entries(tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    return {name: Entry.of(tensors[name]) for name in sorted(tensors)}


def _scaling(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, float]]:
    """(module, factor of B @ A); read from the live layer, where patterns are already resolved."""
    for name, module in model.named_modules(prefix=wrapper(model).removesuffix(".")):
        if isinstance(module, LoraLayer) and adapter_name in module.scaling:
            yield name, float(module.scaling[adapter_name])


def _export_keys(
    model: nn.Module,
    adapter_name: str,
    trainable: Mapping[str, Tensor],
    static: Mapping[str, Tensor],
) -> dict[str, str]:
    """Key of PEFT's checkpoint -> canonical name, found by storage, else by name.

    A checkpoint entry that is neither trained nor owned is a copy of the base and is left out.
    """
    tensors = {**static, **trainable}
    if not has_adapter(model):
        return {name: name for name in sorted(tensors)}
    by_storage = {_storage(tensor): name for name, tensor in tensors.items() if tensor.numel()}
    names = {
        wrapper(model) + key: by_storage.get(_storage(tensor), wrapper(model) + key)
        for key, tensor in _peft_state(model, adapter_name).items()
    }
    keys = {key: names[key] for key in sorted(names) if names[key] in tensors}
    prompt = owned_tensors(model, adapter_name) if hasattr(model, "prompt_encoder") else {}
    for name in sorted(trainable):
        in_prompt = name.startswith("prompt_encoder.") and name in prompt
        if name not in keys.values() and not in_prompt:
            raise ManifestError(
                f"`{name}` is trained, but PEFT does not save it: expected only what the adapter "
                "config names, received one more. Freeze it, or name its module in modules_to_save."
            )
    return keys


def _peft_state(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """PEFT's state dict; the embedding flag is explicit, since "auto" may call the hub."""
    modes = {module: module.training for module in model.modules()}
    model.eval()  # a prompt encoder with dropout would draw from the global RNG
    try:
        state: dict[str, Tensor] = get_peft_model_state_dict(
            model, adapter_name=adapter_name, save_embedding_layers=False
        )
    finally:
        for module, mode in modes.items():
            module.training = mode
    return state


def _storage(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape)
