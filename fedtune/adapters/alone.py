"""The base model without its adapter, as its own held-out loss needs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from fedtune.adapters.names import active_adapter, has_adapter
from fedtune.adapters.starts import rewrites_base

__all__ = ["NEW_HEAD", "base_alone", "has_virtual_tokens"]

NEW_HEAD = "fedtune_new_head"  # attribute of a base model whose head no checkpoint had
IN_THE_CACHE = ("PREFIX_TUNING", "CARTRIDGE")  # keys and values before the row, not tokens


def has_virtual_tokens(model: nn.Module | None) -> bool:
    """Whether a prompt lies before every row, so that a row's first token is predicted as well."""
    if not isinstance(model, PeftModel) or model._adapters_disabled:
        return False
    config = model.active_peft_config
    return config.is_prompt_learning and config.peft_type not in IN_THE_CACHE


@contextmanager
def base_alone(model: nn.Module) -> Iterator[None]:
    """Inside, `model` computes as its base does: no adapter, no prompt, the head as it was loaded.

    For a model as built, before anything is trained: biases and full models are trained in place.
    """
    adapters: Any = getattr(model, "peft_config", {})
    if not has_adapter(model) or rewrites_base(vars(adapters[active_adapter(model)])):
        yield  # adapter and rest of the base together are the base
        return
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        with _without_prompt(model):
            yield
        return
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        with model.disable_adapter() if isinstance(model, PeftModel) else _inside_disabled(model):
            yield
    finally:  # PEFT lets the whole adapter train when it is back
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def _inside_disabled(model: nn.Module) -> Iterator[None]:
    """The `enable_adapters` of transformers leaves `modules_to_save` switched off."""
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@contextmanager
def _without_prompt(model: PeftModel) -> Iterator[None]:
    """PEFT's own way asks for `prepare_inputs_for_generation`, which a classifier lacks."""
    before = vars(model).get("forward")
    vars(model)["forward"] = model.get_base_model().forward
    model._adapters_disabled = True
    try:
        yield
    finally:
        model._adapters_disabled = False
        del vars(model)["forward"]
        if before is not None:
            vars(model)["forward"] = before
