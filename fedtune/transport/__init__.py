"""How parameters travel: records, decorators of Flower's grid, and codecs of single tensors."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedtune.transport.codecs import decode, encode
    from fedtune.transport.feedback import ErrorFeedback, feed_back

__all__ = ["ErrorFeedback", "decode", "encode", "feed_back"]

# The relay imports from this package and loads no torch: names are loaded when they are used.
_HOMES = {
    "ErrorFeedback": "fedtune.transport.feedback",
    "decode": "fedtune.transport.codecs",
    "encode": "fedtune.transport.codecs",
    "feed_back": "fedtune.transport.feedback",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fedtune.transport' has no attribute {name!r}")
