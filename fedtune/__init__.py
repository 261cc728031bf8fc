"""Federated fine-tuning of language models with the HuggingFace Trainer, PEFT and Flower."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedtune.client.api import GlobalUpdate, init, is_running, receive, send
    from fedtune.client.callback import FedTuneCallback
    from fedtune.client.patch import patch, unpatch
    from fedtune.run.launch import launch
    from fedtune.strategies.aggregate import Aggregate, aggregate

__all__ = [
    "Aggregate",
    "FedTuneCallback",
    "GlobalUpdate",
    "__version__",
    "aggregate",
    "init",
    "is_running",
    "launch",
    "patch",
    "receive",
    "send",
    "unpatch",
]

__version__ = version("fedtune")

# `import fedtune` and `fedtune --help` stay quick: names are loaded when they are used.
_HOMES = {
    "Aggregate": "fedtune.strategies.aggregate",
    "FedTuneCallback": "fedtune.client.callback",
    "GlobalUpdate": "fedtune.client.api",
    "aggregate": "fedtune.strategies.aggregate",
    "init": "fedtune.client.api",
    "is_running": "fedtune.client.api",
    "launch": "fedtune.run.launch",
    "patch": "fedtune.client.patch",
    "receive": "fedtune.client.api",
    "send": "fedtune.client.api",
    "unpatch": "fedtune.client.patch",
}


def __dir__() -> list[str]:
    return sorted({*__all__, "errors", "transport"})


def __getattr__(name: str) -> Any:
    if name in ("errors", "transport"):
        return import_module(f"fedtune.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fedtune' has no attribute {name!r}")
