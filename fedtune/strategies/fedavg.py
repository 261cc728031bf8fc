"""FedAvg: the weighted mean of the clients' parameters (McMahan et al. 2017, arXiv 1602.05629).

    x <- sum_k p_k y_k,   p_k = w_k / sum_j w_j

Server memory: one running sum. The mean is rounded to the parameters' dtype once; nothing of it is
kept, so that K equal updates return that update. On LoRA it averages A and B apart, which is FedIT
(arXiv 2305.05644): the mean of the factors differs from that of the products by their covariance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedtune.strategies.base import ANY_ROUND, Method, Properties, Round
from fedtune.strategies.lora.padding import widen
from fedtune.strategies.mean import RunningMean

__all__ = ["FedAvg", "FixedGlobal"]


@dataclass(frozen=True)
class FedAvg(Method):
    """The mean replaces the global parameters."""


@dataclass(frozen=True)
class FixedGlobal(Method):
    """Control of a comparison: clients train, and every round restarts from the same global."""

    properties: ClassVar[Properties] = Properties(mixed_ranks=True)

    def fold(self, now: Round = ANY_ROUND) -> _PaddedMean:
        """The mean, of which only the drift is used."""
        return _PaddedMean(now)

    def step(
        self, old: Tensor, new: Tensor, state: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Keep the old value."""
        return old, {}


class _PaddedMean(RunningMean):
    """Lower LoRA ranks count as padded with zeros."""

    def __init__(self, now: Round) -> None:
        super().__init__()
        self._wide = {name: tuple(tensor.shape) for name, tensor in now.reference.items()}

    def add(self, params: Mapping[str, Tensor], weight: float) -> None:
        """Fold one client's parameters in."""
        super().add(widen(params, self._wide) if self._wide else params, weight)
