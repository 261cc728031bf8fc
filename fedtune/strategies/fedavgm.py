"""FedAvgM: momentum at the server (Hsu et al. 2019, arXiv 1909.06335).

    m <- beta m + delta,   x <- x + lr m,   delta = sum_k p_k y_k - x

The new delta enters in full, not as (1 - beta) delta; with beta 0 and lr 1 it is FedAvg to the bit
(in half precision it keeps what FedAvg's rounding loses in each round).
Server memory: one tensor per parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedtune.strategies.server_step import Memory, Moved, ServerOptimizer
from fedtune.strategies.settings import POSITIVE, SHARE, setting

__all__ = ["FedAvgM"]


@dataclass(frozen=True)
class FedAvgM(ServerOptimizer):
    """Heavy-ball momentum.

    Attributes:
        lr: server learning rate.
        beta: share of the last momentum that stays.
    """

    lr: float = setting(1.0, POSITIVE)
    beta: float = setting(0.9, SHARE)

    def move(self, delta: Tensor, memory: Memory) -> Moved:
        """The momentum."""
        momentum = self.beta * memory.get("momentum", torch.zeros_like(delta)) + delta
        return self.lr * momentum, {"momentum": momentum}
