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

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtune.strategies.base import Method, Properties
from fedtune.strategies.server_step import Memory, server_step
from fedtune.strategies.settings import POSITIVE, SHARE, setting

__all__ = ["FedAdagrad", "FedAdam", "FedYogi"]


@dataclass(frozen=True)
class FedAdam(Method):
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

    properties = Properties(axis="server_optimizer")

    def step(self, old: Tensor, new: Tensor, state: Memory) -> tuple[Tensor, dict[str, Tensor]]:
        """Move by the first moment over the root of the second."""

        def second(v: Tensor, square: Tensor) -> Tensor:
            return self.beta2 * v + (1 - self.beta2) * square

        return _step(second, self, old, new, state)


@dataclass(frozen=True)
class FedYogi(Method):
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

    properties = Properties(axis="server_optimizer")

    def step(self, old: Tensor, new: Tensor, state: Memory) -> tuple[Tensor, dict[str, Tensor]]:
        """Move by the first moment over the root of the second."""

        def second(v: Tensor, square: Tensor) -> Tensor:
            return v - (1 - self.beta2) * square * torch.sign(v - square)

        return _step(second, self, old, new, state)


@dataclass(frozen=True)
class FedAdagrad(Method):
    """Second moment as a sum over all rounds.

    Attributes:
        lr: server learning rate.
        beta1: share of the last first moment that stays.
        tau: floor of the denominator; deltas below it are not scaled up.
    """

    lr: float = setting(0.01, POSITIVE)
    beta1: float = setting(0.0, SHARE)
    tau: float = setting(1e-3, POSITIVE)

    properties = Properties(axis="server_optimizer")

    def step(self, old: Tensor, new: Tensor, state: Memory) -> tuple[Tensor, dict[str, Tensor]]:
        """Move by the first moment over the root of the second."""
        return _step(torch.add, self, old, new, state)


def _step(
    second: Callable[[Tensor, Tensor], Tensor],
    method: FedAdam | FedYogi | FedAdagrad,
    old: Tensor,
    new: Tensor,
    state: Memory,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`second(v, delta^2)` is the next second moment."""

    def move(delta: Tensor, memory: Memory) -> tuple[Tensor, dict[str, Tensor]]:
        m = memory.get("m", torch.zeros_like(delta))
        v = memory.get("v", torch.full_like(delta, method.tau**2))
        m = method.beta1 * m + (1 - method.beta1) * delta
        v = second(v, delta.square())
        return method.lr * m / (v.sqrt() + method.tau), {"m": m, "v": v}

    return server_step(move, old, new, state)
