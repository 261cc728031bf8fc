"""Canonical names: which tensors belong to an adapter, and what they are called without its name.

    base_model.model.q_proj.lora_A.default.weight  ->  base_model.model.q_proj.lora_A.weight
    prompt_encoder.default.embedding.weight        ->  prompt_encoder.embedding.weight

PEFT keeps one entry per adapter in a container keyed by the adapter's name (`ModuleDict`,
`ParameterDict`, `BufferDict`), so ownership is read from the structure, not from key patterns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from peft import PeftModel
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

__all__ = ["base_model", "owned_tensors", "receivers", "static_tensors", "trainable_tensors"]

CONTAINERS = (nn.ModuleDict, nn.ParameterDict, BufferDict)
BASE_COPIES = ("trainable_tokens_original",)  # in a container, but every site has them


def base_model(model: nn.Module) -> nn.Module:
    """The model under the adapter; the model itself where there is none."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def owned_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Parameters and buffers that live in a PEFT container under `adapter_name`, trained or not."""
    prefixes = _prefixes(model, [adapter_name])
    return {
        _canonical(name, prefixes): tensor
        for name, tensor in _named_tensors(model)
        if _prefix_of(name, prefixes) is not None
        and not any(copy in name.split(".") for copy in BASE_COPIES)
    }


def trainable_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """All `requires_grad` parameters but those of other adapters; tied ones appear once."""
    prefixes = _prefixes(model, [adapter_name])
    others = _prefixes(model, [name for name in _adapter_names(model) if name != adapter_name])
    return {
        _canonical(name, prefixes): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and _prefix_of(name, others) is None
    }


def static_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Frozen tensors that belong to what travels.

    With an adapter: those it owns (FFA-LoRA's lora_A, VeRA's projections). A full model owns all of
    its tensors: its frozen parameters and persistent buffers.
    """
    trainable = trainable_tensors(model, adapter_name)
    if isinstance(model, PeftModel):
        owned: Mapping[str, Tensor] = owned_tensors(model, adapter_name)
    else:
        saved = model.state_dict().keys()
        owned = {name: tensor for name, tensor in _named_tensors(model) if name in saved}
    return {name: tensor for name, tensor in owned.items() if name not in trainable}


def receivers(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Every tensor of the model by canonical name, for loading in place."""
    prefixes = _prefixes(model, [adapter_name])
    return {_canonical(name, prefixes): tensor for name, tensor in _named_tensors(model)}


def _adapter_names(model: nn.Module) -> list[str]:
    return list(model.peft_config) if isinstance(model, PeftModel) else []


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _prefixes(model: nn.Module, adapter_names: list[str]) -> dict[str, str]:
    """`"...lora_A.default" -> "...lora_A"` for every container that holds one of the adapters."""
    if not isinstance(model, PeftModel):
        return {}
    return {
        f"{path}.{name}": path
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, CONTAINERS)
        for name in adapter_names
        if name in module
    }


def _prefix_of(name: str, prefixes: Mapping[str, str]) -> str | None:
    """The container entry that `name` lies in: itself or one of its parents."""
    while name:
        if name in prefixes:
            return name
        name = name.rpartition(".")[0]
    return None


def _canonical(name: str, prefixes: Mapping[str, str]) -> str:
    prefix = _prefix_of(name, prefixes)
    return name if prefix is None else prefixes[prefix] + name[len(prefix) :]
