"""Canonical parameters: what travels between sites, as plain CPU tensors with plain names.

All trained parameters by name, not PEFT's own state dict: that one drops the encoder of p-tuning
and the projection of prefix tuning, and does not notice missing keys.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedtune.adapters.base_terms import set_base_terms
from fedtune.adapters.manifest import Entry, Manifest, Params, check
from fedtune.adapters.names import receivers, static_tensors, trainable_tensors
from fedtune.adapters.sharded import copy_into, whole
from fedtune.errors import ManifestError

__all__ = ["Params", "collect", "collect_static", "load", "load_static"]


def collect(model: nn.Module, adapter_name: str | None = None) -> Params:
    """Copies of all trained parameters: CPU, contiguous, live dtype, sorted by canonical name.

    Of the active adapter, here and below, unless another one is named. Tied parameters appear once.
    Works for a PeftModel, for adapters inside a model and for a plain model trained in full.
    """
    return _snapshot(trainable_tensors(model, adapter_name))


def collect_static(model: nn.Module, adapter_name: str | None = None) -> Params:
    """Copies of the frozen tensors that have to be sent once, like FFA-LoRA's lora_A.

    Empty for most adapters. The base model is not part of it, unless the model is trained in full:
    then its frozen parameters and saved buffers are, so that the exported model is whole.
    """
    return _snapshot(static_tensors(model, adapter_name))


def load(
    model: nn.Module,
    params: Params,
    manifest: Manifest,
    *,
    static: Params | None = None,
    base: Params | None = None,
    adapter_name: str | None = None,
) -> None:
    """Copy `params` (and `static`) into the live tensors, cast to their dtype and device.

    The Parameter objects stay the same, so an optimizer over them stays valid. `base`: what has
    been added to the base (`base_terms.py`); earlier terms are dropped, whether or not some follow.

    Raises:
        ManifestError: something differs from the manifest, or the model from both; nothing is
            changed then.
    """
    check(params, manifest)
    if static is not None:
        check(static, manifest, static=True)
    _check_live(model, {**params, **(static or {})}, adapter_name)
    set_base_terms(model, base or {}, adapter_name)
    _copy(model, {**params, **(static or {})}, adapter_name)


def load_static(
    model: nn.Module, static: Params, manifest: Manifest, *, adapter_name: str | None = None
) -> None:
    """Copy only the static tensors into the live ones; same rules as `load`."""
    check(static, manifest, static=True)
    _check_live(model, static, adapter_name)
    _copy(model, static, adapter_name)


def _snapshot(tensors: Params) -> Params:
    return {name: _to_cpu(tensors[name]) for name in sorted(tensors)}


def _to_cpu(tensor: Tensor) -> Tensor:
    return whole(tensor.detach()).to("cpu", copy=True, memory_format=torch.contiguous_format)


def _check_live(model: nn.Module, params: Params, adapter_name: str | None) -> None:
    live = receivers(model, adapter_name)
    for name, tensor in params.items():
        expected = None if name not in live else tuple(live[name].shape)
        if expected != tuple(tensor.shape):
            raise ManifestError(
                f"`{name}`: this model has {expected or 'no such tensor'}, received "
                f"{Entry.of(tensor)}. Build the model with the adapter that the manifest describes."
            )


def _copy(model: nn.Module, params: Params, adapter_name: str | None) -> None:
    live = receivers(model, adapter_name)
    for name, tensor in params.items():
        copy_into(live[name], tensor)
