"""What is trained is fp32: AdamW's steps are below half a step of most bf16 weights.

PEFT's own adapters are fp32 on any base. A model that is trained in full, and `modules_to_save`,
come in the checkpoint's dtype; a frozen base stays in it.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

__all__ = ["train_in_fp32", "warn_of_half_precision"]

log = logging.getLogger(__name__)


def train_in_fp32(model: nn.Module) -> None:
    """Cast, in place, what is trained in half precision to fp32.

    Copies in `modules_to_save` then compute in fp32, and give their layer's dtype back. Where other
    parameters of the base are trained, all of the model is cast, so that its layers fit together.
    """
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for copy in module.modules_to_save.values():
                _widen(copy)
    if _half(model):
        model.float()


def warn_of_half_precision(model: nn.Module) -> None:
    """Log a warning that names the dtype of trained parameters in half precision, if any are."""
    for dtype, names in _half(model).items():
        log.warning(
            "fedtune: %d trained parameters are %s (`%s`, ...): steps below their last bit are "
            "lost, which is most of them at usual learning rates. Load the model with "
            "dtype=torch.float32 and train with --bf16 true.",
            len(names),
            str(dtype).removeprefix("torch."),
            names[0],
        )


def _half(model: nn.Module) -> dict[torch.dtype, list[str]]:
    """Dtype -> names of trained parameters in it, of less than 32 bits."""
    found: dict[torch.dtype, list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype.itemsize < 4:
            found.setdefault(parameter.dtype, []).append(name)
    return found


def _widen(copy: nn.Module) -> None:
    dtypes = [p.dtype for p in copy.parameters() if p.requires_grad and p.dtype.itemsize < 4]
    if dtypes:
        copy.float()
        copy.register_forward_pre_hook(_Cast(torch.float32).before)
        copy.register_forward_hook(_Cast(dtypes[0]).after)


class _Cast:
    """Hooks that cast what goes into a module, or comes out of it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Floating-point inputs in the dtype."""
        return tuple(self._cast(value) for value in args)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """A floating-point output in the dtype."""
        return self._cast(output)

    def _cast(self, value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self._dtype) if floating else value
