"""What a receiver has of a sender's tensors, under a name that both sides compute."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fedtune.adapters import Entry

__all__ = ["Version", "fingerprint"]


@dataclass(frozen=True)
class Version:
    """Tensors by `record/name`.

    Attributes:
        name: fingerprint of `received`.
        received: what the receiver has.
        meant: what the sender wanted it to have.
    """

    name: str
    received: Mapping[str, Tensor]
    meant: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, received: Mapping[str, Tensor], meant: Mapping[str, Tensor]) -> Version:
        """Named by its content."""
        return cls(fingerprint(received), received, meant)

    @cached_property
    def nbytes(self) -> int:
        """Of both; what they share with other versions counts too."""
        return sum(t.nbytes for t in (*self.received.values(), *self.meant.values()))


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Half a sha256 of names, shapes, dtypes and bits, in hex."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(json.dumps([name, *Entry.of(tensor)]).encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
