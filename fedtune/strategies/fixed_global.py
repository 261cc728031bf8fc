"""The control of a comparison: clients train, and every round restarts from the same global."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedtune.strategies.base import ANY_ROUND, Properties, Round, Rule
from fedtune.strategies.lora.padding import widen
from fedtune.strategies.mean import RunningMean
from fedtune.strategies.method import Method
from fedtune.strategies.server_step import Memory, Moved, ServerOptimizer

__all__ = ["fixed_global"]


def fixed_global() -> Method:
    """The method whose server stays where it is."""
    return Method(PaddedMean(), optimizer=StandStill())


@dataclass(frozen=True)
class PaddedMean(Rule):
    """The mean, of which only the drift is used; lower LoRA ranks count as padded with zeros."""

    properties: ClassVar[Properties] = Properties(combines=False, mixed_ranks=True)

    def fold(self, now: Round = ANY_ROUND) -> _PaddedMean:
        """A running mean at the ranks of the global parameters."""
        return _PaddedMean(now)


@dataclass(frozen=True)
class StandStill(ServerOptimizer):
    """No step."""

    def move(self, delta: Tensor, memory: Memory) -> Moved:
        """Nowhere."""
        return delta * 0, {}

    def step(self, old: Tensor, new: Tensor, state: Memory) -> tuple[Tensor, dict[str, Tensor]]:
        """Keep the old value."""
        return old, {}


class _PaddedMean(RunningMean):
    def __init__(self, now: Round) -> None:
        super().__init__()
        self._wide = {name: tuple(tensor.shape) for name, tensor in now.reference.items()}

    def add(self, params: Mapping[str, Tensor], weight: float) -> None:
        """Fold one client's parameters in."""
        super().add(widen(params, self._wide) if self._wide else params, weight)
