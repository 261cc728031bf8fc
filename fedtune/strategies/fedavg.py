"""FedAvg: the weighted mean of the clients' parameters (McMahan et al. 2017, arXiv 1602.05629).

    x <- sum_k p_k y_k,   p_k = w_k / sum_j w_j

Server memory: one running sum. On LoRA it averages A and B apart, which is FedIT (arXiv
2305.05644): the mean of the factors differs from the mean of the products by their covariance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedtune.strategies.base import Method

__all__ = ["FedAvg", "FixedGlobal"]


@dataclass(frozen=True)
class FedAvg(Method):
    """The mean replaces the global parameters."""


@dataclass(frozen=True)
class FixedGlobal(Method):
    """Control of a comparison: clients train, and every round restarts from the same global."""

    def step(
        self, old: Tensor, new: Tensor, state: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Keep the old value."""
        return old, {}
