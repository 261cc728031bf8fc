"""Where tensors lie: in memory, on disk, or elsewhere; read and written part by part.

    source.read(Part("w", 0, 4096)) -> the first 4,096 values of `w`, flattened

A source never changes once somebody has it. A sink takes every value of its entries once, in any
order, and becomes a source when it is closed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fedtune.adapters import Entry

__all__ = [
    "InMemory",
    "MemorySink",
    "Part",
    "TensorSink",
    "TensorSource",
    "parts_of",
    "read_whole",
]


class Part(NamedTuple):
    """A range of one tensor's flattened values."""

    name: str
    start: int
    stop: int


class TensorSource(Protocol):
    """Tensors that can be read.

    Attributes:
        entries: name -> shape and dtype of every tensor.
    """

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Shape and dtype of every tensor."""

    def read(self, part: Part) -> Tensor:
        """The values of a part, (stop - start,), in the dtype of its tensor."""


class TensorSink(Protocol):
    """Tensors that are being written."""

    def write(self, part: Part, values: Tensor) -> None:
        """Take the values of a part, (stop - start,)."""

    def close(self) -> TensorSource:
        """What was written; raises ValueError where values are missing."""

    def abort(self) -> None:
        """Leave nothing behind."""


@dataclass(frozen=True)
class InMemory:
    """Tensors of this process."""

    tensors: Mapping[str, Tensor]

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Shape and dtype of every tensor."""
        return {name: Entry.of(tensor) for name, tensor in self.tensors.items()}

    def read(self, part: Part) -> Tensor:
        """A view of the values."""
        return self.tensors[part.name].detach().reshape(-1)[part.start : part.stop]


class MemorySink:
    """Collects tensors in this process.

    Args:
        entries: name -> shape and dtype of what will be written.
    """

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._tensors = {
            name: torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
            for name, entry in entries.items()
        }
        self._missing = {name: tensor.numel() for name, tensor in self._tensors.items()}

    def write(self, part: Part, values: Tensor) -> None:
        """Copy the values of a part."""
        self._tensors[part.name].view(-1)[part.start : part.stop].copy_(values)
        self._missing[part.name] -= part.stop - part.start

    def close(self) -> InMemory:
        """The tensors; raises ValueError where values are missing."""
        for name, missing in self._missing.items():
            if missing:
                raise ValueError(f"`{name}`: {missing} values were not written")
        return InMemory(self._tensors)

    def abort(self) -> None:
        """Drop them."""
        self._tensors.clear()


def read_whole(source: TensorSource, names: Iterable[str]) -> dict[str, Tensor]:
    """Whole tensors, in their shapes; those that the source does not have are left out."""
    entries = source.entries
    return {
        name: source.read(Part(name, 0, math.prod(entries[name].shape))).reshape(
            entries[name].shape
        )
        for name in names
        if name in entries
    }


def parts_of(name: str, entry: Entry, values: int) -> Iterator[Part]:
    """Ranges of at most `values` values that make up a tensor; one for an empty tensor."""
    count = math.prod(entry.shape)
    for start in range(0, max(count, 1), values):
        yield Part(name, start, min(start + values, count))
