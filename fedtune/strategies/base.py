"""What a federated method is: declared properties, and a few pure functions on tensors.

The shell (`shell.py`) calls them in this order each round; a method overrides what its paper
changes and inherits the rest, which together is FedAvg:

    correction()           -> what clients add to their gradients; None for nothing
    weigh(stats)           -> weight of one client's update
    trains(name, round)    -> whether clients train a tensor in this round
    travels(name)          -> whether it is sent, or stays with its client
    fold(now)              -> add(params, weight) per reply, result() once
    server_rate(stats)     -> how far the server goes from the old parameters to that result
    step(old, new, state)  -> the new global value of one tensor, and the server's state for it

Methods know tensors and numbers, neither Flower nor PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from torch import Tensor

from fedtune.strategies.mean import RunningMean

if TYPE_CHECKING:  # the rules in there are methods themselves
    from fedtune.strategies.lora.cumulative import Cumulative
    from fedtune.strategies.lora.factors import Factors

__all__ = [
    "ANY_ROUND",
    "Axis",
    "ClientStats",
    "Correction",
    "Exactness",
    "Fold",
    "Method",
    "Properties",
    "Round",
]

Axis = Literal["correction", "rule", "server_optimizer"]
Exactness = Literal["exact", "to rank", "approximate"]


@dataclass(frozen=True)
class Properties:
    """What `checks/`, the docs and the contract test need to know of a method.

    Attributes:
        axis: the one axis it occupies when methods are joined by `+`; None combines with nothing.
        sum_suffices: the weighted sum of updates is all it needs (secure aggregation, eager fold).
        client_state: clients keep state of the method between rounds.
        changes_base: it adds to the frozen base model.
        refactors: the new factors are in other coordinates: Adam's moments, server optimizers and
            control variates do not fit them.
        robust: it withstands some arbitrary clients.
        products: whether the merged update is sum p_k s_k B_k A_k: exactly, to the chosen rank, or
            up to the covariance of the factors.
        mixed_ranks: clients may have different LoRA ranks.
        qlora_safe: a quantized base serves as it is. Otherwise what the method adds to the base is
            kept beside it (`lora/cumulative.py`).
        variants: kinds of tensors it is right for (`lora/names.py`); None for all.
    """

    axis: Axis | None = None
    sum_suffices: bool = True
    client_state: bool = False
    changes_base: bool = False
    refactors: bool = False
    robust: bool = False
    products: Exactness = "approximate"
    mixed_ranks: bool = False
    qlora_safe: bool = True
    variants: frozenset[str] | None = None


@dataclass(frozen=True)
class Round:
    """What a fold may need to know besides the updates.

    Attributes:
        number: the round, from 1.
        reference: the global parameters that the clients started from; empty if unknown.
        scaling: module -> factor of B @ A, the same for all clients.
        rank: module -> rank of the global adapter; empty: the largest among the updates.
    """

    number: int = 1
    reference: Mapping[str, Tensor] = field(default_factory=dict)
    scaling: Mapping[str, float] = field(default_factory=dict)
    rank: Mapping[str, int] = field(default_factory=dict)


ANY_ROUND = Round()


@dataclass(frozen=True)
class ClientStats:
    """What one client did in one round.

    Attributes:
        most_weight: that it may have, whatever it did (`weights.py`).
    """

    num_examples: int
    num_tokens: int
    num_steps: int
    most_weight: float = math.inf


@dataclass(frozen=True)
class Correction:
    """What clients add to their gradients (`client/corrections.py`).

    Attributes:
        name: of the correction.
        settings: its numbers.
        control: whether a control variate travels beside the parameters, both ways.
    """

    name: str
    settings: Mapping[str, float] = field(default_factory=dict)
    control: bool = False


Params = Mapping[str, Tensor]


class Fold(Protocol):
    """Consumes replies one at a time; only robust rules keep them (`kept.py`)."""

    def add(self, params: Mapping[str, Tensor], weight: float) -> None:
        """Fold one client's parameters in."""

    def result(self) -> dict[str, Tensor]:
        """The aggregate, in the dtypes of the inputs; half precision may come unrounded."""


@dataclass(frozen=True)
class Method:
    """Base of all methods; with nothing overridden it is FedAvg (McMahan 2017, Alg. 1)."""

    weight_by: Literal["tokens", "examples", "uniform"] = "tokens"

    properties: ClassVar[Properties] = Properties()

    def correction(self) -> Correction | None:
        """What clients add to their gradients."""
        return None

    @property
    def has_control(self) -> bool:
        """Whether a control variate travels beside the parameters."""
        correction = self.correction()
        return correction is not None and correction.control

    def share(self, stats: ClientStats) -> float:
        """Weight of one client's rows in the objective, by `weight_by`, before normalisation."""
        if self.weight_by == "uniform":
            return 1.0
        count = stats.num_tokens if self.weight_by == "tokens" else stats.num_examples
        return min(float(count), stats.most_weight)

    @property
    def weighs(self) -> bool:
        """Whether it makes a difference how much a client trained on."""
        return self.weight_by != "uniform" and not self.properties.robust

    def weigh(self, stats: ClientStats) -> float:
        """Weight p_k of one update, before normalisation."""
        return self.share(stats)

    def least_updates(self) -> int:
        """Updates that a round needs for the result to be defined."""
        return 1

    def trains(self, name: str, server_round: int) -> bool:
        """Whether clients train this tensor in this round; a frozen one need not travel."""
        return True

    def travels(self, name: str) -> bool:
        """Whether this tensor is sent; otherwise each client keeps its own."""
        return True

    def fold(self, now: Round = ANY_ROUND) -> Fold:
        """A fresh fold for one round."""
        return RunningMean()

    def buffer(self, clients: int) -> int:
        """Updates that end a round while others are under way; 0: the round waits for all."""
        return 0

    def rebase(self, new: Params, start: Params, now: Params, age: int) -> Mapping[str, Tensor]:
        """A late update as if its client had started from the present global parameters.

        Args:
            new: what came back.
            start: what the client had started from.
            now: the present global parameters.
            age: rounds that have ended since.
        """
        return new

    def server_rate(self, stats: Sequence[ClientStats]) -> float:
        """Factor on (fold's result - old parameters), from the stats of all folded updates."""
        return 1.0

    def cumulate(self, total: Cumulative, terms: Mapping[str, Factors]) -> Cumulative:
        """What has been added to the base so far, with the terms of a round."""
        return total

    def step(
        self, old: Tensor, new: Tensor, state: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Server update of one tensor, in the dtype of `old`.

        Args:
            old: the global value.
            new: the round's aggregate; of half precision it is not rounded yet.
            state: what the previous round's step returned.
        """
        return new.to(old.dtype), {}
