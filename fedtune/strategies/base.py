"""What the parts of a federated method are: rules, corrections; a few pure functions on tensors.

The server (`aggregator.py`) calls a rule in this order each round; a rule overrides what its paper
changes and inherits the rest, which is FedAvg:

    trains(name, round)    -> whether clients train a tensor in this round
    travels(name)          -> whether it is sent, or stays with its client
    weigh(stats)           -> weight of one client's update
    fold(now)              -> add(params, weight) per update, result() once
    server_rate(stats)     -> how far the server goes from the old parameters to that result
    cumulate(total, terms) -> what has been added to the base so far

Rules know tensors and numbers, neither Flower nor PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor

from fedtune.strategies.mean import RunningMean

if TYPE_CHECKING:  # what is in there imports this
    from fedtune.strategies.lora.cumulative import Cumulative
    from fedtune.strategies.lora.factors import Factors

__all__ = [
    "ANY_ROUND",
    "Axis",
    "ClientStats",
    "Correction",
    "Exactness",
    "Fold",
    "Properties",
    "Round",
    "Rule",
    "Seen",
]

Axis = Literal["correction", "rule", "server_optimizer"]
Exactness = Literal["exact", "to rank", "approximate"]


@dataclass(frozen=True)
class Properties:
    """What `checks/`, the docs, the server and the contract test need to know of a rule.

    Attributes:
        combines: whether it may be joined with methods of other axes by `+`.
        sum_suffices: the weighted sum of updates is all it needs (secure aggregation, eager fold).
        personal: some of the trained tensors stay with each client, which keeps them.
        buffered: a round ends while clients are under way; their updates count later.
        needs_steps: how far the server goes depends on the clients' numbers of steps.
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

    combines: bool = True
    sum_suffices: bool = True
    personal: bool = False
    buffered: bool = False
    needs_steps: bool = False
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


Params = Mapping[str, Tensor]


class Seen(NamedTuple):
    """Numbers of clients.

    Attributes:
        before: clients that the server's extras are a mean over.
        ever: clients that have ever taken part, or do now.
        now: clients whose updates the round has taken.
    """

    before: int
    ever: int
    now: int


@dataclass(frozen=True)
class Correction:
    """What clients add to their gradients (`client/corrections.py`).

    Attributes:
        name: by which clients know it.
        extras: what travels beside the parameters, both ways, and is kept at the client between
            its rounds, one tensor a parameter: the name of its record, and what it is called.
    """

    axis: ClassVar[Axis] = "correction"
    name: ClassVar[str]
    extras: ClassVar[Mapping[str, str]] = {}

    @property
    def settings(self) -> dict[str, float]:
        """Numbers that clients need."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def advance(
        self, extras: Mapping[str, Params], changes: Mapping[str, Params], seen: Seen
    ) -> dict[str, dict[str, Tensor]]:
        """The server's extras after a round; a tensor that is missing is zero.

        Args:
            extras: name -> the server's tensors before.
            changes: name -> the mean of what the round's clients have sent of it.
            seen: how many clients there are.
        """
        return {}


class Fold(Protocol):
    """Consumes replies one at a time; only robust rules keep them (`keep_all.py`)."""

    def add(self, params: Mapping[str, Tensor], weight: float) -> None:
        """Fold one client's parameters in."""

    def result(self) -> dict[str, Tensor]:
        """The aggregate, in the dtypes of the inputs; half precision may come unrounded."""


@dataclass(frozen=True)
class Rule:
    """How updates become one; with nothing overridden it is FedAvg (McMahan 2017, Alg. 1)."""

    weight_by: Literal["tokens", "examples", "uniform"] = "tokens"

    axis: ClassVar[Axis] = "rule"
    properties: ClassVar[Properties] = Properties()

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
