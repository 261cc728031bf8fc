"""FedAdam, FedYogi, FedAdagrad: adaptive server optimizers (Reddi et al. 2021, arXiv 2003.00295).

    m <- beta1 m + (1 - beta1) delta
    v <- beta2 v + (1 - beta2) delta^2                       FedAdam
    v <- v - (1 - beta2) delta^2 sign(v - delta^2)           FedYogi
    v <- v + delta^2                                         FedAdagrad
    x <- x + lr m / (sqrt(v) + tau),   delta = sum_k p_k y_k - x

Algorithm 2 as printed: no bias correction, and v starts at tau^2, not at 0. A coordinate moves by
about lr a round once |delta| exceeds tau, so lr is the first setting to tune. Server memory: two
tensors per parameter.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtune.strategies.server_step import Memory, Moved, ServerOptimizer
from fedtune.strategies.settings import POSITIVE, SHARE, setting

__all__ = ["FedAdagrad", "FedAdam", "FedYogi"]


class _Adaptive(ServerOptimizer):
    """What the three share; they differ in `second`."""

    lr: float
    beta1: float
    tau: float

    @abstractmethod
    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """The next second moment; `square` is delta^2."""

    def move(self, delta: Tensor, memory: Memory) -> Moved:
        """The first moment over the root of the second."""
        m = memory.get("m", torch.zeros_like(delta))
        v = memory.get("v", torch.full_like(delta, self.tau**2))
        m = self.beta1 * m + (1 - self.beta1) * delta
        v = self.second(v, delta.square())
        return self.lr * m / (v.sqrt() + self.tau), {"m": m, "v": v}


@dataclass(frozen=True)
class FedAdam(_Adaptive):
    """Second moment as a running mean.

    Attributes:
        lr: server learning rate.
        beta1: share of the last first moment that stays.
        beta2: share of the last second moment that stays.
        tau: floor of the denominator; deltas below it are not scaled up.
    """

    lr: float = setting(0.01, POSITIVE)
    beta1: float = setting(0.9, SHARE)
    beta2: float = setting(0.99, SHARE)
    tau: float = setting(1e-3, POSITIVE)

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """A running mean."""
        return self.beta2 * v + (1 - self.beta2) * square


@dataclass(frozen=True)
class FedYogi(_Adaptive):
    """Second moment that moves by a fixed share of delta^2, up or down.

    Attributes:
        lr: server learning rate.
        beta1: share of the last first moment that stays.
        beta2: 1 - beta2 is the share of delta^2 by which the second moment moves.
        tau: floor of the denominator; deltas below it are not scaled up.
    """

    lr: float = setting(0.01, POSITIVE)
    beta1: float = setting(0.9, SHARE)
    beta2: float = setting(0.99, SHARE)
    tau: float = setting(1e-3, POSITIVE)

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """A step towards delta^2."""
        return v - (1 - self.beta2) * square * torch.sign(v - square)


@dataclass(frozen=True)
class FedAdagrad(_Adaptive):
    """Second moment as a sum over all rounds.

    Attributes:
        lr: server learning rate.
        beta1: share of the last first moment that stays.
        tau: floor of the denominator; deltas below it are not scaled up.
    """

    lr: float = setting(0.01, POSITIVE)
    beta1: float = setting(0.0, SHARE)
    tau: float = setting(1e-3, POSITIVE)

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """A sum."""
        return v + square
