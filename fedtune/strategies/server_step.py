"""What all server optimizers share: from the aggregate to the next global value of one tensor.

    delta = new - old;   move, memory = optimizer(delta, memory);   x <- old + move

Arithmetic is fp64. Memory rests in fp32 (fp64 for fp64 parameters): a relative error of 6e-8 in a
round is far below the noise of a delta, and a full model's memory takes half the space. Parameters
in half precision keep beside it what rounding to their dtype lost, and `new` comes unrounded, so
that many small moves of many clients add up as they would in fp32. Integer and bool tensors take
the aggregate.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fedtune.strategies.base import Axis

__all__ = ["Memory", "Moved", "ServerOptimizer", "server_step"]

Memory = Mapping[str, Tensor]
Moved = tuple[Tensor, dict[str, Tensor]]  # the move, and the next memory

LOST = "lost"


class ServerOptimizer:
    """How the server goes from the old parameters towards the aggregate; the formula is `move`."""

    axis: ClassVar[Axis] = "server_optimizer"

    @abstractmethod
    def move(self, delta: Tensor, memory: Memory) -> Moved:
        """How far to go, and the next memory. All in fp64; `memory` is empty at first."""

    def step(self, old: Tensor, new: Tensor, state: Memory) -> tuple[Tensor, dict[str, Tensor]]:
        """Go there, see `server_step`."""
        return server_step(self.move, old, new, state)


def server_step(
    optimizer: Callable[[Tensor, Memory], Moved], old: Tensor, new: Tensor, state: Memory
) -> tuple[Tensor, dict[str, Tensor]]:
    """One step; `optimizer(delta, memory)` returns the move and the next memory, all in fp64."""
    if not old.is_floating_point():
        return new, {}
    memory = {key: tensor.double() for key, tensor in state.items()}
    lost = memory.pop(LOST, None)
    delta = new.double() - old.double()
    move, kept = optimizer(delta, memory)
    # Not old + move: a move that equals the delta has to end on the very bits of `new`.
    target = new.double() + (move - delta)
    if lost is not None:
        target += lost
    value = target.to(old.dtype)
    precision = torch.promote_types(old.dtype, torch.float32)
    if old.dtype != precision:
        kept = {**kept, LOST: target - value.double()}
    return value, {key: tensor.to(precision) for key, tensor in kept.items()}
