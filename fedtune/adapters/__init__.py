"""Adapters: what is trained, what travels, and how it becomes an ordinary checkpoint."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedtune.adapters.build import attach_adapter, build_peft_config, load_base
    from fedtune.adapters.export import (
        export_adapter,
        load_exported,
        load_init_adapter,
        params_from_peft_dir,
    )
    from fedtune.adapters.live import describe
    from fedtune.adapters.manifest import FULL, Entry, Manifest, Params, check
    from fedtune.adapters.merging import merge
    from fedtune.adapters.params import collect, collect_static, load, load_static
    from fedtune.adapters.precision import train_in_fp32, warn_of_half_precision
    from fedtune.adapters.quant import keep_trainable

__all__ = [
    "FULL",
    "Entry",
    "Manifest",
    "Params",
    "attach_adapter",
    "build_peft_config",
    "check",
    "collect",
    "collect_static",
    "describe",
    "export_adapter",
    "keep_trainable",
    "load",
    "load_base",
    "load_exported",
    "load_init_adapter",
    "load_static",
    "merge",
    "params_from_peft_dir",
    "train_in_fp32",
    "warn_of_half_precision",
]

# Names are loaded when they are used: the server needs `manifest` and `export`, and neither of them
# imports transformers or PEFT (200 MB).
_HOMES = {
    "build": ("attach_adapter", "build_peft_config", "load_base"),
    "export": ("export_adapter", "load_exported", "load_init_adapter", "params_from_peft_dir"),
    "live": ("describe",),
    "manifest": ("FULL", "Entry", "Manifest", "Params", "check"),
    "merging": ("merge",),
    "params": ("collect", "collect_static", "load", "load_static"),
    "precision": ("train_in_fp32", "warn_of_half_precision"),
    "quant": ("keep_trainable",),
}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"fedtune.adapters.{home}"), name)
    raise AttributeError(f"module 'fedtune.adapters' has no attribute {name!r}")
