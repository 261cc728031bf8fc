"""DiLoCo: Nesterov momentum at the server (Douillard et al. 2023, arXiv 2311.08105).

    m <- momentum m + g,   x <- x - lr (g + momentum m),   g = x - sum_k p_k y_k

The outer step is that of `torch.optim.SGD(nesterov=True)`. The paper's clients run 500 AdamW steps
a round and keep their optimizer state (`--client_state carry`). Server memory: one tensor per
parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedtune.strategies.server_step import Memory, Moved, ServerOptimizer
from fedtune.strategies.settings import POSITIVE, SHARE, setting

__all__ = ["DiLoCo"]


@dataclass(frozen=True)
class DiLoCo(ServerOptimizer):
    """Nesterov outer step.

    Attributes:
        lr: outer learning rate.
        momentum: share of the last momentum that stays.
    """

    lr: float = setting(0.7, POSITIVE)
    momentum: float = setting(0.9, SHARE)

    def move(self, delta: Tensor, memory: Memory) -> Moved:
        """The delta and the momentum it has just joined."""
        momentum = self.momentum * memory.get("momentum", torch.zeros_like(delta)) + delta
        return self.lr * (delta + self.momentum * momentum), {"momentum": momentum}
