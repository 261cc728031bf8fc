"""What a federated method is: declared properties, and a few pure functions on tensors.

The shell (`shell.py`) calls them in this order each round; a method overrides what its paper
changes and inherits the rest, which together is FedAvg:

    weigh(stats)           -> weight of one client's update
    reduce                 -> a fold: add(params, weight) per reply, result() once
    step(old, new, state)  -> the new global value of one tensor, and the server's state for it

Methods know tensors and numbers, neither Flower nor PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from fedtune.strategies.mean import RunningMean

__all__ = ["Axis", "ClientStats", "Fold", "Method", "Properties"]

Axis = Literal["correction", "lora_rule", "server_optimizer"]


@dataclass(frozen=True)
class Properties:
    """What `checks.py`, the docs and the contract test need to know of a method.

    Attributes:
        axis: the one axis it occupies when methods are joined by `+`; None combines with nothing.
        sum_suffices: the weighted sum of updates is all it needs (secure aggregation, eager fold).
        client_state: clients keep state of the method between rounds.
        changes_base: it adds to the frozen base model.
    """

    axis: Axis | None = None
    sum_suffices: bool = True
    client_state: bool = False
    changes_base: bool = False


@dataclass(frozen=True)
class ClientStats:
    """What one client did in one round."""

    num_examples: int
    num_tokens: int
    num_steps: int


class Fold(Protocol):
    """Consumes replies one at a time and keeps none of them."""

    def add(self, params: Mapping[str, Tensor], weight: float) -> None:
        """Fold one client's parameters in."""

    def result(self) -> dict[str, Tensor]:
        """The aggregate, in the dtypes of the inputs."""


@dataclass(frozen=True)
class Method:
    """Base of all methods; with nothing overridden it is FedAvg (McMahan 2017, Alg. 1)."""

    weight_by: Literal["tokens", "examples", "uniform"] = "tokens"

    properties: ClassVar[Properties] = Properties()

    def weigh(self, stats: ClientStats) -> float:
        """Weight p_k of one update, before normalisation."""
        if self.weight_by == "uniform":
            return 1.0
        return float(stats.num_tokens if self.weight_by == "tokens" else stats.num_examples)

    def fold(self) -> Fold:
        """A fresh fold for one round."""
        return RunningMean()

    def step(
        self, old: Tensor, new: Tensor, state: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Server update of one tensor; `state` is what the previous round's step returned."""
        return new, {}
