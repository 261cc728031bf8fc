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

from fedtune.strategies.base import Method, Properties
from fedtune.strategies.server_step import Memory, server_step
from fedtune.strategies.settings import POSITIVE, SHARE, setting

__all__ = ["DiLoCo"]


@dataclass(frozen=True)
class DiLoCo(Method):
    """Nesterov outer step.

    Attributes:
        lr: outer learning rate.
        momentum: share of the last momentum that stays.
    """

    lr: float = setting(0.7, POSITIVE)
    momentum: float = setting(0.9, SHARE)

    properties = Properties(axis="server_optimizer")

    def step(self, old: Tensor, new: Tensor, state: Memory) -> tuple[Tensor, dict[str, Tensor]]:
        """Move by the delta and by the momentum it has just joined."""
        return server_step(self._move, old, new, state)

    def _move(self, delta: Tensor, memory: Memory) -> tuple[Tensor, dict[str, Tensor]]:
        momentum = self.momentum * memory.get("momentum", torch.zeros_like(delta)) + delta
        return self.lr * (delta + self.momentum * momentum), {"momentum": momentum}
