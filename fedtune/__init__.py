"""Federated fine-tuning of language models with the HuggingFace Trainer, PEFT and Flower."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedtune.launcher import launch

__all__ = ["__version__", "launch"]

__version__ = version("fedtune")

# `import fedtune` and `fedtune --help` stay quick: names are loaded when they are used.
_HOMES = {"launch": "fedtune.launcher"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fedtune' has no attribute {name!r}")
