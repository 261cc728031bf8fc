"""Canonical names: which tensors belong to an adapter, and what they are called without its name.

    base_model.model.q_proj.lora_A.default.weight  ->  base_model.model.q_proj.lora_A.weight
    prompt_encoder.default.embedding.weight        ->  prompt_encoder.embedding.weight
    q_proj.lora_A.ward.weight (model.add_adapter)  ->  base_model.model.q_proj.lora_A.weight

Names without an adapter's are of the active one: the adapter that trains, whatever it is called.

PEFT keeps one entry per adapter in a container keyed by the adapter's name (`ModuleDict`,
`ParameterDict`, `BufferDict`), so ownership is read from the structure, not from key patterns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from peft import PeftModel
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fedtune.errors import ManifestError

__all__ = [
    "active_adapter",
    "base_model",
    "has_adapter",
    "owned_tensors",
    "receivers",
    "static_tensors",
    "trainable_tensors",
    "wrapper",
]

CONTAINERS = (nn.ModuleDict, nn.ParameterDict, BufferDict)
WRAPPER = "base_model.model."  # of a PeftModel
NO_ADAPTER = "default"
BASE_COPIES = ("trainable_tokens_original",)  # in a container, but every site has them


def base_model(model: nn.Module) -> nn.Module:
    """The model under the adapter; the model itself where there is none."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def has_adapter(model: nn.Module) -> bool:
    """Whether there is one: a PeftModel, or a model with adapters inside it (`add_adapter`)."""
    return isinstance(model, PeftModel) or bool(getattr(model, "peft_config", None))


def wrapper(model: nn.Module) -> str:
    """What names of modules lack to be those of a PeftModel."""
    return WRAPPER if has_adapter(model) and not isinstance(model, PeftModel) else ""


def active_adapter(model: nn.Module) -> str:
    """Name of the adapter that is trained; any name where there is no adapter.

    Raises:
        ManifestError: none or several are active.
    """
    if not has_adapter(model):
        return NO_ADAPTER
    if isinstance(model, PeftModel):
        active = list(model.active_adapters)
    else:
        layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
        active = sorted({name for layer in layers for name in layer.active_adapters})
    if len(active) != 1:
        raise ManifestError(
            f"Adapter: expected one that is active, received {', '.join(active) or 'none'} of "
            f"{', '.join(sorted(_adapter_names(model)))}. Call model.set_adapter with the name of "
            "the one that is trained."
        )
    return active[0]


def owned_tensors(model: nn.Module, adapter_name: str | None = None) -> dict[str, Tensor]:
    """Parameters and buffers that live in a PEFT container under `adapter_name`, trained or not."""
    adapter_name = adapter_name or active_adapter(model)
    prefixes = _prefixes(model, [adapter_name])
    return {
        _canonical(name, prefixes): tensor
        for name, tensor in _named_tensors(model)
        if _prefix_of(name, prefixes) is not None
        and not any(copy in name.split(".") for copy in BASE_COPIES)
    }


def trainable_tensors(model: nn.Module, adapter_name: str | None = None) -> dict[str, Tensor]:
    """All `requires_grad` parameters but those of other adapters; tied ones appear once."""
    adapter_name = adapter_name or active_adapter(model)
    prefixes = _prefixes(model, [adapter_name])
    others = _prefixes(model, [name for name in _adapter_names(model) if name != adapter_name])
    return {
        _canonical(name, prefixes): parameter
        for name, parameter in model.named_parameters(wrapper(model).removesuffix("."))
        if parameter.requires_grad and _prefix_of(name, others) is None
    }


def static_tensors(model: nn.Module, adapter_name: str | None = None) -> dict[str, Tensor]:
    """Frozen tensors that belong to what travels.

    With an adapter: those it owns (FFA-LoRA's lora_A, VeRA's projections). A full model owns all of
    its tensors: its frozen parameters and persistent buffers.
    """
    trainable = trainable_tensors(model, adapter_name)
    if has_adapter(model):
        owned: Mapping[str, Tensor] = owned_tensors(model, adapter_name)
    else:
        saved = model.state_dict().keys()
        owned = {name: tensor for name, tensor in _named_tensors(model) if name in saved}
    return {name: tensor for name, tensor in owned.items() if name not in trainable}


def receivers(model: nn.Module, adapter_name: str | None = None) -> dict[str, Tensor]:
    """Every tensor of the model by canonical name, for loading in place."""
    prefixes = _prefixes(model, [adapter_name or active_adapter(model)])
    return {_canonical(name, prefixes): tensor for name, tensor in _named_tensors(model)}


def _adapter_names(model: nn.Module) -> list[str]:
    adapters: Iterable[str] = model.peft_config if has_adapter(model) else ()  # type: ignore
    return list(adapters)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    prefix = wrapper(model).removesuffix(".")
    yield from model.named_parameters(prefix)
    yield from model.named_buffers(prefix)


def _prefixes(model: nn.Module, adapter_names: list[str]) -> dict[str, str]:
    """`"...lora_A.default" -> "...lora_A"` for every container that holds one of the adapters."""
    if not has_adapter(model):
        return {}
    prefix = wrapper(model).removesuffix(".")
    return {
        f"{path}.{name}": path
        for path, module in model.named_modules(prefix=prefix, remove_duplicate=False)
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
