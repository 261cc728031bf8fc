"""A fold for rules that need all updates at once: it keeps them, then reduces them.

Server memory: clients x parameters. No secure aggregation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fedtune.strategies.mean import unrounded

__all__ = ["Keep", "by_coordinate"]

Params = Mapping[str, Tensor]

# Coordinates at a time: the fp64 temporaries stay at clients x 0.5 MB.
BLOCK = 1 << 16


class Keep:
    """Collects updates; `reduce` makes one of them."""

    def __init__(self, reduce: Callable[[Sequence[Params]], dict[str, Tensor]]) -> None:
        self._reduce = reduce
        self._updates: list[Params] = []

    def add(self, params: Params, weight: float) -> None:
        """Keep one client's parameters; the weight has no effect."""
        self._updates.append(params)

    def result(self) -> dict[str, Tensor]:
        """What `reduce` makes of them; raises ValueError when nothing was added."""
        if not self._updates:
            raise ValueError("no update was folded")
        return self._reduce(self._updates)


def by_coordinate(
    updates: Sequence[Params], reduce: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Reduce the K values of every coordinate: (K, n), fp64, sorted along K -> (n,)."""
    result = {}
    for name, first in updates[0].items():
        flat = [update[name].reshape(-1) for update in updates]
        parts = [
            reduce(
                torch.stack([one[start : start + BLOCK].double() for one in flat]).sort(0).values
            )
            for start in range(0, first.numel(), BLOCK)
        ]
        whole = torch.cat(parts) if parts else flat[0]
        result[name] = whole.to(unrounded(first.dtype)).reshape(first.shape)
    return result
