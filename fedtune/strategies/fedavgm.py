"""FedAvgM: momentum at the server (Hsu et al. 2019, arXiv 1909.06335).

    m <- beta m + delta,   x <- x + lr m,   delta = sum_k p_k y_k - x

The new delta enters in full, not as (1 - beta) delta; with beta 0 and lr 1 it is FedAvg to the bit.
Server memory: one tensor per parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedtune.strategies.base import Method, Properties
from fedtune.strategies.server_step import Memory, server_step
from fedtune.strategies.settings import POSITIVE, SHARE, setting

__all__ = ["FedAvgM"]


@dataclass(frozen=True)
class FedAvgM(Method):
    """Heavy-ball momentum.

    Attributes:
        lr: server learning rate.
        beta: share of the last momentum that stays.
    """

    lr: float = setting(1.0, POSITIVE)
    beta: float = setting(0.9, SHARE)

    properties = Properties(axis="server_optimizer")

    def step(self, old: Tensor, new: Tensor, state: Memory) -> tuple[Tensor, dict[str, Tensor]]:
        """Move by the momentum."""
        return server_step(self._move, old, new, state)

    def _move(self, delta: Tensor, memory: Memory) -> tuple[Tensor, dict[str, Tensor]]:
        momentum = self.beta * memory.get("momentum", torch.zeros_like(delta)) + delta
        return self.lr * momentum, {"momentum": momentum}
