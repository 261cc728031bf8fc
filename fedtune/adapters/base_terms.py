"""What a method has added to the base model, as a frozen low-rank branch beside adapted layers.

    layer(x)  <-  layer(x) + B (A x)          B: (out, R), A: (R, in), scaling is in them

The base's own weights are never written: a quantized one could not take the term, a half-precision
one would round it away, and the other users of a live model would find it changed. The branch is a
forward hook, so it is no parameter: not trained, not in any checkpoint, gone when none is given.

It belongs to the base, but not to the base as it was before the federation: where PEFT is told to
run without adapters, or with another one (the references of DPO), it is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, MultiheadAttention, ParamWrapper, _ConvNd
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedtune.adapters.manifest import TERM_A, TERM_B
from fedtune.adapters.names import active_adapter, wrapper
from fedtune.errors import ManifestError

__all__ = ["base_terms", "set_base_terms"]

HOLDER = "_fedtune_base_terms"  # attribute of a model that has some
OTHERS = (_ConvNd, MultiheadAttention, ParamWrapper)  # what they do is not a matrix times the input


class _Live(NamedTuple):
    terms: dict[str, Tensor]
    handles: list[RemovableHandle]


def base_terms(model: nn.Module) -> dict[str, Tensor]:
    """The terms beside the model's base: `<module>.base_B` (out, R), `<module>.base_A` (R, in)."""
    live: _Live | None = vars(model).get(HOLDER)
    return dict(live.terms) if live else {}


def set_base_terms(
    model: nn.Module, terms: Mapping[str, Tensor], adapter_name: str | None = None
) -> None:
    """Put `terms` in the place of those that are there; none removes them.

    They act with the named adapter alone, or with the one that is active now.

    Raises:
        ManifestError: a term without its layer, its other factor, or of another size; then nothing
            has changed.
    """
    layers = _layers(model, terms)
    live: _Live | None = vars(model).pop(HOLDER, None)
    for handle in live.handles if live else []:
        handle.remove()
    if terms:
        adapter = adapter_name or active_adapter(model)
        handles = [
            layer.register_forward_hook(
                _Branch(adapter, terms[name + TERM_B], terms[name + TERM_A])
            )
            for name, layer in layers.items()
        ]
        vars(model)[HOLDER] = _Live(dict(terms), handles)


class _Branch:
    """A forward hook of one layer."""

    def __init__(self, adapter: str, b: Tensor, a: Tensor) -> None:
        self._adapter, self._b, self._a = adapter, b, a

    def __call__(self, layer: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if layer.disable_adapters or self._adapter not in layer.active_adapters:
            return output
        x = args[0]
        if self._b.device != x.device:
            self._b, self._a = self._b.to(x.device), self._a.to(x.device)
        if isinstance(layer, Embedding):
            added = F.embedding(x, self._a.T) @ self._b.T
            scale = layer._get_embed_scale()  # type: ignore[no-untyped-call]
            if scale is not None:
                added = added * scale.to(added.dtype)
        else:
            added = F.linear(F.linear(x.to(self._a.dtype), self._a), self._b)
        return output + added.to(output.dtype)


def _layers(model: nn.Module, terms: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Module name -> live layer of every term."""
    if not terms:
        return {}
    live = dict(model.named_modules(prefix=wrapper(model).removesuffix(".")))
    names = sorted({name.removesuffix(TERM_B).removesuffix(TERM_A) for name in terms})
    for name in names:
        layer = live.get(name)
        if not isinstance(layer, LoraLayer) or isinstance(layer, OTHERS):
            raise ManifestError(
                f"`{name}`: expected a Linear, Conv1D or Embedding with LoRA for the base's term, "
                f"received {type(layer).__name__}. Use fedit."
            )
        b, a = terms.get(name + TERM_B), terms.get(name + TERM_A)
        sizes = None if b is None or a is None else (b.shape[0], a.shape[1], b.shape[1])
        if a is None or sizes != (layer.out_features, layer.in_features, a.shape[0]):
            raise ManifestError(
                f"`{name}`: expected a base term with B ({layer.out_features}, R) and A (R, "
                f"{layer.in_features}), received {None if b is None else tuple(b.shape)} and "
                f"{None if a is None else tuple(a.shape)}. Use the same fedtune on both sides."
            )
    return {name: live[name] for name in names}
